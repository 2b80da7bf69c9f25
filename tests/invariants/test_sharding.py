"""What is a statistic of the batch is one of the batch of all processes: 2 x 16 images train like 1 x 32."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.invariants.conftest import ROOT, STUDENT

# SGD: Adam turns rounding noise of tiny gradients into whole steps
RECIPE = {
    **STUDENT, "method": "structural", "student_layers": [0, 1], "teacher_layers": [1, 2], "max_steps": 3,
    "optim": "sgd", "learning_rate": 0.1, "weight_decay": 0.0, "random_crop_padding": 1, "horizontal_flip": 0.5,
    "mixup_alpha": 0.8, "mix_probability": 0.3, "max_eval_samples": 20, "teacher_statistics_samples": 64,
}  # fmt: skip
VARIANTS = {
    "pooled": {"cka_weight": 1.0, "cka_scope": "pooled", "relation_weight": 1.0},
    "images": {"cka_weight": 1.0, "cka_scope": "images", "cka_estimator": "biased", "gram_weight": 5.0},
    "rbf": {"cka_weight": 1.0, "cka_scope": "images", "cka_kernel": "rbf"},
    "published": {
        "cka_weight": 1.0, "cka_estimator": "published", "token_weight": 1.0, "center_positions": False,
        "teacher_projector": "trainable", "task_heads": "cls", "teacher_view": "clean", "mixup_alpha": 0.0,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(teacher, tmp_path_factory):
    """Every variant with one and with two processes."""
    folder = tmp_path_factory.mktemp("sharding")
    found = {}
    for processes in (1, 2):
        recipes = []
        for name, variant in VARIANTS.items():
            recipes.append(folder / f"{processes}" / f"{name}.json")
            recipes[-1].parent.mkdir(exist_ok=True)
            batch = {"per_device_train_batch_size": 32 // processes}
            recipes[-1].write_text(json.dumps({**RECIPE, **variant, **batch, "teacher_model": teacher}))
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if processes == 2 else []
        script = [str(Path(__file__).parent / "sequence.py"), str(folder / f"runs-{processes}")]
        done = subprocess.run(
            [sys.executable, *launcher, *script, *map(str, recipes)], cwd=folder, capture_output=True, text=True,
            timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found[processes] = folder / f"runs-{processes}"
    return found


def history(folder, key):
    return [entry[key] for entry in json.loads((folder / "training_history.json").read_text()) if key in entry]


@pytest.mark.parametrize("name", VARIANTS)
def test_losses_and_weights_do_not_depend_on_the_number_of_processes(name, runs):
    one, two = (runs[processes] / name for processes in (1, 2))
    for folder, processes in ((one, 1), (two, 2)):
        assert json.loads((folder / "recipe.json").read_text())["environment"]["num_processes"] == processes
    losses = [k.replace("weight", "loss") for k in VARIANTS[name] if k.endswith("_weight")]
    for part in ("loss", "grad_norm", *losses):
        found, expected = history(two, part), history(one, part)
        assert len(expected) == 3
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5), part
    files = ["model.safetensors"] + ["distillation/heads.safetensors"] * (name == "published")
    for file in files:
        weights = load_file(two / file)
        for key, tensor in load_file(one / file).items():
            torch.testing.assert_close(weights[key], tensor, rtol=0, atol=1e-5)


def test_gradients_of_every_structural_loss_are_those_of_one_process(tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [sys.executable, *launcher, str(Path(__file__).parent / "gradients.py")], cwd=tmp_path,
        capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
