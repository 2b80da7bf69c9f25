"""A split's decoded images in one file, made once and shared by runs and by the processes of a machine.

The file is written block by block; a journal names each block that is on disk with its checksum, and a block that is
not in the journal or does not match it is made again, whatever happened while it was written. The folder's name is a
hash of everything that determines the pixels, so a file that no longer fits is never found.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import xxhash
from filelock import FileLock, Timeout
from huggingface_hub import constants
from torch import Tensor
from tqdm.auto import tqdm

from hf_ihb.data.decode import EncodedImages, progress_bar
from hf_ihb.data.levels import count_levels
from hf_ihb.data.placement import readable_bytes, readable_seconds
from hf_ihb.errors import CacheError
from hf_ihb.runs.files import write_json

FORMAT = 1
PIXELS_FILE, JOURNAL_FILE = "pixels.bin", "blocks.jsonl"
DESCRIPTION_FILE, LEVELS_FILE = "description.json", "levels.json"
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
        self.image_bytes = encoded.num_bytes // max(1, len(encoded))
        self.block_images = max(1, _BLOCK_BYTES // self.image_bytes)
        self.description = {"format": FORMAT, "block_images": self.block_images, **encoded.description()}
        canonical = json.dumps(self.description, sort_keys=True)
        self.folder = root.absolute() / hashlib.sha256(canonical.encode()).hexdigest()[:32]
        self._intact: set[int] = set()

    @property
    def num_blocks(self) -> int:
        """Blocks of `block_images`; the last one may be short."""
        return -(-len(self.encoded) // self.block_images)

    def bytes_to_write(self) -> int:
        """What the file still has to grow by."""
        path = self.folder / PIXELS_FILE
        return max(0, self.encoded.num_bytes - (path.stat().st_blocks * 512 if path.is_file() else 0))

    def bytes_free(self) -> int:
        """What the disk has left."""
        there = next(folder for folder in (self.folder, *self.folder.parents) if folder.is_dir())
        return shutil.disk_usage(there).free

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
        for _ in range(_ATTEMPTS):
            known = self._journal()
            missing = self._missing(known, show)  # looked for by all processes at once, outside of the lock
            if not missing:
                self._compare()
                return
            with self._alone(show):
                journal = self._journal()
                # another process may have made or mended some in the meantime
                todo = [b for b in missing if b not in journal or (b in known and not self._is_whole(b, journal))]
                if todo:
                    self._build(todo, num_workers, show)
        raise CacheError(
            f"{self.folder}: expected {self.num_blocks} whole blocks of decoded images, found {len(missing)} damaged "
            "again after they were written; check the disk, or give another 'decoded_cache_dir'"
        )

    def map(self) -> Tensor:
        """``(N, C, H, W)`` uint8, in pages that are read when they are looked at; not to be written to."""
        pixels = torch.from_file(str(self.folder / PIXELS_FILE), size=self.encoded.num_bytes, dtype=torch.uint8)
        return pixels.view(self.shape)

    def fingerprint(self) -> str:
        """SHA-256 of shape and checksums."""
        journal = self._journal()
        content = json.dumps([list(self.shape), self.block_images, [journal[b] for b in range(self.num_blocks)]])
        return hashlib.sha256(content.encode()).hexdigest()

    def levels(self) -> Tensor:
        """`count_levels` of all images, counted once."""
        if (counts := self._stored_levels()) is None:
            with self._alone(show=False):
                if (counts := self._stored_levels()) is None:  # nobody else has counted in the meantime
                    counts = count_levels(self.map())
                    with self._storing():
                        write_json(self.folder / LEVELS_FILE, {"counts": counts.tolist()})
        return counts

    def _stored_levels(self) -> Tensor | None:
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            stored = json.loads((self.folder / LEVELS_FILE).read_text("utf-8"))
            counts = torch.tensor(stored["counts"], dtype=torch.int64)
            fits = counts.shape == (self.shape[1], 256) and counts.min() >= 0
            return counts if fits and counts.sum() == self.encoded.num_bytes else None
        return None

    # ---- Blocks ----

    def _positions(self, block: int) -> range:
        return range(block * self.block_images, min((block + 1) * self.block_images, len(self.encoded)))

    def _journal(self) -> dict[int, str]:
        """Checksum of each block that has been written; of a torn line nothing."""
        found: dict[int, str] = {}
        path = self.folder / JOURNAL_FILE
        for line in path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else []:
            with contextlib.suppress(ValueError, TypeError):
                block, checksum = json.loads(line)
                found[int(block)] = str(checksum)
        return found

    def _is_whole(self, block: int, journal: dict[int, str]) -> bool:
        positions, path = self._positions(block), self.folder / PIXELS_FILE
        if block not in journal or not path.is_file():
            return False
        with path.open("rb") as file:
            file.seek(positions.start * self.image_bytes)
            content = file.read(len(positions) * self.image_bytes)
        return xxhash.xxh3_128_hexdigest(content) == journal[block]

    def _missing(self, journal: dict[int, str], show: bool) -> list[int]:
        """Blocks that are not there, or not what was written."""
        named = [b for b in range(self.num_blocks) if b in journal and b not in self._intact]
        for block in tqdm(named, desc="Verifying decoded images", unit="block", delay=2, disable=not show):
            if self._is_whole(block, journal):
                self._intact.add(block)
        return [block for block in range(self.num_blocks) if block not in self._intact]

    def _build(self, blocks: Sequence[int], num_workers: int, show: bool) -> None:
        self._make_room()
        count = sum(len(self._positions(block)) for block in blocks)
        if show:
            print(self._announcement(self._positions(blocks[0]), count, num_workers), flush=True)
        with progress_bar(self.encoded.where, count, show) as bar:
            for block in blocks:
                positions = self._positions(block)
                self._write(block, self.encoded.decode(positions, num_workers))
                bar.update(len(positions))

    def _make_room(self) -> None:
        """The folder with its description, and room for what is still to be written."""
        with self._storing():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / DESCRIPTION_FILE, self.description)
            (self.folder / PIXELS_FILE).touch()
            if (needed := self.bytes_to_write()) > (free := self.bytes_free()):
                raise CacheError(
                    f"{self.folder}: expected {readable_bytes(needed)} of disk for decoded images, found "
                    f"{readable_bytes(free)} free; {_REMEDY}"
                )

    def _announcement(self, first: range, count: int, num_workers: int) -> str:
        """What is about to be made, its size, and how long it takes, measured on a few images."""
        some = first[:_TIMED_IMAGES]
        start = time.perf_counter()
        self.encoded.decode(some)
        each = (time.perf_counter() - start) / len(some)
        return (
            f"Decoded images of {self.encoded.where}: {len(self.encoded):,} images x {self.image_bytes:,} B = "
            f"{readable_bytes(self.encoded.num_bytes)} in {self.folder}; {count:,} images to go, about "
            f"{readable_seconds(each * count / num_workers)} ({1000 * each:.2g} ms an image, {num_workers} threads)"
        )

    def _write(self, block: int, pixels: Tensor) -> None:
        """The block, and when it is on disk, its line in the journal."""
        content = pixels.contiguous().numpy().tobytes()
        with self._storing():
            with (self.folder / PIXELS_FILE).open("r+b") as file:
                file.seek(self._positions(block).start * self.image_bytes)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            with (self.folder / JOURNAL_FILE).open("a", encoding="utf-8") as file:
                line = json.dumps([block, xxhash.xxh3_128_hexdigest(content)])
                file.write(f"\n{line}\n")  # a line torn by a crash ends here
                file.flush()
                os.fsync(file.fileno())
        self._intact.add(block)

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

    # ---- Several processes, and disks ----

    @contextlib.contextmanager
    def _alone(self, show: bool) -> Iterator[None]:
        with self._storing():
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            lock, patience = FileLock(self.folder.with_suffix(".lock")), _PATIENCE_S
            while not lock.is_locked:
                try:
                    lock.acquire(timeout=patience)
                except Timeout:
                    if show and patience > 0:
                        print(f"Waiting for another process that decodes images into {self.folder}", flush=True)
                    patience = -1
        try:
            yield
        finally:
            lock.release()

    @contextlib.contextmanager
    def _storing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CacheError(
                f"{self.folder}: decoded images cannot be written ({error.strerror or error}); what is there is kept; "
                f"{_REMEDY}"
            ) from error
