"""The Python of README and recipes/README is run as it stands."""

import re
from pathlib import Path

import pytest
import torch

from tests.methods.steps import example

ROOT = Path(__file__).parents[2]


@pytest.fixture
def examples(teacher, tmp_path, monkeypatch):
    (tmp_path / "outputs" / "quickstart").mkdir(parents=True)
    (tmp_path / "outputs" / "quickstart" / "teacher").symlink_to(teacher)
    monkeypatch.chdir(tmp_path)
    return {
        name: re.findall(r"```python\n(.*?)```", (ROOT / name).read_text("utf-8"), flags=re.DOTALL)
        for name in ("README.md", "recipes/README.md")
    }


def run(source, namespace):
    exec(compile(source, "README.md", "exec"), namespace)
    return namespace


def test_a_ready_pipeline_is_evaluated_as_the_readme_shows(examples):
    *_, evaluation = examples["recipes/README.md"]
    namespace = run(evaluation, {})
    answers = namespace["classifier"](list(namespace["images"]), top_k=1)
    labels = namespace["digits"].target[1500:].tolist()
    right = [int(answer[0]["label"]) == label for answer, label in zip(answers, labels, strict=True)]
    assert namespace["results"]["accuracy"] == sum(right) / len(right)
    assert 0 < namespace["results"]["ece"] < 1


def test_both_trainers_work_with_the_users_own_parts_as_the_readme_shows(examples):
    namespace = {}
    *trainers, _, _ = examples["recipes/README.md"]
    assert len(trainers) == 2
    for source in trainers:
        trainer = run(source, namespace)["trainer"]
        metrics = trainer.evaluate()
        assert metrics["eval_errors"] == round((1 - metrics["eval_accuracy"]) * 297)
        assert namespace["teacher"].training is False


def test_a_module_of_torchvision_teaches_as_the_readme_shows(examples):
    *_, module, _ = examples["recipes/README.md"]
    teacher = run(module, {})["teacher"]
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    scores, maps = teacher.logits_and_features(teacher.prepare(images), [0, -1])
    assert scores.shape == (2, 10)
    assert [m.grid for m in maps] == [(8, 8), (1, 1)]


def test_the_readmes_ten_lines_distil_and_evaluate(examples):
    lines, _ = examples["README.md"]
    trainer = run(lines, {})["trainer"]
    assert [method.name for method in trainer.methods] == ["kd", "cka"]
    assert trainer.evaluate()["eval_accuracy"] > 0.1


def test_the_readmes_method_is_a_method(examples):
    _, source = examples["README.md"]
    kind = run(source, {})["Similarity"](similarity_weight=1.0)
    loss = kind.loss(*example(kind))
    assert loss.ndim == 0
    assert loss > 0
    assert kind.describe().format(similarity_weight=1.0) == "difference between similarities of images (weight 1)"
