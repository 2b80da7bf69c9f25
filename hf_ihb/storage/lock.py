"""A folder that one process at a time may write to."""

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "launch": launch()}
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


def launch() -> str | None:
    """What tells a launch by torchrun from others, the same when it starts its processes again; None without it."""
    run = os.environ.get("TORCHELASTIC_RUN_ID")
    return None if run is None else f"{run}, of process {os.getppid()} on {socket.gethostname()}"


def last_holder(folder: Path) -> dict[str, Any]:
    """Who held a folder last: ``host``, ``pid`` and ``launch``; nothing where that is not known."""
    try:
        holder = json.loads((folder / HOLDER_FILE).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _holder(folder: Path) -> str:
    holder = last_holder(folder)
    return f"process {holder['pid']} on {holder['host']}" if holder.keys() >= {"pid", "host"} else "another process"
