"""Policies of random operations: RandAugment, AutoAugment for CIFAR-10 and TrivialAugment Wide, drawn per sample.

A policy is drawn first (``(B, n)`` operations and their magnitudes, from uniform numbers) and applied after, one call
per kind of operation. Operations, ranges and bins are those torchvision publishes.
"""

from enum import IntEnum
from typing import Literal

import torch
from torch import Tensor

from hf_ihb.augment import color
from hf_ihb.augment.recolor import recolor
from hf_ihb.functional.constants import constant, table
from hf_ihb.functional.geometry import Interpolation, affine_matrix, compose_affines, identity_affine, warp


class Operation(IntEnum):
    """What a policy can do; RandAugment and TrivialAugment draw from all but INVERT.

    Magnitudes: slope (SHEAR), pixels (TRANSLATE, cut to whole ones), degrees counterclockwise (ROTATE), factor - 1
    (BRIGHTNESS to SHARPNESS), bits that stay (POSTERIZE), threshold as a share of 255 (SOLARIZE), none (the others).
    """

    IDENTITY = 0
    SHEAR_X = 1
    SHEAR_Y = 2
    TRANSLATE_X = 3
    TRANSLATE_Y = 4
    ROTATE = 5
    BRIGHTNESS = 6
    COLOR = 7
    CONTRAST = 8
    SHARPNESS = 9
    POSTERIZE = 10
    SOLARIZE = 11
    AUTO_CONTRAST = 12
    EQUALIZE = 13
    INVERT = 14


_NUM_DRAWN = 14  # IDENTITY to EQUALIZE
# plain numbers: a graph that is compiled cannot compare tensors with members of an enumeration
_IDENTITY, _ROTATE, _LAST_SIGNED = map(int, (Operation.IDENTITY, Operation.ROTATE, Operation.SHARPNESS))
_LAST_GEOMETRIC = _ROTATE
# all that move are one warp
_KINDS = (_IDENTITY, *(int(operation) for operation in Operation if operation >= _LAST_GEOMETRIC))
_COLORS = {o.name.lower().replace("_", ""): int(o) for o in Operation if o > _LAST_GEOMETRIC}
RANDAUGMENT_BINS = 31
_AUTOAUGMENT_BINS = 10

# Cubuk et al., 2018, appendix: (operation, probability, magnitude bin) twice, one line being drawn per image.
_O = Operation
CIFAR10_PAIRS = (
    ((_O.INVERT, 0.1, 0), (_O.CONTRAST, 0.2, 6)),
    ((_O.ROTATE, 0.7, 2), (_O.TRANSLATE_X, 0.3, 9)),
    ((_O.SHARPNESS, 0.8, 1), (_O.SHARPNESS, 0.9, 3)),
    ((_O.SHEAR_Y, 0.5, 8), (_O.TRANSLATE_Y, 0.7, 9)),
    ((_O.AUTO_CONTRAST, 0.5, 0), (_O.EQUALIZE, 0.9, 0)),
    ((_O.SHEAR_Y, 0.2, 7), (_O.POSTERIZE, 0.3, 7)),
    ((_O.COLOR, 0.4, 3), (_O.BRIGHTNESS, 0.6, 7)),
    ((_O.SHARPNESS, 0.3, 9), (_O.BRIGHTNESS, 0.7, 9)),
    ((_O.EQUALIZE, 0.6, 0), (_O.EQUALIZE, 0.5, 0)),
    ((_O.CONTRAST, 0.6, 7), (_O.SHARPNESS, 0.6, 5)),
    ((_O.COLOR, 0.7, 7), (_O.TRANSLATE_X, 0.5, 8)),
    ((_O.EQUALIZE, 0.3, 0), (_O.AUTO_CONTRAST, 0.4, 0)),
    ((_O.TRANSLATE_Y, 0.4, 3), (_O.SHARPNESS, 0.2, 6)),
    ((_O.BRIGHTNESS, 0.9, 6), (_O.COLOR, 0.2, 8)),
    ((_O.SOLARIZE, 0.5, 2), (_O.INVERT, 0.0, 0)),
    ((_O.EQUALIZE, 0.2, 0), (_O.AUTO_CONTRAST, 0.6, 0)),
    ((_O.EQUALIZE, 0.2, 0), (_O.EQUALIZE, 0.6, 0)),
    ((_O.COLOR, 0.9, 9), (_O.EQUALIZE, 0.6, 0)),
    ((_O.AUTO_CONTRAST, 0.8, 0), (_O.SOLARIZE, 0.2, 8)),
    ((_O.BRIGHTNESS, 0.1, 3), (_O.COLOR, 0.7, 0)),
    ((_O.SOLARIZE, 0.4, 5), (_O.AUTO_CONTRAST, 0.9, 0)),
    ((_O.TRANSLATE_Y, 0.9, 9), (_O.TRANSLATE_Y, 0.7, 9)),
    ((_O.AUTO_CONTRAST, 0.9, 0), (_O.SOLARIZE, 0.8, 3)),
    ((_O.EQUALIZE, 0.8, 0), (_O.INVERT, 0.1, 0)),
    ((_O.TRANSLATE_Y, 0.7, 9), (_O.AUTO_CONTRAST, 0.9, 0)),
)


@table
def magnitude_table(
    space: Literal["standard", "wide"], bins: int, size: tuple[int, int], device: torch.device
) -> Tensor:
    """Unsigned magnitudes of each operation, weakest first.

    Args:
        space: 'standard' (RandAugment, AutoAugment) or 'wide' (TrivialAugment Wide).
        bins: Number of magnitudes.
        size: Rows and columns of the image.
        device: Where the table goes.

    Returns:
        ``(15, bins)`` float32, a row of zeros where an operation has none.
    """
    height, width = size
    if space == "wide":
        shear, shift_x, shift_y, degrees, factor, lost_bits = 0.99, 32.0, 32.0, 135.0, 0.99, 6.0
    else:
        shift_x, shift_y = 150 / 331 * width, 150 / 331 * height
        shear, degrees, factor, lost_bits = 0.3, 30.0, 0.9, 4.0
    strongest = (0.0, shear, shear, shift_x, shift_y, degrees, factor, factor, factor, factor)
    table = torch.zeros(len(Operation), bins)
    for operation, value in enumerate(strongest):
        table[operation] = torch.linspace(0, value, bins)
    table[Operation.POSTERIZE] = (8 - torch.linspace(0, lost_bits, bins)).round()
    table[Operation.SOLARIZE] = torch.linspace(1, 0, bins)
    return table.to(device)


def _signed(operation: Tensor, magnitude: Tensor, uniform: Tensor) -> Tensor:
    signed = (operation > _IDENTITY) & (operation <= _LAST_SIGNED)
    return torch.where(signed & (uniform < 0.5), -magnitude, magnitude)


def randaugment(uniforms: Tensor, magnitude_bin: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Draws operations of one strength, with replacement.

    Args:
        uniforms: ``(B, n, 2)`` in [0, 1), for n operations.
        magnitude_bin: Strength, in [0, 30].
        size: Rows and columns of the image.

    Returns:
        ``(B, n)`` int64 operations and their ``(B, n)`` float32 magnitudes, as `apply_operations` takes them.

    References:
        Cubuk et al., 2019, https://arxiv.org/abs/1909.13719
    """
    table = magnitude_table("standard", RANDAUGMENT_BINS, size, uniforms.device)
    operation = (uniforms[..., 0] * _NUM_DRAWN).long()
    return operation, _signed(operation, table[operation, magnitude_bin], uniforms[..., 1])


def trivialaugment_wide(uniforms: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Draws one operation of any strength.

    Args:
        uniforms: ``(B, 3)`` in [0, 1).
        size: Rows and columns of the image.

    Returns:
        ``(B, 1)`` int64 operations and their ``(B, 1)`` float32 magnitudes, as `apply_operations` takes them.

    References:
        Müller and Hutter, 2021, https://arxiv.org/abs/2103.10158
    """
    table = magnitude_table("wide", RANDAUGMENT_BINS, size, uniforms.device)
    operation, magnitude_bin = (uniforms[:, :1] * _NUM_DRAWN).long(), (uniforms[:, 1:2] * RANDAUGMENT_BINS).long()
    return operation, _signed(operation, table[operation, magnitude_bin], uniforms[:, 2:])


def autoaugment_cifar10(uniforms: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Draws one of the 25 pairs of operations that were found on CIFAR-10.

    Args:
        uniforms: ``(B, 5)`` in [0, 1).
        size: Rows and columns of the image.

    Returns:
        ``(B, 2)`` int64 operations, IDENTITY where one is skipped, and their ``(B, 2)`` float32 magnitudes, as
        `apply_operations` takes them.

    References:
        Cubuk et al., 2018, https://arxiv.org/abs/1805.09501
    """
    table = magnitude_table("standard", _AUTOAUGMENT_BINS, size, uniforms.device)
    pair = (uniforms[:, 0] * len(CIFAR10_PAIRS)).long()
    drawn, probability, magnitude_bin = constant(CIFAR10_PAIRS, uniforms.device)[pair].unbind(-1)
    operation = torch.where(uniforms[:, 1:3] < probability, drawn.long(), _IDENTITY)
    return operation, _signed(operation, table[operation, magnitude_bin.long()], uniforms[:, 3:])


def operation_affine(operation: Tensor, magnitude: Tensor, size: tuple[int, int]) -> Tensor:
    """Where the operations look; the identity for those that only change colours.

    Args:
        operation: ``(B,)`` int64.
        magnitude: ``(B,)`` float32.
        size: Rows and columns of the image.

    Returns:
        ``(B, 2, 3)`` affine from output to input coordinates.
    """

    def pair(along_x: Operation, along_y: Operation) -> Tensor:
        drawn = torch.stack((operation == int(along_x), operation == int(along_y)), dim=1)
        return magnitude[:, None] * drawn

    slope = pair(Operation.SHEAR_X, Operation.SHEAR_Y)
    corner = constant((-size[1] / 2, -size[0] / 2), magnitude.device)
    return affine_matrix(
        size,
        degrees=-magnitude * (operation == _ROTATE),
        translate=pair(Operation.TRANSLATE_X, Operation.TRANSLATE_Y).trunc(),
        slope=slope,
        center=corner * (slope != 0).any(dim=1, keepdim=True),  # a shear leaves the upper left in place
    )


def _recolor(operation: int, images: Tensor, magnitude: Tensor) -> Tensor:
    match operation:
        case Operation.IDENTITY:
            return images
        case Operation.BRIGHTNESS:
            return color.adjust_brightness(images, 1 + magnitude)
        case Operation.COLOR:
            return color.adjust_saturation(images, 1 + magnitude)
        case Operation.CONTRAST:
            return color.adjust_contrast(images, 1 + magnitude)
        case Operation.SHARPNESS:
            return color.adjust_sharpness(images, 1 + magnitude)
        case Operation.POSTERIZE:
            return color.posterize(images, magnitude)
        case Operation.SOLARIZE:
            return color.solarize(images, 255 * magnitude)
        case Operation.AUTO_CONTRAST:
            return color.autocontrast(images)
        case Operation.EQUALIZE:
            return color.equalize(images)
        case Operation.INVERT:
            return color.invert(images)
    raise ValueError(f"expected an operation that changes colours, found {operation}")


def apply_operation(
    images: Tensor, operation: Tensor, magnitude: Tensor, interpolation: Interpolation
) -> tuple[Tensor, Tensor]:
    """Applies one operation to each image; `apply_operations` for n = 1, with ``(B,)`` operations and magnitudes."""
    affine = operation_affine(operation, magnitude, tuple(images.shape[-2:]))
    geometric = (operation > _IDENTITY) & (operation <= _LAST_GEOMETRIC)
    if not color.may_group(images):
        which = operation[:, None] == constant(tuple(_COLORS.values()), operation.device, torch.int64)
        drawn = dict(zip(_COLORS, which.view(-1, len(_COLORS), 1, 1, 1).unbind(1), strict=True))
        moved = warp(images, affine, interpolation)
        return torch.where(geometric[:, None, None, None], moved, recolor(images, drawn, magnitude)), affine

    def apply(drawn: int, part: Tensor, rows: Tensor) -> Tensor:
        if drawn == _LAST_GEOMETRIC:
            return warp(part, affine[rows], interpolation)
        return _recolor(drawn, part, magnitude[rows])

    kind = torch.where(geometric, _LAST_GEOMETRIC, operation)  # one warp for all that move
    return color.apply_by_choice(images, kind, _KINDS, apply), affine


def apply_operations(
    images: Tensor, operation: Tensor, magnitude: Tensor, interpolation: Interpolation
) -> tuple[Tensor, Tensor]:
    """Applies to each image its operations, one after the other.

    Args:
        images: ``(B, C, H, W)`` uint8, C = 3 or 1; COLOR leaves one channel as it is.
        operation: ``(B, n)`` int64, values of `Operation`.
        magnitude: ``(B, n)`` float32, signed, in the operation's unit.
        interpolation: How shears, shifts and rotations resample; outside the image they find zeros.

    Returns:
        ``(B, C, H, W)`` uint8, and the ``(B, 2, 3)`` affine of all of them together.
    """
    affine = identity_affine(len(images), images.device)
    for drawn, strength in zip(operation.unbind(1), magnitude.unbind(1), strict=True):
        images, moved = apply_operation(images, drawn, strength, interpolation)
        affine = compose_affines(affine, moved)
    return images, affine
