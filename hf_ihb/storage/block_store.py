"""Rows of bytes in one file, made block by block, each with a checksum in a journal.

Whatever happens while a file is written, a block that no journal names or that does not match its checksum is made
again, and nothing else is. The folder's name is a hash of everything that determines the rows, so a file that no longer
fits is never found.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_ihb.storage.cache_folder import CacheFolder, checksum


class BlockStore(CacheFolder):
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
        super().__init__(root, description, what=what, remedy=remedy)
        self.path = self.folder / file
        self.num_rows, self.row_bytes, self.block_rows = num_rows, row_bytes, block_rows
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

    def prepare(self, *, describes: bool = True) -> None:
        """Makes the folder with its description, and the file, sparse until it is written.

        Args:
            describes: Whether this process writes the description.
        """
        super().prepare(describes=describes)
        with self.storing():
            self.path.touch()

    # ---- Blocks ----

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
