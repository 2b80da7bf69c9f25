"""Number and names of a student's classes, in the model and in what is saved of it, for every family."""

import json
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForImageClassification,
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
)

from hf_ihb.config.model import ModelArguments
from hf_ihb.errors import ModelLoadError
from hf_ihb.models.classes import check_classes, class_names
from hf_ihb.models.processing import student_processor
from hf_ihb.models.student import build_student
from tests.models.test_module import FAMILIES

MEAN, STD, SIZE = [0.5] * 3, [0.25] * 3, (16, 16)
NAMES = {3: ["ant", "bee", "cat"], 4: ["ant", "bee", "cat", "dog"], 6: list("abcdef")}
CNNS = {
    "resnet": lambda: ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=4)
    ),
    "convnextv2": lambda: ConvNextV2ForImageClassification(
        ConvNextV2Config(hidden_sizes=[8, 8], depths=[1, 1], num_stages=2, image_size=16, num_labels=4)
    ),
}


def assert_right(model, names, folder):
    model.save_pretrained(folder)
    for one in (model, AutoModelForImageClassification.from_pretrained(folder)):
        assert one.config.id2label == dict(enumerate(names))
        assert one.config.label2id == {name: i for i, name in enumerate(names)}
        assert one.config.num_labels == len(names)
        assert one.eval()(torch.zeros(1, 3, *SIZE)).logits.shape == (1, len(names))


@pytest.mark.parametrize("count", [3, 4, 6])
@pytest.mark.parametrize("family", [*FAMILIES, *CNNS])
def test_weights_of_transformers_are_given_the_data_sets_classes(family, count, tmp_path):
    source = CNNS[family]() if family in CNNS else FAMILIES[family][0]()
    source.save_pretrained(tmp_path / "source")
    student_processor(MEAN, STD, SIZE).save_pretrained(tmp_path / "source")
    args = ModelArguments(model_name_or_path=str(tmp_path / "source"))
    assert_right(build_student(args, NAMES[count], SIZE, MEAN, STD)[0], NAMES[count], tmp_path / "student")


@pytest.mark.parametrize("count", [3, 4, 6])
@pytest.mark.parametrize("said", ["by number", "by name", "twice"])
def test_weights_of_a_repo_of_timm_are_given_the_data_sets_classes(said, count, tmp_path):
    network = timm.create_model("resnet18_cifar_w16", num_classes=4)
    source = tmp_path / "source"
    source.mkdir()
    save_file(network.state_dict(), source / "model.safetensors")
    pixels = {"input_size": [3, *SIZE], "mean": MEAN, "std": STD, "interpolation": "bicubic", "crop_pct": 1.0}
    config = {"architecture": "resnet18_cifar_w16", "num_classes": 4, "pretrained_cfg": pixels}
    if said != "by number":
        config["label_names"] = ["old", "older", "oldest", "gone"]
    if said == "twice":
        config["pretrained_cfg"] = {**pixels, "num_classes": 4}
    (source / "config.json").write_text(json.dumps(config))
    student, _ = build_student(ModelArguments(model_name_or_path=str(source)), NAMES[count], SIZE, MEAN, STD)
    assert torch.equal(student.timm_model.conv1.weight, network.conv1.weight)
    assert_right(student, NAMES[count], tmp_path / "student")
    saved = json.loads((tmp_path / "student" / "config.json").read_text())
    assert (saved["num_classes"], saved["label_names"]) == (count, NAMES[count])


@pytest.mark.parametrize("architecture", ["deit", "deit_cls", "vit", "adaptive_cnn", "resnet18_cifar_w16"])
def test_a_model_from_scratch_has_the_data_sets_classes(architecture, tmp_path):
    assert_right(
        build_student(ModelArguments(architecture=architecture), NAMES[3], SIZE, MEAN, STD)[0], NAMES[3], tmp_path
    )


def test_a_model_that_answers_otherwise_is_refused_in_one_line():
    model = CNNS["resnet"]()
    with pytest.raises(ModelLoadError, match=r"^ResNetFor.*: expected the 4 classes ant, .* in its config"):
        check_classes(model, NAMES[4])
    model.config.id2label = dict(enumerate(NAMES[4]))
    model.classifier[1] = torch.nn.Linear(8, 9)
    with pytest.raises(ModelLoadError, match=r"expected logits of 4 classes, found 9$"):
        check_classes(model, NAMES[4])
    vit = FAMILIES["vit"][0]()
    vit.config.id2label, vit.config.image_size = dict(enumerate(NAMES[4])), 20
    with pytest.raises(ModelLoadError, match=r"expected it to take images of \(3, 20, 20\) .*: Input image"):
        check_classes(vit, NAMES[4])


def test_names_are_in_the_order_of_the_scores_whatever_the_order_of_id2label():
    assert class_names(ViTConfig(id2label={1: "dog", 2: "owl", 0: "cat"})) == ["cat", "dog", "owl"]
    with pytest.raises(ValueError, match=r"key 'id2label'.*numbered from 0 without a gap, found 0, 2$"):
        class_names(SimpleNamespace(id2label={0: "cat", 2: "dog"}))
