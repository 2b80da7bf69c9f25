"""A folder that one process at a time may write to."""

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from hf_ihb.errors import CheckpointError

LOCK_FILE, HOLDER_FILE = ".lock", ".lock-holder.json"
_held: set[Path] = set()


@contextlib.contextmanager
def folder_lock(folder: Path, takes: bool = True) -> Iterator[None]:
    """Holds a folder for this process; a process that holds it already may do so again.

    The system lets go of it when the process ends, however that comes about.

    Args:
        folder: Made if it is not there.
        takes: Whether this process holds it; others of a run leave that to their main one.

    Raises:
        CheckpointError: If another process holds it, whose host and process id it names, or nothing can be written
            there.
    """
    key = folder.resolve()
    if key in _held or not takes:
        yield
        return
    lock = FileLock(folder / LOCK_FILE, timeout=0, thread_local=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        # not in the locked file, which whoever asks for the lock empties
        holder = {"host": socket.gethostname(), "pid": os.getpid()}
        (folder / HOLDER_FILE).write_text(json.dumps(holder), "utf-8")
    except Timeout:
        raise CheckpointError(
            f"{folder}: expected a folder that no other run writes to, found {_holder(folder)} at it; wait for it, or "
            "give another 'output_dir'"
        ) from None
    except OSError as error:
        lock.release()
        raise CheckpointError(
            f"{folder}: expected an output folder that can be written to, found '{error.strerror or error}' where it "
            "is locked; make room or give another 'output_dir'"
        ) from error
    _held.add(key)
    try:
        yield
    finally:
        _held.discard(key)
        lock.release()


def _holder(folder: Path) -> str:
    try:
        holder = json.loads((folder / HOLDER_FILE).read_text("utf-8"))
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
