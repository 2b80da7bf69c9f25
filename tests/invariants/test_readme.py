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


def test_both_trainers_work_with_the_users_own_parts_as_the_readme_shows(examples, tmp_path):
    namespace = {}
    assert len(examples) == 2
    for source in examples:
        exec(compile(source, str(README), "exec"), namespace)
        trainer = namespace["trainer"]
        metrics = trainer.evaluate()
        assert metrics["eval_errors"] == round((1 - metrics["eval_accuracy"]) * 297)
        assert namespace["teacher"].training is False
