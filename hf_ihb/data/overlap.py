"""Images that two parts of a data set share: a student that is reported on what it was trained on."""

import contextlib
import itertools
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import repeat
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from hf_ihb.data.decode import EncodedImages, may_read
from hf_ihb.errors import DataError

MAX_SHARE = 0.01  # of an evaluated part: published sets have a few images twice, a leak has many
_HEAD_BYTES = 4096
_Key = tuple[int, bytes]
_REMEDY = (
    "`datasets` takes whatever lies in a folder called train, test, eval or the like, at any depth, for that split: "
    "rename the folder, or name the files of each split in a README.md"
)


def refuse_shared_images(parts: Mapping[str, EncodedImages]) -> str | None:
    """Compares the images of the parts of a data set, by the file they are in and by their encoded bytes.

    Bytes are read only of images whose size in bytes occurs in both parts, and past the first `_HEAD_BYTES` only where
    these are the same.

    Args:
        parts: Training, validation and test part, in this order; the later ones are evaluated on.

    Returns:
        A note on images of the same content that are few enough to be the data set's own; None where there are none.

    Raises:
        DataError: If a file is in a part twice or in two parts, or if more than `MAX_SHARE` of a part's images are, by
            their content, also in a part of another split.
    """
    images, notes = {name: _Images(part) for name, part in parts.items()}, []
    contents = dict(zip(images, _in_several(list(images.values())), strict=True))
    for (one, a), (other, b) in itertools.combinations(images.items(), 2):
        files = _pairs([(path, k) for k, path in a.paths.items()], [(path, k) for k, path in b.paths.items()])
        if not (shared := files or _pairs(contents[one], contents[other])):
            continue
        mine, theirs = shared[0]
        found = (
            f"{other} and {one} images: expected different ones, found {len(shared)} of {len(b.rows)} in both, first "
        )
        found += f"{b.where(theirs)}, and {a.where(mine)}"
        if files:
            raise DataError(f"{found}, which are the file {a.paths[mine]}; {_REMEDY}")
        if a.encoded.identity != b.encoded.identity and len(shared) > MAX_SHARE * len(b.rows):
            raise DataError(f"{found}, by their content; take them out of one of the splits")
        notes.append(f"{found}, by their content")
    for name, part in images.items():
        if (twice := part.twice()) is not None:
            raise DataError(f"{part.where(twice)} ({name}): the file {part.paths[twice]} is there twice; {_REMEDY}")
    return "; ".join(notes) or None


class _Images:
    """What is known of the images of a part without decoding them; a position is one among the part's rows."""

    def __init__(self, encoded: EncodedImages) -> None:
        self.encoded, self.rows = encoded, encoded.rows
        column = encoded.table.with_format("arrow")[:][encoded.column]  # as it lies on disk
        chunks = [chunk.field("bytes") for chunk in column.chunks]
        self._starts = np.cumsum([0, *map(len, chunks)])
        self._contents = [_buffers(chunk) for chunk in chunks]
        in_table = pc.fill_null(pc.binary_length(pc.struct_field(column, "bytes")), -1).to_numpy()
        self.sizes = in_table[self.rows].astype(np.int64)
        self.paths: dict[int, str] = {}
        if (apart := np.flatnonzero(self.sizes < 0)).size:
            paths = pc.struct_field(column, "path").take(pa.array(self.rows[apart])).to_pylist()
            for position, path in zip(apart.tolist(), paths, strict=True):
                # decoding says what is wrong with the others
                if path is not None and may_read({"bytes": None, "path": path}, encoded.local):
                    self.paths[position] = path
                    with contextlib.suppress(OSError):
                        self.sizes[position] = os.stat(path).st_size

    def twice(self) -> int | None:
        """Position of an image whose file is another's as well; None if there is none."""
        first = {path: position for position, path in reversed(self.paths.items())}
        return next((position for position, path in self.paths.items() if first[path] != position), None)

    def where(self, position: int) -> str:
        """Data set, split and row of an image."""
        return f"{self.encoded.where}, row {self.rows[position]}"

    def keys(self, positions: Sequence[int], limit: int | None) -> list[_Key]:
        """Size of each image, and the hash of its first `limit` bytes."""
        rows = self.rows[positions]
        chunks = np.searchsorted(self._starts, rows, "right") - 1
        heads = map(self._head, positions, chunks.tolist(), (rows - self._starts[chunks]).tolist(), repeat(limit))
        return list(zip(self.sizes[positions].tolist(), map(xxhash.xxh3_128_digest, heads), strict=True))

    def _head(self, position: int, chunk: int, row: int, limit: int | None) -> bytes | memoryview:
        if (path := self.paths.get(position)) is not None:
            try:
                with open(path, "rb") as file:
                    return file.read(-1 if limit is None else limit)
            except OSError:
                return path.encode()  # like no other; decoding says what is wrong
        offsets, content = self._contents[chunk]
        return content[offsets[row] : offsets[row + 1]][:limit]


def _buffers(chunk: pa.BinaryArray) -> tuple[np.ndarray, memoryview]:
    """Where each value begins and the last one ends, and the bytes of all of them, not copied."""
    _, offsets, content = chunk.buffers()
    each = np.frombuffer(offsets, np.int64 if pa.types.is_large_binary(chunk.type) else np.int32)
    return each[chunk.offset : chunk.offset + len(chunk) + 1], memoryview(content or b"")


def _in_several(parts: Sequence[_Images]) -> list[list[tuple[_Key, int]]]:
    """Of each part the images that others hold as well, each with what tells its content from others."""
    sizes = np.concatenate([np.unique(part.sizes[part.sizes >= 0]) for part in parts])
    values, counts = np.unique(sizes, return_counts=True)
    positions = [np.flatnonzero(np.isin(part.sizes, values[counts > 1])).tolist() for part in parts]
    found: list[list[tuple[_Key, int]]] = []
    for limit in (_HEAD_BYTES, None):
        keys = [part.keys(some, limit) for part, some in zip(parts, positions, strict=True)]
        times = Counter(itertools.chain.from_iterable(map(set, keys)))
        pairs = [zip(own, some, strict=True) for own, some in zip(keys, positions, strict=True)]
        found = [[(key, k) for key, k in own if times[key] > 1] for own in pairs]
        positions = [[k for _, k in own] for own in found]
    return found


def _pairs(some: Sequence[tuple[Any, int]], others: Sequence[tuple[Any, int]]) -> list[tuple[int, int]]:
    """Positions of what is in both, the first in `some` for each of `others`."""
    known = dict(reversed(some))
    return [(known[key], position) for key, position in others if key in known]
