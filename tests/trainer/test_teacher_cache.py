"""The file of rows: whatever happens while it is built, what is read is what was computed."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections import namedtuple

import pytest
import torch

import hf_ihb.trainer.teacher_cache as module
from hf_ihb.errors import CacheError
from hf_ihb.storage.block_store import BlockStore
from hf_ihb.trainer.cache_rows import Layout
from hf_ihb.trainer.teacher_cache import TeacherCache, fingerprint

ROWS, BATCH = 21, 3
LAYOUT = Layout("tokens", ((2, 3), (1, 4)))


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(module, "BLOCK_ROWS", 4)


def row(number):
    """What the teacher says of an image: whole numbers, exact in half precision."""
    return torch.arange(10) + 10 * number


class Asked:
    """Computes rows and notes which; stops like a killed process after some."""

    def __init__(self, stop_after=None):
        self.rows, self.stop_after = [], stop_after

    def __call__(self, batches):
        for batch in batches:
            if self.stop_after is not None and len(self.rows) >= self.stop_after:
                raise KeyboardInterrupt
            self.rows += batch
            yield torch.stack([row(number) for number in batch]).float()


def make(root, layout=LAYOUT, rows=ROWS, **description):
    return TeacherCache(root, {"teacher": "one", **description}, layout, rows)


def opened(root, compute=None, **options):
    cache = make(root, **options)
    cache.open(compute or Asked(), BATCH, tolerance=1e-2, show=False)
    return cache


def assert_right(cache):
    index = torch.randperm(ROWS)
    first, second = cache(index)
    expected = torch.stack([row(int(number)) for number in index]).float()
    torch.testing.assert_close(first, expected[:, :6].view(-1, 2, 3), rtol=0, atol=0)
    torch.testing.assert_close(second, expected[:, 6:].view(-1, 1, 4), rtol=0, atol=0)


def test_what_is_read_is_what_was_computed_layer_by_layer(tmp_path):
    assert_right(opened(tmp_path))


def test_a_cache_that_is_there_is_checked_and_not_built_again(tmp_path):
    opened(tmp_path)
    asked = Asked()
    assert_right(opened(tmp_path, asked))
    assert sorted(asked.rows) == [0, 2, 5, 8, 11, 14, 17, 20]  # the rows that are compared


@pytest.mark.parametrize("stop_after", range(1, ROWS, 4))
def test_an_interrupted_cache_goes_on_at_its_first_missing_block(tmp_path, stop_after):
    with pytest.raises(KeyboardInterrupt):
        opened(tmp_path, Asked(stop_after))
    cache, asked = make(tmp_path), Asked()
    done = cache.written()
    cache.open(asked, BATCH, tolerance=1e-2, show=False)
    assert_right(cache)
    assert done == stop_after // 4 * 4 or done == (stop_after + 2) // 4 * 4
    assert asked.rows[: ROWS - done] == list(range(done, ROWS))


@pytest.mark.parametrize("position", [0, 101, 239, 20 * ROWS - 1])
def test_a_flipped_bit_is_found_and_its_block_alone_built_again(tmp_path, position):
    path = opened(tmp_path).folder / "rows.bin"
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)
    asked = Asked()
    assert_right(opened(tmp_path, asked))
    block = position // 80
    rows = list(range(4 * block, min(4 * block + 4, ROWS)))
    assert asked.rows[: len(rows)] == rows
    assert len(asked.rows) == len(rows) + 8


@pytest.mark.parametrize("size", [0, 1, 79, 80, 333, 20 * ROWS - 1])
def test_a_file_that_is_cut_off_is_completed(tmp_path, size):
    path = opened(tmp_path).folder / "rows.bin"
    os.truncate(path, size)
    assert_right(opened(tmp_path))
    assert path.stat().st_size == 20 * ROWS


@pytest.mark.parametrize("lost", ["rows.bin", "journal-0.jsonl", "description.json"])
def test_a_cache_that_lost_a_file_is_right_again(tmp_path, lost):
    (opened(tmp_path).folder / lost).unlink()
    assert_right(opened(tmp_path))


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_torn_line_of_the_journal_costs_its_block_and_no_other(tmp_path, cut):
    journal = opened(tmp_path).folder / "journal-0.jsonl"
    journal.write_bytes(journal.read_bytes()[:-cut])
    assert_right(opened(tmp_path))
    asked = Asked()
    assert_right(opened(tmp_path, asked))  # what was appended behind the torn line is read
    assert len(asked.rows) == 8


def test_a_journal_that_names_wrong_checksums_is_not_believed(tmp_path):
    journal = opened(tmp_path).folder / "journal-0.jsonl"
    lines = [json.loads(line) for line in journal.read_text().splitlines() if line]
    journal.write_text("\n".join(json.dumps(dict.fromkeys(line, "0" * 64)) for line in lines) + "\n[1]\nnull\n3")
    assert_right(opened(tmp_path))


def test_a_killed_process_leaves_nothing_that_is_read_wrongly(tmp_path):
    program = """
        import os, signal, sys, torch
        import hf_ihb.trainer.teacher_cache as module
        from tests.trainer.test_teacher_cache import Asked, make
        module.BLOCK_ROWS = 4
        write, count = os.fsync, int(sys.argv[2])
        def fsync(descriptor):
            global count
            count -= 1
            if count == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            write(descriptor)
        os.fsync = fsync
        from pathlib import Path
        make(Path(sys.argv[1])).open(Asked(), 3, tolerance=1e-2, show=False)
    """
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path), "5"]
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert make(tmp_path).written() == 8
    assert_right(opened(tmp_path))


def test_two_runs_that_build_the_same_cache_take_turns(tmp_path):
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=opened, args=(tmp_path,)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    journal = next(tmp_path.glob("*/journal-0.jsonl")).read_text().split()
    assert sum('"0":' in line for line in journal) == 1, "the second one has built nothing"
    assert_right(opened(tmp_path))


def test_whatever_determines_the_rows_names_another_cache(tmp_path):
    caches = [
        make(tmp_path),
        make(tmp_path, teacher="two"),
        make(tmp_path, images="others"),
        make(tmp_path, rows=ROWS + 1),
        make(tmp_path, layout=Layout("tokens", ((3, 2), (1, 4)))),
        make(tmp_path, layout=Layout("gram", ((2, 3), (1, 4)))),
    ]
    assert len({cache.folder for cache in caches}) == len(caches)
    assert make(tmp_path).folder == caches[0].folder


def test_the_format_is_a_part_of_the_name(tmp_path, monkeypatch):
    before = make(tmp_path).folder
    monkeypatch.setattr(module, "FORMAT", module.FORMAT + 1)
    assert make(tmp_path).folder != before


def test_rows_that_the_teacher_would_not_give_now_are_an_error_of_one_line(tmp_path):
    opened(tmp_path)

    def another(batches):
        for batch in batches:
            yield torch.stack([row(number) + (number == 11) * 50 for number in batch]).float()

    with pytest.raises(
        CacheError, match=r"training image 11: expected what the teacher says now, .* delete the folder$"
    ):
        opened(tmp_path, another)


def test_numbers_that_half_precision_cannot_hold_are_an_error_with_their_image(tmp_path):
    def large(batches):
        for batch in batches:
            yield torch.stack([row(number) + 1e5 * (number == 7) for number in batch]).float()

    with pytest.raises(CacheError, match=r"expected numbers within 65504, found one .* for training image 7;"):
        opened(tmp_path, large)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_not_stored(tmp_path, value):
    layout = Layout("logits", ((1, 10),))

    def broken(batches):
        for batch in batches:
            yield torch.full((len(batch), 10), value)

    with pytest.raises(CacheError, match="for training image 0;"):
        opened(tmp_path, broken, layout=layout)


def test_scores_keep_single_precision(tmp_path):
    layout = Layout("logits", ((1, 10),))
    scores = torch.randn(ROWS, 10) * 1e6

    def compute(batches):
        yield from (scores[list(batch)] for batch in batches)

    cache = opened(tmp_path, compute, layout=layout)
    torch.testing.assert_close(cache(torch.arange(ROWS))[0][:, 0], scores, rtol=0, atol=0)


def test_a_disk_that_is_too_small_is_known_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 100))
    asked = Asked()
    with pytest.raises(
        CacheError, match=r"expected 0.00 MB of disk .*, found 0.00 MB; give another 'teacher_cache_dir'"
    ):
        opened(tmp_path, asked)
    assert asked.rows == []
    assert make(tmp_path).trouble(0.5).endswith("(50% of what is free)")


def test_a_write_that_fails_is_one_line_and_keeps_what_is_there(tmp_path, monkeypatch):
    fsync, count = os.fsync, 0

    def full(descriptor):
        nonlocal count
        count += 1
        if count == 6:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CacheError, match=r"cannot be written \(No space left on device\); what is there is kept"):
        opened(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(module, "BLOCK_ROWS", 4)
    assert make(tmp_path).written() >= 8
    assert_right(opened(tmp_path))


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="the teacher cache cannot be written"):
        opened(tmp_path / "file" / "folder")


def test_size_place_and_time_are_said_before_it_is_built(tmp_path, capsys):
    make(tmp_path).open(Asked(), BATCH, tolerance=1e-2, show=True)
    said = capsys.readouterr().out
    assert said.startswith(f"Teacher cache (tokens): 21 images x 20 B = 0.00 MB in {tmp_path}")
    assert "21 images to go, about 0 s (" in said
    make(tmp_path).open(Asked(), BATCH, tolerance=1e-2, show=True)
    assert capsys.readouterr().out == ""


def test_statistics_are_made_once_and_never_believed_when_damaged(tmp_path):
    calls = []

    def statistics():
        calls.append(1)
        return {"mean.0": torch.arange(3.0)}

    for expected in (1, 1):
        found = make(tmp_path).statistics(statistics)
        torch.testing.assert_close(found["mean.0"], torch.arange(3.0))
        assert len(calls) == expected
    path = make(tmp_path).folder / "statistics.safetensors"
    for damaged in (path.read_bytes()[:-1], b"", path.read_bytes()[:-1] + b"\1"):
        path.write_bytes(damaged)
        before = len(calls)
        torch.testing.assert_close(make(tmp_path).statistics(statistics)["mean.0"], torch.arange(3.0))
        assert len(calls) == before + 1


def test_a_fingerprint_sees_names_types_shapes_and_every_byte():
    base = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}
    others = [
        {"a": base["a"].view(3, 2), "b": base["b"]},
        {"a": base["a"].double(), "b": base["b"]},
        {"c": base["a"], "b": base["b"]},
        {
            "a": base["a"].clone().index_put_((torch.tensor(1), torch.tensor(2)), torch.tensor(5.0000005)),
            "b": base["b"],
        },
        {"a": base["a"]},
    ]
    prints = [fingerprint(tensors) for tensors in (base, *others)]
    assert len(set(prints)) == len(prints)
    reordered = {"b": base["b"], "a": base["a"].T.contiguous().T}
    assert fingerprint(reordered) == prints[0]
    images = torch.rand(2, 3, 4, 4)
    assert fingerprint({"w": images}) == fingerprint({"w": images.to(memory_format=torch.channels_last)})


def test_a_whole_cache_is_read_without_a_lock_and_one_that_cannot_be_made_is_said(tmp_path, monkeypatch):
    rows = opened(tmp_path)._rows.clone()
    monkeypatch.setattr(BlockStore, "lock", lambda self: pytest.fail("asked for the lock"))
    monkeypatch.setattr(BlockStore, "may_be_written", lambda self: False)
    again = opened(tmp_path)
    assert torch.equal(again._rows, rows)
    assert again.trouble() is None
    (again.folder / "rows.bin").unlink()
    assert "expected a folder for the teacher cache that can be written to" in again.trouble()
