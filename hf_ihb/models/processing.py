"""What an image processor does to pixels, as tensor operations on a batch."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import ViTImageProcessor
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

from hf_ihb.functional.constants import constant


class PixelFormat(NamedTuple):
    """Normalisation and size a model was trained with.

    Attributes:
        mean: One value a channel that the model is shown, for pixels in [0, 1].
        std: Likewise.
        size: Height and width; None for images as they are.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int] | None

    def apply(self, images: Tensor) -> Tensor:
        """Resizes (bicubic, antialiased) and normalises images.

        Args:
            images: ``(B, C, H, W)``, uint8 or float in [0, 1].

        Returns:
            ``(B, len(mean), H, W)``: grey images become equal channels, and the channels of a colour image their mean
            where the model is shown one.
        """
        resized = self.size is not None and tuple(images.shape[-2:]) != self.size
        levels = 255.0 if images.dtype == torch.uint8 else 1.0
        if levels == 255 and (resized or len(self.mean) == 1):
            images, levels = images.float() / 255, 1.0
        if len(self.mean) == 1:
            images = images.mean(1, keepdim=True)
        if resized:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True).clamp(0, 1)
        # (x - mean) / std as one multiplication, which reads uint8 directly, and one addition in place
        dtype = torch.float32 if levels == 255 else images.dtype
        scale = constant(tuple(1 / (levels * s) for s in self.std), images.device, dtype)
        shift = constant(tuple(-m / s for m, s in zip(self.mean, self.std, strict=True)), images.device, dtype)
        # one channel against three means gives three
        return (images * scale[:, None, None]).add_(shift[:, None, None])


def pixel_format(processor: Any) -> PixelFormat:
    """Reads mean, std and size off an image processor of transformers or timm."""
    if isinstance(processor, TimmWrapperImageProcessor):
        config = processor.data_config
        return PixelFormat(tuple(config["mean"]), tuple(config["std"]), tuple(config["input_size"][-2:]))
    normalizes = getattr(processor, "do_normalize", True)
    mean = tuple(processor.image_mean) if normalizes else (0.0, 0.0, 0.0)
    std = tuple(processor.image_std) if normalizes else (1.0, 1.0, 1.0)
    crops = getattr(processor, "do_center_crop", False) and getattr(processor, "crop_size", None)
    return PixelFormat(mean, std, _height_and_width(processor.crop_size if crops else getattr(processor, "size", None)))


def _height_and_width(size: Any) -> tuple[int, int] | None:
    if size is None or isinstance(size, int):
        return None if size is None else (size, size)
    height, width = (getattr(size, "height", None), getattr(size, "width", None))
    if isinstance(size, dict):
        height, width = size.get("height"), size.get("width")
    if height and width:
        return int(height), int(width)
    edge = size.get("shortest_edge") if isinstance(size, dict) else getattr(size, "shortest_edge", None)
    return (int(edge), int(edge)) if edge else None


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
