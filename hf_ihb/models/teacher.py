"""Frozen teachers: any image model of transformers or timm, seen through its own normalisation and resolution."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from hf_ihb.config.model import TeacherArguments
from hf_ihb.errors import NumericsError, TeacherMismatchError
from hf_ihb.models.features import FeatureMap, extract_features, final_norm, size_arguments
from hf_ihb.models.geometry import Geometry
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
        self.model = model.eval().requires_grad_(False)
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
        try:
            outputs, maps = extract_features(
                self.model, pixel_values, layers, **size_arguments(self.model, pixel_values)
            )
        except ValueError as error:
            raise TeacherMismatchError(f"teacher '{self.name}', key 'teacher_layers': {error}") from error
        if not apply_norm:
            return outputs, maps
        norm = final_norm(self.model)
        if norm is None:
            raise TeacherMismatchError(f"teacher '{self.name}', key 'teacher_norm': expected a final norm, found none")
        return outputs, [m._replace(tokens=norm(m.tokens)) for m in maps]

    @torch.no_grad()
    def normed(self, feature_map: FeatureMap) -> FeatureMap:
        """A block's output after the model's final norm; as it is where the model has none."""
        norm = final_norm(self.model)
        if norm is None:
            return feature_map
        tokens = feature_map.tokens
        return feature_map._replace(tokens=norm(tokens.to(self.model.dtype)).to(tokens.dtype))


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
        ValueError: If the data set's statistics are asked for and not given.
    """
    untrained = args.teacher_control == "untrained"
    loaded = load_pretrained(
        args.teacher_model,
        args.teacher_revision,
        needs_logits=needs_logits,
        role="teacher",
        untrained_seed=(torch.initial_seed() if seed is None else seed) if untrained else None,
    )
    model, pixels = loaded.model, loaded.pixels
    if args.teacher_image_size is not None:
        pixels = pixels.whole((args.teacher_image_size,) * 2)
    if args.teacher_normalization == "dataset":
        if dataset_statistics is None:
            raise ValueError("key 'teacher_normalization': expected the data set's mean and std with it, found none")
        # one channel of a greyscale set stands for all of the teacher's
        mean, std = (tuple(v) * (len(pixels.mean) // len(v)) for v in dataset_statistics)
        pixels = replace(pixels, mean=mean, std=std)
    names = label_names if needs_logits else None
    return Teacher(
        model, pixels, names, args.teacher_assume_same_label_order, args.teacher_control, revision=loaded.revision
    )
