"""A folder with a manifest: the size and SHA-256 of each of its files, written last."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from typing import IO, Any, Self

from hf_ihb.errors import CheckpointError

MANIFEST_FILE = "manifest.json"
_FORMAT = 1
_THREADS = 8
_SYNC_EVERY = 2**23  # bytes: a disk that begins when a file is whole makes one wait for all of it
_PART = 2**20  # bytes that are handed on to be hashed
_PARTS = 64  # that may wait for it
_READ = 2**22  # bytes that are read at once


class HashedFile:
    """A new file that is only added to, as by `torch.save`: what is written is handed on in parts.

    Args:
        stream: Of the file.
        hand_on: Takes a part that was written.
    """

    def __init__(self, stream: IO[bytes], hand_on: Callable[[bytearray], Any]) -> None:
        self._stream, self._hand_on, self._held = stream, hand_on, bytearray()

    def write(self, data: Any) -> int:
        """Adds bytes; they may change afterwards."""
        self._held += data
        if len(self._held) >= _PART:
            self.flush()
        return len(data)

    def flush(self) -> None:
        """Writes everything."""
        held, self._held = self._held, bytearray()
        self._stream.write(held)
        self._stream.flush()
        self._hand_on(held)


class Sealing:
    """Hashes files and sees them to the disk while others are written; to be used in a ``with``."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_THREADS)
        self._facts: dict[Path, Future] = {}
        self._synced: list[Future] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: Any) -> None:
        self._pool.shutdown()

    def begin(self, paths: Iterable[Path]) -> None:
        """Begins with some files; they may not be changed any more."""
        for path in paths:
            if path not in self._facts:
                self._synced.append(self._pool.submit(_sync, path))
                self._facts[path] = self._pool.submit(_facts, path)

    @contextmanager
    def written(self, path: Path) -> Iterator[HashedFile]:
        """Hashes a file and sees it to the disk while it is written, from its first byte to its last, in the ``with``.

        Its hash is that of what was to be written: a write that went wrong without a word is found when it is verified.
        """
        parts: Queue = Queue(_PARTS)
        digest = self._pool.submit(_sha256_of, iter(parts.get, None))
        size = 0

        def hand_on(part: bytearray) -> None:
            nonlocal size
            parts.put(part)
            if size // _SYNC_EVERY < (size + len(part)) // _SYNC_EVERY:
                self._synced.append(self._pool.submit(_sync, path))
            size += len(part)

        try:
            with path.open("wb") as stream:
                hashed = HashedFile(stream, hand_on)
                yield hashed
                hashed.flush()
        finally:
            parts.put(None)
        self._synced.append(self._pool.submit(_sync, path))
        self._facts[path] = self._pool.submit(lambda: {"bytes": size, "sha256": digest.result()})

    def facts(self, folder: Path) -> dict[str, Any]:
        """Size and hash of each file of a folder, by its name in it.

        Raises:
            OSError: If one could not be brought to the disk.
        """
        paths = [path for path in _files(folder) if path.name != MANIFEST_FILE]
        self.begin(paths)
        found = {str(path.relative_to(folder)): self._facts[path].result() for path in paths}
        for synced in self._synced:
            synced.result()
        return found


def write_manifest(folder: Path, about: Mapping[str, Any], sealing: Sealing | None = None) -> None:
    """Writes down what a folder holds; nothing may be written into it afterwards.

    Args:
        folder: Whose files are whole.
        about: What else is to be known of it, as JSON.
        sealing: That has begun with some of them.
    """
    with sealing or Sealing() as sealing:
        content = {"format": _FORMAT, "files": sealing.facts(folder), "about": dict(about)}
    (folder / MANIFEST_FILE).write_text(json.dumps(content | {"sha256": _digest(content)}, indent=1), "utf-8")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder, ``files`` and ``about``; None where there is none.

    Raises:
        CheckpointError: If it is not as it was written.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text("utf-8"))
        digest = content.pop("sha256")
        whole = digest == _digest(content) and content["format"] == _FORMAT
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        whole = False
    if not whole:
        raise CheckpointError(f"{path}: expected the manifest as it was written, found it damaged")
    return content


def verify(folder: Path) -> dict[str, Any] | None:
    """Compares every file of a folder with its manifest, which is returned; None where there is none.

    Raises:
        CheckpointError: If a file is missing or is not as it was written; it names the first one.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    for name, facts in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: expected {facts['bytes']} bytes, found no such file")
        if path.stat().st_size != facts["bytes"]:
            raise CheckpointError(f"{path}: expected {facts['bytes']} bytes, found {path.stat().st_size}")
        if _sha256(path) != facts["sha256"]:
            raise CheckpointError(f"{path}: expected the content that was written, found another (SHA-256)")
    return manifest


def publish(staged: Path, final: Path) -> None:
    """Moves a folder to its name in one act, once all of it is on the disk.

    Where there is a folder of that name already it is moved aside, and deleted afterwards.
    """
    for path in (*_files(staged), *_folders(staged)):
        _sync(path)
    aside = staged.with_name(f"{staged.name}.replaced")
    if final.exists():
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)
    staged.rename(final)
    _sync(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _files(folder: Path) -> Iterator[Path]:
    return (p for p in sorted(folder.rglob("*")) if p.is_file())


def _folders(folder: Path) -> Iterator[Path]:
    yield from (p for p in sorted(folder.rglob("*")) if p.is_dir())
    yield folder


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _facts(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_READ))  # large: others want the interpreter meanwhile
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def _sha256_of(parts: Iterable[bytearray]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
