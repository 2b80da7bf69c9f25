import json
import math
import socket
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from torch import nn
from transformers import AutoImageProcessor, pipeline

from hf_ihb.config.data import DataArguments
from hf_ihb.config.model import ModelArguments
from hf_ihb.data import DIGITS, ImageSplit, load_image_split
from hf_ihb.errors import ModelLoadError, NumericsError, RecipeError, TeacherMismatchError
from hf_ihb.evaluation import evaluate_model, evaluator, metrics_table
from hf_ihb.metrics import (
    Accuracy,
    PrecisionRecallF1,
    TeacherFidelity,
    TopKAccuracy,
    TransferEfficiency,
    classification_metrics,
)
from hf_ihb.models.pretrained import load_pretrained
from hf_ihb.models.student import build_student
from hf_ihb.models.teacher import Teacher

SHAPE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4}
DATA = DataArguments(dataset_name=DIGITS, max_eval_samples=70)
NAMES = [str(digit) for digit in range(10)]


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def split():
    return load_image_split(DATA, "test")[0]


@pytest.fixture(scope="module")
def images(split):
    """The same images as a `datasets.Dataset` of PIL images."""
    features = Features({"img": Image(), "label": ClassLabel(names=NAMES)})
    pixels = [PILImage.fromarray(image.permute(1, 2, 0).numpy()) for image in split.images]
    labels = split.labels.tolist()
    return Dataset.from_dict({"img": pixels, "label": labels}, features=features)


@pytest.fixture(scope="module")
def student(split, tmp_path_factory):
    """Folder of a tiny student with random weights that spread its answers."""

    def save(architecture="deit", seed=0, names=NAMES, **options):
        folder = tmp_path_factory.mktemp(architecture)
        arguments = ModelArguments(architecture=architecture, **SHAPE, **options)
        model, processor = build_student(arguments, names, (8, 8), *split.statistics())
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, generator=generator)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        return str(folder)

    return save


@pytest.fixture(scope="module")
def two_headed(student):
    return student()


def ask(subject, images, metric=None, **options):
    result = evaluator(batch_size=16).compute(
        subject, images, metric=metric, input_column="img", label_mapping={n: i for i, n in enumerate(NAMES)}, **options
    )
    return {key: value for key, value in result.items() if not key.endswith(("_in_seconds", "_per_second"))}


def logits_of(folder, split, head="logits"):
    model, pixels, *_ = load_pretrained(folder)
    with torch.no_grad():
        return getattr(model(pixel_values=pixels.apply(split.images.float() / 255)), head)


# ---- The evaluator ----


@pytest.mark.parametrize("architecture", ["deit", "vit"])
def test_the_librarys_evaluator_and_one_pass_agree(architecture, student, images, split):
    folder = student(architecture)
    loaded = load_pretrained(folder)
    stock = evaluate.ImageClassificationEvaluator().compute(
        loaded.model,
        images,
        metric=Accuracy(),
        feature_extractor=AutoImageProcessor.from_pretrained(folder),
        input_column="img",
        label_mapping=loaded.model.config.label2id,
    )
    found = next(iter(evaluate_model(loaded, split, device="cpu")["heads"].values()))
    assert found["accuracy"] == stock["accuracy"]
    assert (np.sum(found["confusion_matrix"], axis=0) > 0).sum() > 3  # classes that are predicted at all
    ours = ask(folder, images, classification_metrics(10))
    assert ours.keys() == found.keys()
    for key in ("accuracy", "top_5_accuracy", "precision", "f1", "per_class", "confusion_matrix"):
        assert ours[key] == found[key]
    for key in ("auc", "nll", "ece"):
        assert ours[key] == pytest.approx(found[key], abs=1e-5)


def test_every_form_of_a_model_is_evaluated_alike(two_headed, images):
    model, processor = load_pretrained(two_headed).model, AutoImageProcessor.from_pretrained(two_headed)
    ready = pipeline("image-classification", model=model, image_processor=processor, device="cpu")
    expected = ask(two_headed, images)  # our accuracy where no metric is named
    assert expected.keys() == {"accuracy"}
    assert ask(ready, images) == expected
    assert ask(model, images, feature_extractor=processor) == expected
    assert ask(lambda pictures: ready(list(pictures)), images) == expected
    top_2 = ask(two_headed, images, TopKAccuracy(2))
    assert ask(ready, images, TopKAccuracy(2)) == top_2
    assert ask(lambda pictures, **kwargs: ready(list(pictures), **kwargs), images, TopKAccuracy(2)) == top_2


def test_logits_are_put_in_the_order_of_the_mapping(two_headed, images, split):
    class Seen(TopKAccuracy):
        def _measure(self, predictions, references):
            return {"logits": predictions}

    mapping = {name: (position + 3) % 10 for position, name in enumerate(NAMES)}
    result = evaluator().compute(two_headed, images, metric=Seen(), input_column="img", label_mapping=mapping)
    expected = logits_of(two_headed, split).roll(3, dims=1)
    torch.testing.assert_close(torch.tensor(result["logits"]).float(), expected, rtol=1e-4, atol=1e-4)


def test_a_bootstrap_interval_is_the_librarys(two_headed, images):
    images = images.select(range(40))
    ready = pipeline("image-classification", model=two_headed, device="cpu")
    options = {"strategy": "bootstrap", "n_resamples": 25, "random_state": 0}
    ours = ask(ready, images, PrecisionRecallF1(), **options)
    answers = evaluate.ImageClassificationEvaluator().predictions_processor(
        ready(list(images["img"])), ready.model.config.label2id
    )
    inputs = {"references": images["label"], **answers}
    stock = evaluate.Evaluator._compute_confidence_interval(PrecisionRecallF1(), inputs, ["f1"], 0.95, 25, 0)
    assert ours["f1"]["confidence_interval"] == pytest.approx(stock["f1"]["confidence_interval"])
    assert ours["f1"]["standard_error"] == pytest.approx(stock["f1"]["standard_error"])
    low, high = ours["f1"]["confidence_interval"]
    assert low < ours["f1"]["score"] < high
    assert ours["per_class"].keys() == {"score"}


def test_a_bootstrap_of_logits_draws_images(two_headed, images):
    images = images.select(range(40))
    options = {"strategy": "bootstrap", "n_resamples": 25, "random_state": 0}
    of_logits = ask(two_headed, images, evaluate.combine([Accuracy(), TopKAccuracy(2)]), **options)
    of_decisions = ask(two_headed, images, Accuracy(), **options)
    assert of_logits["accuracy"] == of_decisions["accuracy"]
    low, high = of_logits["top_2_accuracy"]["confidence_interval"]
    assert low < of_logits["top_2_accuracy"]["score"] < high


def test_what_the_evaluator_refuses(two_headed, images):
    with pytest.raises(KeyError, match="Unknown task text-classification"):
        evaluator("text-classification")
    with pytest.raises(ValueError, match="'function_to_apply' and 'top_k'"):
        ask(lambda pictures: [], images, TopKAccuracy(2))
    with pytest.raises(ValueError, match="expected a model, a pipeline or a callable, got None"):
        ask(None, images)
    with pytest.raises(ValueError, match=r"expected a score for each of the labels .'a'., got scores for .'0', '1'"):
        evaluator().compute(two_headed, images, metric=TopKAccuracy(2), input_column="img", label_mapping={"a": 0})
    with pytest.raises(ValueError, match="needs label_mapping"):
        evaluator().compute(two_headed, images, metric=TopKAccuracy(2), input_column="img")
    other = pipeline("image-feature-extraction", model=two_headed, device="cpu")
    with pytest.raises(ValueError, match="expected a pipeline for image-classification, got one for image-feature"):
        ask(other, images)


# ---- One pass over a split ----


def test_every_head_is_judged_by_its_own_logits(two_headed, split):
    results = evaluate_model(load_pretrained(two_headed), split, device="cpu")
    assert list(results["heads"]) == ["averaged", "cls", "distillation"]
    heads = {"averaged": "logits", "cls": "cls_logits", "distillation": "distillation_logits"}
    for head, name in heads.items():
        logits = logits_of(two_headed, split, name)
        expected = classification_metrics(10).compute(predictions=logits, references=split.labels)
        assert results["heads"][head]["nll"] == pytest.approx(expected["nll"], abs=1e-6)
        assert results["heads"][head]["confusion_matrix"] == expected["confusion_matrix"]
    assert len({results["heads"][head]["nll"] for head in heads}) == 3
    assert results["fidelity"] is results["transfer"] is results["teacher"] is results["baseline"] is None
    assert results["data"]["num_images"] == 70


@pytest.mark.parametrize(
    ("options", "heads"),
    [
        ({"architecture": "vit"}, ["logits"]),
        ({"architecture": "deit_cls"}, ["logits"]),
        ({"layer_scale_init": 0.1}, ["averaged", "cls", "distillation"]),
        ({"inference_head": "distillation"}, ["distillation", "cls"]),
    ],
)
def test_the_first_head_is_the_one_the_model_answers_with(options, heads, student, split):
    folder = student(**options)
    results = evaluate_model(load_pretrained(folder), split, device="cpu")
    assert list(results["heads"]) == heads
    logits = logits_of(folder, split)
    expected = torch.nn.functional.cross_entropy(logits.double(), split.labels).item()
    assert results["heads"][heads[0]]["nll"] == pytest.approx(expected, abs=1e-6)


def test_results_do_not_depend_on_the_batch_size(two_headed, student, split):
    models = {"teacher": student(seed=1), "baseline": student(seed=2)}
    found = []
    for batch_size in (1, 27, 256):
        teacher = load_pretrained(models["teacher"])
        results = evaluate_model(
            load_pretrained(two_headed),
            split,
            teacher=Teacher(teacher.model, teacher.pixels, NAMES),
            baseline=load_pretrained(models["baseline"]),
            batch_size=batch_size,
            device="cpu",
        )
        found.append(results)
    for other in found[1:]:
        assert other["transfer"] == found[0]["transfer"]
        assert other["fidelity"] == pytest.approx(found[0]["fidelity"], abs=1e-6)
        for head, values in other["heads"].items():
            assert values["confusion_matrix"] == found[0]["heads"][head]["confusion_matrix"]
            for key in ("nll", "ece", "auc", "f1"):
                assert values[key] == pytest.approx(found[0]["heads"][head][key], abs=1e-6)


def test_classes_in_another_order_are_brought_into_the_data_sets(two_headed, split):
    loaded = load_pretrained(two_headed)
    expected = evaluate_model(loaded, split, device="cpu")
    shuffled = torch.tensor([3, 1, 4, 0, 5, 9, 2, 6, 8, 7])
    loaded.model.config.id2label = {i: NAMES[old] for i, old in enumerate(shuffled.tolist())}
    for head in (loaded.model.cls_classifier, loaded.model.distillation_classifier):
        for parameter in head.parameters():
            parameter.data = parameter.data[shuffled]
    found = evaluate_model(loaded, split, device="cpu")
    assert found["heads"]["cls"]["confusion_matrix"] == expected["heads"]["cls"]["confusion_matrix"]
    assert found["heads"]["averaged"]["nll"] == pytest.approx(expected["heads"]["averaged"]["nll"], abs=1e-6)


def test_other_classes_are_refused(student, two_headed, split):
    foreign = load_pretrained(student(names=[f"letter {name}" for name in "abcdefghij"]))
    with pytest.raises(TeacherMismatchError, match=r"model '.*': expected the classes 0, 1, .* found letter a"):
        evaluate_model(foreign, split, device="cpu")
    fewer = load_pretrained(student(names=NAMES[:4]))
    with pytest.raises(TeacherMismatchError, match=r"baseline '.*': expected 10 classes"):
        evaluate_model(load_pretrained(two_headed), split, baseline=fewer, device="cpu")
    with pytest.raises(TeacherMismatchError, match=r"teacher '.*': expected 10 classes, found 4"):
        evaluate_model(load_pretrained(two_headed), split, teacher=Teacher(fewer.model, fewer.pixels), device="cpu")


def test_a_model_is_its_own_teacher_and_baseline(two_headed, split):
    loaded, again = load_pretrained(two_headed), load_pretrained(two_headed)
    results = evaluate_model(
        loaded, split, teacher=Teacher(again.model, again.pixels, NAMES), baseline=again, device="cpu"
    )
    assert results["fidelity"] == {"agreement": 1.0, "kl_divergence": pytest.approx(0, abs=1e-9)}
    transfer = results["transfer"]
    assert (transfer["gain"], transfer["gain_ci_low"], transfer["transfer_efficiency"]) == (0, 0, 1)
    assert math.isnan(transfer["gap_closed"])
    assert results["model"] == results["baseline"]


def test_fidelity_and_transfer_are_those_of_the_metrics_and_gain_needs_no_teacher(two_headed, student, split):
    folders = [two_headed, student("vit", seed=1), student(seed=2)]
    scores = [logits_of(folder, split) for folder in folders]
    # labels that student and teacher know in part, and the baseline by chance
    taught = torch.arange(len(split)) % 3 > 0
    labels = torch.where(taught, scores[1].argmax(1), scores[0].argmax(1))
    known = ImageSplit(split.images, labels, NAMES)
    inputs = dict(zip(("predictions", "teacher_predictions", "baseline_predictions"), scores, strict=True))
    expected = TransferEfficiency().compute(**inputs, references=labels)
    assert expected["student_accuracy"] > expected["baseline_accuracy"] != expected["teacher_accuracy"]
    loaded, teacher, baseline = map(load_pretrained, folders)
    teacher = Teacher(teacher.model, teacher.pixels, NAMES)
    results = evaluate_model(loaded, known, teacher=teacher, baseline=baseline, device="cpu")
    assert results["transfer"] == expected
    inputs.pop("baseline_predictions")
    assert results["fidelity"] == pytest.approx(TeacherFidelity().compute(**inputs), abs=1e-6)
    assert results["fidelity"]["kl_divergence"] > 0.1
    alone = evaluate_model(loaded, known, baseline=baseline, device="cpu")["transfer"]
    assert (alone["gain"], alone["gain_ci_low"]) == (expected["gain"], expected["gain_ci_low"])
    assert math.isnan(alone["transfer_efficiency"])


def test_a_model_that_gives_no_number_is_an_error(two_headed, split):
    loaded = load_pretrained(two_headed)
    broken = ImageSplit(split.images, split.labels, split.label_names)
    with torch.no_grad():
        loaded.model.cls_classifier.bias[4] = math.nan
    with pytest.raises(NumericsError, match="model, head 'averaged', image 0: expected finite logits"):
        evaluate_model(loaded, broken, device="cpu")


def test_dropout_of_a_model_in_training_mode_is_off(two_headed, split):
    loaded = load_pretrained(two_headed)
    expected = evaluate_model(loaded, split, device="cpu")["heads"]
    for module in loaded.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    loaded.model.train()
    assert evaluate_model(loaded, split, device="cpu")["heads"] == expected


def test_a_grey_set_and_a_set_of_five_classes(student, split):
    rows = split.labels < 5
    few = ImageSplit(split.images[rows, :1], split.labels[rows], NAMES[:5])
    results = evaluate_model(load_pretrained(student(names=NAMES[:5])), few, device="cpu")
    assert "top_5_accuracy" not in results["heads"]["averaged"]
    assert "top-5" not in metrics_table(results)
    absent = ImageSplit(few.images[few.labels > 0], few.labels[few.labels > 0], NAMES[:5])
    results = evaluate_model(load_pretrained(student(names=NAMES[:5])), absent, device="cpu")
    assert math.isnan(results["heads"]["cls"]["auc"])
    assert "n/a" in metrics_table(results)


def test_the_table_has_a_row_for_each_head_and_names_what_intervals_cover():
    head = {"accuracy": 0.9005, "precision": 0.5, "recall": 0.25, "f1": 1 / 3, "auc": None, "nll": 0.4, "ece": 0.0123}
    transfer = {
        "student_accuracy": 0.9005, "teacher_accuracy": 0.951, "baseline_accuracy": 0.8602, "gain": 0.0403,
        "transfer_efficiency": 0.9469, "gap_closed": None, "gain_ci_low": 0.03, "gain_ci_high": 0.05,
        "confidence_level": 0.95,
    }  # fmt: skip
    fidelity = {"agreement": 0.92, "kl_divergence": 0.345}
    lines = metrics_table({"heads": {"cls": head}, "fidelity": fidelity, "transfer": transfer}).splitlines()
    assert lines[0].split("|")[1:4] == [" head ", " accuracy % ", " precision % "]
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == [
        "cls", "90.05", "50.00", "25.00", "33.33", "n/a", "0.4000", "1.23",
    ]  # fmt: skip
    text = "\n".join(lines[3:])
    for part in (
        "92.00 % of the",
        "0.3450 nats",
        "teacher 95.10 %",
        "gap closed n/a",
        "4.03 points, 95% interval [3.00, 5.00]",
    ):
        assert part in text


# ---- The script ----


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))
    import evaluate_model as module

    yield module.main
    del sys.modules["evaluate_model"]


def test_the_script_writes_what_it_prints(script, two_headed, student, split, tmp_path, capsys):
    teacher, baseline = student("vit", seed=1), student(seed=2)
    recipe = {"keys": {"dataset_name": DIGITS, "max_eval_samples": 70, "learning_rate": 1.0}}
    Path(two_headed, "recipe.json").write_text(json.dumps(recipe))
    options = ["--teacher_model", teacher, "--baseline_model", baseline, "--output_dir", str(tmp_path / "out")]
    script([two_headed, *options, "--device", "cpu", "--batch_size", "33"])
    results = json.loads((tmp_path / "out" / "metrics.json").read_text())
    expected = evaluate_model(load_pretrained(two_headed), split, device="cpu")
    assert results["heads"]["cls"]["confusion_matrix"] == expected["heads"]["cls"]["confusion_matrix"]
    assert results["data"] == {
        "name": DIGITS, "revision": None, "split": "test", "num_images": 70, "label_names": NAMES,
    }  # fmt: skip
    assert results["model"]["weights_sha256"] == expected["model"]["weights_sha256"]
    assert results["transfer"]["student_accuracy"] == expected["heads"]["averaged"]["accuracy"]
    assert results["teacher"]["class"] == "ViTForImageClassification"
    assert metrics_table(results) in capsys.readouterr().out
    with PILImage.open(tmp_path / "out" / "plots" / "confusion_matrix.png") as plot:
        assert min(plot.size) > 100


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        (["no/such-model"], ModelLoadError, "'no/such-model': not in the cache"),
        (["{empty}"], ModelLoadError, "expected config.json in the folder, found none"),
        (["{folder}", "--split", "tests"], RecipeError, "split"),
        (
            ["{folder}", "--baseline_model", "no/such-model"],
            ModelLoadError,
            "baseline 'no/such-model': not in the cache",
        ),
        (["{letters}"], TeacherMismatchError, "expected the classes 0, 1, .*, found letter a"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(options, error, says, script, student, two_headed, tmp_path):
    letters = student(names=[f"letter {name}" for name in "abcdefghij"])
    (tmp_path / "empty").mkdir()
    folders = {"folder": two_headed, "letters": letters, "empty": tmp_path / "empty"}
    filled = [option.format(**folders) for option in options]
    with pytest.raises(error, match=says) as caught:
        script([*filled, "--dataset_name", DIGITS, "--device", "cpu", "--output_dir", str(tmp_path / "out")])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
