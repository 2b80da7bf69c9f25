"""Crops, flips, covered regions and mixing of a batch, one set of parameters per sample, on the batch's own device.

Every geometric operation also returns where it looked: an affine ``(B, 2, 3)`` that maps output to input coordinates,
both in [-1, 1] over the image as in `torch.nn.functional.affine_grid(align_corners=False)`. Other warps are in
`hf_ihb.functional.geometry`, colours in `hf_ihb.augment.color`, policies of both in `hf_ihb.augment.policies`.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import betaincinv
from torch import Tensor

from hf_ihb.functional.constants import constant, table


def crop_flip(images: Tensor, corner: Tensor, flip: Tensor, padding: int) -> tuple[Tensor, Tensor]:
    """Pads with zeros, crops back to the original size, then mirrors horizontally where asked.

    Args:
        images: ``(B, C, H, W)``, any dtype.
        corner: ``(B, 2)`` int64 first row and column of the crop in the padded image, in [0, 2 * padding].
        flip: ``(B,)`` bool.
        padding: Pixels added on each side, >= 0.

    Returns:
        The views ``(B, C, H, W)`` in the dtype of `images`, and their affine ``(B, 2, 3)``.
    """
    height, width = images.shape[-2:]
    padded = F.pad(images, (padding,) * 4)
    rows = (torch.arange(height, device=images.device) + corner[:, :1]) * (width + 2 * padding)  # (B, H)
    columns = torch.arange(width, device=images.device)
    columns = torch.where(flip[:, None], width - 1 - columns, columns) + corner[:, 1:]  # (B, W)
    flat = (rows[:, :, None] + columns[:, None, :]).flatten(1)
    views = padded.flatten(2).gather(2, flat[:, None].expand(-1, images.shape[1], -1)).view_as(images)
    mirrored, plain = constant((((-1, 0), (0, 1)), ((1, 0), (0, 1))), images.device)
    scale = torch.where(flip[:, None, None], mirrored, plain)
    shift = (corner.flip(1) - padding) * constant((2 / width, 2 / height), images.device)
    return views, torch.cat((scale, shift[:, :, None]), dim=2)


def rectangle_mask(corner: Tensor, sides: Tensor | int, height: int, width: int) -> Tensor:
    """Rectangles, clipped at the border.

    Args:
        corner: ``(B, 2)`` int64 first row and column.
        sides: ``(B, 2)`` int64 number of rows and columns, or one for all.
        height: Image rows.
        width: Image columns.

    Returns:
        ``(B, 1, H, W)`` bool, true inside the rectangle.
    """
    place = torch.arange(max(height, width), device=corner.device)
    inside = (place >= corner[..., None]) & (place < (corner + sides)[..., None])  # (B, 2, longer side)
    return (inside[:, 0, :height, None] & inside[:, 1, None, :width])[:, None]


def box_mask(center: Tensor, sides: Tensor | int, height: int, width: int) -> Tensor:
    """Boxes around integer centres, clipped at the border.

    Args:
        center: ``(B, 2)`` int64 row and column of the centre; the box covers rows ``[y - h // 2, y + h // 2)``.
        sides: ``(B, 2)`` int64 number of rows and columns, or one for all.
        height: Image rows.
        width: Image columns.

    Returns:
        ``(B, 1, H, W)`` bool, true inside the box.
    """
    half = sides // 2
    return rectangle_mask(center - half, 2 * half, height, width)


def cutout(images: Tensor, center: Tensor, size: int, fill: Tensor) -> Tensor:
    """Covers one square per image.

    Args:
        images: ``(B, C, H, W)`` float.
        center: ``(B, 2)`` int64 row and column of the centre, in [0, H) and [0, W).
        size: Side of the square in pixels, clipped at the border.
        fill: ``(C,)`` colour of the square.

    Returns:
        ``(B, C, H, W)``.

    References:
        DeVries and Taylor, 2017, https://arxiv.org/abs/1708.04552
    """
    covered = box_mask(center, size, *images.shape[-2:])
    return torch.where(covered, fill.to(images)[:, None, None], images)


ERASING_TRIES = 10


def erasing_rectangles(
    uniforms: Tensor,
    height: int,
    width: int,
    area: tuple[float, float] = (0.02, 0.33),
    ratio: tuple[float, float] = (0.3, 3.3),
) -> tuple[Tensor, Tensor]:
    """Draws a rectangle that lies inside the image: the first of `ERASING_TRIES` shapes that fits, at a uniform place.

    All tries are drawn at once, which gives the distribution of torchvision's rejection loop without looping; forcing a
    single draw to fit would pile up rectangles of nearly the image's side.

    Args:
        uniforms: ``(B, 2 + 2 * ERASING_TRIES)`` in [0, 1).
        height: Image rows.
        width: Image columns.
        area: Smallest and largest share of the image, drawn uniformly.
        ratio: Smallest and largest quotient of rows and columns, drawn log-uniformly.

    Returns:
        First row and column ``(B, 2)`` int64, and number of rows and columns ``(B, 2)``; 0 if no shape fits.

    References:
        Zhong et al., 2017, https://arxiv.org/abs/1708.04896
    """
    low, high = (math.log(bound) for bound in ratio)
    pixels = height * width * (area[0] + (area[1] - area[0]) * uniforms[:, 2 : 2 + ERASING_TRIES])
    quotient = (low + (high - low) * uniforms[:, 2 + ERASING_TRIES :]).exp()
    sides = torch.stack((pixels * quotient, pixels / quotient), dim=1).sqrt().round().long()  # (B, 2, tries)
    image = constant((height, width), uniforms.device, torch.int64)
    fits = (sides < image[:, None]).all(dim=1, keepdim=True)
    first = fits.int().argmax(dim=2, keepdim=True).expand(-1, 2, -1)
    sides = (sides * fits).gather(2, first)[:, :, 0]
    return (uniforms[:, :2] * (image - sides + 1)).long(), sides


def erase(images: Tensor, corner: Tensor, sides: Tensor, fill: Tensor) -> Tensor:
    """Covers one rectangle per image; arguments as from `erasing_rectangles` and in `cutout`.

    Returns:
        ``(B, C, H, W)``.
    """
    covered = rectangle_mask(corner, sides, *images.shape[-2:])
    return torch.where(covered, fill.to(images)[:, None, None], images)


@table
def _beta_quantiles(alpha: float, resolution: int, device: torch.device) -> Tensor:
    middle = (np.arange(resolution) + 0.5) / resolution
    return torch.tensor(betaincinv(alpha, alpha, middle), dtype=torch.float32, device=device)


def beta_from_uniform(uniform: Tensor, alpha: float, resolution: int = 1 << 16) -> Tensor:
    """Symmetric Beta(alpha, alpha) variates by inverting the distribution function on a fine grid.

    Rejection samplers draw an unknown number of uniforms; a counter-based generator needs exactly one.

    Args:
        uniform: Numbers in [0, 1), any shape.
        alpha: Shape parameter, > 0.
        resolution: Grid points of the table.

    Returns:
        Same shape as `uniform`, in (0, 1).
    """
    table = _beta_quantiles(alpha, resolution, uniform.device)
    return table[(uniform * resolution).long().clamp(max=resolution - 1)]


def cutmix_weight(lam: Tensor, center: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Share of the own image at each pixel under CutMix.

    Args:
        lam: ``(B,)`` nominal share of the own image, in [0, 1].
        center: ``(B, 2)`` int64 row and column of the pasted box's centre.
        height: Image rows.
        width: Image columns.

    Returns:
        ``(B, 1, H, W)`` float in {0, 1}, 0 where the partner shows; and ``(B,)`` its mean, the share after clipping.

    References:
        Yun et al., 2019, https://arxiv.org/abs/1905.04899
    """
    sides = (1 - lam).sqrt()[:, None] * constant((height, width), lam.device)
    pasted = box_mask(center, sides.long(), height, width)
    weight = 1 - pasted.float()
    return weight, weight.mean(dim=(1, 2, 3))


def mix(first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    """Convex combination ``weight * first + (1 - weight) * second``; `weight` broadcasts.

    References:
        Zhang et al., 2018 (MixUp), https://arxiv.org/abs/1710.09412
    """
    return weight * first + (1 - weight) * second


def smoothed_one_hot(labels: Tensor, num_labels: int, smoothing: float) -> Tensor:
    """Class probabilities of hard labels.

    Args:
        labels: ``(B,)`` int64 in [0, num_labels).
        num_labels: Number of classes K.
        smoothing: Mass spread evenly over all classes, in [0, 1).

    Returns:
        ``(B, K)`` float32, rows sum to 1.

    References:
        Szegedy et al., 2016, https://arxiv.org/abs/1512.00567
    """
    one_hot = F.one_hot(labels, num_labels).float()
    return one_hot * (1 - smoothing) + smoothing / num_labels
