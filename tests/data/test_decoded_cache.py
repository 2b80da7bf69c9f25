import errno
import multiprocessing
import os
import pickle
import shutil
import signal
from collections import namedtuple

import datasets
import numpy as np
import PIL
import pytest
import torch

from hf_ihb.data import ImageSplit, MappedSplit, decoded_cache
from hf_ihb.data.decode import EncodedImages
from hf_ihb.data.decoded_cache import DecodedCache
from hf_ihb.data.levels import count_levels
from hf_ihb.errors import CacheError, DataError
from hf_ihb.storage.block_store import BlockStore
from tests.image_sets import NAMES, picture

pytestmark = pytest.mark.usefixtures("small_blocks")
BLOCKS = 5  # of 9, 9, 9, 9 and 4 images
FORK = multiprocessing.get_context("fork")


def opened(root, encoded):
    """The pixels, after everything in memory has been forgotten."""
    cache = DecodedCache(root, encoded)
    cache.open(1, show=False)
    return cache.map()


@pytest.fixture
def expected(encoded):
    return encoded.decode(range(40))


@pytest.fixture
def decoded_rows(monkeypatch):
    """Rows that were decoded since, as often as they were."""
    seen, pixels = [], EncodedImages._pixels

    def note(self, record, row):
        seen.append(row)
        return pixels(self, record, row)

    monkeypatch.setattr(EncodedImages, "_pixels", note)
    return seen


def test_a_file_holds_the_pixels_and_is_made_once(tmp_path, encoded, expected, decoded_rows, capsys):
    cache = DecodedCache(tmp_path, encoded)
    assert cache.store.num_blocks == BLOCKS
    cache.open(2, show=True)
    assert torch.equal(cache.map(), expected)
    assert set(decoded_rows) == set(range(40))
    said = capsys.readouterr().out
    assert f"40 images x 108 B = 0.00 MB in {cache.folder}; 40 images to go, about 0 s" in said
    decoded_rows.clear()
    again = DecodedCache(tmp_path, encoded)
    again.open(2, show=True)
    assert torch.equal(again.map(), expected)
    assert len(decoded_rows) == 8  # compared with what they decode to now
    assert capsys.readouterr().out == ""


def build_until_killed(root, encoded, sync, written):
    """Dies at a call of fsync, when part of what it was to bring to disk is there."""
    real, calls = os.fsync, [0]

    def dying(descriptor):
        calls[0] += 1
        if calls[0] == sync:
            os.ftruncate(descriptor, int(written * os.fstat(descriptor).st_size))
            os.kill(os.getpid(), signal.SIGKILL)
        real(descriptor)

    os.fsync = dying
    DecodedCache(root, encoded).open(1, show=False)


@pytest.mark.parametrize("written", [1.0, 0.4, 0.0])
@pytest.mark.parametrize("sync", range(1, 2 * BLOCKS + 1))
def test_a_process_that_is_killed_leaves_what_the_next_one_can_use(tmp_path, encoded, expected, sync, written):
    process = FORK.Process(target=build_until_killed, args=(tmp_path, encoded, sync, written))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert torch.equal(opened(tmp_path, encoded), expected)


def test_blocks_that_are_on_disk_are_not_made_again(tmp_path, encoded, expected, decoded_rows):
    process = FORK.Process(target=build_until_killed, args=(tmp_path, encoded, 5, 1.0))
    process.start()
    process.join(60)
    assert torch.equal(opened(tmp_path, encoded), expected)
    made = decoded_rows[:-8]
    assert sorted(made) == list(range(18, 40))


@pytest.mark.parametrize("cut", range(0, 200, 13))
def test_a_journal_that_ends_anywhere_is_believed_as_far_as_it_goes(tmp_path, encoded, expected, cut):
    opened(tmp_path, encoded)
    journal = DecodedCache(tmp_path, encoded).folder / "journal-0.jsonl"
    journal.write_bytes(journal.read_bytes()[:cut])
    assert torch.equal(opened(tmp_path, encoded), expected)
    assert torch.equal(opened(tmp_path, encoded), expected)


@pytest.mark.parametrize("garbage", [b"\xff\xfe\x00", b"null\n3\n[1]\n[[],2]\n{}\n", b'["x", "y"]\n[99, "ab"]\n'])
def test_garbage_in_a_journal_is_passed_over(tmp_path, encoded, expected, garbage):
    opened(tmp_path, encoded)
    journal = DecodedCache(tmp_path, encoded).folder / "journal-0.jsonl"
    journal.write_bytes(garbage + journal.read_bytes())
    assert torch.equal(opened(tmp_path, encoded), expected)


@pytest.mark.parametrize("damage", ["flip", "truncate", "zero", "grow", "remove", "empty"])
def test_a_damaged_file_is_found_and_only_what_is_damaged_made_again(tmp_path, encoded, expected, decoded_rows, damage):
    opened(tmp_path, encoded)
    path = DecodedCache(tmp_path, encoded).folder / decoded_cache.PIXELS_FILE
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[20 * 108 + 5] ^= 4  # in block 2
    elif damage == "zero":
        content[9 * 108 : 10 * 108] = bytes(108)  # in block 1
    elif damage == "grow":
        content += b"more"
    content = content[: 30 * 108] if damage == "truncate" else content  # in block 3
    path.unlink()
    if damage != "remove":
        path.write_bytes(b"" if damage == "empty" else content)
    decoded_rows.clear()
    assert torch.equal(opened(tmp_path, encoded), expected)
    again = {"flip": range(18, 27), "zero": range(9, 18), "truncate": range(27, 40), "grow": range(0)}
    assert sorted(decoded_rows[:-8]) == list(again.get(damage, range(40)))


@pytest.mark.parametrize("change", ["images", "size", "mode", "rows", "pillow", "format"])
def test_what_changes_the_pixels_changes_the_place(tmp_path, encode, encoded, monkeypatch, change):
    images = [picture(i) for i in range(40)]
    before, other = DecodedCache(tmp_path, encoded).folder, encoded
    assert DecodedCache(tmp_path, encode(images)).folder == before
    match change:
        case "images":
            other = encode(images, identity=("another commit",))
        case "size":
            other = encode(images, size=(7, 6))
        case "mode":
            other = encode(images, mode="L")
        case "rows":
            other = encoded.select(torch.arange(39))
        case "pillow":
            monkeypatch.setattr(PIL, "__version__", "1.0")
        case "format":
            monkeypatch.setattr(decoded_cache, "FORMAT", 99)
    assert DecodedCache(tmp_path, other).folder != before


def test_pixels_that_are_not_the_images_are_never_used(tmp_path, encode, encoded):
    opened(tmp_path, encoded)
    impostor = encode([picture(i + (i == 39)) for i in range(40)])  # of the same name, with another last image
    with pytest.raises(CacheError, match=r"here, row 39: expected what the image decodes to now, found other pixels"):
        opened(tmp_path, impostor)


def build_together(root, encoded, barrier, queue):
    barrier.wait(30)
    queue.put(opened(root, encoded).numpy().tobytes())


def test_processes_that_need_the_same_file_make_it_once(tmp_path, encoded, expected):
    barrier, queue = FORK.Barrier(3), FORK.Queue()
    processes = [FORK.Process(target=build_together, args=(tmp_path, encoded, barrier, queue)) for _ in range(3)]
    for process in processes:
        process.start()
    assert {queue.get(timeout=60) for _ in processes} == {expected.numpy().tobytes()}
    for process in processes:
        process.join(30)
    journal = (DecodedCache(tmp_path, encoded).folder / "journal-0.jsonl").read_text()
    assert len(journal.split("\n\n")) == BLOCKS


def test_a_process_that_waits_says_so(tmp_path, encoded, expected, monkeypatch, capsys):
    monkeypatch.setattr(decoded_cache, "_PATIENCE_S", 0.05)
    cache = DecodedCache(tmp_path, encoded)
    with cache._alone(show=False):
        process = FORK.Process(target=lambda: DecodedCache(tmp_path, encoded).open(1, show=True))
        process.start()
        process.join(0.5)
        assert process.is_alive()
        assert not (cache.folder / decoded_cache.PIXELS_FILE).exists()
    process.join(60)
    assert process.exitcode == 0
    assert torch.equal(cache.map(), expected)


def test_a_disk_that_is_too_small_is_one_line_before_anything_is_decoded(tmp_path, encoded, monkeypatch, decoded_rows):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 4000, 4000))
    with pytest.raises(CacheError, match=r"expected 0.00 MB of disk for decoded images, found 0.00 MB free"):
        opened(tmp_path, encoded)
    assert decoded_rows == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 4320, 4320))
    opened(tmp_path, encoded)


@pytest.mark.parametrize("sync", range(1, 2 * BLOCKS + 1))
def test_a_disk_that_fills_up_is_one_line_and_what_is_there_is_kept(
    tmp_path, encoded, expected, monkeypatch, decoded_rows, sync
):
    calls = [0]

    def full(descriptor):
        calls[0] += 1
        if calls[0] == sync:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CacheError, match=r"decoded images cannot be written \(No space left on device\); .*") as error:
        opened(tmp_path, encoded)
    assert len(str(error.value).splitlines()) == 1
    decoded_rows.clear()
    assert torch.equal(opened(tmp_path, encoded), expected)
    assert len(decoded_rows) - 8 <= 40 - 9 * ((sync - 1) // 2)


def test_a_disk_that_does_not_keep_what_is_written_ends_in_one_line(tmp_path, encoded, monkeypatch):
    monkeypatch.setattr(BlockStore, "write", lambda self, block, content: None)
    with pytest.raises(CacheError, match=r"expected 5 whole blocks of decoded images, found 5 damaged again after"):
        opened(tmp_path, encoded)


def test_a_folder_that_may_not_be_written_is_one_line(tmp_path, encoded):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CacheError, match="decoded images cannot be written"):
        opened(tmp_path / "file" / "below", encoded)


def test_a_bad_row_is_the_first_one_and_ends_the_making(tmp_path, encode):
    images = [picture(i) for i in range(40)]
    images[11] = images[33] = b"broken"
    with pytest.raises(DataError, match=r"^here, row 11: the image cannot be decoded"):
        opened(tmp_path, encode(images))


# ---- A split of it ----


@pytest.fixture
def mapped(tmp_path, encoded):
    cache = DecodedCache(tmp_path, encoded)
    cache.open(1, show=False)
    return MappedSplit(cache, torch.arange(40) % 3, NAMES)


def test_a_mapped_split_goes_to_other_processes_by_its_path(mapped, expected):
    written = pickle.dumps(mapped)
    assert torch.equal(pickle.loads(written).images, expected)
    pixels = pickle.dumps(ImageSplit(mapped.images.clone(), mapped.labels, NAMES))
    assert expected.numpy().tobytes() in pixels
    assert expected.numpy().tobytes() not in written


def test_statistics_of_a_file_are_exact_and_counted_once(mapped, expected, monkeypatch):
    counts = mapped.cache.levels()
    assert torch.equal(counts, count_levels(expected))
    assert torch.equal(counts, torch.stack([torch.bincount(c.flatten(), minlength=256) for c in expected.unbind(1)]))
    assert mapped.statistics() == ImageSplit(expected, mapped.labels, NAMES).statistics()
    path = mapped.cache.folder / decoded_cache.LEVELS_FILE
    for damage in ("", "{}", "[]", path.read_text()[:500], path.read_text().replace("1", "2")):
        path.write_text(damage)
        assert torch.equal(mapped.cache.levels(), counts)
    monkeypatch.setattr(decoded_cache, "count_levels", None)
    assert torch.equal(mapped.cache.levels(), counts)


def test_a_fingerprint_of_a_file_is_of_its_pixels(tmp_path, encode, encoded, mapped):
    same = DecodedCache(tmp_path, encode([picture(i) for i in range(40)], identity=("elsewhere",)))
    other = DecodedCache(tmp_path, encode([picture(i + (i == 20)) for i in range(40)], identity=("other",)))
    for cache in (same, other):
        cache.open(1, show=False)
    assert same.folder != mapped.cache.folder
    assert same.fingerprint() == mapped.fingerprint()
    assert other.fingerprint() != mapped.fingerprint()


def test_a_whole_file_is_read_without_a_lock(tmp_path, encoded, expected, monkeypatch):
    opened(tmp_path, encoded)
    monkeypatch.setattr(BlockStore, "lock", lambda self: pytest.fail("asked for the lock"))
    assert torch.equal(opened(tmp_path, encoded), expected)


def test_an_image_that_was_replaced_without_a_trace_in_size_and_time_is_decoded_anew(tmp_path):
    def named(row):
        return {"bytes": None, "path": str(tmp_path / f"{row}.bmp")}

    for row in range(12):
        picture(row, size=(6, 6)).save(tmp_path / f"{row}.bmp")
    table = datasets.Dataset.from_dict(
        {"image": [named(row) for row in range(12)]},
        features=datasets.Features({"image": datasets.Image(decode=False)}),
    )
    encoded = EncodedImages(table, "image", np.arange(12), (6, 6), True, "RGB", "here", True, ("set",))
    before = opened(tmp_path / "caches", encoded).clone()
    path = tmp_path / "5.bmp"
    state = os.stat(path)
    picture(99, size=(6, 6)).save(path)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert (os.stat(path).st_size, os.stat(path).st_mtime_ns) == (state.st_size, state.st_mtime_ns)
    after = opened(tmp_path / "caches", encoded)
    assert torch.equal(after, encoded.decode(range(12)))
    assert not torch.equal(after[5], before[5])
