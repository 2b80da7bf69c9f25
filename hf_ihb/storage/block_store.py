"""Rows of bytes in one file, made block by block, each with a checksum in a journal.

Whatever happens while a file is written, a block that no journal names or that does not match its checksum is made
again, and nothing else is. The folder's name is a hash of everything that determines the rows, so a file that no longer
fits is never found.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm.auto import tqdm

from hf_ihb.errors import CacheError

DESCRIPTION_FILE = "description.json"


class BlockStore:
    """A file of rows, a row an item, in their order.

    Args:
        root: Folder of all such files.
        description: Everything that determines the rows, as JSON; its hash names the folder.
        file: Name of the file in it.
        num_rows: Rows.
        row_bytes: Bytes of each.
        block_rows: Rows of a block; the last one may be short.
        what: What errors call it, in the plural or with an article.
        remedy: What to do where it cannot be written, for errors.
    """

    def __init__(
        self,
        root: Path,
        description: Mapping[str, Any],
        file: str,
        *,
        num_rows: int,
        row_bytes: int,
        block_rows: int,
        what: str,
        remedy: str,
    ) -> None:
        self.description = dict(description)
        canonical = json.dumps(self.description, sort_keys=True, default=str)
        self.key = hashlib.sha256(canonical.encode()).hexdigest()
        self.folder = root.absolute() / self.key[:32]
        self.path = self.folder / file
        self.num_rows, self.row_bytes, self.block_rows = num_rows, row_bytes, block_rows
        self.what, self.remedy = what, remedy
        self._intact: set[int] = set()

    @property
    def num_blocks(self) -> int:
        """Blocks of `block_rows`."""
        return -(-self.num_rows // self.block_rows)

    @property
    def num_bytes(self) -> int:
        """Of the whole file."""
        return self.num_rows * self.row_bytes

    def rows_of(self, block: int) -> range:
        """Rows of a block."""
        return range(block * self.block_rows, min((block + 1) * self.block_rows, self.num_rows))

    # ---- Room ----

    def bytes_to_write(self) -> int:
        """What the file still has to grow by."""
        return max(0, self.num_bytes - (self.path.stat().st_blocks * 512 if self.path.is_file() else 0))

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
        """Makes the folder with its description, which people read, and the file, sparse until it is written.

        Args:
            describes: Whether this process writes the description.
        """
        with self.storing():
            self.folder.mkdir(parents=True, exist_ok=True)
            if describes:
                staged = self.folder / f"{DESCRIPTION_FILE}.{os.getpid()}"
                staged.write_text(json.dumps(self.description, indent=2, sort_keys=True, default=str), "utf-8")
                staged.replace(self.folder / DESCRIPTION_FILE)
            self.path.touch()

    # ---- Blocks ----

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

    def write(self, block: int, content: bytes, writer: int = 0) -> None:
        """Writes a block, and notes it when it is on the disk."""
        with self.storing():
            with self.path.open("r+b") as file:
                file.seek(self.rows_of(block).start * self.row_bytes)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            self.note(str(block), content, writer)
        self._intact.add(block)

    def is_whole(self, block: int, journal: Mapping[str, str]) -> bool:
        """Whether a block is what a journal says was written."""
        if str(block) not in journal or not self.path.is_file():
            return False
        rows = self.rows_of(block)
        with self.path.open("rb") as file:
            file.seek(rows.start * self.row_bytes)
            content = file.read(len(rows) * self.row_bytes)
        return checksum(content) == journal[str(block)]

    def missing(self, journal: Mapping[str, str] | None = None, *, show: bool = False) -> list[int]:
        """Blocks that are not there, or not what was written; those that were once seen whole are not read again.

        Args:
            journal: What is to be believed; what is on the disk if None.
            show: With a progress bar.
        """
        journal = self.journal() if journal is None else journal
        named = [b for b in range(self.num_blocks) if str(b) in journal and b not in self._intact]
        for block in tqdm(named, desc=f"Verifying {self.what}", unit="block", delay=2, disable=not show):
            if self.is_whole(block, journal):
                self._intact.add(block)
        return [block for block in range(self.num_blocks) if block not in self._intact]

    def written(self) -> int:
        """Rows that a journal names, without looking at them."""
        names = self.journal() if self.folder.is_dir() else {}
        return sum(len(self.rows_of(block)) for block in range(self.num_blocks) if str(block) in names)

    def map(self, dtype: torch.dtype) -> Tensor:
        """``(rows, numbers)`` in pages that are read when they are looked at; not to be written to."""
        numbers = torch.from_file(str(self.path), size=self.num_bytes // dtype.itemsize, dtype=dtype)
        return numbers.view(self.num_rows, -1)

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
