import ast
import dataclasses
import json
import random
import re
import string

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from hf_ihb.analysis import AnalysisArguments, analyze
from hf_ihb.config.data import DataArguments
from hf_ihb.config.fields import published_flaws
from hf_ihb.config.model import ModelArguments, TeacherArguments
from hf_ihb.data import load_image_split
from hf_ihb.errors import DataError
from hf_ihb.evaluation import evaluate_model, metrics_table
from hf_ihb.hub import card_files, run_card
from hf_ihb.markdown import Markdown, code, table, to_markdown, visible
from hf_ihb.model_card import card_data
from hf_ihb.models.pretrained import load_pretrained
from hf_ihb.models.student import build_student
from hf_ihb.redaction import publishable
from hf_ihb.trainer.arguments import (
    StructuralDistillationTrainingArguments,
    SupervisedTrainingArguments,
)

MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])
SHA = "0123456789abcdef0123456789abcdef01234567"
ENVIRONMENT = {
    "versions": {"python": "3.11.7", "hf_ihb": "0.1.0", "torch": "2.11.0"},
    "commit": "c" * 40,
    "device": "Some CPU",
    "cpu_threads": 2,
    "num_processes": 1,
    "mixed_precision": "no",
}


def model_summary(name, parameters, revision=None, digest="aa"):
    return {
        "name": name,
        "revision": revision,
        "class": "DeiTForImageClassificationWithTeacher",
        "num_parameters": parameters,
        "weights_sha256": digest,
    }


def head(accuracy):
    return {"accuracy": accuracy, "top_5_accuracy": 0.8937, "nll": 1.659498094904454, "ece": 0.04401420448443497}


def records():
    """The files of a run of a two-head student with a teacher from the Hub, as the scripts write them."""
    data = {"name": "uoft-cs/cifar10", "revision": SHA, "split": "test", "num_images": 10000}
    recipe = {
        "recipe": "recipes/cka.json",
        "keys": {
            "license": "mit",
            "dataset_name": "uoft-cs/cifar10",
            "dataset_config_name": "plain_text",
            "architecture": "deit",
            "method": "structural",
            "teacher_model": "facebook/dinov2-small",
            "cka_weight": 1.0,
            "student_layers": [0, 1],
            "teacher_layers": [5, 11],
            "teacher_control": "none",
            "teacher_view": "shared",
            "per_device_train_batch_size": 64,
            "gradient_accumulation_steps": 2,
            "num_train_epochs": 3,
            "max_steps": -1,
            "learning_rate": 0.001,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.1,
            "optim": "adamw_torch",
            "weight_decay": 0.05,
            "horizontal_flip": 0.5,
            "load_best_model_at_end": True,
            "metric_for_best_model": "accuracy",
            "greater_is_better": True,
            "seed": 7,
        },
        "dataset": {"name": "uoft-cs/cifar10", "revision": SHA, "label_names": ["cat", "dog"]}
        | {"train": 45000, "validation": 5000, "test": 10000},
        "teacher": {"name": "facebook/dinov2-small", "revision": SHA},
        "environment": ENVIRONMENT,
    }
    layers = [
        {"layer": i, "distance": 3.0 + i / 7, "distance_relative": 0.7 + i / 7, "distance_px": 12.0 + i / 7}
        | {"entropy": 3.5 + i / 7, "special_token_mass": 0.02 + i / 7}
        for i in range(2)
    ]
    own = model_summary("me/cka", 308820)
    return {
        "recipe.json": recipe,
        "config.json": {
            "architectures": ["DeiTForImageClassificationWithTeacher"],
            "model_type": "deit",
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": 4,
            "image_size": 32,
        },
        "preprocessor_config.json": {"size": {"height": 32, "width": 32}},
        "training_history.json": [
            {"loss": 2.0, "step": 10},
            {"eval_accuracy": 0.31, "epoch": 1.0},
            {"eval_accuracy": 0.35, "epoch": 2.0},
            {"eval_accuracy": 0.35, "epoch": 3.0},
        ],
        "evaluation.json": {
            "validation": {"accuracy": 0.35, "num_images": 5000},
            "test": {"loss": 1.5, "accuracy": 0.3851, "cls_accuracy": 0.3842, "distillation_accuracy": 0.3839}
            | {"num_images": 10000, "teacher_agreement": 0.4374},
            "num_parameters": 308820,
            "num_train_images": 45000,
            "train_steps": 703,
            "train_seconds": 470.0,
            "seed": 7,
            "teacher_validation_accuracy": 0.6424,
        },
        "metrics.json": {
            "model": own,
            "teacher": model_summary("facebook/dinov2-small", 22056576, SHA),
            "baseline": model_summary("me/ce", 308820, SHA),
            "data": data | {"label_names": ["cat", "dog"]},
            "environment": ENVIRONMENT,
            "heads": {"averaged": head(0.3851), "cls": head(0.3842), "distillation": head(0.3839)},
            "fidelity": {"agreement": 0.4374, "kl_divergence": 0.703188496983648},
            "transfer": {
                "student_accuracy": 0.3851,
                "teacher_accuracy": 0.641,
                "baseline_accuracy": 0.346,
                "transfer_efficiency": 0.6007,
                "gap_closed": 0.132542372881356,
                "gain": 0.0391,
                "gain_ci_low": 0.031129,
                "gain_ci_high": 0.04707,
                "confidence_level": 0.95,
            },
        },
        "analysis.json": {
            "model": own,
            "teacher": model_summary("facebook/dinov2-small", 22056576, SHA),
            "data": data | {"num_images": 2048, "seed": 0, "indices": [0, 1]},
            "environment": ENVIRONMENT,
            "attention": {
                "grid": [8, 8],
                "patch_size_px": [4, 4],
                "num_images": 2048,
                "uniform_distance": 4.136482711405379,
                "mean_distance": 3.0714285714,
                "layers": layers,
                "untrained": {
                    "mean_distance": 4.14,
                    "layers": [{"layer": i, "distance": 4.1 + i / 70} for i in range(2)],
                },
            },
            "cka": {
                "num_images": 2048,
                "rows_per_batch": 256,
                "features": "mean over patch tokens",
                "matrices": [
                    {"rows": {"name": "me/cka", "layers": [0, 1]}, "columns": {"name": "me/cka", "layers": [0, 1]}}
                    | {"linear": [[1.0, 0.5], [0.5, 1.0]]},
                    {"rows": {"name": "me/cka", "layers": [0, 1]}, "columns": {"name": "t", "layers": [0, 1, 2]}}
                    | {"linear": [[0.1, 0.8765, 0.2], [0.3, None, 0.4321]]},
                ],
            },
            "hessian": {
                "num_images": 1024,
                "trace": 1234.5,
                "trace_standard_error": 12.3,
                "num_probes": 30,
                "largest_eigenvalue": 99.5,
                "smallest_eigenvalue": -3.25,
            },
        },
    }


def on_labels(files):
    """The same run without a teacher."""
    files["recipe.json"]["teacher"] = None
    keys = files["recipe.json"]["keys"]
    for name in [name for name in keys if name.startswith(("teacher_", "cka_", "student_")) or name == "method"]:
        del keys[name]
    files["evaluation.json"].pop("teacher_validation_accuracy")
    files["evaluation.json"]["test"].pop("teacher_agreement")
    files["metrics.json"] |= {"teacher": None, "baseline": None, "fidelity": None, "transfer": None}
    files["analysis.json"]["teacher"] = None
    del files["analysis.json"]["cka"]["matrices"][1]
    return files


@pytest.fixture
def make_run(tmp_path):
    def write(files, name="cka", plots=("attention_distance", "cka_linear", "confusion_matrix")):
        folder = tmp_path / name
        (folder / "plots").mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            (folder / file).write_text(json.dumps(content))
        for plot in plots:
            (folder / "plots" / f"{plot}.png").write_bytes(b"png")
        return folder

    return write


def body_of(text):
    return re.sub(r"\A---\n.*?\n---\n", "", text, count=1, flags=re.DOTALL)


def inline_text(token):
    return "".join(child.content for child in token.children)


def tables_of(text):
    """Rows of cells of every table, as a reader sees them."""
    tables, tokens = [], MARKDOWN.parse(body_of(text))
    for token, following in zip(tokens, [*tokens[1:], None], strict=True):
        if token.type == "table_open":
            tables.append([])
        elif token.type == "tr_open":
            tables[-1].append([])
        elif token.type in ("th_open", "td_open"):
            tables[-1][-1].append(inline_text(following))
    return tables


def fences_of(text, language):
    return [t.content for t in MARKDOWN.parse(body_of(text)) if t.type == "fence" and t.info == language]


def plain(text):
    """The body's words, one space between them."""
    return " ".join(body_of(text).split())


# ---- Header ----


def test_the_header_holds_the_numbers_of_the_json_files_exactly(make_run):
    files = records()
    draw = random.Random(3).random
    files["metrics.json"]["heads"]["averaged"]["accuracy"] = draw()
    for layer in files["analysis.json"]["attention"]["layers"]:
        layer["distance"] = 5 * draw()
    card = ModelCard(run_card(make_run(files), repo_id="me/cka"))
    accuracy, *distances = card.data.eval_results
    assert accuracy.metric_type == "accuracy"
    assert accuracy.metric_value == files["metrics.json"]["heads"]["averaged"]["accuracy"]
    assert [r.metric_value for r in distances] == [
        layer["distance"] for layer in files["analysis.json"]["attention"]["layers"]
    ]
    assert [r.metric_name for r in distances] == [f"Mean attention distance, layer {i}" for i in range(2)]
    assert {r.metric_type for r in distances} == {"mean_attention_distance"}
    for i, result in enumerate(distances):
        assert result.metric_args == {
            "layer": i,
            "unit": "patches",
            "reduction": "mean over heads, query patches and images",
            "uniform_distance": files["analysis.json"]["attention"]["uniform_distance"],
            "num_images": 2048,
        }
    for result in card.data.eval_results:
        assert type(result.metric_value) is float
        assert (result.dataset_type, result.dataset_name) == ("uoft-cs/cifar10", "cifar10")
        assert (result.dataset_config, result.dataset_split) == ("plain_text", "test")
        assert result.dataset_revision == SHA


def test_the_header_says_what_the_hub_files_it_under(make_run):
    data = ModelCard(run_card(make_run(records()), repo_id="me/deit")).data.to_dict()
    assert len(data["model-index"]) == 1
    assert data["model-index"][0]["name"] == "deit"
    del data["model-index"]
    assert data == {
        "license": "mit",
        "library_name": "transformers",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "hf_ihb", "distillation", "knowledge-distillation"],
        "datasets": ["uoft-cs/cifar10"],
        "metrics": ["accuracy"],
        "teacher_model": "facebook/dinov2-small",
        "teacher_revision": SHA,
    }


def test_the_card_is_the_text_that_the_library_would_write(make_run):
    text = run_card(make_run(records()))
    assert str(ModelCard(text)) == text
    assert card_data(card_files(make_run(records()))).to_dict() == ModelCard(text).data.to_dict()


def test_numbers_that_are_not_defined_are_not_published(make_run):
    files = records()
    files["analysis.json"]["attention"]["layers"][1]["distance"] = None
    results = ModelCard(run_card(make_run(files))).data.eval_results
    assert [(r.metric_type, (r.metric_args or {}).get("layer")) for r in results] == [
        ("accuracy", None),
        ("mean_attention_distance", 0),
    ]


def test_a_data_set_or_teacher_that_was_local_is_no_hub_id(make_run, tmp_path):
    files = records()
    local = {"name": str(tmp_path / "sets" / "cifar10"), "revision": None}
    files["recipe.json"]["keys"] |= {"dataset_name": local["name"], "teacher_model": "outputs/a/resnet18"}
    files["recipe.json"]["dataset"] |= local
    files["recipe.json"]["teacher"] = {"name": "outputs/a/resnet18", "revision": None}
    for name in ("metrics.json", "analysis.json"):
        files[name]["data"] |= local
        files[name]["teacher"] |= {"name": "outputs/a/resnet18", "revision": None}
    text = run_card(make_run(files))
    data = ModelCard(text).data.to_dict()
    assert "datasets" not in data
    assert "teacher_revision" not in data
    assert data["teacher_model"] == "local:resnet18"
    assert "`resnet18` (a local folder)" in text
    assert "`cifar10` (a local folder)" in text
    assert "--dataset_name FOLDER" in text
    for leak in (str(tmp_path), "outputs/a", "sets"):
        assert leak not in text


def test_digits_are_neither_local_nor_on_the_hub(make_run):
    files = records()
    digits = {"name": "sklearn:digits", "revision": None}
    files["recipe.json"]["keys"]["dataset_name"] = "sklearn:digits"
    files["recipe.json"]["dataset"] |= digits
    files["metrics.json"]["data"] |= digits
    text = run_card(make_run(files))
    assert "datasets" not in ModelCard(text).data.to_dict()
    assert "--dataset_name" not in text
    assert "`sklearn:digits`" in text


def test_weights_that_training_started_from_are_the_base_model(make_run):
    files = records()
    files["recipe.json"]["keys"] |= {"model_name_or_path": "facebook/deit-tiny-patch16-224", "model_revision": SHA}
    text = run_card(make_run(files))
    data = ModelCard(text).data
    assert data.base_model == "facebook/deit-tiny-patch16-224"
    assert data.base_model_relation == "finetune"
    assert "from the weights of" in text
    files["recipe.json"]["keys"] |= {"model_name_or_path": "/weights/tiny", "model_revision": None}
    text = run_card(make_run(files))
    assert ModelCard(text).data.base_model is None
    assert "from the weights of `tiny` (a local folder)" in text


def test_options_add_to_what_the_files_say_or_take_its_place(make_run):
    folder = make_run(records())
    options = {
        "license": "cc-by-4.0",
        "tags": ["mine", "distillation"],
        "model_name": "Small-DeiT",
        "base_model": "me/base",
        "datasets": ["me/more"],
    }
    text = run_card(folder, **options)
    data = ModelCard(text).data
    assert data.license == "cc-by-4.0"
    assert data.tags == ["image-classification", "hf_ihb", "distillation", "knowledge-distillation", "mine"]
    assert data.base_model == "me/base"
    assert data.datasets == ["uoft-cs/cifar10", "me/more"]
    assert data.model_name == "Small-DeiT"
    assert "\n# Small-DeiT\n" in text


@pytest.mark.parametrize("option", [{"base_model": "/a/b/c"}, {"datasets": ["https://x/y"]}, {"datasets": ["a/b\n"]}])
def test_names_that_the_hub_cannot_have_are_refused(make_run, option):
    with pytest.raises(DataError, match="expected Hub ids"):
        run_card(make_run(records()), **option)


# ---- Body ----


def test_the_results_are_those_of_the_json_files(make_run):
    files = records()
    results, attention, _ = tables_of(run_card(make_run(files)))
    assert results == [
        ["", "accuracy %", "top-5 %", "NLL (nats)", "ECE %", "parameters"],
        ["this student", "38.51", "89.37", "1.6595", "4.40", "308,820"],
        ["its cls head alone", "38.42", "89.37", "1.6595", "4.40", ""],
        ["its distillation head alone", "38.39", "89.37", "1.6595", "4.40", ""],
        ["matched control, no teacher: me/ce", "34.60", "", "", "", "308,820"],
        ["teacher: facebook/dinov2-small", "64.10", "", "", "", "22,056,576"],
    ]
    columns = ("distance", "distance_relative", "distance_px", "entropy", "special_token_mass")
    for row, layer, twin in zip(
        attention[1:],
        files["analysis.json"]["attention"]["layers"],
        files["analysis.json"]["attention"]["untrained"]["layers"],
        strict=True,
    ):
        assert row[0] == str(layer["layer"])
        expected = [*(layer[name] for name in columns), twin["distance"]]
        assert [float(cell) for cell in row[1:]] == pytest.approx(expected, abs=5e-3)


@pytest.mark.parametrize(
    ("file", "path", "value", "shown"),
    [
        ("metrics.json", ("heads", "averaged", "accuracy"), 0.12345, "12.35"),
        ("metrics.json", ("heads", "cls", "nll"), 9.87654, "9.8765"),
        ("metrics.json", ("transfer", "teacher_accuracy"), 0.9871, "98.71"),
        ("metrics.json", ("transfer", "baseline_accuracy"), 0.23456, "23.46"),
        ("metrics.json", ("transfer", "gain"), -0.01234, "-1.23 points"),
        ("metrics.json", ("transfer", "gain_ci_low"), -0.0666, "[-6.66, 4.71]"),
        ("metrics.json", ("transfer", "gap_closed"), 0.7777, "77.77 % is closed"),
        ("metrics.json", ("fidelity", "agreement"), 0.5678, "56.78 %"),
        ("metrics.json", ("fidelity", "kl_divergence"), 2.34567, "2.3457 nats"),
        ("metrics.json", ("data", "num_images"), 4321, "4,321 images"),
        ("evaluation.json", ("validation", "accuracy"), 0.2222, "validation split: 22.22 %"),
        ("evaluation.json", ("teacher_validation_accuracy",), 0.8888, "its teacher's: 88.88 %"),
        ("evaluation.json", ("train_seconds",), 6000, "100.0 minutes"),
        ("analysis.json", ("attention", "uniform_distance"), 5.4321, "distance 5.432"),
        ("analysis.json", ("attention", "mean_distance"), 2.71828, "over layers is 2.718 patches"),
        ("analysis.json", ("attention", "untrained", "mean_distance"), 3.3333, "random weights, 3.333"),
        ("analysis.json", ("hessian", "trace"), 98765.0, "9.876e+04"),
        ("recipe.json", ("keys", "learning_rate"), 0.0125, "0.0125, `cosine` schedule"),
        ("recipe.json", ("keys", "seed"), 41, "one training run, seed 41"),
        ("recipe.json", ("environment", "commit"), "f" * 40, "f" * 40),
        ("recipe.json", ("environment", "mixed_precision"), "bf16", "`bf16` (mixed)"),
        ("recipe.json", ("keys", "ema_decay"), 0.995, "exponential moving average, decay 0.995"),
        ("recipe.json", ("keys", "cka_estimator"), "biased", "`biased` estimator"),
        ("recipe.json", ("keys", "cutmix_alpha"), 1.5, "`cutmix_alpha=1.5`"),
    ],
)  # fmt: skip
def test_a_number_that_changes_in_a_file_changes_in_the_card(make_run, file, path, value, shown):
    files = records()
    assert shown not in plain(run_card(make_run(files)))
    holder = files[file]
    for name in path[:-1]:
        holder = holder[name]
    holder[path[-1]] = value
    assert shown in plain(run_card(make_run(files)))


def test_epochs_are_images_seen_per_image_and_the_batch_is_that_of_all_processes(make_run):
    files = records()
    files["recipe.json"]["environment"] = ENVIRONMENT | {"num_processes": 3}
    text = run_card(make_run(files))
    assert f"703 steps, {703 * 64 * 2 * 3 / 45000:.1f} epochs" in text
    assert "384 images (per device 64, accumulated 2, processes 3)" in text


def test_splits_that_a_run_has_not_are_left_out(make_run):
    files = records()
    assert "45,000 training, 5,000 validation, 10,000 test images" in run_card(make_run(files))
    files["recipe.json"]["dataset"]["test"] = 0
    assert "45,000 training, 5,000 validation images" in run_card(make_run(files))


def test_of_equal_evaluations_the_first_was_kept(make_run):
    assert "the best of 3 evaluations by `accuracy` on the `validation` split: epoch 2, 35.00 %" in run_card(
        make_run(records())
    )
    files = records()
    files["recipe.json"]["keys"] |= {"metric_for_best_model": "loss", "greater_is_better": False}
    files["training_history.json"] = [{"eval_loss": 2.0, "epoch": 1.0}, {"eval_loss": 3.0, "epoch": 2.0}]
    assert "the best of 2 evaluations by `loss` on the `validation` split: epoch 1, 2.0000" in run_card(make_run(files))


def test_the_most_similar_pair_of_layers_is_named(make_run):
    text = plain(run_card(make_run(records())))
    assert "Layer 0 and layer 1 of `facebook/dinov2-small` are the most alike, with 0.876" in text
    assert "the last layers of both, 1 and 2, have 0.432." in text
    assert "The first and the last layer have 0.500." in plain(run_card(make_run(on_labels(records()))))


def test_a_run_on_labels_has_no_word_of_a_teacher(make_run):
    text = run_card(make_run(on_labels(records())))
    data = ModelCard(text).data
    assert data.tags == ["image-classification", "hf_ihb"]
    assert "teacher_model" not in data.to_dict()
    assert "learned from the labels alone, without a teacher." in text
    assert body_of(text).count("teacher") == 1
    assert not re.search("student|frozen|distill(?!ation head)", body_of(text).replace("`distillation` head", ""))


@pytest.mark.parametrize(
    ("control", "phrase"), [("untrained", "its teacher had random weights"), ("shuffled", "another image of the batch")]
)
def test_a_control_says_so_first(make_run, control, phrase):
    files = records()
    files["recipe.json"]["keys"]["teacher_control"] = control
    first = body_of(run_card(make_run(files))).strip().split("\n\n")[1]
    assert first.startswith("**A control run: ")
    assert phrase in first
    assert "control run" not in run_card(make_run(records()))


def test_what_the_loss_was_is_said(make_run):
    files = records()
    files["recipe.json"]["keys"] |= {
        "method": "logits", "alpha": 0.75, "temperature": 3.0, "distillation_type": "soft", "cka_weight": 0.0,
    }  # fmt: skip
    text = run_card(make_run(files))
    assert "by soft logit distillation at temperature 3." in text
    assert "cross-entropy on the labels (weight 0.25)" in text
    assert "probabilities at temperature 3 (weight 0.75)" in text
    assert "1503.02531" in text
    files["recipe.json"]["keys"]["distillation_type"] = "hard"
    text = run_card(make_run(files))
    assert "by hard logit distillation." in text
    assert "1503.02531" not in text
    files["recipe.json"]["keys"] |= {"cka_weight": 1.0, "token_weight": 0.5}
    assert "by hard logit distillation and CKA + token losses between layers." in run_card(make_run(files))
    files["recipe.json"]["keys"] |= {"method": "structural", "alpha": 0.0}
    text = run_card(make_run(files))
    assert "by CKA + token losses between layers." in text
    assert "0 with 5, 1 with 11 (student's with teacher's, from 0)" in text


def test_references_are_of_what_the_run_stands_on(make_run):
    def cited(files):
        return set(re.findall(r"abs/([\d.]+)\)", run_card(make_run(files))))

    deit, vit, cka, dinov2 = "2012.12877", "2010.11929", "1905.00414", "2304.07193"
    assert cited(records()) == {deit, vit, cka, dinov2}
    files = on_labels(records())
    assert cited(files) == {deit, vit, cka}
    del files["analysis.json"]["cka"]
    assert cited(files) == {deit, vit}
    (files["recipe.json"]["keys"])["architecture"] = "convnextv2"
    files["config.json"] = {"architectures": ["ConvNextV2ForImageClassification"]}
    del files["analysis.json"]["attention"]
    assert cited(files) == {"2301.00808"}


OPTIONAL = (
    "config.json",
    "preprocessor_config.json",
    "training_history.json",
    "evaluation.json",
    "metrics.json",
    "analysis.json",
)


@pytest.mark.parametrize("taught", [True, False])
@pytest.mark.parametrize("kept", range(2 ** len(OPTIONAL)))
def test_what_a_run_lacks_is_left_out_whole(make_run, kept, taught):
    files = records() if taught else on_labels(records())
    for i, name in enumerate(OPTIONAL):
        if not kept >> i & 1:
            del files[name]
    text = run_card(make_run(files, plots=()))
    body = body_of(text)
    assert not re.search(r"\b(None|nan|NaN|null|N/A|n/a|undefined)\b", body)
    assert "![" not in body
    kinds = [token.type for token in MARKDOWN.parse(body)]
    headings = [i for i, kind in enumerate(kinds) if kind == "heading_close"]
    assert all(i + 1 < len(kinds) and kinds[i + 1] != "heading_open" for i in headings)
    titles = re.findall(r"^## (.*)$", body, re.MULTILINE)
    has_results = "metrics.json" in files or "evaluation.json" in files
    assert ("Results" in titles) == has_results
    assert ("There are no results on a test split yet." in body) == (not has_results)
    assert ("Attention distance" in titles) == ("analysis.json" in files)
    assert ("Similarity of layers" in titles) == ("analysis.json" in files)
    results = ModelCard(text).data.eval_results or []
    assert ("accuracy" in [r.metric_type for r in results]) == has_results
    assert all(f"`{name}`:" in body for name in files)
    assert not any(f"`{name}`:" in body for name in OPTIONAL if name not in files)


def test_without_metrics_the_accuracies_are_those_of_the_end_of_training(make_run):
    files = records()
    del files["metrics.json"]
    text = run_card(make_run(files))
    assert ModelCard(text).data.eval_results[0].metric_value == 0.3851
    assert tables_of(text)[0] == [
        ["", "accuracy %", "parameters"],
        ["this student", "38.51", "308,820"],
        ["its cls head alone", "38.42", ""],
        ["its distillation head alone", "38.39", ""],
    ]
    assert "It decides as its teacher on 43.74 % of the images." in text


def test_one_head_is_one_row(make_run):
    files = on_labels(records())
    files["metrics.json"]["heads"] = {"logits": head(0.5)}
    assert [row[0] for row in tables_of(run_card(make_run(files)))[0]] == ["", "this model"]


def test_plots_are_shown_where_they_are(make_run):
    files = records()
    shown = re.findall(r"!\[.*?\]\((.*?)\)", run_card(make_run(files)))
    assert shown == ["plots/attention_distance.png", "plots/cka_linear.png"]
    folder = make_run(files, name="other", plots=("cka_linear", "eigenvalue_density"))
    assert re.findall(r"!\[.*?\]\((.*?)\)", run_card(folder)) == [
        "plots/cka_linear.png",
        "plots/eigenvalue_density.png",
    ]


def test_the_same_files_give_the_same_text_wherever_they_are(make_run, tmp_path, monkeypatch):
    folder = make_run(records())
    text = run_card(folder)
    copied = folder.rename(tmp_path / "moved").rename(tmp_path / "plots")
    (tmp_path / "deep").mkdir()
    copied = copied.rename(tmp_path / "deep" / "cka")
    monkeypatch.chdir(copied)
    assert run_card(copied) == text == run_card(copied.relative_to(copied))
    assert str(tmp_path) not in text


def flawed_cases():
    for arguments in (
        DataArguments,
        TeacherArguments,
        SupervisedTrainingArguments,
        StructuralDistillationTrainingArguments,
    ):
        for field in dataclasses.fields(arguments):
            for value in field.metadata.get("published", {}):
                yield arguments, field.name, value


@pytest.mark.parametrize(("arguments", "name", "value"), flawed_cases())
def test_flaws_of_the_published_study_are_named_as_a_run_names_them(make_run, arguments, name, value):
    files = records()
    assert "Flaws of the published study" not in run_card(make_run(files))
    files["recipe.json"]["keys"][name] = value
    text = plain(run_card(make_run(files)))
    instance = object.__new__(arguments)
    instance.__dict__.update({name: value})
    (line,) = published_flaws([instance])
    reason = line.partition("published study: ")[2]
    assert f"- `{name}={value}`: {reason}" in text
    assert text.count(reason) == 1


# ---- Usage ----


def usage_of(text):
    (example,) = fences_of(text, "python")
    assert len(example.strip().splitlines()) <= 10
    ast.parse(example)
    return example


@pytest.fixture(scope="module")
def digits():
    return load_image_split(DataArguments(dataset_name="sklearn:digits", max_eval_samples=60), "test")[0]


def run_with_model(make_run, digits, **shape):
    """A folder with a saved model, and metrics and analysis as they are really made."""
    model, processor = build_student(ModelArguments(**shape), digits.label_names, (8, 8), [0.5], [0.5])
    files = on_labels(records())
    for name in ("config.json", "preprocessor_config.json", "metrics.json", "analysis.json", "evaluation.json"):
        del files[name]
    files["recipe.json"]["dataset"] |= {"name": "sklearn:digits", "revision": None, "label_names": digits.label_names}
    files["recipe.json"]["keys"]["dataset_name"] = "sklearn:digits"
    folder = make_run(files, name=shape.get("architecture", "deit"))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    data = {"name": "sklearn:digits", "revision": None}
    saved = load_pretrained(str(folder))
    metrics = evaluate_model(saved, digits, baseline=saved, data=data | {"split": "test"}, device="cpu")
    (folder / "metrics.json").write_text(json.dumps(metrics).replace("NaN", "null"))
    if shape["architecture"] == "deit":
        args = AnalysisArguments(metrics="attention,cka", max_images=60, rows_per_batch=20)
        analysis = analyze(saved, digits, args, data=data)
        (folder / "analysis.json").write_text(json.dumps(analysis))
    return folder, metrics


@pytest.mark.parametrize(
    "shape",
    [
        {"architecture": "deit", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 2},
        {"architecture": "adaptive_cnn", "hidden_sizes": [8, 16], "depths": [1, 1]},
        {"architecture": "resnet18_cifar_w16"},
    ],
    ids=lambda shape: shape["architecture"],
)
def test_the_usage_example_runs_and_the_card_prints_what_evaluation_prints(
    make_run, digits, shape, monkeypatch, capsys
):
    folder, metrics = run_with_model(make_run, digits, **shape)
    text = run_card(folder)
    example = usage_of(text)
    is_custom, is_ours = shape["architecture"] == "adaptive_cnn", shape["architecture"].startswith("resnet18")
    assert ("trust_remote_code=True" in example) == is_custom
    assert example.startswith("import hf_ihb") == is_ours
    data = ModelCard(text).data
    assert data.library_name == ("hf_ihb" if is_ours else "transformers")
    assert ("custom_code" in data.tags) == is_custom
    monkeypatch.chdir(folder.parent)
    exec(compile(example, "card", "exec"), {})
    answers = capsys.readouterr().out.splitlines()
    assert len(answers) == 3
    assert {line.split()[1] for line in answers} <= set(digits.label_names)
    (accuracy,) = re.findall(r"It prints an accuracy of ([\d.]+) %", text)
    assert accuracy in metrics_table(metrics).splitlines()[2]
    assert data.eval_results[0].metric_value == next(iter(metrics["heads"].values()))["accuracy"]
    if shape["architecture"] == "deit":
        layers = json.loads((folder / "analysis.json").read_text())["attention"]["layers"]
        assert [r.metric_value for r in data.eval_results[1:]] == [layer["distance"] for layer in layers]


def test_the_example_and_the_command_name_the_repo(make_run):
    files = records()
    text = run_card(make_run(files), repo_id="me/deit-tiny-cka")
    assert 'model="me/deit-tiny-cka"' in usage_of(text)
    assert fences_of(text, "bash") == ["python scripts/evaluate_model.py me/deit-tiny-cka\n"]
    assert "\n# deit-tiny-cka\n" in text
    files["metrics.json"]["data"] |= {"split": "validation", "name": "me/other"}
    assert fences_of(run_card(make_run(files)), "bash") == [
        "python scripts/evaluate_model.py cka --dataset_name me/other --split validation\n"
    ]


# ---- Names of others ----

NASTY = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "&lt;b&gt; &amp; &#60;",
    "a | b || c",
    "\\| a \\\\| b \\",
    "`tick` ``two`` ```three",
    "`",
    "[text](https://evil.example)",
    "![x](https://evil.example/x.png)",
    "https://evil.example www.evil.example me@evil.example <https://evil.example>",
    "line\n---\n# heading\n\n| a |\n|---|\n| b |",
    "---\nlicense: other\n---",
    "\r\n- item\n1. one\n> quote\n```python\nimport os\n```",
    "[ref]: https://evil.example",
    "{{ 7 * 7 }} {% for x in y %} {# c #}",
    "{} {0} {name} %s",
    "**bold** _it_ ~~s~~ $x$ :smile: @user #1",
    "\u202egnp.exe\u202c \u200b\ufeff\u2066",
    "nul\x00 bell\x07 esc\x1b[31m nel\x85 ls\u2028 ps\u2029",
    "lone \ud800 surrogate",
    "'\"\\",
    " lead and trail ",
    "   ",
    "yes",
    "null",
    "123",
    "- a: b",
    "ünï ↔ 猫 🐱",
    "x" * 500,
]


def test_code_shows_every_name_as_it_is():
    draw = random.Random(0)
    alphabet = "`\\|<>&[]()!*_~{}#-:\n\t \u202e" + string.ascii_letters
    names = NASTY + ["".join(draw.choices(alphabet, k=draw.randint(1, 12))) for _ in range(400)]
    for name in names:
        shown = visible(name) if visible(name).strip() else repr(visible(name))
        shown = shown.replace("\\|", "\\x5c|")
        for text, unescape in ((f"a {code(name)} b", str), (f"- {code(name)}", str)):
            tokens = [t for t in MARKDOWN.parse(unescape(text)) if t.type == "inline"]
            spans = [child for token in tokens for child in token.children if child.type != "text"]
            assert [(span.type, span.content) for span in spans] == [("code_inline", shown)], name
        (inner,) = tables_of(table([[Markdown("a"), Markdown("b")], [name, Markdown("c")]]))
        assert inner == [["a", "b"], [shown, "c"]], name
        # GitHub's renderer takes two backslashes for one, and the pipe behind them for the end of the cell
        assert "\\\\|" not in table([[Markdown("a")], [name]])


def test_what_is_no_name_number_or_markdown_is_not_printed():
    for value in (None, True, ["a"], {}):
        with pytest.raises(TypeError):
            to_markdown(value)
    assert Markdown("{} {:.1f}").format(["<b>"], 0.25) == "`['<b>']` 0.2"
    assert isinstance(Markdown("a") + Markdown("b"), Markdown)
    assert Markdown("a") + "b" == "a`b`"


def with_names(name):
    """The files of a run in which every name of others is this one."""
    files = records()
    recipe = files["recipe.json"]
    recipe["recipe"] = f"recipes/{name}"
    recipe["dataset"] |= {"name": name, "revision": None, "label_names": [name, name]}
    recipe["teacher"] = {"name": name, "revision": None}
    recipe["keys"] |= {"dataset_name": name, "dataset_config_name": name, "teacher_model": name}
    recipe["keys"] |= {"model_name_or_path": name, "lr_scheduler_type": name, "optim": name}
    recipe["environment"] = ENVIRONMENT | {
        "device": name,
        "commit": name,
        "mixed_precision": name,
        "versions": {"hf_ihb": name, name + "x": name},
    }
    files["config.json"] |= {"architectures": [name]}
    for file in ("metrics.json", "analysis.json"):
        files[file]["data"] |= {"name": name, "revision": None, "split": name}
        for role in ("model", "teacher", "baseline"):
            if role in files[file]:
                files[file][role] |= {"name": name, "revision": None, "class": name}
    files["metrics.json"]["heads"] = {"averaged": head(0.5), name: head(0.25)}
    return files


def skeleton(text):
    """All there is on the page but words: headings, links, images, tables, code, HTML."""
    return [
        (token.type, token.tag, token.info, tuple(sorted(token.attrs.items())))
        for outer in MARKDOWN.parse(body_of(text))
        for token in (outer, *(outer.children or []))
        if token.type not in ("text", "softbreak")
    ]


@pytest.mark.parametrize("name", NASTY)
def test_no_name_becomes_markup(make_run, name):
    tame = "tame" if name.isalnum() and len(name) < 20 else "a.b"
    benign, hostile = make_run(with_names("a.b"), "a.b"), make_run(with_names(name), "c.d")
    options = {"repo_id": name, "model_name": name, "license": name, "tags": [name]}
    expected = run_card(benign, repo_id="a.b", model_name=tame)
    text = run_card(hostile, **options)
    assert skeleton(text) == skeleton(expected)
    html = MARKDOWN.render(body_of(text))
    assert "<script" not in html
    assert "<img src=x" not in html
    assert 'evil.example"' not in html
    usage_of(text)
    assert not re.search(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]", body_of(text)
    )
    data = ModelCard(text).data
    assert data.license == name
    assert data.tags[-1] == name
    assert data.model_name == name
    published = publishable(
        {file: json.loads(json.dumps(content)) for file, content in with_names(name).items()}, repo_id=name
    )
    where = published["metrics.json"]["data"]
    config = published["recipe.json"]["keys"]["dataset_config_name"]
    for result in data.eval_results:
        assert (result.dataset_type, result.dataset_config) == (where["name"], config)
        assert result.dataset_split == where["split"]
    assert data.teacher_model == published["recipe.json"]["teacher"]["name"]
    assert len(data.to_dict()["model-index"]) == 1


# ---- Files that are not what they should be ----


def test_a_folder_without_a_recipe_is_no_run(tmp_path):
    with pytest.raises(DataError, match=r"recipe\.json: expected a JSON file"):
        run_card(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("recipe.json", "{", r"recipe\.json: expected a JSON file"),
        ("recipe.json", "[]", r"recipe\.json: expected an object in JSON, found list"),
        ("recipe.json", '{"keys": {}}', r"recipe\.json: expected 'dataset', found keys"),
        ("training_history.json", "{}", r"training_history\.json: expected a list in JSON, found dict"),
        ("metrics.json", '{"model": {"weights_sha256": "aa"}}', r"metrics\.json: expected 'data', found model"),
        (
            "metrics.json",
            '{"model": {"weights_sha256": "bb"}, "data": {}, "heads": {}}',
            r"of the same weights, found different ones",
        ),
    ],
)
def test_files_that_are_something_else_are_one_line(make_run, file, content, message):
    folder = make_run(records())
    (folder / file).write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        run_card(folder)
    assert "\n" not in str(caught.value)
