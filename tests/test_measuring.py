"""What is measured of a trained student: of one pass over the test split, and the same whether one pushes or not."""

import json

import pytest

from hf_ihb import evaluation
from hf_ihb.config.run import RunArguments
from hf_ihb.errors import RecipeError
from hf_ihb.run import chosen_analyses
from tests.test_scripts import STUDENT

MEASURED = {key: value for key, value in STUDENT.items() if key != "analyses_after_training"}
SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size")
CNN = {key: value for key, value in STUDENT.items() if key not in SHAPE} | {"architecture": "resnet18_cifar_w16"}
STRUCTURAL = {"method": "structural", "cka_weight": 1.0, "student_layers": [0], "teacher_layers": [1]}
CHANGES = ("environment", "seconds", "name", "weights_sha256")  # from run to run


def read(path):
    return json.loads(path.read_text("utf-8"))


def steady(content):
    """A record without what differs between two runs of one recipe."""
    if isinstance(content, dict):
        return {name: steady(value) for name, value in content.items() if name not in CHANGES}
    return [steady(value) for value in content] if isinstance(content, list) else content


def test_the_metrics_are_of_the_pass_that_the_evaluation_is_of(script, tmp_path, monkeypatch):
    def second_pass(readers, *_):
        raise AssertionError(f"{list(readers)} were shown the test split again")

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "_read", second_pass)
        done = script("train.py", MEASURED, "--output_dir", "run", "--max_steps", "3")
    assert done.code == 0, done.stderr
    test, metrics = read(tmp_path / "run" / "evaluation.json")["test"], read(tmp_path / "run" / "metrics.json")
    assert list(metrics["heads"]) == ["averaged", "cls", "distillation"]
    for head, key in (("averaged", "accuracy"), ("cls", "cls_accuracy"), ("distillation", "distillation_accuracy")):
        assert metrics["heads"][head]["accuracy"] == pytest.approx(test[key])
    # and they are what a pass of its own finds of the model that was saved
    assert script("evaluate_model.py", None, "run", "--device", "cpu", "--output_dir", "again").code == 0
    again = read(tmp_path / "again" / "metrics.json")
    assert again["model"] == metrics["model"]
    assert again["data"] == metrics["data"]
    for head, found in again["heads"].items():
        assert found["confusion_matrix"] == metrics["heads"][head]["confusion_matrix"]
        assert found["nll"] == pytest.approx(metrics["heads"][head]["nll"], rel=1e-4)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [({"method": "logits"}, {"teacher", "baseline"}), (STRUCTURAL, {"baseline"})],
)
def test_a_teacher_and_a_control_are_compared_on_the_answers_of_that_pass(
    keys, expected, script, tmp_path, monkeypatch
):
    learned = {**CNN, "max_steps": 40, "max_train_samples": 640, "learning_rate": 3e-3}
    assert script("train.py", learned, "--output_dir", "other").code == 0
    shown = []
    read_logits = evaluation._read
    monkeypatch.setattr(evaluation, "_read", lambda readers, *a: shown.append(set(readers)) or read_logits(readers, *a))
    recipe = {**STUDENT, **keys, "teacher_model": "other", "baseline_model": "other"}
    done = script("distill.py", recipe, "--output_dir", "run")
    assert done.code == 0, done.stderr
    assert shown == [expected]
    test, metrics = read(tmp_path / "run" / "evaluation.json")["test"], read(tmp_path / "run" / "metrics.json")
    if "teacher" in expected:
        assert metrics["fidelity"]["agreement"] == pytest.approx(test["teacher_agreement"])
    assert metrics["transfer"]["student_accuracy"] == pytest.approx(test["accuracy"])


def test_pushing_changes_nothing_about_what_is_measured(script, hub_here, tmp_path):
    for name, more in (("here", ()), ("pushed", ("--push_to_hub", "true", "--hub_model_id", "me/student"))):
        done = script("train.py", MEASURED, "--output_dir", name, *more)
        assert done.code == 0, done.stderr
    here, pushed = tmp_path / "here", tmp_path / "pushed"
    for file in ("metrics.json", "analysis.json"):
        assert steady(read(here / file)) == steady(read(pushed / file)), file
    assert {p.name for p in (here / "plots").iterdir()} == {p.name for p in (pushed / "plots").iterdir()}
    assert read(here / "analysis.json").keys() >= {"attention"}
    for card in ((here / "README.md").read_text("utf-8"), hub_here.files("me/student")["README.md"].decode()):
        assert "## Attention distance" in card
        assert "type: accuracy" in card


def test_a_student_without_attention_is_measured_without(script, tmp_path):
    done = script("train.py", CNN | {"analyses_after_training": "attention"}, "--output_dir", "run")
    assert done.code == 0, done.stderr
    assert (tmp_path / "run" / "metrics.json").is_file()
    assert not (tmp_path / "run" / "analysis.json").exists()


def test_analyses_are_named_or_none():
    assert chosen_analyses(RunArguments(analyses_after_training="none")) == []
    assert chosen_analyses(RunArguments(analyses_after_training="hessian, attention")) == ["attention", "hessian"]
    with pytest.raises(RecipeError, match="key 'analyses_after_training': expected some of attention,cka,hessian"):
        chosen_analyses(RunArguments(analyses_after_training="hesian"))


def test_an_unknown_analysis_is_refused_before_anything_is_loaded(script, tmp_path):
    done = script("train.py", CNN | {"analyses_after_training": "hesian"}, "--output_dir", "run")
    assert done.code == 2
    assert not (tmp_path / "run").exists()
