"""The colour operations of policies, each image's own, in operations of fixed shapes: for accelerators and compilers.

What `hf_ihb.augment.color` does to groups of images, here all images go through at once. A pass over all of them for
each operation, to choose from after, would be ten passes; instead the three blends are one, with an image that is
neither blended nor changed by it in the place of the others, and everything that looks at a level alone is one table of
256 levels a channel. The results are the same to the bit.
"""

import torch
from torch import Tensor

from hf_ihb.augment import color
from hf_ihb.functional.constants import constant


def recolor(images: Tensor, drawn: dict[str, Tensor], magnitude: Tensor) -> Tensor:
    """Changes the colours of each image in the one way it drew, or not at all.

    Args:
        images: ``(B, C, H, W)`` uint8, C = 3 or 1.
        drawn: For ``brightness``, ``color``, ``contrast``, ``sharpness``, ``posterize``, ``solarize``,
            ``autocontrast``, ``equalize`` and ``invert`` the images that drew it, ``(B, 1, 1, 1)`` bool; each image at
            most one.
        magnitude: ``(B,)`` float32, see `hf_ihb.augment.policies.Operation`.

    Returns:
        ``(B, C, H, W)`` uint8.
    """
    amount = magnitude[:, None, None, None]
    images = _blended(images, drawn, amount)
    sharpened = color.adjust_sharpness(images, 1 + magnitude)
    images = torch.where(drawn["sharpness"], sharpened, images)
    batch, channels, height, width = images.shape
    table = _table(images, drawn, amount).view(batch, channels, 256)
    return table.gather(2, images.flatten(2).long()).view(batch, channels, height, width)


def _blended(images: Tensor, drawn: dict[str, Tensor], amount: Tensor) -> Tensor:
    """Brightness, contrast and saturation: blends with black, the mean grey, and the grey image."""
    gray = color.gray(images)
    blends = drawn["brightness"] | drawn["contrast"]
    other = gray.mean(dim=(1, 2, 3), keepdim=True) * drawn["contrast"]
    if images.shape[1] > 1:  # one channel has no saturation
        blends = blends | drawn["color"]
        other = torch.where(drawn["color"], gray, other)
    factor = 1 + amount * blends  # 1: an image times 1, and nothing else
    return color.as_levels((images * factor).add_(other * (1 - factor)))


def _table(images: Tensor, drawn: dict[str, Tensor], amount: Tensor) -> Tensor:
    """``(B, C, 1, 256)`` uint8, what becomes of each level."""
    levels = constant(tuple(range(256)), images.device, torch.uint8).expand(*images.shape[:2], 1, 256)
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    table = torch.where(drawn["autocontrast"], color.stretched(levels, low, high), levels)
    table = torch.where(drawn["equalize"], color.equal_levels(images)[:, :, None], table)
    # the others keep all bits, invert nothing: each of them is then the identity for who did not draw it
    bits, none = constant(8.0, images.device), constant(256.0, images.device)
    bits = torch.where(drawn["posterize"], amount, bits)
    threshold = torch.where(drawn["solarize"], 255 * amount, none * ~drawn["invert"])
    table = color.posterize(table, bits[:, 0, 0, 0])
    bright = levels >= threshold.ceil()
    return torch.where(bright, ~table, table)
