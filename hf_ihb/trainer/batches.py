"""From a batch to what the student sees of it: a `Step`, of images kept on the accelerator where they fit."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import TrainingArguments

from hf_ihb.augment import Augmenter, class_targets
from hf_ihb.config.augmentation import AugmentationArguments
from hf_ihb.data import ImageSplit, collate_images, host_index, onto, placement, rows_onto
from hf_ihb.errors import DataError
from hf_ihb.models.processing import PixelFormat
from hf_ihb.step import Step, Views
from hf_ihb.trainer.compiling import compiled


class Batches:
    """Makes steps of batches.

    Args:
        args: Of the training.
        augmentation: What stored images go through in training.
        pixels: How the student wants its images; None if batches bring normalised ``pixel_values``.
        num_labels: Number of classes K.

    Attributes:
        augmenter: Made with the first batch of stored images, which tells their shape; None before.
        placed: Each split that was asked for, by its id, beside the one that is read in its place.
    """

    def __init__(
        self,
        args: TrainingArguments,
        augmentation: AugmentationArguments,
        pixels: PixelFormat | None,
        num_labels: int,
    ) -> None:
        self.args, self.augmentation, self.pixels, self.num_labels = args, augmentation, pixels, num_labels
        self.augmenter: Augmenter | None = None
        self._partners_from: ImageSplit | None = None
        self.placed: dict[int, tuple[ImageSplit, ImageSplit]] = {}
        self._views_of = compiled(self._view, args)

    def remade(self, args: TrainingArguments, augmentation: AugmentationArguments) -> Self:
        """The same for other arguments; images stay where they were placed."""
        new = type(self)(args, augmentation, self.pixels, self.num_labels)
        new.placed = self.placed
        return new

    def place(self, dataset: Any) -> Any:
        """Stored images on the accelerator, where they fit; any other data set as it is."""
        if not isinstance(dataset, ImageSplit):
            return dataset
        if id(dataset) not in self.placed:
            fits = placement(dataset.images.nbytes, self.args.device) == "device"
            self.placed[id(dataset)] = (dataset, dataset.to(self.args.device) if fits else dataset)
        return self.placed[id(dataset)][1]

    # ---- A batch as a step ----

    def step(self, inputs: Mapping[str, Any], train: bool, epoch: float, images: Any) -> Step:
        """What the student sees of a batch, and what the labels say of it.

        Args:
            inputs: The batch, on the device.
            train: Whether stored images are augmented; targets are made then.
            epoch: Epochs trained so far.
            images: The training set, for mixing partners.

        Raises:
            DataError: If something is missing that training, or stored images, need.
        """
        if train and (missing := [key for key in ("pixel_values", "labels") if key not in inputs]):
            raise DataError(f"training batch: expected '{missing[0]}', found {', '.join(inputs)}")
        pixels, labels = inputs["pixel_values"], inputs.get("labels")
        if pixels.dtype != torch.uint8:
            targets = self._targets(labels, None) if train else None
            return Step(pixels, labels, targets, inputs=inputs)
        if self.pixels is None:
            raise DataError("stored (uint8) images: expected a 'processing_class' with mean and std, found none")
        if not train:
            return Step(self.pixels.apply(pixels), labels, inputs=inputs)
        if inputs.get("index") is None:
            raise DataError("stored (uint8) images: expected a `StoredSplit` or batches with 'index' to augment")
        if self.augmenter is None:
            self._make_augmenter(pixels, self.place(images))
        # a number would be compiled into the graph, and that anew in every epoch
        number = torch.full((), int(epoch), device=pixels.device) if self.args.torch_compile else int(epoch)
        seen, views = self._views_of(pixels, inputs["index"], number, labels, self._partners(inputs, int(epoch)))
        return Step(seen, labels, views.targets, views, inputs=inputs)

    def _targets(self, labels: Tensor | None, views: Views | None) -> Tensor | None:
        if labels is None:
            return None
        return class_targets(labels, self.num_labels, self.args.label_smoothing_factor, views)

    def _view(
        self, images: Tensor, index: Tensor, epoch: int | Tensor, labels: Tensor | None, partners: tuple | None
    ) -> tuple[Tensor, Views]:
        """What the student sees, and how it came about: one graph where it is compiled."""
        views = self.augmenter(images, index, epoch, labels, partners)
        views.targets = self._targets(labels, views)
        return self.pixels.apply(views.seen), views

    def _make_augmenter(self, pixels: Tensor, split: Any) -> None:
        fetch, count = None, 0
        if hasattr(split, "images"):  # any image can be had
            count = len(split)
            if split.images.device == pixels.device:

                def fetch(rows: Tensor) -> tuple[Tensor, Tensor]:
                    return split.images.index_select(0, rows), split.labels[rows]

            else:
                self._partners_from = split
        fill = self.pixels.mean[: pixels.shape[1]]  # a grey image has one channel where its processor has three
        self.augmenter = Augmenter(self.augmentation, self.args.seed, fill, fetch, count)

    def _partners(self, inputs: Mapping[str, Any], epoch: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """Mixing partners whose images are on the host, chosen there as well: nothing is asked of the device."""
        split = self._partners_from
        if split is None or not self.augmentation.mixes:
            return None
        rows, device = torch.from_numpy(host_index(inputs)), inputs["pixel_values"].device
        rows = self.augmenter.partners_of(rows, epoch)
        return onto(device, rows), rows_onto(device, split.images, rows), rows_onto(device, split.labels, rows)


def image_collator(collate: Callable | None, args: TrainingArguments) -> Callable:
    """A user's collator, or `collate_images`; of tensors alone where the main process hands out batches."""
    collate = collate or collate_images
    if not args.accelerator_config.dispatch_batches:
        return collate

    @functools.wraps(collate)
    def collated(batch: Any) -> dict[str, Any]:
        return {name: value for name, value in collate(batch).items() if name not in ("rows", "split")}

    return collated


def first_batch(images: Any, collate: Callable) -> dict[str, Any]:
    """A batch of one image, to see shapes with.

    Raises:
        DataError: If there are no images, or they come as a stream.
    """
    if images is None:
        raise DataError("expected a train_dataset or eval_dataset to read the image size off, found none")
    images = next(iter(images.values())) if isinstance(images, dict) else images
    if isinstance(images, IterableDataset):
        raise DataError(
            f"train_dataset: expected one with an item for each number, found a stream ({type(images).__name__}), "
            "which methods that compare features cannot take; load the data set without streaming"
        )
    return collate([images[0]])
