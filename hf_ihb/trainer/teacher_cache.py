"""What a frozen teacher says of every training image, computed once and kept on disk.

A cache is a `BlockStore` of rows, a row an image, in the order of the training split.
"""

import contextlib
import dataclasses
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from huggingface_hub import constants
from torch import Tensor
from tqdm.auto import tqdm

from hf_ihb.data.placement import readable_bytes, readable_seconds, rows_onto
from hf_ihb.errors import CacheError
from hf_ihb.functional.gram import TokenGram
from hf_ihb.models.teacher import Teacher
from hf_ihb.storage.block_store import BlockStore
from hf_ihb.trainer.cache_rows import Code, Layout
from hf_ihb.trainer.shared_caches import kept_tensors, on_every_process, trouble

FORMAT = 4
BLOCK_ROWS = 512
ROWS_FILE, STATISTICS_FILE = "rows.bin", "statistics.safetensors"
_CHECKED_ROWS = 8
_LOCK_SECONDS = 30.0

Compute = Callable[[Sequence[Sequence[int]]], Iterator[Tensor]]


def cache_root(folder: str | None) -> Path:
    """Folder of all caches: the one given, or one beside the Hub's own."""
    return Path(constants.HF_HOME, "hf_ihb", "teacher_cache") if folder is None else Path(folder).expanduser()


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and bytes of some tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def describe_teacher(teacher: Teacher, whole: bool) -> dict[str, Any]:
    """What determines what a teacher says of a given image.

    Args:
        teacher: That is asked.
        whole: Whether it is shown all of each image, as `Teacher.prepare` takes it.
    """
    pixels = teacher.pixels.whole() if whole and teacher.pixels is not None else teacher.pixels
    config = teacher.model.config.to_dict()
    # where it came from and what wrote it say nothing about what it is
    kept = {name: value for name, value in config.items() if name not in ("_name_or_path", "transformers_version")}
    permutation = None if teacher.permutation is None else teacher.permutation.tolist()
    return {
        "class": type(teacher.model).__name__,
        "config": kept,
        "weights": fingerprint(teacher.model.state_dict()),
        "pixels": None if pixels is None else pixels.description(),
        "permutation": permutation,
    }


class TeacherCache:
    """Rows of numbers, one for each training image.

    Args:
        root: Folder of all caches.
        description: Everything that determines the rows, as JSON; its hash names the cache.
        layout: What a row holds.
        num_rows: Number of training images.

    Attributes:
        codes: Of the tokens of each layer, and of the mean token; to be set before rows are made or read. None for
            inner products and scores, which lie before those that have one.
    """

    def __init__(self, root: Path, description: Mapping[str, Any], layout: Layout, num_rows: int) -> None:
        self.layout, self.num_rows = layout, num_rows
        about = {"format": FORMAT, "rows": num_rows, "block_rows": BLOCK_ROWS, "layout": dataclasses.asdict(layout)}
        self.store = BlockStore(
            root,
            {**about, **description},
            ROWS_FILE,
            num_rows=num_rows,
            row_bytes=layout.row_bytes,
            block_rows=BLOCK_ROWS,
            what="the teacher cache",
            remedy="give another 'teacher_cache_dir', or 'teacher_cache' off",
        )
        self.codes: list[Code] = []
        self._rows: Tensor | None = None

    @property
    def folder(self) -> Path:
        """Where it is."""
        return self.store.folder

    @property
    def key(self) -> str:
        """Hash of everything that determines the rows."""
        return self.store.key

    @property
    def num_bytes(self) -> int:
        """Size of the whole cache."""
        return self.store.num_bytes

    @property
    def device(self) -> torch.device:
        """Where the rows are, and the index is expected."""
        return self._rows.device

    def __call__(self, index: Tensor, device: torch.device | None = None) -> list[Tensor | TokenGram]:
        """What the teacher said of some images, layer by layer.

        Args:
            index: ``(B,)`` int64 positions in the training split, where the rows are.
            device: Where the answer is wanted; there as well if None.
        """
        here = device in (None, self.device)
        # whole rows, whatever their type
        rows = self._rows.index_select(0, index) if here else rows_onto(device, self._rows, index)
        return self._decoded(rows)

    def _decoded(self, rows: Tensor) -> list[Tensor | TokenGram]:
        parts = self.layout.unpack(rows)
        first = len(parts) - len(self.codes)
        return parts[:first] + [code.read(part) for code, part in zip(self.codes, parts[first:], strict=True)]

    def pack(self, scores: Tensor | None, features: Sequence[Tensor]) -> Tensor:
        """Rows of class scores ``(B, K)``, where there are any, and ``(B, N, D)`` of each part of the features."""
        first = len(features) - len(self.codes)
        coded = [code.write(x) for code, x in zip(self.codes, features[first:], strict=True)]
        return self.layout.pack(([] if scores is None else [scores[:, None]]) + [*features[:first], *coded])

    # ---- On disk ----

    def trouble(self, share: float = 1.0) -> str | None:
        """What keeps the cache from being built: no leave to write, or more than a share of the disk's free space."""
        return trouble(self.store, "the teacher cache", self.store.bytes_to_write(), share)

    def written(self) -> int:
        """Images whose rows a journal names, without looking at the rows."""
        return self.store.written()

    def missing(self, *, show: bool = False) -> list[int]:
        """Blocks that are not there or not what was written.

        Args:
            show: With a progress bar.
        """
        return self.store.missing(show=show)

    def statistics(self, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """See `hf_ihb.trainer.shared_caches.kept_tensors`."""
        return kept_tensors(self.store, STATISTICS_FILE, make)

    # ---- Building ----

    def open(self, compute: Compute, batch_size: int, *, tolerance: float, show: bool) -> None:
        """Builds what is missing, checks the rest, and makes the rows readable.

        Blocks are shared out among the processes. Another run that builds the same cache is waited for.

        Args:
            compute: Batches of row numbers -> for each of them the rows ``(n, width)``.
            batch_size: Images in a batch, at most.
            tolerance: Relative error within which rows that are computed anew must agree with those on disk.
            show: Print size and time before, with a progress bar.

        Raises:
            CacheError: On every process, if a disk is full or cannot be written to, a number does not fit, or a row on
                disk is not what the teacher says.
        """
        state = PartialState()
        shares = [(state.process_index, state.num_processes)]
        if (local := int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) < state.num_processes:
            shares.append((state.local_process_index, local))  # machines that do not share a disk
        with on_every_process(state, self.key, "teacher cache"):
            incomplete = bool(self.missing(show=show))
        # a whole cache is read as it is, also where nothing may be written
        with self._alone(state, show) if any(gather_object([incomplete])) else contextlib.nullcontext():
            for number, (index, count) in enumerate(shares):
                with on_every_process(state, self.key, "teacher cache"):
                    missing = [block for block in self.missing(show=show) if block % count == index]
                    if missing:
                        self._build(missing, compute, batch_size, show and number == 0)
        with on_every_process(state, self.key, "teacher cache"):
            if missing := self.missing():
                raise CacheError(
                    f"{self.folder}: expected {self.store.num_blocks} whole blocks, found {len(missing)} damaged"
                )
            self._rows = self.store.map(self.layout.dtype)
            self._compare(compute, tolerance)

    def _build(self, blocks: Sequence[int], compute: Compute, batch_size: int, show: bool) -> None:
        self._make_room()
        batches = {block: _batches(self.store.rows_of(block), batch_size) for block in blocks}
        count = sum(len(self.store.rows_of(block)) for block in blocks)
        if show:
            print(self._announcement(count, compute, batch_size), flush=True)
        answers = compute([batch for parts in batches.values() for batch in parts])
        with tqdm(total=count, desc="Teacher cache", unit="img", disable=not show) as bar:
            for block, parts in batches.items():
                rows = []
                for batch in parts:
                    rows.append(self._fitting(next(answers), batch))
                    bar.update(len(batch))
                content = torch.cat(rows).contiguous().numpy().tobytes()
                self.store.write(block, content, PartialState().process_index)

    def _make_room(self) -> None:
        self.store.prepare(describes=PartialState().is_local_main_process)
        if (trouble := self.trouble()) is not None:
            raise CacheError(f"{trouble}; {self.store.remedy}")
        with self.store.storing():
            os.truncate(self.store.path, self.num_bytes)

    def _announcement(self, count: int, compute: Compute, batch_size: int) -> str:
        """What is about to be built, its size, and how long it takes, measured on one batch."""
        first = range(min(batch_size, BLOCK_ROWS, self.num_rows))
        next(compute([first]))
        start = time.perf_counter()
        next(compute([first]))
        each = (time.perf_counter() - start) / len(first)
        processes = PartialState().num_processes
        todo = f"{count * processes:,}" if processes > 1 else f"{count:,}"
        return (
            f"Teacher cache ({self.layout.kind}): {self.num_rows:,} images x {self.layout.row_bytes:,} B = "
            f"{readable_bytes(self.num_bytes)} in {self.folder}; {todo} images to go, about "
            f"{readable_seconds(each * count)} ({1000 * each:.3g} ms an image)"
        )

    def _stored(self, rows: Tensor) -> Tensor:
        """Rows as they are written."""
        if self.layout.dtype == torch.uint8 and rows.dtype != torch.uint8:
            raise TypeError(f"rows of '{self.layout.kind}': expected bytes, as `Layout.pack` makes them")
        return rows.to(self.layout.dtype).cpu()

    def _fitting(self, values: Tensor, rows: Sequence[int]) -> Tensor:
        stored = self._stored(values)
        for part in self.layout.numbers(stored):
            if not (finite := torch.isfinite(part).all(dim=1)).all():
                raise CacheError(
                    f"teacher cache ({self.layout.kind}): expected numbers within {torch.finfo(part.dtype).max:g}, "
                    f"found one beyond or NaN for training image {rows[int(finite.int().argmin())]}; give "
                    "'teacher_cache' off"
                )
        return stored

    def _compare(self, compute: Compute, tolerance: float) -> None:
        """Some rows are computed anew: the key cannot know of a driver, or of a teacher changed in place."""
        rows = torch.linspace(0, self.num_rows - 1, min(_CHECKED_ROWS, self.num_rows)).long()
        stored, fresh = self._rows[rows], self._stored(next(compute([rows.tolist()])))
        errors = self._distances(stored, fresh)
        if not (errors <= tolerance).all():
            worst = int(errors.nan_to_num(torch.inf).argmax())
            raise CacheError(
                f"{self.folder}: training image {int(rows[worst])}: expected what the teacher says now, found a "
                f"row that is {float(errors[worst]):.2g} away (relative, {tolerance:g} allowed); delete the folder"
            )

    def _distances(self, stored: Tensor, fresh: Tensor) -> Tensor:
        """``(B,)`` relative distance of rows, of scores or of a kind of features where that is larger."""
        sides, distances = [], []
        for rows in (stored, fresh):
            numbers, first = self.layout.numbers(rows), len(self.layout.shapes) - len(self.codes)
            # of tokens as they are: their deviations from the mean may be nothing but the rounding of the teacher
            sides.append(numbers[:first] + self._decoded(rows)[first:])
        for place in self.layout.places:
            old, new = (torch.cat([part.float().flatten(1) for part in side[place]], dim=1) for side in sides)
            distances.append((old - new).norm(dim=1) / new.norm(dim=1).clamp_min(1e-12))
        return torch.stack(distances).amax(dim=0)

    # ---- Several processes ----

    @contextlib.contextmanager
    def _alone(self, state: PartialState, show: bool) -> Iterator[None]:
        """The main process holds the lock; the others hear of it at once, however long another run takes."""
        said = False
        with contextlib.ExitStack() as stack:
            with on_every_process(state, self.key, "teacher cache"):
                lock = stack.enter_context(self.store.lock())
            while True:
                held = [not state.is_main_process or self.store.take(lock, _LOCK_SECONDS)]
                if broadcast_object_list(held)[0]:
                    break
                if show and not said:
                    print(f"Waiting for another run that builds the teacher cache in {self.folder}", flush=True)
                    said = True
            yield

    def place(self, device: torch.device, where: Literal["device", "host"]) -> None:
        """Moves the rows to where they are read from fastest.

        Args:
            device: That the training runs on.
            where: Onto it, or left to the file and its pages in memory.
        """
        if where == "device":
            self._rows = self._rows.to(device)


def _batches(rows: range, size: int) -> list[range]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]
