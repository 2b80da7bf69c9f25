"""Frozen teachers: any image model of transformers or timm, seen through its own normalisation and resolution."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_MAPPING

import hf_ihb.models.timm_cifar  # noqa: F401  registers resnet18_cifar
from hf_ihb.arguments import TeacherArguments
from hf_ihb.errors import ModelLoadError, NumericsError, TeacherMismatchError
from hf_ihb.models.features import FeatureMap, extract_features, final_norm
from hf_ihb.models.processing import PixelFormat, pixel_format
from hf_ihb.models.student import absent_weights

# Parts of a backbone that blocks do not use: a checkpoint of another head may lack them.
_UNUSED_BY_BLOCKS = ("pooler", "mask_token")


class Teacher:
    """A frozen model; never trained, wrapped or saved.

    Args:
        model: Set to eval mode, without gradients.
        pixels: How the model wants its images; None if callers bring normalised `pixel_values`.
        label_names: Classes of the data set, in the student's order; None for a teacher without logits.
        assume_same_order: Trust the teacher's class order where its names cannot tell.
        control: ``none``; ``untrained`` where the weights were drawn anew; ``shuffled`` where a trainer is to show it
            the image after the student's.

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
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.pixels = pixels
        self.control = control
        self.name = getattr(model.config, "name_or_path", "") or type(model).__name__
        self.revision = getattr(model.config, "_commit_hash", None)
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise NumericsError(f"teacher '{self.name}': expected finite weights, found NaN or Inf in {name}")
        self.permutation: Tensor | None = None
        if label_names is not None:
            self.align_labels(label_names, assume_same_order)
        takes = inspect.signature(model.forward).parameters
        self._interpolates = "interpolate_pos_encoding" in takes

    def to(self, device: torch.device) -> "Teacher":
        """Moves the model; returns itself."""
        self.model.to(device)
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
        permutation = _label_permutation(self.model.config, list(label_names), assume_same_order, self.name)
        self.permutation = None if permutation is None else permutation.to(self.model.device)

    def prepare(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` float images in [0, 1] -> normalised pixels at the teacher's resolution."""
        if self.pixels is None:
            raise TeacherMismatchError(
                f"teacher '{self.name}': expected its image processor to normalise stored images, found none; "
                "give 'teacher_processor', or batches with 'teacher_pixel_values'"
            )
        return self.pixels.apply(images)

    def _kwargs(self, pixel_values: Tensor) -> dict[str, Any]:
        size = getattr(self.model.config, "image_size", None)
        fixed = (size, size) if isinstance(size, int) else size
        resized = fixed is not None and tuple(pixel_values.shape[-2:]) != tuple(fixed)
        return {"interpolate_pos_encoding": True} if resized and self._interpolates else {}

    @torch.no_grad()
    def logits(self, pixel_values: Tensor) -> Tensor:
        """``(B, K)`` float32 class scores in the student's class order, of normalised ``(B, C, H, W)`` pixels."""
        logits = self.model(pixel_values=pixel_values, **self._kwargs(pixel_values)).logits.float()
        return logits if self.permutation is None else logits[:, self.permutation]

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
        try:
            _, maps = extract_features(self.model, pixel_values, layers, **self._kwargs(pixel_values))
        except ValueError as error:
            raise TeacherMismatchError(f"teacher '{self.name}', key 'teacher_layers': {error}") from error
        if not apply_norm:
            return maps
        norm = final_norm(self.model)
        if norm is None:
            raise TeacherMismatchError(f"teacher '{self.name}', key 'teacher_norm': expected a final norm, found none")
        return [m._replace(tokens=norm(m.tokens)) for m in maps]

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
        ModelLoadError: If it cannot be found or read.
        TeacherMismatchError: If weights are missing or its classes do not fit.
        ValueError: If the data set's statistics are asked for and not given.
    """
    name, revision = args.teacher_model, args.teacher_revision or "main"
    path = Path(name).expanduser()
    source = str(path) if path.is_dir() else name
    try:
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
        auto = AutoModelForImageClassification
        if not needs_logits:
            auto = AutoModel if type(config) in MODEL_MAPPING else AutoBackbone
        if args.teacher_control == "untrained":
            model = _untrained(auto, config, torch.initial_seed() if seed is None else seed)
        else:
            model = _trained(auto, config, source, revision, name, needs_logits)
        processor = AutoImageProcessor.from_pretrained(source, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, ImportError, SafetensorError, RuntimeError) as error:
        raise ModelLoadError(f"teacher '{name}' could not be loaded: {' '.join(str(error).split())[:300]}") from error
    pixels = pixel_format(processor)
    if args.teacher_image_size is not None:
        pixels = pixels._replace(size=(args.teacher_image_size,) * 2)
    if args.teacher_normalization == "dataset":
        if dataset_statistics is None:
            raise ValueError("key 'teacher_normalization': expected the data set's mean and std with it, found none")
        # one channel of a greyscale set stands for all of the teacher's
        mean, std = (tuple(v) * (len(pixels.mean) // len(v)) for v in dataset_statistics)
        pixels = pixels._replace(mean=mean, std=std)
    names = label_names if needs_logits else None
    return Teacher(model, pixels, names, args.teacher_assume_same_label_order, args.teacher_control)


def _trained(auto: Any, config: Any, source: str, revision: str, name: str, needs_logits: bool) -> PreTrainedModel:
    """The model with its weights, every one of them."""
    model, info = auto.from_pretrained(
        source,
        config=config,
        revision=revision,
        use_safetensors=True,
        output_loading_info=True,
        dtype=torch.float32,
        trust_remote_code=False,
    )
    absent = absent_weights(info)
    if not needs_logits:
        absent = [k for k in absent if not any(part in _UNUSED_BY_BLOCKS for part in k.split("."))]
    if absent:
        raise TeacherMismatchError(
            f"teacher '{name}': expected weights for all of {type(model).__name__}, found none for {absent[0]} "
            f"({len(absent)} in all)"
        )
    return model


def _untrained(auto: Any, config: Any, seed: int) -> PreTrainedModel:
    """The same architecture as its library initialises it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(config, dtype=torch.float32)
        if (network := getattr(model, "timm_model", None)) is not None:
            # transformers' wrapper draws a network's weights anew, every convolution from N(0, 0.02)
            fresh = timm.create_model(config.architecture, num_classes=network.num_classes, **(config.model_args or {}))
            network.load_state_dict(fresh.state_dict())
    return model


def _label_permutation(config: Any, names: list[str], assume_same_order: bool, teacher: str) -> Tensor | None:
    """Positions of `names` among the teacher's classes; None if they are in order already."""
    theirs = [str(config.id2label[i]) for i in range(len(config.id2label))]
    if len(theirs) != len(names):
        raise TeacherMismatchError(
            f"teacher '{teacher}': expected {len(names)} classes ({_listed(names)}), found {len(theirs)} "
            f"({_listed(theirs)})"
        )
    if theirs == names or assume_same_order:
        return None
    positions = {_plain(name): i for i, name in enumerate(theirs)}
    if len(positions) != len(names) or any(_plain(name) not in positions for name in names):
        raise TeacherMismatchError(
            f"teacher '{teacher}': expected the classes {_listed(names)}, found {_listed(theirs)}; if the order is the "
            "same, say so with 'teacher_assume_same_label_order', or give the student the teacher's id2label"
        )
    return torch.tensor([positions[_plain(name)] for name in names])


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", " ")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
