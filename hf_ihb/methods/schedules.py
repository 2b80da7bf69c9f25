"""How the weight of a loss goes over training."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

# losses below this weigh as much as this: debiased ones may be below 0
_FLOOR = 1e-6


def warmup_factor(epoch: float, warmup_epochs: float, kind: str) -> float:
    """Share of a loss's weight at a (fractional) epoch: 0 to 1 over the warm-up, 1 after it.

    Args:
        epoch: Epochs trained so far, >= 0.
        warmup_epochs: Length of the warm-up; 0 turns it off.
        kind: ``linear`` rises steadily, ``step`` stays at 0 until the end.
    """
    if epoch >= warmup_epochs:
        return 1.0
    return epoch / warmup_epochs if kind == "linear" else 0.0


def fade_factor(epoch: float, num_epochs: float, fade_epochs: float, stop_epoch: float | None) -> float:
    """Share of a loss's weight at a (fractional) epoch: 1, then steadily falling to 0, and 0 after it.

    Args:
        epoch: Epochs trained so far, >= 0.
        num_epochs: Epochs of the whole training.
        fade_epochs: Length of the fall; 0 goes from 1 to 0 at once.
        stop_epoch: Where it has fallen; the end of training if None.
    """
    end = num_epochs if stop_epoch is None else stop_epoch
    if fade_epochs == 0:
        return float(stop_epoch is None or epoch < stop_epoch)
    return min(max((end - epoch) / fade_epochs, 0.0), 1.0)


def uncertainty_shares(
    losses: Mapping[str, Tensor], temperature: float, mean: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Soft optimal uncertainty weighting: ``w_k = exp(1 / (T L_k)) / sum_j exp(1 / (T L_j))``, without gradients.

    The smaller a loss, the larger its share; at a high temperature all are the same.

    Args:
        losses: Scalars by their names, > 0; those below 1e-6 count as 1e-6.
        temperature: T > 0, in units of 1 over a loss.
        mean: Of a tensor over processes.

    Returns:
        Shares by the same names, float32 scalars that sum to 1.

    References:
        Kirchdorfer et al., 2024, https://arxiv.org/abs/2408.07985
    """
    if not losses:
        return {}
    values = mean(torch.stack([loss.detach().float() for loss in losses.values()]))
    return dict(zip(losses, (1 / (temperature * values.clamp_min(_FLOOR))).softmax(dim=0).unbind(), strict=True))


def scheduled_alpha(
    epoch: float, num_epochs: float, start: float, end: float, schedule: str, warmup_epochs: float, warmup: str
) -> float:
    """Weight of the logit distillation loss at a (fractional) epoch.

    With p the share of the time between warm-up and end that has passed, ``linear`` is ``start + (end - start) p`` and
    ``cosine`` is ``start + (end - start) (1 - cos(pi p)) / 2``. The warm-up leads from 0 to where the schedule begins.

    Args:
        epoch: Epochs trained so far, >= 0.
        num_epochs: Epochs of the whole training.
        start: Where a schedule begins, in [0, 1].
        end: Where it ends; what ``constant`` is throughout.
        schedule: ``constant``, ``linear`` or ``cosine``.
        warmup_epochs: Length of the warm-up.
        warmup: ``linear`` or ``step``, see `warmup_factor`.
    """
    first = end if schedule == "constant" else start
    if epoch < warmup_epochs or schedule == "constant":
        return first * warmup_factor(epoch, warmup_epochs, warmup)
    length = num_epochs - warmup_epochs
    progress = min((epoch - warmup_epochs) / length, 1.0) if length > 0 else 1.0
    return start + (end - start) * (progress if schedule == "linear" else (1 - math.cos(math.pi * progress)) / 2)
