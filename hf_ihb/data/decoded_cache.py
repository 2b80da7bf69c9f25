"""A split's decoded images in one file, made once and shared by runs and by the processes of a machine."""

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from torch import Tensor

from hf_ihb.data.decode import EncodedImages, progress_bar
from hf_ihb.data.levels import count_levels
from hf_ihb.data.placement import readable_bytes, readable_seconds
from hf_ihb.errors import CacheError
from hf_ihb.runs.files import write_json
from hf_ihb.storage.block_store import BlockStore

FORMAT = 2
PIXELS_FILE, LEVELS_FILE = "pixels.bin", "levels.json"
_BLOCK_BYTES = 32 << 20
_TIMED_IMAGES, _COMPARED_IMAGES = 32, 8
_PATIENCE_S = 5.0
_ATTEMPTS = 3
_REMEDY = "free some, give another 'decoded_cache_dir', or 'decode' stream"


def decoded_root(folder: str | None) -> Path:
    """Folder of all decoded images: the one given, or one beside the Hub's own cache."""
    return Path(constants.HF_HOME, "hf_ihb", "decoded") if folder is None else Path(folder).expanduser()


class DecodedCache:
    """Decoded images of one split on disk.

    Args:
        root: Folder of all caches.
        encoded: The images.
    """

    def __init__(self, root: Path, encoded: EncodedImages) -> None:
        self.encoded, self.shape = encoded, encoded.shape
        image_bytes = encoded.num_bytes // max(1, len(encoded))
        block_images = max(1, _BLOCK_BYTES // image_bytes)
        self.store = BlockStore(
            root,
            {"format": FORMAT, "block_images": block_images, **encoded.description()},
            PIXELS_FILE,
            num_rows=len(encoded),
            row_bytes=image_bytes,
            block_rows=block_images,
            what="decoded images",
            remedy=_REMEDY,
        )

    @property
    def folder(self) -> Path:
        """Where they are."""
        return self.store.folder

    @property
    def description(self) -> dict[str, Any]:
        """Everything that determines the pixels, as JSON."""
        return self.store.description

    def bytes_to_write(self) -> int:
        """What the file still has to grow by."""
        return self.store.bytes_to_write()

    def bytes_free(self) -> int:
        """What the disk has left."""
        return self.store.bytes_free()

    def open(self, num_workers: int, *, show: bool) -> None:
        """Makes what is missing and verifies the rest, so that the file can be mapped.

        Every process reads the whole file once to verify it, which also brings it into memory as far as that goes: it
        takes what the disk takes (the checksum itself runs at 10 GB/s and more). A process that finds another at work
        waits for it.

        Args:
            num_workers: Threads that decode.
            show: Print size, place and time before, with a progress bar.

        Raises:
            DataError: If an image cannot be used; the first of them in the split.
            CacheError: If the disk is full or cannot be written to, or what is on it is not what was written.
        """
        store = self.store
        for _ in range(_ATTEMPTS):
            known = store.journal()
            missing = store.missing(known, show=show)  # looked for by all processes at once, outside of the lock
            if not missing:
                self._compare()
                return
            with self._alone(show):
                journal = store.journal()
                # another process may have made or mended some in the meantime
                todo = [
                    b for b in missing if str(b) not in journal or (str(b) in known and not store.is_whole(b, journal))
                ]
                if todo:
                    self._build(todo, num_workers, show)
        raise CacheError(
            f"{self.folder}: expected {store.num_blocks} whole blocks of decoded images, found {len(missing)} damaged "
            "again after they were written; check the disk, or give another 'decoded_cache_dir'"
        )

    def map(self) -> Tensor:
        """``(N, C, H, W)`` uint8, in pages that are read when they are looked at; not to be written to."""
        return self.store.map(torch.uint8).view(self.shape)

    def fingerprint(self) -> str:
        """SHA-256 of shape and checksums."""
        journal, store = self.store.journal(), self.store
        checksums = [journal[str(block)] for block in range(store.num_blocks)]
        content = json.dumps([list(self.shape), store.block_rows, checksums])
        return hashlib.sha256(content.encode()).hexdigest()

    def levels(self) -> Tensor:
        """`count_levels` of all images, counted once."""
        if (counts := self._stored_levels()) is None:
            with self._alone(show=False):
                if (counts := self._stored_levels()) is None:  # nobody else has counted in the meantime
                    counts = count_levels(self.map())
                    with self.store.storing():
                        write_json(self.folder / LEVELS_FILE, {"counts": counts.tolist()})
        return counts

    def _stored_levels(self) -> Tensor | None:
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            stored = json.loads((self.folder / LEVELS_FILE).read_text("utf-8"))
            counts = torch.tensor(stored["counts"], dtype=torch.int64)
            fits = counts.shape == (self.shape[1], 256) and counts.min() >= 0
            return counts if fits and counts.sum() == self.encoded.num_bytes else None
        return None

    def _build(self, blocks: Sequence[int], num_workers: int, show: bool) -> None:
        store = self.store
        store.prepare()
        if (needed := store.bytes_to_write()) > (free := store.bytes_free()):
            raise CacheError(
                f"{self.folder}: expected {readable_bytes(needed)} of disk for decoded images, found "
                f"{readable_bytes(free)} free; {_REMEDY}"
            )
        count = sum(len(store.rows_of(block)) for block in blocks)
        if show:
            print(self._announcement(store.rows_of(blocks[0]), count, num_workers), flush=True)
        with progress_bar(self.encoded.where, count, show) as bar:
            for block in blocks:
                positions = store.rows_of(block)
                store.write(block, self.encoded.decode(positions, num_workers).contiguous().numpy().tobytes())
                bar.update(len(positions))

    def _announcement(self, first: range, count: int, num_workers: int) -> str:
        """What is about to be made, its size, and how long it takes, measured on a few images."""
        some = first[:_TIMED_IMAGES]
        start = time.perf_counter()
        self.encoded.decode(some)
        each = (time.perf_counter() - start) / len(some)
        return (
            f"Decoded images of {self.encoded.where}: {len(self.encoded):,} images x {self.store.row_bytes:,} B = "
            f"{readable_bytes(self.encoded.num_bytes)} in {self.folder}; {count:,} images to go, about "
            f"{readable_seconds(each * count / num_workers)} ({1000 * each:.2g} ms an image, {num_workers} threads)"
        )

    def _compare(self) -> None:
        """Some images are decoded anew: the key cannot know of everything that decodes."""
        count = len(self.encoded)
        positions = torch.linspace(0, count - 1, min(_COMPARED_IMAGES, count), dtype=torch.float64).round().long()
        stored, fresh = self.map()[positions], self.encoded.decode(positions)
        if not torch.equal(stored, fresh):
            row = int(self.encoded.rows[positions[int((stored != fresh).flatten(1).any(1).int().argmax())]])
            raise CacheError(
                f"{self.folder}: {self.encoded.where}, row {row}: expected what the image decodes to now, found other "
                "pixels; delete the folder"
            )

    @contextlib.contextmanager
    def _alone(self, show: bool) -> Iterator[None]:
        patience = _PATIENCE_S
        with self.store.lock() as lock:
            while not self.store.take(lock, patience):
                if show:
                    print(f"Waiting for another process that decodes images into {self.folder}", flush=True)
                patience = -1
            yield
