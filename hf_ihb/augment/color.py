"""Colour operations on a batch of 8-bit images, one parameter per sample.

uint8 in, uint8 out: the operations of the published policies are defined on grey levels (posterize clears bits,
equalize counts levels, all cut fractions off), and only so can they be compared level by level with torchvision and
PIL. Where torchvision calculates in float32 it may fuse a product into a sum, which is one rounding less; where that
falls on a grey level's edge the results differ by one level.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_ihb.functional.constants import constant

_fixed = ContextVar("fixed_shapes", default=False)


@contextlib.contextmanager
def fixed_shapes() -> Iterator[None]:
    """Inside, what runs is what a compiled graph holds, on a CPU too."""
    before = _fixed.set(True)
    try:
        yield
    finally:
        _fixed.reset(before)


def may_group(images: Tensor) -> bool:
    """Whether sizes of groups are known without a wait for the device, and shapes may depend on them."""
    return not torch.compiler.is_compiling() and images.device.type == "cpu" and not _fixed.get()


def apply_by_choice(
    images: Tensor, choice: Tensor, candidates: Sequence[int], function: Callable[[int, Tensor, Tensor], Tensor]
) -> Tensor:
    """Gives each sample what it drew.

    On the CPU in one call for all samples that drew the same. Elsewhere, and in a compiled graph, every candidate is
    made of all samples and then chosen from: more work, but of fixed shapes, and nothing is waited for.

    Args:
        images: ``(B, ...)``.
        choice: ``(B,)`` int64, what each sample drew.
        candidates: What can be drawn, ascending.
        function: Takes what was drawn, the ``(n, ...)`` images that drew it and their ``(n,)`` rows; returns
            ``(n, ...)``.

    Returns:
        ``(B, ...)``.
    """
    if not may_group(images):
        rows, result = torch.arange(len(images), device=images.device), images
        for drawn in candidates:
            mine = (choice == drawn).view(-1, *[1] * (images.ndim - 1))
            result = torch.where(mine, function(drawn, images, rows), result)
        return result
    order = choice.argsort(stable=True)
    sizes = torch.bincount(choice, minlength=candidates[-1] + 1).tolist()
    groups = zip(images.index_select(0, order).split(sizes), order.split(sizes), strict=True)
    parts = [function(drawn, part, rows) if len(rows) else part for drawn, (part, rows) in enumerate(groups)]
    return torch.cat(parts).index_select(0, order.argsort())


def _per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def as_levels(values: Tensor) -> Tensor:
    """Float values, which are overwritten -> uint8: cut to the range, fractions cut off."""
    return values.clamp_(0, 255).to(torch.int16).to(torch.uint8)  # four times faster than at once


def gray(images: Tensor) -> Tensor:
    """``(B, 1, H, W)`` float32 whole grey levels (ITU-R 601 luma, fractions cut off)."""
    if images.shape[1] == 1:
        return images.float()
    red, green, blue = images.split(1, dim=1)
    return (red * 0.2989 + green * 0.587 + blue * 0.114).floor_()


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    factor = _per_image(factor)
    return as_levels((images * factor).add_(other * (1 - factor)))


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Blends with black: 0 is black, 1 the image.

    Args:
        images: ``(B, C, H, W)`` uint8.
        factor: ``(B,)`` float32 >= 0.

    Returns:
        ``(B, C, H, W)`` uint8, as from all operations here.
    """
    return as_levels(images * _per_image(factor))


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blends with the image's mean grey; arguments as in `adjust_brightness`."""
    # grey levels are whole numbers: up to 2^16 pixels their float32 sum is exact in any order
    return _blend(images, gray(images).mean(dim=(1, 2, 3), keepdim=True), factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blends with the grey image; one channel stays as it is. Arguments as in `adjust_brightness`."""
    return images if images.shape[1] == 1 else _blend(images, gray(images), factor)


def adjust_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Turns the hue circle; one channel stays as it is.

    Args:
        images: ``(B, C, H, W)`` uint8, C = 3 or 1.
        turns: ``(B,)`` float32 in [-0.5, 0.5], 1 being once around.
    """
    if images.shape[1] == 1:
        return images
    red, green, blue = images.float().unbind(1)
    high = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = high - low
    # products with a mask: `torch.where` and `torch.aminmax` over channels are an order of magnitude slower on a CPU
    is_red = high == red
    is_green = (high == green) & ~is_red
    hue = (green - blue) * is_red + (blue - red + 2 * chroma) * is_green
    hue += (red - green + 4 * chroma) * ~(is_red | is_green)
    hue = hue / chroma.clamp_min(1) + 6 * turns[:, None, None]  # in sixths; levels are whole, so chroma is 0 or >= 1
    hue = hue - 6 * (hue / 6).floor_()
    center, sign, offset = constant(((3, 2, 4), (1, -1, -1), (-1, 2, 2)), images.device)[..., None, None]
    share = (hue[:, None] - center).abs_().mul_(sign).add_(offset).clamp_(0, 1)
    # the factor is torchvision's way of not cutting a level off where rounding made 0.99... of a whole number
    return as_levels(share.mul_(chroma[:, None]).add_(low[:, None]).mul_(255.999 / 255))


def adjust_sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Blends with a 3 x 3 blur; the outermost pixels stay as they are. Arguments as in `adjust_brightness`."""
    if min(images.shape[-2:]) < 3:
        return images
    width = images.shape[-1]
    # rows lie one after the other: shifted sums are long runs, and where they wrap around only border pixels see it
    levels = images.flatten(2).to(torch.int16)
    row = levels[..., :-2] + levels[..., 1:-1] + levels[..., 2:]
    inner = levels[..., width + 1 : -width - 1]
    weighted = row[..., : -2 * width] + row[..., width:-width] + row[..., 2 * width :] + 4 * inner
    blurred = (weighted * (1 / 13)).round_()  # thirteenths are never halves: rounding them is safe
    sharpened = as_levels(inner + (blurred - inner) * (1 - factor)[:, None, None])  # flat places stay exactly flat
    result = images.clone()
    result[..., 1:-1, 1:-1] = F.pad(sharpened, (0, 2)).unflatten(2, (-1, width))[..., :-2]
    return result


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keeps the highest bits of each level.

    Args:
        images: ``(B, C, H, W)`` uint8.
        bits: ``(B,)`` whole numbers in [0, 8], any dtype.
    """
    return images & _per_image(256 - (1 << (8 - bits.long()))).to(torch.uint8)


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Inverts the levels from a threshold on.

    Args:
        images: ``(B, C, H, W)`` uint8.
        threshold: ``(B,)`` float32 in [0, 255].
    """
    bright = images >= _per_image(threshold.ceil().to(torch.uint8))
    return images ^ (255 * bright.to(torch.uint8))


def autocontrast(images: Tensor) -> Tensor:
    """Stretches each channel to the whole range; a channel of one level stays as it is."""
    return stretched(images, images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True))


def stretched(levels: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Levels ``(B, C, ...)`` from bounds ``(B, C, 1, 1)`` to the whole range; between equal ones as they are."""
    low, flat = low.float(), low == high
    step = (high - low) * (1 / 255) + flat  # 1 between equals
    return as_levels((levels - low * ~flat).div_(step))


def _level_counts(levels: Tensor) -> Tensor:
    """``(N, pixels)`` uint8 -> ``(N, 256)`` int32, how often each row has each level."""
    if may_group(levels):  # elsewhere it would wait to learn how many bins there are
        row = torch.arange(len(levels), dtype=torch.int32)[:, None]
        return torch.bincount((levels + 256 * row).flatten(), minlength=256 * len(levels)).view(-1, 256).int()
    counts = torch.zeros(len(levels), 256, dtype=torch.int32, device=levels.device)
    return counts.scatter_add_(1, levels.long(), torch.ones_like(levels, dtype=torch.int32))


def equalize(images: Tensor) -> Tensor:
    """Gives each channel levels that are used about equally often, by PIL's integer rule."""
    return equal_levels(images).gather(2, images.flatten(2).long()).view_as(images)


def equal_levels(images: Tensor) -> Tensor:
    """``(B, C, 256)`` uint8, what `equalize` makes of each level."""
    levels = images.reshape(-1, images.shape[-2] * images.shape[-1])
    counts = _level_counts(levels)
    darker = counts.cumsum(1, dtype=torch.int32) - counts
    # of the brightest level: all pixels that are not it
    step = darker.gather(1, levels.amax(1, keepdim=True).long()) // 255
    table = ((darker + step // 2) // step.clamp_min(1)).clamp_(max=255)
    table = torch.where(step > 0, table, torch.arange(256, device=images.device)).to(torch.uint8)
    return table.view(*images.shape[:2], 256)


def invert(images: Tensor) -> Tensor:
    """The negative, ``255 - level``."""
    return ~images


_JITTER: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
    adjust_hue,
)


def jitter_draws(uniforms: Tensor, amounts: Sequence[float]) -> tuple[Tensor, Tensor]:
    """What `color_jitter` does to each image.

    Args:
        uniforms: ``(B, 8)`` in [0, 1).
        amounts: Half widths for brightness, contrast, saturation and hue.

    Returns:
        ``(B, 4)`` int64 order, all permutations being equally likely; and ``(B, 4)`` parameters, uniform between
        ``1 - amount`` and ``1 + amount``, for hue between ``-amount`` and ``amount``.
    """
    half_width = constant(tuple(amounts), uniforms.device)
    middle = constant((1, 1, 1, 0), uniforms.device)
    return uniforms[:, :4].argsort(dim=1, stable=True), middle + half_width * (2 * uniforms[:, 4:8] - 1)


def color_jitter(images: Tensor, order: Tensor, parameters: Tensor, amounts: Sequence[float]) -> Tensor:
    """Changes brightness (0), contrast (1), saturation (2) and hue (3), each sample in its own order.

    Args:
        images: ``(B, C, H, W)`` uint8.
        order: ``(B, 4)`` int64, a permutation of 0..3 in each row.
        parameters: ``(B, 4)`` float32; column k belongs to operation k.
        amounts: Four numbers; an operation whose amount is 0 is left out.

    Returns:
        ``(B, C, H, W)`` uint8.
    """

    def adjust(k: int, part: Tensor, rows: Tensor) -> Tensor:
        return _JITTER[k](part, parameters[rows, k]) if amounts[k] else part

    for choice in order.unbind(1):
        images = apply_by_choice(images, choice, range(len(_JITTER)), adjust)
    return images
