"""Encoded images of a data set -> uint8 pixels."""

import contextlib
import functools
import hashlib
import io
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
import PIL
import pyarrow as pa
import pyarrow.compute as pc
import torch
from huggingface_hub import constants
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm.auto import tqdm

from hf_ihb.errors import DataError

MAX_PIXELS = 1 << 26
PIL_MODES = {"rgb": "RGB", "grayscale": "L"}
_DECODER = 2  # of these rules: what was decoded by others is another image
_AT_MOST_16_BITS = ("PNG", "PPM")  # formats whose grey images may be 32-bit integers to Pillow, and are of 16 bits
_AT_ONCE = 16  # images a thread takes at a time: handing them over one by one costs as much as decoding a small PNG
_ROWS_BETWEEN_UPDATES = 512


class RowError(DataError):
    """A row that cannot be used.

    A `DataLoader` raises an error of a worker process anew, with that process's traceback as the message; the last line
    of it is what the error said.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.strip().splitlines()[-1].removeprefix(f"{__name__}.{type(self).__name__}: "))


class Geometry(Protocol):
    """What a model's image processor does to the size of a picture."""

    def of_picture(self, picture: Image.Image) -> Tensor:
        """A picture in RGB -> ``(3, H, W)`` uint8."""

    def description(self) -> dict[str, Any]:
        """What determines it, as JSON."""


@dataclass(frozen=True)
class EncodedImages:
    """The images of a split as the data set stores them, decoded when they are asked for.

    Attributes:
        table: Holds them.
        column: Their column in it.
        rows: ``(N,)`` their rows in it, int64.
        size: Height and width of the decoded images.
        resizes: Whether images of another size are resized, or refused.
        mode: One of PIL's modes.
        where: Data set and split, for errors.
        local: Whether images may be files of this machine.
        identity: What tells the table from every other.
        stored_mode: The mode that the data set says its images are to be read in first; their own if None.
        geometry: What is done to the size of the decoded images; the whole image is brought to `size` if None.
    """

    table: datasets.Dataset
    column: str
    rows: np.ndarray
    size: tuple[int, int]
    resizes: bool
    mode: str
    where: str
    local: bool
    identity: tuple[str, ...]
    stored_mode: str | None = None
    geometry: Geometry | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(N, C, H, W)`` of the decoded images."""
        return len(self.rows), len(Image.new(self.mode, (1, 1)).getbands()), *self.size

    @property
    def num_bytes(self) -> int:
        """Of the decoded images."""
        return int(np.prod(self.shape))

    def select(self, positions: Tensor) -> "EncodedImages":
        """Those at some positions."""
        return replace(self, rows=self.rows[positions.numpy()])

    def through(self, geometry: Geometry) -> "EncodedImages":
        """The same images as a model sees them, from what is encoded and in one step.

        Args:
            geometry: Of the model's image processor; its size of the first image is that of all.

        Raises:
            DataError: If the first image cannot be used.
        """
        row = int(self.rows[0])
        with _bombs_are_errors():
            first = _open(self.table[row][self.column], f"{self.where}, row {row}", self.local, self.stored_mode, "RGB")
        return replace(self, geometry=geometry, size=tuple(geometry.of_picture(first).shape[-2:]))

    def description(self) -> dict[str, Any]:
        """Everything that determines the decoded images, as JSON."""
        seen = {} if self.geometry is None else {"geometry": self.geometry.description()}
        return seen | {
            "table": list(self.identity),
            "files": self._files(),
            "column": self.column,
            "rows": hashlib.sha256(np.ascontiguousarray(self.rows, dtype="<i8").tobytes()).hexdigest(),
            "shape": list(self.shape),
            "mode": self.mode,
            "stored_mode": self.stored_mode,
            "decoder": _DECODER,
            "pillow": PIL.__version__,
        }

    def _files(self) -> str | None:
        """Hash of what tells the files of images that lie beside a local table from those they were, unread.

        A file that is replaced may keep its size and the time it was changed, but not what the system notes (ctime).
        """
        if not self.local:
            return None  # a commit of the Hub is the same everywhere
        column = self.table.with_format("arrow")[:][self.column]
        apart = pc.struct_field(column, "bytes").is_null().to_numpy()[self.rows]
        if not apart.any():
            return None
        digest = hashlib.sha256()
        for path in pc.struct_field(column, "path").take(pa.array(self.rows[apart])).to_pylist():
            with contextlib.suppress(OSError, TypeError, ValueError):  # decoding says what is wrong with it
                state = os.stat(path)
                digest.update(f"{path}\0{state.st_size} {state.st_mtime_ns} {state.st_ctime_ns}\0".encode())
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """Hash of `description`."""
        return hashlib.sha256(json.dumps(self.description(), sort_keys=True).encode()).hexdigest()

    def decode(self, positions: Sequence[int] | Tensor, num_workers: int = 1) -> Tensor:
        """``(n, C, H, W)`` uint8 of some images; the same for any number of workers.

        Args:
            positions: Among the N, in [0, N).
            num_workers: Threads; Pillow lets go of the interpreter while it decodes and resizes.

        Raises:
            DataError: If an image cannot be used, and of several, the first.
        """
        rows = self.rows[np.asarray(positions)].tolist()
        encoded = self.table[rows][self.column]
        with torch.inference_mode(False):  # threads have a mode of their own, and may not write to its tensors
            images = torch.empty((len(rows), *self.shape[1:]), dtype=torch.uint8)

        def fill(start: int) -> None:
            for i in range(start, min(start + _AT_ONCE, len(rows))):
                images[i] = self._pixels(encoded[i], rows[i])

        starts = range(0, len(rows), _AT_ONCE)
        with _bombs_are_errors():
            if num_workers == 1 or len(starts) == 1:
                for start in starts:
                    fill(start)
            else:
                with ThreadPoolExecutor(num_workers) as pool:
                    for _ in pool.map(fill, starts):  # in order, so that the first error is that of the first row
                        pass
        return images

    def decode_all(self, num_workers: int, *, show: bool) -> Tensor:
        """``(N, C, H, W)`` uint8, as `decode`.

        Args:
            num_workers: Threads.
            show: With a progress bar.
        """
        images = torch.empty(self.shape, dtype=torch.uint8)
        with progress_bar(self.where, len(self), show) as bar:
            for positions in torch.arange(len(self)).split(_ROWS_BETWEEN_UPDATES):
                images[positions[0] : positions[-1] + 1] = self.decode(positions, num_workers)
                bar.update(len(positions))
        return images

    def _pixels(self, record: dict[str, Any], row: int) -> Tensor:
        where = f"{self.where}, row {row}"
        image = _open(record, where, self.local, self.stored_mode, "RGB")
        if self.mode == "L":
            _check_grey(image, where)
        if self.geometry is not None:
            pixels = self.geometry.of_picture(image)[: self.shape[1]]
            if tuple(pixels.shape[-2:]) != self.size:
                raise RowError(
                    f"{where}: expected {self.size[0]} x {self.size[1]} px from the model's image processor, as of row "
                    f"{self.rows[0]}, found {pixels.shape[-2]} x {pixels.shape[-1]}; give it one that brings images to "
                    "one size"
                )
            return pixels
        if not self.resizes and (image.height, image.width) != self.size:
            raise RowError(
                f"{where}: expected {self.size[0]} x {self.size[1]} px like row 0, found {image.height} x "
                f"{image.width}; give 'image_size' to resize"
            )
        return _to_tensor(image.convert(self.mode), self.size)


def progress_bar(where: str, total: int, show: bool) -> tqdm:
    """Counts decoded images."""
    return tqdm(total=total, desc=f"Decoding {where}", unit="img", mininterval=1.0, disable=not show)


def default_workers() -> int:
    """Threads of one process where nothing else is asked for: its share of the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def size_of_first(table: datasets.Dataset, column: str, where: str, local: bool) -> tuple[int, int]:
    """Height and width of the first image of an undecoded column.

    Raises:
        DataError: If it cannot be used.
    """
    with _bombs_are_errors():
        image = _open(table[0][column], f"{where}, row 0", local)
    return image.height, image.width


@contextlib.contextmanager
def _bombs_are_errors() -> Iterator[None]:
    """Around threads, not in them: filters of warnings are the whole process's."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _open(record: dict[str, Any] | None, where: str, local: bool, *modes: str | None) -> Image.Image:
    """An image, upright, brought to some of PIL's modes one after the other."""
    if record is None or (record["bytes"] is None and record["path"] is None):
        raise RowError(f"{where}: expected an image, found none; leave the row out")
    try:
        if not may_read(record, local):
            raise RowError(f"{where}: expected an image of the data set, found the path {record['path']!r}")
        source = io.BytesIO(record["bytes"]) if record["bytes"] is not None else record["path"]
        with Image.open(source) as image:
            if image.width * image.height > MAX_PIXELS:
                raise RowError(f"{where}: expected at most {MAX_PIXELS} px, found {image.width} x {image.height}")
            upright = _in_8_bits(_upright(image), image.format, where)
            return functools.reduce(lambda image, mode: image.convert(mode), filter(None, modes), upright)
    except (
        OSError,
        SyntaxError,
        ValueError,
        TypeError,
        Image.DecompressionBombWarning,
        Image.DecompressionBombError,
    ) as error:
        unknown = isinstance(error, UnidentifiedImageError)  # whose text is the address of a buffer
        reason = "no format that Pillow knows" if unknown else " ".join(str(error).split())[:120]
        raise RowError(f"{where}: the image cannot be decoded ({reason})") from error


def _upright(image: Image.Image) -> Image.Image:
    """The image as its EXIF orientation says it is to be seen, as `datasets` and `pipeline` turn it."""
    image.load()
    turned = image.getexif().get(ExifTags.Base.Orientation) is not None
    return ImageOps.exif_transpose(image) if turned else image


def _in_8_bits(image: Image.Image, stored_as: str | None, where: str) -> Image.Image:
    """Grey images of 16 bits by their upper 8, as Pillow reads colours of 16 bits; it would cut them at 255."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;"):
        return image
    if image.mode == "F" or (image.mode == "I" and stored_as not in _AT_MOST_16_BITS):
        kind = {"F": "floating-point", "I": "32-bit integer"}[image.mode]
        raise RowError(f"{where}: expected levels of 8 or 16 bits, found {kind} ones, whose white is not known")
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


def may_read(record: dict[str, Any], local: bool) -> bool:
    """Whether an image may be looked at: a data set of the Hub brings it, or has it in the cache."""
    return record["bytes"] is not None or local or _in_cache(record["path"])


def _check_grey(image: Image.Image, where: str) -> None:
    """Refuses colours: `pipeline` shows every model three channels, and a processor does not make grey of them."""
    pixels = np.asarray(image)
    if not ((pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 1] == pixels[..., 2]).all()):
        raise RowError(
            f"{where}: key 'color_mode': expected a grey image for 'grayscale', found colours, which `pipeline` would "
            "show the model; give 'rgb', or grey images"
        )


def _in_cache(path: str | None) -> bool:
    """Whether a path lies in a folder that data sets of the Hub are downloaded to."""
    folders = (constants.HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE)
    return path is not None and any(Path(os.path.abspath(path)).is_relative_to(os.path.abspath(f)) for f in folders)


def _to_tensor(image: Image.Image, size: tuple[int, int]) -> Tensor:
    if (image.height, image.width) != size:
        image = image.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    pixels = np.array(image).reshape(*size, -1)  # a grey image has no axis for its channel
    return torch.from_numpy(pixels).permute(2, 0, 1)
