"""Frozen teachers: any image model of transformers or timm, seen through its own normalisation and resolution."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from hf_ihb.config.model import TeacherArguments
from hf_ihb.errors import NumericsError, TeacherMismatchError
from hf_ihb.models.features import (
    FeatureMap,
    apply_final_norm,
    extract_features,
    in_channels,
    layout_of,
    resolve_layers,
    sample_pixels,
    size_arguments,
)
from hf_ihb.models.files import UNREADABLE, one_line
from hf_ihb.models.geometry import Geometry
from hf_ihb.models.images import fit_size, take_images
from hf_ihb.models.pretrained import label_permutation, load_pretrained
from hf_ihb.models.processing import PixelFormat


class Teacher:
    """A frozen model; never trained, wrapped or saved.

    Args:
        model: Set to eval mode, without gradients.
        pixels: How the model wants its images; None if callers bring normalised `pixel_values`.
        label_names: Classes of the data set, in the student's order; None for a teacher without logits.
        assume_same_order: Trust the teacher's class order where its names cannot tell.
        control: ``none``; ``untrained`` where the weights were drawn anew; ``shuffled`` where a trainer is to show it
            the image after the student's.
        revision: Commit on the Hub that the model was read from.

    Raises:
        TeacherMismatchError: If its classes cannot be brought into the order of `label_names`.
        NumericsError: If a weight is not finite.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        pixels: PixelFormat | None,
        label_names: Sequence[str] | None = None,
        assume_same_order: bool = False,
        control: str = "none",
        revision: str | None = None,
    ) -> None:
        self.model = take_images(model).eval().requires_grad_(False)
        self.pixels = pixels
        self.control = control
        self.name = getattr(model.config, "name_or_path", "") or type(model).__name__
        self.revision = revision
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise NumericsError(f"teacher '{self.name}': expected finite weights, found NaN or Inf in {name}")
        self.permutation: Tensor | None = None
        if label_names is not None:
            self.align_labels(label_names, assume_same_order)
        if pixels is not None and pixels.size is not None:
            sample = sample_pixels(model, pixels.size, len(pixels.mean))
            self.look(sample)
            if label_names is not None:
                self._check_scores(sample, len(label_names))

    def _check_scores(self, pixel_values: Tensor, count: int) -> None:
        with torch.no_grad():
            outputs = self.model(pixel_values=pixel_values, **size_arguments(self.model, pixel_values))
        scores = getattr(outputs, "logits", None)
        if scores is None or tuple(scores.shape) != (1, count):
            found = "none" if scores is None else f"scores of shape {tuple(scores.shape)}"
            raise TeacherMismatchError(
                f"teacher '{self.name}', key 'teacher_model': expected {count} class scores of an image, found {found}"
            )

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> "Teacher":
        """Moves the model, and lays out its convolutions' weights as they run fastest; returns itself.

        Args:
            device: Where to.
            dtype: Of its weights from now on; as they are if None.
        """
        self.model.to(device, dtype=dtype, memory_format=torch.channels_last)
        if self.permutation is not None:
            self.permutation = self.permutation.to(device)
        return self

    def align_labels(self, label_names: Sequence[str], assume_same_order: bool = False) -> None:
        """Brings the class scores into the order of `label_names`, by name.

        Args:
            label_names: Classes in the student's order.
            assume_same_order: Trust the teacher's order where its names cannot tell.

        Raises:
            TeacherMismatchError: If number or names of the classes do not match.
        """
        who = f"teacher '{self.name}'"
        permutation = label_permutation(self.model.config, label_names, who, assume_same_order)
        self.permutation = None if permutation is None else permutation.to(self.model.device)

    def prepare(self, images: Tensor, whole: bool = False, shown: Geometry | None = None) -> Tensor:
        """Images as `PixelFormat.apply` takes them -> normalised pixels at the teacher's resolution.

        Args:
            images: ``(B, C, H, W)``.
            whole: Whether all of each image is brought to that resolution, whatever the image processor cuts off.
            shown: What they have gone through already.
        """
        if self.pixels is None:
            raise TeacherMismatchError(
                f"teacher '{self.name}': expected its image processor to normalise stored images, found none; "
                "give 'teacher_processor', or batches with 'teacher_pixel_values'"
            )
        return (self.pixels.whole() if whole else self.pixels).apply(images, shown)

    def _pixels_as_weights(self, pixel_values: Tensor) -> Tensor:
        return pixel_values.to(self.model.dtype)

    @torch.no_grad()
    def logits(self, pixel_values: Tensor) -> Tensor:
        """``(B, K)`` float32 class scores in the student's class order, of normalised ``(B, C, H, W)`` pixels."""
        pixel_values = self._pixels_as_weights(pixel_values)
        logits = self.model(pixel_values=pixel_values, **size_arguments(self.model, pixel_values)).logits
        return self._in_order(logits)

    def _in_order(self, logits: Tensor) -> Tensor:
        return logits.float() if self.permutation is None else logits.float()[:, self.permutation]

    @torch.no_grad()
    def features(self, pixel_values: Tensor, layers: Sequence[int], apply_norm: bool = False) -> list[FeatureMap]:
        """Feature maps of some blocks, of normalised ``(B, C, H, W)`` pixels.

        Args:
            pixel_values: Normalised images.
            layers: 0-based block indices.
            apply_norm: Pass each output through the model's final norm.

        Raises:
            TeacherMismatchError: If a layer or the norm does not exist.
        """
        return self._outputs(pixel_values, layers, apply_norm)[1]

    @torch.no_grad()
    def logits_and_features(
        self, pixel_values: Tensor, layers: Sequence[int], apply_norm: bool = False
    ) -> tuple[Tensor, list[FeatureMap]]:
        """What `logits` and `features` return, of one forward."""
        outputs, maps = self._outputs(pixel_values, layers, apply_norm)
        return self._in_order(outputs.logits), maps

    def _outputs(
        self, pixel_values: Tensor, layers: Sequence[int], apply_norm: bool
    ) -> tuple[ModelOutput, list[FeatureMap]]:
        pixel_values = self._pixels_as_weights(pixel_values)
        self.look(pixel_values)
        try:
            outputs, maps = extract_features(
                self.model, pixel_values, layers, **size_arguments(self.model, pixel_values)
            )
        except ValueError as error:
            raise TeacherMismatchError(f"teacher '{self.name}', key 'teacher_layers': {error}") from error
        return outputs, [
            self._with_norm(m, layer) for m, layer in zip(maps, layers, strict=True)
        ] if apply_norm else maps

    def _with_norm(self, feature_map: FeatureMap, layer: int) -> FeatureMap:
        normed = apply_final_norm(self.model, feature_map)
        if normed is None:
            norm = layout_of(self.model).norm
            found = "found none"
            if norm is not None:
                width = feature_map.tokens.shape[-1]
                found = f"found one of width {norm.width} alone, where block {layer} has {width}: name the last block"
            raise TeacherMismatchError(f"teacher '{self.name}', key 'teacher_norm': expected a final norm, {found}")
        return normed

    @torch.no_grad()
    def normed(self, feature_map: FeatureMap) -> FeatureMap:
        """A block's output after the model's final norm; as it is where the model has none of its width."""
        tokens = feature_map.tokens
        normed = apply_final_norm(self.model, feature_map._replace(tokens=tokens.to(self.model.dtype)))
        return feature_map if normed is None else normed._replace(tokens=normed.tokens.to(tokens.dtype))

    def look(self, pixel_values: Tensor) -> None:
        """Sees that the model takes such images, and what its blocks are; the first time it is asked.

        Raises:
            TeacherMismatchError: If its forward fails.
        """
        try:
            layout_of(self.model, pixel_values, **size_arguments(self.model, pixel_values))
        except UNREADABLE as error:
            rows, columns = pixel_values.shape[-2:]
            raise TeacherMismatchError(
                f"teacher '{self.name}', key 'teacher_image_size': expected a model that takes {pixel_values.shape[1]} "
                f"channels of {rows} x {columns} px and returns its blocks, found: {one_line(error)}"
            ) from error

    def states(self, layers: Sequence[int]) -> list[int]:
        """Which of the states that its library returns the outputs of these blocks are."""
        blocks = layout_of(self.model).blocks
        return [blocks[layer].index for layer in layers]

    def resolve_layers(self, pixel_values: Tensor, layers: Sequence[int]) -> tuple[int, ...]:
        """Blocks as numbers from 0; negative ones count from the last.

        Raises:
            TeacherMismatchError: If one does not exist.
        """
        self.look(self._pixels_as_weights(pixel_values))
        try:
            return tuple(resolve_layers(layers, layout_of(self.model).depth, type(self.model).__name__))
        except ValueError as error:
            raise TeacherMismatchError(f"teacher '{self.name}', key 'teacher_layers': {error}") from error


def load_teacher(
    args: TeacherArguments,
    label_names: Sequence[str],
    needs_logits: bool,
    *,
    seed: int | None = None,
    dataset_statistics: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Teacher:
    """Loads a teacher from the Hub or a folder; only safetensors and JSON are read, no code of the repo is run.

    Args:
        args: Which teacher, and how it sees images.
        label_names: Classes of the data set in label order.
        needs_logits: Whether class scores are learned from; a headless model is refused then.
        seed: Of the weights of an ``untrained`` teacher; that of torch's generator if None. The generator's state is
            left as it was.
        dataset_statistics: Channel means and standard deviations of the data set in [0, 1], for
            ``teacher_normalization='dataset'``.

    Raises:
        ModelLoadError: If it cannot be found, reached or read, or weights are missing.
        TeacherMismatchError: If its classes do not fit.
        ValueError: If no teacher is named, or the data set's statistics are asked for and not given.
    """
    args.check_named()
    untrained = args.teacher_control == "untrained"
    loaded = load_pretrained(
        args.teacher_model,
        args.teacher_revision,
        needs_logits=needs_logits,
        role="teacher",
        untrained_seed=(torch.initial_seed() if seed is None else seed) if untrained else None,
    )
    model, pixels = loaded.model, _of_channels(loaded.pixels, in_channels(loaded.model), args.teacher_model)
    if args.teacher_image_size is not None:
        pixels = pixels.whole((args.teacher_image_size,) * 2)
    if args.teacher_normalization == "dataset":
        if dataset_statistics is None:
            raise ValueError("key 'teacher_normalization': expected the data set's mean and std with it, found none")
        # one channel of a greyscale set stands for all of the teacher's
        mean, std = (tuple(v) * (len(pixels.mean) // len(v)) for v in dataset_statistics)
        pixels = replace(pixels, mean=mean, std=std)
    try:
        fit_size(model, pixels.size)
    except ValueError as error:
        raise TeacherMismatchError(f"teacher '{args.teacher_model}', key 'teacher_image_size': {error}") from error
    names = label_names if needs_logits else None
    return Teacher(
        model, pixels, names, args.teacher_assume_same_label_order, args.teacher_control, revision=loaded.revision
    )


def _of_channels(pixels: PixelFormat, channels: int | None, name: str) -> PixelFormat:
    """Pixels with a mean for each channel that a model takes, where one stands for all.

    Raises:
        TeacherMismatchError: If the model takes other images than grey ones and those in colour.
    """
    values = list(zip(pixels.mean, pixels.std, strict=True))
    if channels is None or (channels == len(values) and channels in (1, 3)):
        return pixels
    if channels not in (1, 3) or len(set(values)) > 1:
        raise TeacherMismatchError(
            f"teacher '{name}': expected a model of 1 or 3 channels whose image processor has a mean for each, found "
            f"{channels} channels and {len(values)} means"
        )
    mean, std = values[0]
    return replace(pixels, mean=(mean,) * channels, std=(std,) * channels)
