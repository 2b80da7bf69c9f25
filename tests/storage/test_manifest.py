import hashlib
import json
import random
import shutil

import pytest

from hf_ihb.errors import CheckpointError
from hf_ihb.storage import MANIFEST_FILE, Sealing, publish, read_manifest, verify, write_manifest


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "made"
    (made / "inner").mkdir(parents=True)
    (made / "a.bin").write_bytes(bytes(range(256)))
    (made / "inner" / "b.json").write_text('{"b": 1}')
    (made / "empty").touch()
    write_manifest(made, {"step": 3})
    return made


def test_what_was_written_verifies_and_says_what_it_is(folder):
    assert verify(folder)["about"] == {"step": 3}
    assert set(verify(folder)["files"]) == {"a.bin", "inner/b.json", "empty"}


def test_a_folder_without_a_manifest_is_told_from_a_damaged_one(tmp_path):
    assert verify(tmp_path) is None
    assert read_manifest(tmp_path) is None


@pytest.mark.parametrize("name", ["a.bin", "inner/b.json", "empty"])
def test_a_missing_file_is_named(name, folder):
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name}: expected .* bytes, found no such file"):
        verify(folder)


@pytest.mark.parametrize("name", ["a.bin", "inner/b.json", MANIFEST_FILE])
def test_every_flipped_bit_and_every_cut_is_noticed(name, folder):
    path, generator = folder / name, random.Random(0)
    whole = path.read_bytes()
    for _ in range(60):
        bit = generator.randrange(8 * len(whole))
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match=name):
            verify(folder)
    for length in {0, 1, len(whole) // 2, len(whole) - 1}:
        for padded in (b"", b"\0"):
            path.write_bytes(whole[:length] + padded * (len(whole) - length))
            with pytest.raises(CheckpointError, match=name):
                verify(folder)
    path.write_bytes(whole)
    assert verify(folder) is not None


@pytest.mark.parametrize("size", [0, 1, 2**20 - 1, 2**20, 9 * 2**20 + 3])
def test_what_is_hashed_while_it_is_written_is_the_file(size, tmp_path):
    generator, path = random.Random(size), tmp_path / "file"
    content = generator.randbytes(size)
    with Sealing() as sealing:
        with sealing.written(path) as stream:
            at, buffer = 0, bytearray(2**21)  # whose bytes are others' as soon as they are written
            while at < size:
                end = min(size, at + generator.choice([1, 100, 2**18, 2**21]))
                buffer[: end - at] = content[at:end]
                assert stream.write(memoryview(buffer)[: end - at]) == end - at
                at = end
        facts = sealing.facts(tmp_path)
        write_manifest(tmp_path, {}, sealing)
    assert path.read_bytes() == content
    assert facts == {"file": {"bytes": size, "sha256": hashlib.sha256(content).hexdigest()}}
    assert verify(tmp_path) is not None


def test_a_write_that_fails_is_not_waited_for(tmp_path):
    def write():
        with Sealing() as sealing, sealing.written(tmp_path / "file") as stream:
            stream.write(bytes(2**21))
            raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        write()


def test_a_manifest_of_another_folder_is_not_taken(folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (other / "a.bin").write_bytes(b"x" * 256)
    write_manifest(other, {"step": 3})
    shutil.copy(other / MANIFEST_FILE, folder / MANIFEST_FILE)
    with pytest.raises(CheckpointError, match=r"a\.bin: expected the content that was written"):
        verify(folder)


def test_a_changed_manifest_is_not_believed(folder):
    content = json.loads((folder / MANIFEST_FILE).read_text())
    content["about"]["step"] = 4
    (folder / MANIFEST_FILE).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="manifest as it was written, found it damaged"):
        verify(folder)


def test_a_published_folder_takes_the_place_of_one_of_its_name(folder, tmp_path):
    final = tmp_path / "final"
    final.mkdir()
    (final / "old").touch()
    publish(folder, final)
    assert not folder.exists()
    assert verify(final)["about"] == {"step": 3}
    assert not (final / "old").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
