"""A folder with a manifest: the size and SHA-256 of each of its files, written last."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hf_ihb.errors import CheckpointError

MANIFEST_FILE = "manifest.json"
_FORMAT = 1


def write_manifest(folder: Path, about: Mapping[str, Any]) -> None:
    """Writes down what a folder holds; nothing may be written into it afterwards.

    Args:
        folder: Whose files are whole.
        about: What else is to be known of it, as JSON.
    """
    files = {str(p.relative_to(folder)): _facts(p) for p in _files(folder) if p.name != MANIFEST_FILE}
    content = {"format": _FORMAT, "files": files, "about": dict(about)}
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
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
