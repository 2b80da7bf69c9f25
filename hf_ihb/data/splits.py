"""Splits of stored images: in memory, in a file that is mapped into it, or decoded when they are asked for."""

import hashlib
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor
from transformers import default_data_collator

from hf_ihb.data.decode import EncodedImages, Geometry, default_workers
from hf_ihb.data.decoded_cache import DecodedCache
from hf_ihb.data.labels import check_labels
from hf_ihb.data.levels import count_levels, moments
from hf_ihb.data.placement import onto
from hf_ihb.errors import DataError

STATISTICS_IMAGES = 2048


class StoredSplit(torch.utils.data.Dataset, ABC):
    """Images of one split as uint8; a batch is made at once.

    An item is ``{"pixel_values": uint8 (C, H, W), "labels": int, "index": int}``. A `DataLoader` asks for a whole batch
    at once and gets the stacked dictionary; `collate_images` passes it on. Beside ``index``, which goes where the
    images go, it has ``rows``, the same as a NumPy array, which stays on the host (`host_index`), and ``split``,
    the key of the split: the same of a copy on another device, and of no other split.

    Args:
        labels: ``(N,)`` int64 in [0, len(label_names)).
        label_names: Name of each class, in label order.

    Raises:
        DataError: If a label is none of the classes.
    """

    encoded: EncodedImages | None = None  # what the images were decoded from, where that is known

    def __init__(self, labels: Tensor, label_names: Sequence[str]) -> None:
        check_labels(labels, len(label_names))
        self.labels, self.label_names = labels, list(label_names)
        self.key = uuid.uuid4().hex

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = range(len(self))[index]
        pixels = self._pixels(torch.tensor([row]))[0]
        return {"pixel_values": pixels, "labels": int(self.labels[row]), "index": row}

    def __getitems__(self, indices: Sequence[int] | Tensor) -> dict[str, Any]:
        index = torch.as_tensor(indices)
        return {
            "pixel_values": self._pixels(index),
            "labels": self.labels[index],
            "index": index,
            "rows": index.numpy(),
            "split": self.key,
        }

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int, int]:
        """``(N, C, H, W)``."""

    @property
    def num_channels(self) -> int:
        """3, or 1 for grey images."""
        return self.shape[1]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the stored images."""
        return tuple(self.shape[2:])

    @property
    def geometry(self) -> Geometry | None:
        """What the images have gone through as a model's image processor does it; None for whole images as stored."""
        return None if self.encoded is None else self.encoded.geometry

    def through(self, geometry: Geometry | None) -> "StoredSplit":
        """The same images as a model sees them, decoded anew when they are asked for.

        Args:
            geometry: Of the model's image processor.

        Returns:
            The split itself where its images are of that geometry, or cannot be had in another.
        """
        if geometry is None or self.encoded is None or geometry == self.geometry:
            return self
        return StreamedSplit(self.encoded.through(geometry), self.labels.cpu(), self.label_names)

    @abstractmethod
    def select(self, indices: Tensor | np.ndarray) -> "StoredSplit":
        """The rows at `indices`, renumbered from 0."""

    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel over all pixels, in [0, 1], to four decimals."""
        return moments(self._levels())

    @abstractmethod
    def fingerprint(self) -> str:
        """What tells these images from others; 64 hexadecimal digits."""

    @abstractmethod
    def _pixels(self, index: Tensor) -> Tensor: ...

    @abstractmethod
    def _levels(self) -> Tensor: ...


class ImageSplit(StoredSplit):
    """Decoded images in memory; a batch is one gather.

    Args:
        images: ``(N, C, H, W)`` uint8.
        labels: ``(N,)`` int64 in [0, len(label_names)).
        label_names: Name of each class, in label order.
        encoded: What they were decoded from; None for images that came otherwise.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, label_names: Sequence[str], encoded: EncodedImages | None = None
    ) -> None:
        super().__init__(labels, label_names)
        self.images, self.encoded = images, encoded
        self._fingerprint: str | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(N, C, H, W)``."""
        return tuple(self.images.shape)

    def __getitems__(self, indices: Sequence[int] | Tensor) -> dict[str, Any]:
        index = torch.as_tensor(indices)
        rows, index = index.numpy(), onto(self.images.device, index)
        # copies whole rows, where indexing goes byte by byte: a tenth of the time on the CPU
        pixels = self.images.index_select(0, index)
        labels = self.labels[index]
        return {"pixel_values": pixels, "labels": labels, "index": index, "rows": rows, "split": self.key}

    def select(self, indices: Tensor | np.ndarray) -> "ImageSplit":
        """The rows at `indices`, renumbered from 0; copied into memory."""
        index = torch.as_tensor(indices)
        encoded = None if self.encoded is None else self.encoded.select(index.cpu())
        return ImageSplit(self.images[index], self.labels[index], self.label_names, encoded)

    def to(self, device: torch.device | str) -> "ImageSplit":
        """The split with images and labels on an accelerator, so that a batch is one gather there.

        The index of a batch is copied without a wait for the device. A `DataLoader` must ask from the main process and
        leave pinning alone: ``num_workers=0, pin_memory=False``.

        Returns:
            The split itself where it is there already, as on the CPU.
        """
        device = torch.device(device)
        if device.type == self.images.device.type and device.index in (None, self.images.device.index):
            return self
        moved = ImageSplit(self.images.to(device), self.labels.to(device), self.label_names, self.encoded)
        moved.key = self.key
        moved._fingerprint = self._fingerprint
        return moved

    def fingerprint(self) -> str:
        """SHA-256 of shape and pixels."""
        if self._fingerprint is None:
            digest = hashlib.sha256(f"{tuple(self.images.shape)};".encode())
            for part in self.images.split(4096):
                digest.update(part.contiguous().cpu().numpy())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def _pixels(self, index: Tensor) -> Tensor:
        return self.images.index_select(0, index.to(self.images.device))

    def _levels(self) -> Tensor:
        return count_levels(self.images)


class MappedSplit(ImageSplit):
    """Decoded images in a file that is mapped into memory, so that all processes of a machine share its pages.

    Args:
        cache: Built and verified.
        labels: ``(N,)`` int64 in [0, len(label_names)).
        label_names: Name of each class, in label order.
    """

    def __init__(self, cache: DecodedCache, labels: Tensor, label_names: Sequence[str]) -> None:
        super().__init__(cache.map(), labels, label_names, cache.encoded)
        self.cache = cache

    def __reduce__(self) -> tuple[Any, ...]:
        return MappedSplit, (self.cache, self.labels, self.label_names)  # a worker process maps the file itself

    def fingerprint(self) -> str:
        """SHA-256 of shape and checksums."""
        return self.cache.fingerprint()

    def _levels(self) -> Tensor:
        return self.cache.levels()


class StreamedSplit(StoredSplit):
    """Images that are decoded when they are asked for, in the worker processes of a `DataLoader` or in threads.

    Sampling, resuming and sharing out among processes are those of the other splits, since a row has its number; it is
    also decoded to the same pixels.

    Args:
        encoded: The images.
        labels: ``(N,)`` int64 in [0, len(label_names)).
        label_names: Name of each class, in label order.
        num_workers: Threads that decode a batch where no worker process does.
    """

    def __init__(
        self, encoded: EncodedImages, labels: Tensor, label_names: Sequence[str], num_workers: int | None = None
    ) -> None:
        super().__init__(labels, label_names)
        self.encoded, self.num_workers = encoded, num_workers

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(N, C, H, W)``."""
        return self.encoded.shape

    def select(self, indices: Tensor | np.ndarray) -> "StreamedSplit":
        """The rows at `indices`, renumbered from 0; nothing is decoded."""
        index = torch.as_tensor(indices)
        return StreamedSplit(self.encoded.select(index), self.labels[index], self.label_names, self.num_workers)

    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and deviation of each channel, over `STATISTICS_IMAGES` evenly spaced images where there are more."""
        return super().statistics()

    def fingerprint(self) -> str:
        """SHA-256 of everything that determines the pixels, which are not looked at."""
        return self.encoded.fingerprint()

    def _pixels(self, index: Tensor) -> Tensor:
        in_worker = torch.utils.data.get_worker_info() is not None
        return self.encoded.decode(index, 1 if in_worker else self.num_workers or default_workers())

    def _levels(self) -> Tensor:
        count = min(STATISTICS_IMAGES, len(self))
        sample = torch.linspace(0, len(self) - 1, count, dtype=torch.float64).round().long()
        some = self.encoded.select(sample)
        return count_levels(some.decode_all(self.num_workers or default_workers(), show=False))


@dataclass
class ImageData:
    """The splits of a data set; `revision` is the Hub commit, None for local sets.

    Where epochs are selected on the test split, `validation` is `test`.
    """

    train: StoredSplit
    validation: StoredSplit
    test: StoredSplit
    name: str
    revision: str | None

    @property
    def label_names(self) -> list[str]:
        """Class names in label order."""
        return self.train.label_names

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the stored images."""
        return self.train.image_size


def collate_images(batch: dict[str, Any] | list[dict[str, Any]]) -> dict[str, Any]:
    """Passes on a batch that a split of ours made; stacks items of any data set as `default_data_collator` does."""
    return batch if isinstance(batch, dict) else default_data_collator(batch)


def host_index(batch: Mapping[str, Any]) -> np.ndarray:
    """``(B,)`` position of each image of a batch in its split, on the host.

    Batches of our splits bring it along. Of any other it is copied, which on an accelerator is waited for.
    """
    rows = batch.get("rows")
    return batch["index"].cpu().numpy() if rows is None else rows


def stratified_sample(split: StoredSplit, count: int, seed: int, where: str) -> Tensor:
    """Sorted row numbers of `count` images, every class in proportion; of all images where there are no more.

    Raises:
        DataError: If `count` does not hold every class.
    """
    return sample_of_labels(split.labels, count, seed, where)


def sample_of_labels(labels: Tensor, count: int | None, seed: int, where: str) -> Tensor:
    """Sorted row numbers of `count` labels ``(N,)``, every class in proportion; of all where `count` is None."""
    if count is None or count >= len(labels):
        return torch.arange(len(labels))
    return split_by_class(labels, count, seed, where)[1]


def split_by_class(labels: Tensor, share: float | int, seed: int, where: str) -> tuple[Tensor, Tensor]:
    """Sorted row numbers of (the rest, a stratified part).

    Args:
        labels: ``(N,)``.
        share: Of the part, in (0, 1), or its number of rows.
        seed: Of the choice.
        where: For errors.

    Raises:
        DataError: If a class has too few rows.
    """
    try:
        rest, part = train_test_split(
            np.arange(len(labels)), test_size=share, stratify=labels.numpy(), random_state=seed
        )
    except ValueError as error:
        raise DataError(
            f"{where}: cannot be split by class ({error}); give 'validation_split' or more images"
        ) from error
    return torch.from_numpy(np.sort(rest)), torch.from_numpy(np.sort(part))
