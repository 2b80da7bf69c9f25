"""The README's Python is run as it stands."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture
def examples(teacher, tmp_path, monkeypatch):
    (tmp_path / "outputs" / "quickstart").mkdir(parents=True)
    (tmp_path / "outputs" / "quickstart" / "teacher").symlink_to(teacher)
    monkeypatch.chdir(tmp_path)
    return re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), flags=re.DOTALL)


def run(source, namespace):
    exec(compile(source, str(README), "exec"), namespace)
    return namespace


def test_a_ready_pipeline_is_evaluated_as_the_readme_shows(examples):
    evaluation, *_ = examples
    namespace = run(evaluation, {})
    answers = namespace["classifier"](list(namespace["images"]), top_k=1)
    labels = namespace["digits"].target[1500:].tolist()
    right = [int(answer[0]["label"]) == label for answer, label in zip(answers, labels, strict=True)]
    assert namespace["results"]["accuracy"] == sum(right) / len(right)
    assert 0 < namespace["results"]["ece"] < 1


def test_both_trainers_work_with_the_users_own_parts_as_the_readme_shows(examples):
    namespace = {}
    _, *trainers = examples
    assert len(trainers) == 2
    for source in trainers:
        trainer = run(source, namespace)["trainer"]
        metrics = trainer.evaluate()
        assert metrics["eval_errors"] == round((1 - metrics["eval_accuracy"]) * 297)
        assert namespace["teacher"].training is False
