"""From a batch to what the student sees of it: a `Step`, of images kept on the accelerator where they fit."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel, TrainingArguments

from hf_ihb.augment import Augmenter, class_targets, code_digest
from hf_ihb.config.augmentation import AugmentationArguments
from hf_ihb.data import ImageSplit, StoredSplit, collate_images, host_index, onto, placement, rows_onto
from hf_ihb.errors import DataError, ModelLoadError
from hf_ihb.models.inputs import format_for
from hf_ihb.models.processing import PixelFormat
from hf_ihb.step import Step, Views
from hf_ihb.trainer.compiling import compiled


class Batches:
    """Makes steps of batches.

    Args:
        args: Of the training.
        augmentation: What stored images go through in training.

    Attributes:
        augmenter: Made with the first batch of stored images, which tells their shape; None before.
        placed: Each split that was asked for, by its id, beside the one that is read in its place.
    """

    def __init__(self, args: TrainingArguments, augmentation: AugmentationArguments) -> None:
        self.args, self.augmentation, self.num_labels = args, augmentation, 0
        self.pixels: PixelFormat | None = None
        self._whole: PixelFormat | None = None
        self._refusal: Exception = DataError(
            "stored (uint8) images: expected a 'processing_class' with mean and std, found none"
        )
        self._shown: Any = None
        self.augmenter: Augmenter | None = None
        self._partners_from: ImageSplit | None = None
        self.placed: dict[int, tuple[ImageSplit, ImageSplit]] = {}
        self._views_of = compiled(self._view, args)

    def remade(self, args: TrainingArguments, augmentation: AugmentationArguments) -> Self:
        """The same for other arguments; images stay where they were placed."""
        new = type(self)(args, augmentation)
        new.num_labels, new.placed = self.num_labels, self.placed
        new.pixels, new._whole, new._refusal = self.pixels, self._whole, self._refusal
        return new

    def serve(self, student: PreTrainedModel, processor: Any) -> None:
        """Takes number of classes and pixels from a student and its image processor.

        Stored images that are evaluated go through the processor's own steps. In training all of each image is brought
        to the size that they make.

        Args:
            student: That is trained.
            processor: None if batches bring normalised ``pixel_values``. One that cannot be followed is refused when
                stored images come.
        """
        self.num_labels = student.config.num_labels
        if processor is None:
            return
        try:
            self.pixels = format_for(student, processor)
            self._whole = self.pixels.whole()
        except ModelLoadError as error:
            self._refusal = error

    def check(self, *datasets: Any) -> None:
        """Refuses stored images whose pixels nobody can make.

        Raises:
            HfIhbError: If one of the data sets holds stored images, and there is no image processor to follow.
        """
        known = [d for given in datasets for d in (given.values() if isinstance(given, dict) else (given,))]
        if self.pixels is None and any(isinstance(dataset, StoredSplit) for dataset in known):
            raise self._refusal

    def place(self, dataset: Any) -> Any:
        """Stored images on the accelerator, where they fit; any other data set as it is."""
        if not isinstance(dataset, ImageSplit):
            return dataset
        if id(dataset) not in self.placed:
            fits = placement(dataset.images.nbytes, self.args.device) == "device"
            self.placed[id(dataset)] = (dataset, dataset.to(self.args.device) if fits else dataset)
        return self.placed[id(dataset)][1]

    # ---- A batch as a step ----

    @contextlib.contextmanager
    def evaluating(self, loader: Any) -> Iterator[None]:
        """While a data set is evaluated on: its images may have been decoded as the model sees them."""
        before, self._shown = self._shown, getattr(getattr(loader, "dataset", None), "geometry", None)
        try:
            yield
        finally:
            self._shown = before

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
            raise self._refusal
        if not train:
            return Step(self.pixels.apply(pixels, self._shown), labels, inputs=inputs)
        if inputs.get("index") is None:
            raise DataError("stored (uint8) images: expected a `StoredSplit` or batches with 'index' to augment")
        if self.augmenter is None:
            self._make_augmenter(pixels, self.place(images))
        # a number would be compiled into the graph, and that anew in every epoch
        number = torch.full((), int(epoch), device=pixels.device) if self.args.torch_compile else int(epoch)
        seen, views = self._views_of(pixels, inputs["index"], number, labels, self._partners(inputs, int(epoch)))
        return Step(seen, labels, views.targets, views, inputs=inputs, epoch=int(epoch))

    def whole_images(self, pixels: Tensor) -> Tensor:
        """What the student is shown of images in training, but for augmentation: ``(B, C, H, W)``, normalised."""
        if pixels.dtype != torch.uint8:
            return pixels
        if self._whole is None:
            raise self._refusal
        return self._whole.apply(pixels)

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
        return self._whole.apply(views.seen), views

    def _make_augmenter(self, pixels: Tensor, split: Any) -> None:
        fetch, count = None, 0
        if hasattr(split, "images"):  # any image can be had
            count = len(split)
            if split.images.device == pixels.device:

                def fetch(rows: Tensor) -> tuple[Tensor, Tensor]:
                    return split.images.index_select(0, rows), split.labels[rows]

            else:
                self._partners_from = split
        self.augmenter = Augmenter(self.augmentation, self.augmentation_seed, self._fill(pixels.shape[1]), fetch, count)

    def _fill(self, channels: int) -> tuple[float, ...]:
        """Mean colour in [0, 1]; a grey image has one channel where its processor has three."""
        mean = self.pixels.mean[::-1] if self.pixels.flips else self.pixels.mean
        return tuple(min(max(level, 0.0), 1.0) for level in mean[:channels])

    @property
    def augmentation_seed(self) -> int:
        """Of what images go through."""
        given = self.augmentation.augmentation_seed
        return self.args.seed if given is None else given

    def describe_views(self, split: StoredSplit) -> dict[str, Any]:
        """What determines the view of each image of a training split in each epoch, beside the images, as JSON."""
        args = self.augmentation
        covers = args.cutout_size or args.random_erasing
        return {
            **dataclasses.asdict(args),
            "augmentation_seed": self.augmentation_seed,
            "code": code_digest(),
            "fill": self._fill(split.num_channels) if covers else None,
        }

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
