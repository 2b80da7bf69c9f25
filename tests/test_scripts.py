"""What a person sees of the scripts: exit codes, one line for a mistake, and nothing written by it."""

import json
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers.utils import logging

ROOT = Path(__file__).parents[1]
STUDENT = {
    "dataset_name": "sklearn:digits", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "patch_size": 2, "max_train_samples": 64, "max_eval_samples": 40, "per_device_train_batch_size": 32, "max_steps": 1,
    "report_to": "none", "use_cpu": True, "disable_tqdm": True,
}  # fmt: skip
TAUGHT = {**STUDENT, "method": "logits"}


@dataclass
class Done:
    """How a script ended and what it said."""

    code: int
    stdout: str
    stderr: str


@pytest.fixture
def script(tmp_path, monkeypatch, capsys):
    def run(name, recipe, *overrides):
        path = tmp_path / "recipe.json"
        if recipe is not None:
            path.write_text(recipe if isinstance(recipe, str) else json.dumps(recipe))
        first = [] if recipe is None else [str(path)]
        monkeypatch.setattr(sys, "argv", [name, *first, *overrides])
        monkeypatch.chdir(tmp_path)
        logging.set_verbosity_error()
        code = 0
        try:
            runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        return Done(code, *capsys.readouterr())

    return run


@pytest.mark.parametrize(
    ("name", "recipe", "overrides", "code", "says"),
    [
        ("train.py", {**STUDENT, "learning_rat": 1}, [], 2, "unknown; did you mean 'learning_rate'?"),
        ("train.py", STUDENT, ["--drop_path_rate", "1.5"], 2, "command line: key 'drop_path_rate': expected"),
        ("train.py", "{", [], 2, "recipe.json:1:2: expected JSON"),
        ("train.py", {**STUDENT, "patch_size": 3}, [], 2, "a multiple of 3 px, found 8 x 8 px"),
        ("train.py", {**STUDENT, "architecture": "dejt"}, [], 2, "key 'architecture': expected deit, deit_cls, vit"),
        ("train.py", {**STUDENT, "dataset_name": "no/such-set"}, [], 3, "data set 'no/such-set' could not be loaded"),
        ("distill.py", {**STUDENT, "method": "logit"}, [], 2, "key 'method': expected one of logits, structural"),
        ("distill.py", TAUGHT, [], 2, "key 'teacher_model': expected a Hub id or a folder, found nothing"),
        ("distill.py", {**TAUGHT, "teacher_model": "x", "teacher_view": "clean", "mixup_alpha": 1}, [], 2, "not mixed"),
        ("distill.py", {**TAUGHT, "teacher_model": "no/such-model"}, [], 3, "'no/such-model' could not be loaded"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_an_exit_code(name, recipe, overrides, code, says, script, tmp_path):
    done = script(name, recipe, *overrides, "--output_dir", "run")
    last = done.stderr.strip().splitlines()[-1]
    assert done.code == code, done.stderr
    assert last.startswith("error: ")
    assert says in last
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.json"]


def test_an_earlier_run_is_kept_unless_it_is_resumed_or_replaced(script, tmp_path):
    assert script("train.py", STUDENT, "--output_dir", "run").code == 0
    weights = (tmp_path / "run" / "model.safetensors").read_bytes()
    again = script("train.py", STUDENT, "--output_dir", "run", "--seed", "7")
    assert again.code == 2
    assert "--overwrite_output_dir true" in again.stderr
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == weights
    replaced = script("train.py", STUDENT, "--output_dir", "run", "--seed", "7", "--overwrite_output_dir", "true")
    assert replaced.code == 0
    assert (tmp_path / "run" / "model.safetensors").read_bytes() != weights


def test_a_run_that_failed_before_its_first_checkpoint_does_not_block_the_next(script, tmp_path):
    failed = script("train.py", {**STUDENT, "per_device_train_batch_size": 500}, "--output_dir", "run")
    assert failed.code == 3
    assert "0 steps" in failed.stderr
    assert script("train.py", STUDENT, "--output_dir", "run").code == 0


def test_replacing_a_run_leaves_files_that_are_not_ours(script, tmp_path):
    assert script("train.py", STUDENT, "--output_dir", "run").code == 0
    (tmp_path / "run" / "notes.txt").write_text("mine")
    (tmp_path / "run" / "checkpoint-99").mkdir()
    assert script("train.py", STUDENT, "--output_dir", "run", "--overwrite_output_dir", "true").code == 0
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "run" / "checkpoint-99").exists()


def test_a_folder_whose_recipe_is_somebodys_own_is_not_taken_for_a_run(script, tmp_path):
    done = script("train.py", STUDENT, "--output_dir", ".", "--overwrite_output_dir", "true")
    assert done.code == 2
    assert "with other content" in done.stderr


def test_epochs_on_the_command_line_beat_the_recipes(script, tmp_path):
    recipe = {**STUDENT, "max_steps": -1, "num_train_epochs": 5}
    assert script("train.py", recipe, "--output_dir", "run", "--num_train_epochs", "1").code == 0
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["train_steps"] == 2  # 64 images by 32


def test_a_folder_with_other_content_is_never_written_to(script, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("mine")
    done = script("train.py", STUDENT, "--output_dir", "thesis", "--overwrite_output_dir", "true")
    assert done.code == 2
    assert "expected an empty or new folder" in done.stderr
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.txt"]


def test_a_run_leaves_what_later_steps_read_and_the_table_shows_it(script, tmp_path):
    assert script("train.py", STUDENT, "--output_dir", "run").code == 0
    recipe, evaluation = (json.loads((tmp_path / "run" / f"{n}.json").read_text()) for n in ("recipe", "evaluation"))
    assert recipe["keys"]["hidden_size"] == 32
    assert not any(key.endswith("_token") for key in recipe["keys"])
    assert {"torch", "transformers"} <= recipe["environment"]["versions"].keys()
    assert evaluation["test"]["num_images"] == 40
    assert json.loads((tmp_path / "run" / "training_history.json").read_text())
    table = script("summarize.py", None, "run").stdout
    assert f"{100 * evaluation['test']['accuracy']:.2f}" in table.splitlines()[2]


@pytest.mark.parametrize("name", ["train.py", "distill.py"])
def test_help_prints_every_key_with_its_range_without_a_recipe(name, script):
    done = script(name, None, "--help")
    assert done.code == 0
    keys = ["--random_crop_padding", "--drop_path_rate", "--learning_rate"]
    keys += ["--temperature", "--cka_weight", "--teacher_model"] if name == "distill.py" else []
    for key in keys:
        assert key in done.stdout
    assert "in [0, 1)" in " ".join(done.stdout.split())
