"""Which of several teachers a step learns from."""

import torch
from torch import Tensor

from hf_ihb.augment.augmenter import Stream
from hf_ihb.functional.random import counter_uniforms


def kept_teachers(losses: Tensor, probability: float, seed: int, step: int) -> Tensor:
    """1 for each teacher that is learned from, 0 for those that are left out.

    The one with the largest loss is kept, each other one is left out with a probability (teacher dropping of UNIC;
    Sariyildiz et al., 2024, https://arxiv.org/abs/2408.05088). UNIC decides for each image, by losses of one kind, and
    divides by the number that is kept over the batch. Here losses may be statistics of the batch, so that it is decided
    for the batch; they differ in kind, so that weighted ones are compared; and the weights of those that are kept stay
    as they are, since some are shares of the labels' weight.

    Args:
        losses: ``(T,)`` weighted loss of each teacher, the same on all processes.
        probability: In [0, 1).
        seed: Run seed.
        step: Optimizer steps that were made; with the seed it determines what is drawn, on any device.

    Returns:
        ``(T,)`` float32.
    """
    drawn = counter_uniforms(seed, step, torch.arange(len(losses), device=losses.device), Stream.TEACHER_DROPPING, 1)
    largest = torch.arange(len(losses), device=losses.device) == losses.argmax()
    return ((drawn[:, 0] >= probability) | largest).float()
