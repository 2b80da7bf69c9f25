"""Mean and deviation of uint8 images from how often each level occurs: exact, without a float copy of the images."""

import torch
from torch import Tensor

_IMAGES_AT_ONCE = 4096


def count_levels(images: Tensor) -> Tensor:
    """``(N, C, H, W)`` uint8 -> ``(C, 256)`` int64, how often each level occurs."""
    counts = torch.zeros(images.shape[1], 256, dtype=torch.int64, device=images.device)
    for some in images.split(_IMAGES_AT_ONCE):
        counts += torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in some.unbind(1)])
    return counts.cpu()


def moments(counts: Tensor) -> tuple[list[float], list[float]]:
    """``(C, 256)`` counts -> mean and standard deviation of each channel in [0, 1], to four decimals.

    The deviation of a constant channel is 1e-4, so that it can be divided by.
    """
    levels = torch.arange(256, dtype=torch.float64) / 255
    share = counts.double() / counts.sum(dim=1, keepdim=True)
    mean = share @ levels
    std = (share @ levels.square() - mean.square()).clamp_min(0).sqrt()
    return [round(v, 4) for v in mean.tolist()], [max(round(v, 4), 1e-4) for v in std.tolist()]
