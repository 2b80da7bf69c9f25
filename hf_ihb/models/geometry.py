"""What an image processor does to the size and the levels of images, found out by asking it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize_image
from transformers.image_utils import pil_torch_interpolation_mapping
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

from hf_ihb.errors import ModelLoadError

# Steps of a processor that change levels and leave sizes alone; their names are those of its keywords.
_LEVEL_STEPS = ("do_rescale", "do_normalize", "include_top", "do_flip_channel_order")
_SIZE_STEPS = ("do_resize", "do_center_crop")
_PROBES = ((20, 28), (28, 20), (45, 33), (33, 33))  # height and width of made-up images
_ROUNDING = 4.0  # mean distance in levels between torchvision's resizing and Pillow's, which clip at other places


class Geometry(Protocol):
    """What images go through before anything is done to their levels."""

    is_whole: bool

    def __call__(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` uint8, or float in [0, 1] -> ``(B, C, H', W')`` of the same kind."""

    def of_picture(self, picture: Image.Image) -> Tensor:
        """A picture in RGB -> ``(3, H', W')`` uint8, as `pipeline` gets it."""

    def description(self) -> dict[str, Any]:
        """What determines it, as JSON."""


@dataclass(frozen=True)
class WholeImage:
    """The whole image, brought to a size as the processors of transformers do it.

    Attributes:
        size: Height and width; None leaves images as they are.
        interpolation: Filter, as torchvision calls it; antialiased.
    """

    size: tuple[int, int] | None
    interpolation: str = "bicubic"

    is_whole = True

    def __call__(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` uint8, or float in [0, 1] -> ``(B, C, *size)`` of the same kind."""
        if self.size is None or tuple(images.shape[-2:]) == self.size:
            return images
        lanczos_elsewhere = self.interpolation == "lanczos" and images.device.type != "cpu"
        filter_ = InterpolationMode("bicubic" if lanczos_elsewhere else self.interpolation)
        resized = resize_image(images, list(self.size), filter_, antialias=True)
        return resized.clamp(0, 1) if resized.is_floating_point() else resized

    def of_picture(self, picture: Image.Image) -> Tensor:
        """A picture in RGB -> ``(3, *size)`` uint8."""
        return self(torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()[None])[0]

    def description(self) -> dict[str, Any]:
        """What determines it, as JSON."""
        size = None if self.size is None else list(self.size)
        return {"whole": size, "interpolation": self.interpolation, "torchvision": torchvision.__version__}


class ProcessorGeometry:
    """An image processor's own steps, but for what it does to levels.

    Args:
        processor: Of transformers or timm.
        is_whole: Whether it is known to bring whole images to one size.
    """

    def __init__(self, processor: Any, is_whole: bool = False) -> None:
        self.processor, self.is_whole = processor, is_whole
        self._off = {name: False for name in _LEVEL_STEPS if getattr(processor, name, None)}
        self._is_timm = isinstance(processor, TimmWrapperImageProcessor)
        # Pillow rounds otherwise than torchvision
        self.uses_pillow = self._is_timm or getattr(processor, "backend", "torchvision") == "pil"

    def __call__(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` uint8, or float in [0, 1] -> ``(B, C, H', W')`` of the same kind."""
        colours = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
        seen = self._ask_timm(colours) if self._is_timm else self._ask(colours)
        if images.dtype != torch.uint8:
            return seen[:, : images.shape[1]].to(images.dtype).clamp(0, 1)
        return _levels(seen)[:, : images.shape[1]]

    def of_picture(self, picture: Image.Image) -> Tensor:
        """A picture in RGB -> ``(3, H', W')`` uint8, as `pipeline` gets it."""
        return _levels(self._ask_timm(picture)) if self._is_timm else _levels(self._ask([picture])[0])

    def _ask(self, images: Any) -> Tensor:
        device = images.device if isinstance(images, Tensor) else None
        if device is not None and self.uses_pillow:
            images = images.cpu()
        data_format = {} if device is None else {"input_data_format": "channels_first"}
        seen = self.processor(images, return_tensors="pt", **data_format, **self._off)["pixel_values"]
        return seen if device is None else seen.to(device)

    def _ask_timm(self, images: Any) -> Tensor:
        for step in self.processor.val_transforms.transforms:
            if type(step).__name__ not in ("ToTensor", "MaybeToTensor", "Normalize"):
                images = step(images)
        if isinstance(images, Tensor):
            return images
        return torch.from_numpy(np.array(images)).permute(2, 0, 1)

    def description(self) -> dict[str, Any]:
        """What determines it, as JSON."""
        return json.loads(self._text)

    @cached_property
    def _text(self) -> str:
        steps = self.processor.data_config if self._is_timm else self.processor.to_dict()
        kept = {name: value for name, value in steps.items() if not name.startswith("_")}
        description = {
            "processor": type(self.processor).__name__,
            "steps": kept,
            "torchvision": torchvision.__version__,
        }
        return json.dumps(description, sort_keys=True, default=_as_json)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ProcessorGeometry) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)


def _as_json(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else str(value)


def _levels(images: Tensor) -> Tensor:
    """uint8, which resizing in Pillow by way of floats may have left."""
    return images if images.dtype == torch.uint8 else images.round().clamp(0, 255).to(torch.uint8)


class Steps(NamedTuple):
    """What a processor was seen to do.

    Attributes:
        mean: ``(x - mean) / std`` is what it makes of a level x in [0, 1], channel by channel.
        std: Likewise.
        flips: Whether channels come out in reverse.
        size: Height and width of what it makes of any image; None if they depend on the image.
        interpolation: Filter it resizes with.
        geometry: What it does before.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    flips: bool
    size: tuple[int, int] | None
    interpolation: str
    geometry: Geometry


def read_steps(processor: Any) -> Steps:
    """Asks a processor with made-up images: of all levels, and of several sizes.

    Raises:
        ModelLoadError: If what it does is not a step that changes sizes followed by one number times, and one added to,
            the levels of each channel.
    """
    try:
        steps = _steps(processor)
    except ModelLoadError:
        raise
    except Exception as error:  # a processor is anybody's code, and may raise anything
        raise _refusal(processor, f"an error ({' '.join(str(error).split())[:150]})") from error
    if not _explains(steps, processor):
        raise _refusal(processor, _culprit(steps, processor))
    return steps


def _refusal(processor: Any, found: str) -> ModelLoadError:
    return ModelLoadError(
        f"image processor {type(processor).__name__}: expected steps that resize, crop, rescale, normalise or turn "
        f"channels around, found {found}, which stored images cannot be put through"
    )


def _steps(processor: Any) -> Steps:
    mean, std, flips = _read_levels(processor)
    geometry = ProcessorGeometry(processor)
    interpolation = _interpolation(processor)
    made = [geometry.of_picture(picture) for picture in _pictures()]
    shapes = [tuple(image.shape[-2:]) for image in made]
    if shapes == list(_PROBES) and all(
        torch.equal(a, WholeImage(None).of_picture(b)) for a, b in zip(made, _pictures(), strict=True)
    ):
        return Steps(mean, std, flips, None, interpolation, WholeImage(None, interpolation))
    if len(set(shapes)) > 1:
        return Steps(mean, std, flips, None, interpolation, geometry)
    whole = WholeImage(shapes[0], interpolation)
    distances = [(a.float() - whole.of_picture(b)).abs().mean().item() for a, b in zip(made, _pictures(), strict=True)]
    if max(distances) == 0 and not geometry.uses_pillow:
        return Steps(mean, std, flips, shapes[0], interpolation, whole)
    geometry = ProcessorGeometry(processor, is_whole=max(distances) <= _ROUNDING)
    return Steps(mean, std, flips, shapes[0], interpolation, geometry)


def _pictures() -> list[Image.Image]:
    """Noise: no two ways to resize or crop it agree by chance."""
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in _PROBES]


def _interpolation(processor: Any) -> str:
    if (config := getattr(processor, "data_config", None)) is not None:
        return str(config["interpolation"])
    resample = getattr(processor, "resample", None)
    mode = pil_torch_interpolation_mapping.get(resample, resample) if resample is not None else None
    return "bilinear" if mode is None else InterpolationMode(getattr(mode, "value", mode)).value


def _read_levels(processor: Any) -> tuple[tuple[float, ...], tuple[float, ...], bool]:
    """What becomes of every level: mean, deviation, and whether channels are turned around."""
    ramp = np.arange(256, dtype=np.uint8)
    channels = np.stack([ramp, ramp[::-1], np.roll(ramp, 77)], axis=-1).reshape(16, 16, 3)
    given = torch.from_numpy(channels.copy()).permute(2, 0, 1).double()
    if isinstance(processor, TimmWrapperImageProcessor):
        seen: Any = Image.fromarray(channels)
        for step in processor.val_transforms.transforms:
            if type(step).__name__ in ("ToTensor", "MaybeToTensor", "Normalize"):
                seen = step(seen)
    else:
        off = {name: False for name in _SIZE_STEPS if getattr(processor, name, None)}
        seen = processor([Image.fromarray(channels)], return_tensors="pt", **off)["pixel_values"][0]
    seen = seen.double()
    if seen.shape != given.shape:
        raise _refusal(processor, _named_steps(processor) or f"{tuple(seen.shape)} of {tuple(given.shape)} pixels")
    for flips in (False, True):
        source = given.flip(0) if flips else given
        low, high = (torch.stack([s[g == v].mean() for s, g in zip(seen, source, strict=True)]) for v in (0, 255))
        slope = (high - low) / 255
        expected = source * slope[:, None, None] + low[:, None, None]
        if slope.abs().min() > 0 and (seen - expected).abs().max() <= 1e-5 * seen.abs().max().clamp_min(1):
            std = 1 / (255 * slope)
            return tuple((-low * std).tolist()), tuple(std.tolist()), flips
    raise _refusal(processor, "levels that are not scaled and shifted channel by channel")


def _explains(steps: Steps, processor: Any, **changed: Any) -> bool:
    """Whether geometry and levels make what the processor as a whole makes."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (steps.mean, steps.std))
    for picture in _pictures():
        expected = processor([picture], return_tensors="pt", **changed)["pixel_values"][0]
        stored = steps.geometry.of_picture(picture)
        found = ((stored.flip(0) if steps.flips else stored) / 255 - mean) / std
        if found.shape != expected.shape:
            return False
        if (found - expected).abs().max() > 1e-4 * expected.abs().max().clamp_min(1):
            return False
    return True


def _culprit(steps: Steps, processor: Any) -> str:
    """The step that is in the way."""
    for name in _other_steps(processor):
        try:
            if _explains(steps, processor, **{name: False}):
                return f"'{name}'"
        except Exception:  # a step that others need
            continue
    return _named_steps(processor) or "steps of its own"


def _other_steps(processor: Any) -> list[str]:
    known = {*_LEVEL_STEPS, *_SIZE_STEPS, "do_convert_rgb"}
    return [n for n, v in sorted(vars(processor).items()) if n.startswith("do_") and v is True and n not in known]


def _named_steps(processor: Any) -> str:
    return ", ".join(f"'{name}'" for name in _other_steps(processor))
