"""The number on the card is what `pipeline` gives: three decisions for each image, of students of several kinds."""

import importlib.util

import pytest
import torch

from tests.conftest import ROOT

SPEC = importlib.util.spec_from_file_location("card_is_pipeline", ROOT / "benchmarks" / "card_is_pipeline.py")
card_is_pipeline = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(card_is_pipeline)
STEPS = {
    "image_size": 32,
    "validation_fraction": 0.25,
    "max_steps": 12,
    "per_device_train_batch_size": 16,
    "learning_rate": 3e-3,
    "report_to": "none",
    "save_strategy": "no",
    "eval_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs") / "set"
    return folder, card_is_pipeline.make_images(folder, train=48, test=24)


def compared(dataset, folder, keys, weights=None):
    path, files = dataset
    trainer, data = card_is_pipeline.train(folder, STEPS | {"dataset_name": str(path)} | keys, weights)
    found = card_is_pipeline.compare(trainer, data, path, files)
    assert (found["card_differs"], found["evaluate_model_differs"]) == (0, 0)
    assert found["logit_distance"] < 1e-3
    return found


@pytest.mark.parametrize("family", ["vit", "resnet18_cifar_w16 (timm)"])
def test_a_student_from_scratch(family, dataset, tmp_path):
    compared(dataset, tmp_path / "run", card_is_pipeline.SCRATCH[family])


@pytest.mark.parametrize(("family", "chosen"), [("MobileNetV2", "by a recipe"), ("ConvNeXt", "by the user")])
def test_a_student_of_weights_whose_processor_crops(family, chosen, dataset, tmp_path):
    torch.manual_seed(0)
    model, own = card_is_pipeline.WEIGHTS[family][1]()
    if chosen == "by the user":
        assert compared(dataset, tmp_path / "run", {}, (model, own))["misread_differs"] > 0
        return
    for part in (model, own):
        part.save_pretrained(tmp_path / "weights")
    compared(dataset, tmp_path / "run", {"model_name_or_path": str(tmp_path / "weights")})
