"""What a frozen teacher says of augmented images, by epoch and image: kept while trainings ask, read by later ones.

Given the seed of the augmentation it is a constant, whatever the loss, the temperature, the student and the order of
the images are. A file holds what one process asked within an epoch since it last wrote: which images, a bit each, and
their rows, in the order of the training split. Files are only added, and a file that no journal names is none.
"""

import contextlib
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor
from transformers.utils import logging

from hf_ihb.data.placement import onto, readable_bytes, rows_onto
from hf_ihb.errors import CacheError
from hf_ihb.functional.gram import TokenGram
from hf_ihb.functional.tokens import TokenMean
from hf_ihb.storage.cache_folder import CacheFolder, checksum
from hf_ihb.trainer.shared_caches import kept_tensors, on_every_process, trouble
from hf_ihb.trainer.view_rows import ViewRow

logger = logging.get_logger(__name__)

FORMAT = 1
STATISTICS_FILE = "statistics"  # no suffix: files that have one hold rows
_CHECKED_ROWS = 8
_HELD_BYTES = 2**26  # of rows that are not written yet
Ask = Callable[[Tensor | None], Tensor]


class ViewCache:
    """A row for every training image's view of each epoch, as far as anybody asked for them.

    Args:
        root: Folder of all caches.
        description: Everything that determines a view and what the teacher says of it, as JSON; its hash names it.
        row: How what the teacher says is stored; the code of a mean token may be put in before rows are made or read.
        num_images: Of the training split.
        run: That may write, as it is named to others.
    """

    kind = "views"

    def __init__(
        self, root: Path, description: Mapping[str, Any], row: ViewRow, num_images: int, run: str = ""
    ) -> None:
        about = {"format": FORMAT, "kind": self.kind, "images": num_images, "row": row.description()}
        remedy = "give another 'teacher_cache_dir', or 'teacher_cache' off"
        self.store = CacheFolder(root, about | {"of": description}, what="the cache of views", remedy=remedy)
        self.row, self.num_images, self.run = row, num_images, run
        self.writes = False
        self._lock = contextlib.ExitStack()
        self._epoch: int | None = None
        self._known = np.zeros(num_images, dtype=bool)  # whose rows the table holds
        self._table = torch.empty(0, row.width, dtype=torch.int16)
        self._asked = np.zeros(num_images, dtype=bool)  # whose rows are still to be written
        self._fresh: list[tuple[np.ndarray, Tensor]] = []
        self._held = 0

    @property
    def folder(self) -> Path:
        """Where it is."""
        return self.store.folder

    @property
    def key(self) -> str:
        """Hash of everything that determines the rows."""
        return self.store.key

    @property
    def epoch_bytes(self) -> int:
        """Of the views of one epoch."""
        return 2 * self.row.width * self.num_images + -(-self.num_images // 8)

    # ---- Reading and keeping ----

    def __call__(
        self, epoch: int, index: np.ndarray, ask: Ask, device: torch.device
    ) -> tuple[Tensor | None, list[TokenGram | TokenMean] | None]:
        """What the teacher says of a batch of views, always as it is stored: read or asked for, it is the same.

        Args:
            epoch: That the views are of.
            index: ``(B,)`` positions in the training split, on the host.
            ask: Positions in the batch ``(n,)``, None for all -> rows ``(n, width)`` of what the teacher says; called
                for those whose rows are not there.
            device: Where the answer is wanted.

        Returns:
            As `ViewRow.unpack`.
        """
        self._turn_to(epoch)
        known = self._known[index]
        if not known.any():
            rows = ask(None)
            self._keep(index, rows)
            return self.row.unpack(rows)
        rows = rows_onto(device, self._table, torch.from_numpy(index))
        if not known.all():
            missing = np.flatnonzero(~known)
            where = onto(device, torch.from_numpy(missing))
            asked = ask(where)
            self._keep(index[missing], asked)
            rows = rows.index_copy(0, where, asked)
        return self.row.unpack(rows)

    def _keep(self, index: np.ndarray, rows: Tensor) -> None:
        if not self.writes:
            return
        if (again := self._asked[index]).any():  # a sampler that fills its last batch up shows images twice
            new = np.flatnonzero(~again)
            index, rows = index[new], rows[onto(rows.device, torch.from_numpy(new))]
        self._asked[index] = True
        self._fresh.append((index, rows))
        self._held += 2 * rows.numel()
        if self._held > _HELD_BYTES:
            self.flush()

    def _turn_to(self, epoch: int) -> None:
        """Rows of an epoch are read whole, when its first batch comes."""
        if epoch == self._epoch:
            return
        self.flush()
        self._epoch, self._table = epoch, self._table.new_zeros(self.num_images, self.row.width)
        self._known[:] = self._asked[:] = False
        for rows, known in self._parts(epoch):
            self._table[torch.from_numpy(known)] = rows
            self._known |= known

    def _parts(self, epoch: int) -> Iterator[tuple[Tensor, np.ndarray]]:
        """Rows ``(n, width)`` of an epoch, and whose they are ``(N,)``, file by file."""
        journal = self.store.journal()
        for path in self._files(journal):
            if _epoch_of(path) != epoch:
                continue
            content = path.read_bytes()
            if checksum(content) != journal[path.name]:
                again = f"the teacher is asked again for its {_count_of(path):,} views"
                logger.warning(f"{path}: expected what was written, found something else; {again}")
                continue
            part = load(content)
            yield part["rows"], np.unpackbits(part["images"].numpy(), count=self.num_images).astype(bool)

    def flush(self) -> None:
        """Writes what was asked since the last time.

        A disk that is full ends the writing, not the training: what is learned from is the same.

        Raises:
            CacheError: If the teacher said something that is no number, or that half precision does not reach.
        """
        if not self._fresh:
            return
        index = np.concatenate([part for part, _ in self._fresh])
        rows = torch.cat([part for _, part in self._fresh])
        self._fresh, self._held = [], 0
        self.add(self._epoch, index, rows)

    def missing(self, epoch: int) -> np.ndarray:
        """Positions of the images whose views of an epoch no file holds."""
        return np.flatnonzero(~sum((known for _, known in self._parts(epoch)), np.zeros(self.num_images, dtype=bool)))

    def add(self, epoch: int, index: np.ndarray, rows: Tensor) -> None:
        """Writes rows ``(n, width)`` of images of an epoch; see `flush`."""
        rows = rows.cpu()[torch.from_numpy(index.argsort())]
        if (undefined := self.row.undefined(rows)).any():
            image = int(np.sort(index)[int(undefined.int().argmax())])
            raise CacheError(
                f"teacher: expected numbers that half precision holds, found NaN or one beyond for training image "
                f"{image} in epoch {epoch}; they are not kept"
            )
        images = np.packbits(np.isin(np.arange(self.num_images), index))
        parts = {"images": torch.from_numpy(images), "rows": rows}
        try:
            self._write(f"{epoch:06d}-{len(index)}-{uuid.uuid4().hex[:12]}", save(parts, {"run": self.run}))
        except CacheError as error:
            self.writes = False
            logger.warning(f"{error}; training goes on without writing")

    def _write(self, name: str, content: bytes) -> None:
        path = self.folder / f"{name}.safetensors"
        with self.store.storing():
            staged = path.with_suffix(".tmp")
            with staged.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            staged.replace(path)
            self.store.note(path.name, content, PartialState().process_index)

    # ---- What is there ----

    def statistics(self, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """See `hf_ihb.trainer.shared_caches.kept_tensors`."""
        return kept_tensors(self.store, STATISTICS_FILE, make)

    def _files(self, journal: Mapping[str, str]) -> list[Path]:
        """Those that a journal names, epoch by epoch."""
        names = sorted(name for name in journal if name.endswith(".safetensors"))
        return [path for name in names if (path := self.folder / name).is_file()]

    def written(self) -> int:
        """Views whose rows a journal names, without looking at the rows."""
        return sum(_count_of(path) for path in self._files(self.store.journal()))

    @property
    def begun_by(self) -> str | None:
        """The run that wrote the first rows that are there; None where none are."""
        files = sorted(self._files(self.store.journal()), key=lambda path: path.stat().st_mtime_ns)
        with contextlib.suppress(IndexError, OSError, SafetensorError), safe_open(files[0], "pt") as file:
            return file.metadata()["run"]
        return None

    def trouble(self, views: int, share: float = 1.0) -> str | None:
        """What keeps it from growing to the views that a training asks for; see `shared_caches.trouble`."""
        needed = max(0, views - self.written()) * self.epoch_bytes // self.num_images
        return trouble(self.store, self.store.what, max(1, needed), share)

    # ---- Opening and closing ----

    def open(self, fresh: Callable[[int, np.ndarray], Tensor], views: int, *, tolerance: float, show: bool) -> None:
        """Takes the right to write where no other run has it, and compares some rows with what the teacher says now.

        Args:
            fresh: An epoch and positions of images ``(n,)`` -> rows ``(n, width)``, asked for anew.
            views: That the training asks for.
            tolerance: Relative error within which these must agree with what is stored.
            show: Say what is there and who writes.

        Raises:
            CacheError: On every process, if they do not agree, or if nothing is there and nothing can be written.
        """
        state, said = PartialState(), ""
        self.close()
        with on_every_process(state, self.key, self.store.what):
            if state.is_main_process:
                self.writes, said = self._take(views)
            self._compare(fresh, tolerance)
        self.writes, self._epoch = broadcast_object_list([self.writes])[0], None
        if self.writes:
            self.store.prepare(describes=state.is_main_process)
        if show:
            print(f"{self._announcement(views)}; {said}", flush=True)

    def _take(self, views: int) -> tuple[bool, str]:
        """Tries to become the one that writes, without waiting: whether it is, and what to say."""
        if (why := self.trouble(views)) is not None:
            if not self.written():
                raise CacheError(f"{why}; {self.store.remedy}")
            return False, f"this run writes none: {why}"
        if self.store.take(self._lock.enter_context(self.store.lock()), 0):
            return True, "this run writes what is not there"
        return False, "another run writes: this one reads what is there when an epoch begins, and asks for the rest"

    def _announcement(self, views: int) -> str:
        row, begun = self.epoch_bytes / self.num_images, self.begun_by
        by = "" if begun is None else f", begun by '{begun}'"
        return (
            f"Teacher cache (views): {views:,} views x {row:.4g} B ({self.row.describe()}) = "
            f"{readable_bytes(views * row)} in {self.folder}; {self.written():,} are there{by}"
        )

    def _compare(self, fresh: Callable[[int, np.ndarray], Tensor], tolerance: float) -> None:
        """Some rows are asked for anew: the key cannot know of a driver, or of augmentation that was changed."""
        if not (files := self._files(self.store.journal())):
            return
        self._turn_to(epoch := _epoch_of(files[-1]))
        there = np.flatnonzero(self._known)
        if len(there) == 0:
            return
        rows = there[np.linspace(0, len(there) - 1, min(_CHECKED_ROWS, len(there))).astype(int)]
        sides = (self._table[torch.from_numpy(rows)], fresh(epoch, rows).cpu())
        parts = zip(*map(self.row.numbers, sides), strict=True)
        errors = torch.stack([(a - b).norm(dim=1) / b.norm(dim=1).clamp_min(1e-12) for a, b in parts]).amax(dim=0)
        if not (errors <= tolerance).all():
            worst = int(errors.nan_to_num(torch.inf).argmax())
            raise CacheError(
                f"{self.folder}: image {int(rows[worst])} in epoch {epoch}: expected what the teacher says now, found "
                f"a row that is {float(errors[worst]):.2g} away (relative, {tolerance:g} allowed); delete the folder"
            )

    def close(self) -> None:
        """Writes what is left, and lets another run write."""
        try:
            self.flush()
        finally:
            self.writes = False
            self._lock.close()


def _epoch_of(path: Path) -> int:
    return int(path.name.split("-")[0])


def _count_of(path: Path) -> int:
    return int(path.name.split("-")[1])
