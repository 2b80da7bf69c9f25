"""A folder of what can be made again, named by a hash of everything that determines it, with a journal of checksums.

A folder that no longer fits is never found. Whatever happens while something is written into it, what no journal names,
or does not match its checksum, is not believed.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash
from filelock import FileLock, Timeout

from hf_ihb.errors import CacheError

DESCRIPTION_FILE = "description.json"


class CacheFolder:
    """A folder that several processes read, and one run at a time writes.

    Args:
        root: Folder of all such folders.
        description: Everything that determines what is in it, as JSON; its hash names the folder.
        what: What errors call it, in the plural or with an article.
        remedy: What to do where it cannot be written, for errors.
    """

    def __init__(self, root: Path, description: Mapping[str, Any], *, what: str, remedy: str) -> None:
        self.description = dict(description)
        canonical = json.dumps(self.description, sort_keys=True, default=str)
        self.key = hashlib.sha256(canonical.encode()).hexdigest()
        self.folder = root.absolute() / self.key[:32]
        self.what, self.remedy = what, remedy

    # ---- Room ----

    def bytes_free(self) -> int:
        """What the disk has left."""
        return shutil.disk_usage(self._there).free

    def may_be_written(self) -> bool:
        """Whether the folder, or the one it would be made in, lets anything be written."""
        return os.access(self._there, os.W_OK)

    @property
    def _there(self) -> Path:
        return next(folder for folder in (self.folder, *self.folder.parents) if folder.is_dir())

    @contextlib.contextmanager
    def storing(self) -> Iterator[None]:
        """Around what writes.

        Raises:
            CacheError: If the disk is full or cannot be written to.
        """
        try:
            yield
        except OSError as error:
            raise CacheError(
                f"{self.folder}: {self.what} cannot be written ({error.strerror or error}); what is there is kept; "
                f"{self.remedy}"
            ) from error

    def prepare(self, *, describes: bool = True) -> None:
        """Makes the folder with its description, which people read.

        Args:
            describes: Whether this process writes the description.
        """
        with self.storing():
            self.folder.mkdir(parents=True, exist_ok=True)
            if describes:
                staged = self.folder / f"{DESCRIPTION_FILE}.{os.getpid()}"
                staged.write_text(json.dumps(self.description, indent=2, sort_keys=True, default=str), "utf-8")
                staged.replace(self.folder / DESCRIPTION_FILE)

    # ---- What is there ----

    def journal(self) -> dict[str, str]:
        """Checksum of each block, and of whatever else was noted; of a torn line nothing."""
        found: dict[str, str] = {}
        for path in sorted(self.folder.glob("journal-*.jsonl")):
            for line in path.read_text("utf-8", errors="replace").splitlines():
                with contextlib.suppress(json.JSONDecodeError):
                    record = json.loads(line)
                    if isinstance(record, dict):
                        found |= record
        return found

    def note(self, name: str, content: bytes, writer: int = 0) -> None:
        """Notes the checksum of what was written.

        Args:
            name: Of it.
            content: All of it, on the disk.
            writer: Number of the process; each has a journal of its own.
        """
        with (self.folder / f"journal-{writer}.jsonl").open("a", encoding="utf-8") as file:
            file.write(f"\n{json.dumps({name: checksum(content)})}\n")  # a line torn by a crash ends here
            file.flush()
            os.fsync(file.fileno())

    # ---- Several processes ----

    @contextlib.contextmanager
    def lock(self) -> Iterator[FileLock]:
        """The lock of the folder, not taken yet; it is let go of at the end, whoever took it."""
        with self.storing():
            self.folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder.with_suffix(".lock"))
        try:
            yield lock
        finally:
            lock.release()

    def take(self, lock: FileLock, patience_s: float) -> bool:
        """Waits for the lock; whether it was to be had.

        Args:
            lock: Of `lock`.
            patience_s: Seconds; without end if negative.
        """
        with self.storing():
            try:
                lock.acquire(timeout=patience_s)
            except Timeout:
                return False
        return True


def checksum(content: bytes) -> str:
    """XXH3, 128 bits, in hexadecimal: it finds accidents, at the speed of memory."""
    return xxhash.xxh3_128_hexdigest(content)
