"""Run folders of the version before: they resume, are evaluated, compared and published by this one.

See `tests/fixtures/before_methods/README.md`.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[1]
FIXTURE = Path(__file__).parent / "fixtures" / "before_methods"
SAME = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "architecture", "student_layers", "teacher_layers",
    "token_weight", "teacher_view", "max_steps", "per_device_train_batch_size", "max_train_samples",
    "max_eval_samples", "save_strategy", "eval_strategy", "load_best_model_at_end", "logging_steps", "save_steps",
)  # fmt: skip


RECIPES = {"structural": "cka.json", "logits": "kd.json"}


@pytest.fixture
def older(tmp_path):
    """The folders, where they may be written to."""
    for name in ("teacher", *RECIPES):
        shutil.copytree(FIXTURE / name, tmp_path / name)
    return tmp_path


def go_on(script, folder):
    """The run in a folder, from its checkpoint."""
    keys = json.loads((folder / "recipe.json").read_text("utf-8"))["keys"]
    recipe = json.loads((ROOT / "recipes" / "quickstart" / RECIPES[folder.name]).read_text("utf-8"))
    recipe |= {name: keys[name] for name in SAME if keys.get(name) is not None}
    recipe |= {"output_dir": folder.name, "teacher_model": "teacher", "teacher_cache": "off", "use_cpu": True}
    return script("distill.py", recipe, "--resume_from_checkpoint", "true")


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_of_the_version_before_goes_on_to_the_same_end(name, older, script):
    before = {file: load_file(older / name / file) for file in ("model.safetensors", "distillation/heads.safetensors")}
    losses = json.loads((older / name / "training_history.json").read_text("utf-8"))
    done = go_on(script, older / name)
    assert done.code == 0, done.stderr
    after = load_file(older / name / "model.safetensors")
    for key, tensor in before["model.safetensors"].items():
        torch.testing.assert_close(after[key], tensor, rtol=1e-3, atol=1e-5)
    heads = load_file(older / name / "distillation" / "heads.safetensors")
    renamed = [key.replace("projections.", "heads.token.") for key in before["distillation/heads.safetensors"]]
    assert sorted(heads) == sorted(renamed)
    history = json.loads((older / name / "training_history.json").read_text("utf-8"))
    for old, new in zip([e for e in losses if "loss" in e], [e for e in history if "loss" in e], strict=True):
        assert {key: old[key] for key in old if key.endswith("loss")} == pytest.approx(
            {key: new[key] for key in new if key.endswith("loss")}, rel=1e-4
        )


def test_heads_of_another_shape_are_refused_in_one_line(older, script):
    path = older / "structural" / "checkpoint-2" / "distillation" / "heads.safetensors"
    save_file({"projections.7.weight": torch.zeros(3)}, path)
    done = go_on(script, older / "structural")
    assert done.code == 4
    assert "expected heads ['heads.token.0.bias'" in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error")]) == 1


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_of_the_version_before_is_evaluated_compared_and_published(name, older, script):
    said = {}
    for what, *options in (
        ("evaluate_model.py", name, "--teacher_model", "teacher"),
        ("analyze.py", name, "--metrics", "attention,cka", "--max_images", "20", "--batch_size", "20"),
        ("summarize.py", *RECIPES),
        ("publish.py", name, "--hub_model_id", "me/student", "--dry_run", "true"),
    ):
        done = script(what, None, *options)
        assert done.code == 0, f"{what}: {done.stderr}"
        said[what] = done.stdout
    assert "teacher: cka + token" in said["summarize.py"]
    assert "teacher: soft logits" in said["summarize.py"]
    card = (older / name / "hub" / "README.md").read_text("utf-8")
    shown = {"structural": "its tokens following the student's augmentation", "logits": "shown the stored images"}
    assert shown[name] in card
    learned = {"structural": "CKA + token losses between layers", "logits": "soft logit distillation at temperature"}
    assert learned[name] in card
