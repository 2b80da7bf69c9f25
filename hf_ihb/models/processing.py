"""What an image processor does to pixels: read off the processor itself, applied to batches of stored images."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import ViTImageProcessor
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

from hf_ihb.errors import ModelLoadError
from hf_ihb.functional.constants import constant
from hf_ihb.models.geometry import Geometry, WholeImage, read_steps

_CLOSE = 1e-6


@dataclass(frozen=True)
class PixelFormat:
    """What happens to an image on its way into a model.

    Attributes:
        mean: One value a channel that the model is shown, for pixels in [0, 1].
        std: Likewise. Whatever else a processor does to levels (another rescale factor, an offset, none at all) is in
            these two.
        size: Height and width of what the model sees; None for what `geometry` makes of each image.
        interpolation: Filter by which images are resized, as torchvision calls it.
        flips: Whether the channels are turned around (BGR).
        geometry: What is resized and cropped; the whole image to `size` if None.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int] | None
    interpolation: str = "bicubic"
    flips: bool = False
    geometry: Geometry | None = None

    def __post_init__(self) -> None:
        if self.geometry is None:
            object.__setattr__(self, "geometry", WholeImage(self.size, self.interpolation))

    @property
    def crops(self) -> bool:
        """Whether parts of an image may be cut off, or its shape be kept, on the way to a fixed size."""
        return self.size is not None and not self.geometry.is_whole

    def whole(self, size: tuple[int, int] | None = None) -> "PixelFormat":
        """The same of whole images: all of an image is brought to the size that the model sees.

        Args:
            size: Height and width in the place of its own. Without either, each image is as `geometry` makes it.
        """
        size = self.size if size is None else size
        if size is None or self.geometry == WholeImage(size, self.interpolation):
            return self
        return replace(self, size=size, geometry=WholeImage(size, self.interpolation))

    def apply(self, images: Tensor, shown: Geometry | None = None) -> Tensor:
        """Brings images to their size and normalises them.

        8-bit images stay so until they have their size, as in the processors of transformers, which makes the rounding
        the same.

        Args:
            images: ``(B, C, H, W)``, uint8 or float in [0, 1].
            shown: What they have gone through already; nothing more is done to their size where it is `geometry`.

        Returns:
            ``(B, len(mean), H, W)``: grey images become equal channels, and the channels of a colour image their mean
            where the model is shown one.
        """
        if shown is None or shown != self.geometry:
            images = self.geometry(images)
        levels = 255.0 if images.dtype == torch.uint8 else 1.0
        if levels == 255 and len(self.mean) == 1:
            images, levels = images.float() / 255, 1.0
        if len(self.mean) == 1:
            images = images.mean(1, keepdim=True)
        elif self.flips and images.shape[1] == 3:
            images = images.flip(1)
        # (x - mean) / std as one multiplication, which reads uint8 directly, and one addition in place
        dtype = torch.float32 if levels == 255 else images.dtype
        scale = constant(tuple(1 / (levels * s) for s in self.std), images.device, dtype)
        shift = constant(tuple(-m / s for m, s in zip(self.mean, self.std, strict=True)), images.device, dtype)
        # one channel against three means gives three
        return (images * scale[:, None, None]).add_(shift[:, None, None])

    def description(self) -> dict[str, Any]:
        """Everything that determines what `apply` returns, as JSON."""
        return {
            "mean": list(self.mean),
            "std": list(self.std),
            "flips": self.flips,
            "geometry": self.geometry.description(),
        }

    def resembles(self, other: "PixelFormat") -> bool:
        """Whether another does the same, up to rounding of mean and deviation and to who resizes."""
        numbers, others = (*self.mean, *self.std), (*other.mean, *other.std)
        return (self.size, self.interpolation, self.flips, self.crops, len(numbers)) == (
            other.size,
            other.interpolation,
            other.flips,
            other.crops,
            len(others),
        ) and all(abs(a - b) <= _CLOSE * max(1, abs(b)) for a, b in zip(numbers, others, strict=True))


def pixel_format(processor: Any) -> PixelFormat:
    """Reads what an image processor of transformers or timm does to images.

    The processor is asked, with a few made-up images: what it does to their levels, and to their size. A format that
    does not say exactly what the processor does is not returned.

    Args:
        processor: That `pipeline` would use.

    Raises:
        ModelLoadError: If it does something that cannot be done to stored images.
    """
    steps = read_steps(processor)
    mean, std = _nominal(processor, steps.mean, steps.std)
    return PixelFormat(mean, std, steps.size, steps.interpolation, steps.flips, steps.geometry)


def _nominal(
    processor: Any, mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation as they are written down, where they are what was measured up to its rounding."""
    config = getattr(processor, "data_config", None) or {}
    written = [
        config.get("mean") or getattr(processor, "image_mean", None),
        config.get("std") or getattr(processor, "image_std", None),
    ]
    for values in (written, [(0.0,) * 3, (1.0,) * 3]):
        if all(isinstance(v, (tuple, list)) and len(v) == len(mean) for v in values):
            pairs = zip((*values[0], *values[1]), (*mean, *std), strict=True)
            if all(abs(a - b) <= 1e-5 * max(1, abs(b)) for a, b in pairs):
                return tuple(map(float, values[0])), tuple(map(float, values[1]))
    return mean, std


def student_processor(mean: list[float], std: list[float], size: tuple[int, int]) -> ViTImageProcessor:
    """The image processor saved beside a student, so that `pipeline` sees what training evaluated.

    Args:
        mean: Of three channels, as `pipeline` makes every image RGB; equal ones for grey images.
        std: Likewise.
        size: Height and width.
    """
    return ViTImageProcessor(
        do_resize=True,
        size={"height": size[0], "width": size[1]},
        resample=3,  # PIL's bicubic
        do_rescale=True,
        do_normalize=True,
        image_mean=list(mean),
        image_std=list(std),
    )


def whole_image_processor(processor: Any, size: tuple[int, int] | None) -> Any:
    """An image processor that does to levels what another does, and brings whole images to a size.

    Args:
        processor: Of the weights that a student starts from.
        size: Height and width; that of the other's images if None.

    Returns:
        One of its own class where that can do so, a ViT's otherwise; the processor itself where there is no size.

    Raises:
        ModelLoadError: If neither can.
    """
    wanted = pixel_format(processor).whole(size)
    if wanted.size is None:
        return processor
    if isinstance(processor, TimmWrapperImageProcessor):
        return timm_processor(wanted, processor)
    for candidate in (_of_its_class, _of_vit):
        made = candidate(processor, wanted)
        if made is not None and pixel_format(made).resembles(wanted):
            return made
    raise ModelLoadError(
        f"image processor {type(processor).__name__}: expected one that can be made to resize whole images to "
        f"{wanted.size[0]} x {wanted.size[1]} px, found none that treats levels and channels alike"
    )


def _of_its_class(processor: Any, wanted: PixelFormat) -> Any:
    size = {"height": wanted.size[0], "width": wanted.size[1]}
    changed = {"do_resize": True, "size": size, "do_center_crop": False}
    try:
        made = type(processor).from_dict(processor.to_dict() | changed)
        pixel_format(made)
    except (ModelLoadError, ValueError, TypeError, KeyError):  # a class with a way of its own to resize
        return None
    return made


def _of_vit(processor: Any, wanted: PixelFormat) -> ViTImageProcessor:
    made = student_processor(list(wanted.mean), list(wanted.std), wanted.size)
    resample = getattr(processor, "resample", None)
    made.resample = made.resample if resample is None else resample
    return made


def timm_processor(pixels: PixelFormat, like: TimmWrapperImageProcessor | None = None) -> TimmWrapperImageProcessor:
    """The image processor of a timm model for whole images; its ``data_config`` is the model's ``pretrained_cfg``.

    Args:
        pixels: What it should do; with a fixed size.
        like: One whose other settings are kept.

    Raises:
        ModelLoadError: If timm's cannot do it.
    """
    config = dict(like.data_config) if like is not None else {}
    config |= {
        "input_size": [len(pixels.mean), *pixels.size],
        "mean": list(pixels.mean),
        "std": list(pixels.std),
        "interpolation": pixels.interpolation,
        "crop_pct": 1.0,
        "crop_mode": "squash",
    }
    made = TimmWrapperImageProcessor(config)
    if pixels.crops or not pixel_format(made).resembles(pixels):
        raise ModelLoadError(
            "image processor of a timm model: expected whole images, resized to one size and normalised, which is all "
            "that its config can hold, found other steps; give it one like that"
        )
    return made
