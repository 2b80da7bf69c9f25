"""The launch config for sharded training suits every kind of student, and shards without changing what is learned."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.invariants import sharded
from tests.invariants.conftest import ROOT


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Runs on two processes, sharded, and what they tell."""
    folder = tmp_path_factory.mktemp("sharded")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", sharded.__file__, folder],
        cwd=folder, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("name", sharded.STUDENTS)
def test_the_blocks_of_every_student_are_gathered_one_at_a_time(name, two):
    assert two[1][f"{name}-float32"]["sharded"] == sharded.STUDENTS[name][1]


@pytest.mark.parametrize("name", sharded.WITHOUT_BATCH_NORM)
def test_a_sharded_student_learns_what_a_whole_one_does(name, two, tmp_path):
    folder, found = two
    whole = sharded.train(tmp_path, name, "float32")
    assert whole["sharded"] == []
    assert found[f"{name}-float32"]["losses"] == pytest.approx(whole["losses"], rel=1e-4)
    weights = load_file(folder / f"{name}-float32" / "model.safetensors")
    for key, tensor in load_file(tmp_path / f"{name}-float32" / "model.safetensors").items():
        torch.testing.assert_close(weights[key], tensor, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", sharded.IN_BF16)
def test_in_bf16_a_sharded_student_has_nearly_the_losses_of_float32(name, two):
    half, whole = (two[1][f"{name}-{precision}"]["losses"] for precision in ("bf16", "float32"))
    assert half == pytest.approx(whole, rel=0.02)
    assert half != whole


def test_a_sharded_run_resumes_within_a_step_warm_up_like_one_that_never_stopped(two):
    whole, again = two[1]["resumed"]
    assert len(whole) == 6
    assert again == whole
