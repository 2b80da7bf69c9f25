"""Probabilistic knowledge transfer: how likely each image of a batch is to choose each other as its neighbour."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_ihb.config.fields import NON_NEGATIVE, key
from hf_ihb.functional.logits import tilted_divergence
from hf_ihb.functional.tokens import unit_rows
from hf_ihb.methods.pooled import PooledMethod, pairs_among

# kernel below this: images that look in opposite directions, and would have a logarithm of -inf
_FLOOR = 1e-6


@dataclass
class PKT(PooledMethod):
    """``KL(p_t(. | i) || p_s(. | i))``, mean over images i.

    ``p(j | i)`` is proportional to ``(1 + cos(x_i, x_j)) / 2``, over the images j other than i of the batch of all
    processes. A divergence in nats; the authors' code takes its mean over all pairs of a batch, the image itself among
    them, which comparisons of methods weigh by 30000.

    References:
        Passalis and Tefas, 2018, https://arxiv.org/abs/1803.10837
    """

    name: ClassVar[str] = "pkt"
    label: ClassVar[str] = "probabilistic"
    said: ClassVar[tuple[str, ...]] = ("pkt_weight",)

    pkt_weight: float = key(
        0.0,
        "Weight of the divergence between the probabilities, by cosine similarity, that images of a batch are "
        "neighbours.",
        within=NON_NEGATIVE,
    )
    pkt_warmup_epochs: float = key(0.0, "Warm-up of pkt_weight.", within=NON_NEGATIVE, unit="epochs")

    @property
    def references(self) -> tuple[tuple[str, str], ...]:
        """What it stands on."""
        return (("Probabilistic knowledge transfer: Passalis and Tefas, 2018", "1803.10837"),)

    def batch_loss(self, student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
        """A scalar."""
        pairs = pairs_among(weight)
        own, other = (_log_kernel(x) for x in (student, teacher))
        # finite, so that an image without others has a gradient of 0 rather than NaN
        probabilities = other.masked_fill(~pairs, torch.finfo(other.dtype).min).log_softmax(dim=1)
        _, divergence = tilted_divergence(probabilities, (own - other).masked_fill(~pairs, 0))
        rows = pairs.any(dim=1)
        return torch.where(rows, divergence, 0).sum() / rows.sum().clamp_min(1)

    def describe(self) -> str:
        """Its term of the loss."""
        return "divergence between the probabilities that images of a batch are neighbours (weight {pkt_weight:g})"


def _log_kernel(x: Tensor) -> Tensor:
    unit = unit_rows(x)
    return ((1 + unit @ unit.mT) / 2).clamp_min(_FLOOR).log()
