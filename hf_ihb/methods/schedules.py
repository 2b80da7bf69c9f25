"""How the weight of a loss goes over training."""

import math


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
