"""The usage example and the command of a card run as they stand."""

import ast
import json
import re

import pytest
from huggingface_hub import ModelCard

from hf_ihb.analysis import AnalysisArguments, analyze
from hf_ihb.config.data import DataArguments
from hf_ihb.config.model import ModelArguments
from hf_ihb.data import load_image_split
from hf_ihb.evaluation import evaluate_model, metrics_table
from hf_ihb.hub import run_card
from hf_ihb.models.pretrained import load_pretrained
from hf_ihb.models.student import build_student
from tests.model_card.records import fences_of, on_labels, records


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
