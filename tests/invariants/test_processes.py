"""Laws that hold across processes: they train like one, and end together."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.invariants import build_cache, disagree, unused
from tests.invariants.conftest import AUGMENTED, LOGITS, ROOT, STRUCTURAL, STUDENT

SHARED_OUT = STRUCTURAL | {
    "cka_weight": 0.0, "gram_weight": 0.0, "token_weight": 0.0, "procrustes_weight": 1.0, "rkd_weight": 1.0,
    "dist_weight": 0.2, "uncertainty_weighting": 2.0,
}  # fmt: skip


@pytest.mark.parametrize("method", ["logits", "structural", "shared out"])
def test_two_processes_train_like_one_on_the_same_global_batch(method, launch, teacher, tmp_path):
    cached = {"center_positions": False, "teacher_cache": "tokens"}
    recipe = {"logits": LOGITS, "structural": {**STRUCTURAL, **cached}, "shared out": SHARED_OUT}[method]
    # SGD: Adam turns rounding noise of tiny gradients into whole steps
    recipe |= {**AUGMENTED, "teacher_model": teacher, "max_steps": 5, "optim": "sgd", "learning_rate": 0.05}
    recipe |= {"weight_decay": 0.01, "weight_decay_scope": "all"}
    folders = [str(tmp_path / name) for name in ("one", "two")]
    one = launch("distill.py", {**recipe, "per_device_train_batch_size": 32, "teacher_cache_dir": folders[0]})
    two = launch(
        "distill.py", {**recipe, "per_device_train_batch_size": 16, "teacher_cache_dir": folders[1]}, processes=2
    )
    assert (one.code, two.code) == (0, 0), one.stderr + two.stderr
    assert [run.json("recipe.json")["environment"]["num_processes"] for run in (one, two)] == [1, 2]
    for run in (one, two):  # a flaw of the published study is named once, whatever the number of processes
        assert run.stderr.count("weight_decay_scope=all repeats a flaw of the published study: norms, biases") == 1
    parts = {
        "logits": ["task_loss", "kd_loss"],
        "structural": ["cka_loss", "gram_loss", "token_loss"],
        "shared out": ["task_weight", "procrustes_loss", "procrustes_weight", "rkd_loss", "dist_loss", "dist_weight"],
    }[method]
    for part in ["loss", *parts]:
        assert two.logged(part) == pytest.approx(one.logged(part), rel=1e-6, abs=1e-5), part
    for name, tensor in one.weights().items():
        torch.testing.assert_close(two.weights()[name], tensor, rtol=0, atol=1e-5)
    assert two.json("evaluation.json")["test"]["accuracy"] == one.json("evaluation.json")["test"]["accuracy"]
    if method == "structural":
        rows = [path.read_bytes() for path in sorted(tmp_path.glob("*/*/rows.bin"))]
        assert len(rows) == 2
        assert rows[0] == rows[1]


def test_processes_that_see_other_metrics_stop_together_and_hold_one_average(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(Path(disagree.__file__)), str(tmp_path)], env=environment, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for kind in ("ema", "swa"):
        first, second = (torch.load(tmp_path / kind / f"{rank}.pt", weights_only=True) for rank in (0, 1))
        # the main process's first evaluation is its best, two more end its patience: three epochs of four steps
        assert first["ended"] == second["ended"] == {"step": 12, "best": 0.0, "world": 2}
        for name, tensor in first["state"].items():
            assert torch.equal(second["state"][name], tensor), name
    # both halves of the images are in the statistics of SWA
    images = (disagree.make_split(0).images.double() / 255 - 0.5) / 0.25
    stem = "student.deit.embeddings.patch_embeddings.stem"
    mean = F.conv2d(images, first["state"][f"{stem}.0.weight"].double(), padding=1).mean((0, 2, 3))
    torch.testing.assert_close(first["state"][f"{stem}.1.running_mean"].double(), mean, rtol=1e-4, atol=1e-5)


def test_processes_do_not_wait_for_parameters_that_no_output_depends_on(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(Path(unused.__file__)), str(tmp_path), "2"], env=environment, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "SiglipForImageClassification: not trained, since no output depends on it: vision_model.h" in done.stderr


def test_processes_share_out_a_cache_and_fail_together(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*command, str(Path(build_cache.__file__)), str(tmp_path)], env=environment, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["world"] == second["world"] == 2
    checked = [0, 2, 5, 8, 11, 14, 17, 20]
    blocks = [[n for n in range(21) if n // 4 % 2 == rank] for rank in (0, 1)]
    assert [ended["together"]["asked"] for ended in (first, second)] == [block + checked for block in blocks]
    for ended in (first, second):
        assert ended["together"]["read"] == list(range(21))
        assert "for training image 5;" in ended["broken"]
        assert "expected the same teacher and images on all processes" in ended["different"]
        assert ended["one folder"] is None
        assert ended["again"] == [True, True, False]
        assert re.match(
            "key 'output_dir': expected a folder that all machines see, .* found another .*", ended["two folders"]
        )


def test_two_processes_learn_from_two_teachers_like_one(launch, teacher, tmp_path):
    entries = [
        {"teacher_model": teacher, "alpha": 0.5, "temperature": 2.0},
        {"teacher_model": teacher, "cka_weight": 1.0, "token_weight": 0.5, "student_layers": [0, 1]},
    ]
    recipe = {**STUDENT, **AUGMENTED, "teacher_models": entries, "teacher_dropping": 0.7, "max_steps": 5}
    recipe |= {"optim": "sgd", "learning_rate": 0.05, "teacher_cache_dir": str(tmp_path)}
    one = launch("distill.py", {**recipe, "per_device_train_batch_size": 32})
    two = launch("distill.py", {**recipe, "per_device_train_batch_size": 16}, processes=2)
    assert (one.code, two.code) == (0, 0), one.stderr + two.stderr
    for part in ("loss", "task_loss", "kd_loss_1", "cka_loss_2", "token_loss_2", "teacher_kept_1"):
        assert two.logged(part) == pytest.approx(one.logged(part), abs=1e-5), part
    assert 0 < sum(one.logged("teacher_kept_1")) < 5
    for name, tensor in one.weights().items():
        torch.testing.assert_close(two.weights()[name], tensor, rtol=0, atol=1e-5)
