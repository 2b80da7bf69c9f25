"""Affine warps of a batch, one per sample, and the algebra of where they looked.

An affine ``(B, 2, 3)`` maps output to input coordinates, x then y, both in [-1, 1] over the image as in
`torch.nn.functional.affine_grid(align_corners=False)`. Sums are written out instead of being matrix products: those
may round differently in another batch size, and an image must not depend on its neighbours.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_ihb.functional.constants import constant, table

Interpolation = Literal["nearest", "bilinear"]


def identity_affine(batch_size: int, device: torch.device | None = None) -> Tensor:
    """``(B, 2, 3)`` affine of an image that was not moved."""
    affine = constant(((1, 0, 0), (0, 1, 0)), torch.device("cpu") if device is None else device)
    return affine.expand(batch_size, 2, 3)


def affine_matrix(
    size: tuple[int, int],
    *,
    degrees: Tensor,
    translate: Tensor,
    scale: Tensor | None = None,
    slope: Tensor | None = None,
    center: Tensor | None = None,
) -> Tensor:
    """Where an image that is sheared along x, then along y, scaled, rotated and shifted comes from.

    The conventions are those of torchvision's `affine`: with c the centre, an input point q goes to
    ``R(degrees) scale Y(slope_y) X(slope_x) (q - c) + c + translate``; this is the inverse of it.

    Args:
        size: Rows and columns of the image.
        degrees: ``(B,)`` rotation, clockwise as seen.
        translate: ``(B, 2)`` shift along x and y in pixels.
        scale: ``(B,)`` magnification, > 0; 1 if None.
        slope: ``(B, 2)`` tangents of the shear angles along x and y; 0 if None.
        center: ``(B, 2)`` x and y of the fixed point in pixels from the image's centre, which it is if None.

    Returns:
        ``(B, 2, 3)`` float32 affine from output to input coordinates.
    """
    height, width = size
    slope = torch.zeros_like(translate) if slope is None else slope
    center = torch.zeros_like(translate) if center is None else center
    angle = torch.deg2rad(degrees)
    cos, sin = angle.cos(), angle.sin()
    low = torch.stack((slope[:, 1] * cos - sin, slope[:, 1] * sin + cos), dim=1)
    linear = torch.stack((torch.stack((cos, sin), dim=1) + slope[:, :1] * low, low), dim=1)  # (B, 2, 2), in pixels
    if scale is not None:
        linear = linear / scale[:, None, None]
    target = center + translate
    shift = center - (linear[:, :, 0] * target[:, :1] + linear[:, :, 1] * target[:, 1:])
    half = constant((width / 2, height / 2), linear.device)
    return torch.cat((linear * half / half[:, None], (shift / half)[:, :, None]), dim=2)


def compose_affines(first: Tensor, then: Tensor) -> Tensor:
    """Affine of a view made by `first` and then by `then`.

    Args:
        first: ``(B, 2, 3)``, coordinates of the view between to those of the stored image.
        then: ``(B, 2, 3)``, coordinates of the final view to those of the view between.

    Returns:
        ``(B, 2, 3)``, coordinates of the final view to those of the stored image.
    """
    linear, shift = first[:, :, :2], first[:, :, 2:]
    composed = linear[:, :, :1] * then[:, :1] + linear[:, :, 1:] * then[:, 1:]
    return torch.cat((composed[:, :, :2], composed[:, :, 2:] + shift), dim=2)


@table
def pixel_centers(count: int, device: torch.device) -> Tensor:
    """``(count,)`` float32 coordinates in [-1, 1] of the pixels along one side of an image."""
    return (2 * torch.arange(count, device=device) + 1) / count - 1


def warp(images: Tensor, affine: Tensor, interpolation: Interpolation, fill: int = 0) -> Tensor:
    """Resamples each image where its affine looks.

    Args:
        images: ``(B, C, H, W)`` uint8.
        affine: ``(B, 2, 3)``, output to input coordinates.
        interpolation: 'nearest' takes the closest pixel, 'bilinear' weighs four.
        fill: Grey level outside the image, in [0, 255].

    Returns:
        ``(B, C, H, W)`` uint8, rounded.
    """
    y, x = (pixel_centers(n, images.device) for n in images.shape[-2:])
    across = x[:, None] * affine[:, None, :, 0]  # (B, W, 2)
    down = y[:, None] * affine[:, None, :, 1] + affine[:, None, :, 2]  # (B, H, 2)
    grid = across[:, None] + down[:, :, None]  # (B, H, W, 2)
    levels = images.float().sub_(fill)  # outside the image grid_sample finds zeros, so the fill has to be the zero
    sampled = F.grid_sample(levels, grid, mode=interpolation, padding_mode="zeros", align_corners=False)
    return sampled.add_(fill).round_().to(torch.int16).to(torch.uint8)  # four times faster than at once
