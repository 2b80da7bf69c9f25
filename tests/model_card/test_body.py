"""What a card says of a run."""

import dataclasses
import re

import pytest
from huggingface_hub import ModelCard

from hf_ihb.config.data import DataArguments
from hf_ihb.config.fields import published_flaws
from hf_ihb.config.model import TeacherArguments
from hf_ihb.hub import run_card
from hf_ihb.trainer.arguments import (
    StructuralDistillationTrainingArguments,
    SupervisedTrainingArguments,
)
from tests.model_card.records import ENVIRONMENT, MARKDOWN, body_of, head, on_labels, plain, records, tables_of


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
        ("evaluation.json", ("teacher_views",), {"key": "ab", "begun_by": "a"}, "image, begun by the run `a`"),
        ("recipe.json", ("teacher", "crop_left_out"), True, "whole ones, without the crop of its image processor"),
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


def test_shared_keys_are_cited_where_they_are_used_and_a_negative_control_is_named(make_run):
    files = records()
    keys = {"alpha": 0.5, "logit_standardization": True, "uncertainty_weighting": 2.0, "attention_weight": 1.5}
    keys |= {"distillation_stop_epoch": 2.0, "teacher_logits_view": "identical"}
    files["recipe.json"]["keys"] |= keys
    text = plain(run_card(make_run(files)))
    assert {"2403.01427", "2408.07985", "2411.09702", "2605.07191"} <= set(re.findall(r"abs/([\d.]+)\)", text))
    for said in ("uncertainty_weighting=2.0", "logit_standardization=True", "distillation_stop_epoch=2.0"):
        assert said in text
    assert "(weight 1.5; a likely negative control for teachers such as DINOv2, CLIP and BEiT)" in text


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
