"""Runs that are killed, told to end or started again go on to the same end, in one process and in two."""

import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.invariants.conftest import AVERAGED, LOGITS, RESUMABLE, ROOT, STRUCTURAL


def test_a_run_that_its_launcher_starts_again_goes_on_to_the_same_end(launch, teacher):
    recipe = {**LOGITS, **RESUMABLE, "teacher_model": teacher, "per_device_train_batch_size": 32}
    whole = launch("distill.py", recipe)
    again = launch("distill.py", recipe, restarts=1, kill_at_step=7)
    assert (whole.code, again.code) == (0, 0), whole.stderr + again.stderr
    assert "started again by its launcher: going on from the newest checkpoint" in again.stderr
    assert again.logged("loss") == whole.logged("loss")
    for name, tensor in whole.weights().items():
        assert torch.equal(again.weights()[name], tensor), name


@pytest.mark.parametrize(("recipe", "processes"), [(STRUCTURAL, 1), (STRUCTURAL | AVERAGED, 2)])
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(recipe, processes, launch, teacher, tmp_path):
    recipe = {**recipe, **RESUMABLE, "teacher_model": teacher, "per_device_train_batch_size": 32 // processes}
    whole = launch("distill.py", recipe, processes=processes)
    assert whole.code == 0, whole.stderr
    go_on, run, strike = [], tmp_path / "run", {"kill_at_step": 7}
    if processes > 1:  # told to one of them alone, all end in the same step, with its checkpoint
        told = launch("distill.py", recipe, processes=processes, output_dir=run, term_at_step=4)
        assert told.code != 0
        assert told.stderr.count("told to end (SIGTERM); saved in") == processes
        (step,) = set(re.findall(r"step (\d): told to end", told.stderr))
        assert (run / f"checkpoint-{step}").is_dir()
        go_on, strike = ["--resume_from_checkpoint", "true"], {"kill_in_save": 6}
    killed = launch("distill.py", recipe, *go_on, processes=processes, output_dir=run, **strike)
    assert killed.code != 0
    if processes > 1:  # one of them died: the other ends in a line, what was not whole has no name
        assert not (run / "checkpoint-6").exists()
        (line,) = [line for line in killed.stderr.splitlines() if line.startswith("error: ")]
        assert re.search(rf"step 6: another process .* verifies is .*checkpoint-{step}; go on by", line)
        assert f'File "{ROOT / "hf_ihb"}' not in killed.stderr
    assert (killed.folder / "checkpoint-3").is_dir()
    assert not (killed.folder / "model.safetensors").exists()
    resumed = launch(
        "distill.py", recipe, "--resume_from_checkpoint", "true", processes=processes, output_dir=killed.folder
    )
    assert resumed.code == 0, resumed.stderr
    for part in ("loss", "task_loss", "grad_norm"):
        assert resumed.logged(part) == whole.logged(part), part
    for name, tensor in whole.weights().items():
        assert torch.equal(resumed.weights()[name], tensor), name
    test, expected = (run.json("evaluation.json")["test"] for run in (resumed, whole))
    assert test == expected


def stored_views(folder):
    """(epoch, image) -> row, of all files of a cache of views; no view is in two of them."""
    found = {}
    for path in folder.glob("*/*.safetensors"):
        part, epoch = load_file(path), int(path.name.split("-")[0])
        images = np.flatnonzero(np.unpackbits(part["images"].numpy()))
        assert not found.keys() & {(epoch, int(k)) for k in images}
        found |= {(epoch, int(k)): row.view(torch.half) for k, row in zip(images, part["rows"], strict=True)}
    return found


def test_processes_share_out_views_and_killed_and_resumed_equals_uninterrupted(launch, teacher, tmp_path):
    recipe = {**LOGITS, **RESUMABLE, "teacher_model": teacher, "teacher_cache": "views", "augmentation_seed": 5}
    # rows of scores and mean tokens
    recipe |= {"relation_weight": 1.0, "teacher_view": "identical", "student_layers": [0, 1], "teacher_layers": [1, 2]}

    def run(name, *more, processes=2, **settings):
        words = ["--teacher_cache_dir", str(tmp_path / name), *more]
        images = ["--per_device_train_batch_size", str(48 // processes)]
        return launch("distill.py", recipe, *words, *images, processes=processes, **settings)

    whole = run("whole")
    assert whole.code == 0, whole.stderr
    killed = run("killed", kill_at_step=7)
    assert killed.code != 0
    resumed = run("killed", "--resume_from_checkpoint", "true", output_dir=killed.folder)
    assert resumed.code == 0, resumed.stderr
    assert resumed.logged("loss") == whole.logged("loss")
    for name, tensor in whole.weights().items():
        assert torch.equal(resumed.weights()[name], tensor), name
    rows, again = stored_views(tmp_path / "whole"), stored_views(tmp_path / "killed")
    # three batches of 48 an epoch; what they leave out of 160 is asked for when the second after it begins
    assert sorted(epoch for epoch, _ in rows) == [0] * 160 + [1] * 144 + [2] * 96
    assert rows.keys() == again.keys()
    assert all(torch.equal(again[place], row) for place, row in rows.items())
    # another number of processes, another seed, temperature and loss: the same views, and none is asked for twice
    words = ["--temperature", "4", "--relation_weight", "0", "--sp_weight", "100", "--seed", "9"]
    other = run("whole", *words, processes=1)
    assert other.code == 0, other.stderr
    after = stored_views(tmp_path / "whole")
    assert all(torch.equal(after[place], row) for place, row in rows.items())
    about = other.json("evaluation.json")["teacher_views"]
    assert about["begun_by"] == whole.folder.name
    assert (tmp_path / "whole" / about["key"]).is_dir()
