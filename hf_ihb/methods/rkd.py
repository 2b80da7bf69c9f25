"""Relational knowledge distillation: distances and angles between the images of a batch."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_ihb.config.fields import NON_NEGATIVE, key
from hf_ihb.methods.pooled import PooledMethod, pairs_among

# images closer than the rounding of their inner products, by their squared distance over the mean one, are the same
_ROUNDING = 1e-6


@dataclass
class RKD(PooledMethod):
    """``mean_ij h(d_s(i, j), d_t(i, j)) + rkd_angle * mean_ijk h(cos_s(i, j, k), cos_t(i, j, k))``, h of Huber.

    d is the distance of two images over its mean in the batch of all processes, cos the cosine of the angle at j; i, j
    and k are different. Images at the same place have a distance of 0 and a cosine of 0. Angles take memory with the
    third power of the batch: 0.5 GB for each of several float32 tensors at 512 images.

    References:
        Park et al., 2019, https://arxiv.org/abs/1904.05068
    """

    name: ClassVar[str] = "rkd"
    label: ClassVar[str] = "relational"
    said: ClassVar[tuple[str, ...]] = ("rkd_weight", "rkd_angle")

    rkd_weight: float = key(
        0.0,
        "Weight of relational distillation: distances and angles between the images of a batch; published with 25.",
        within=NON_NEGATIVE,
    )
    rkd_warmup_epochs: float = key(0.0, "Warm-up of rkd_weight.", within=NON_NEGATIVE, unit="epochs")
    rkd_angle: float = key(
        2.0,
        "RKD: angles over distances; published with 2. Their memory grows with the third power of the batch of all "
        "processes; 0 leaves them out.",
        within=NON_NEGATIVE,
    )

    @property
    def references(self) -> tuple[tuple[str, str], ...]:
        """What it stands on."""
        return (("Relational knowledge distillation: Park et al., 2019", "1904.05068"),)

    def batch_loss(self, student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
        """A scalar."""
        pairs = pairs_among(weight)
        own, other = (_relations(x, weight, pairs) for x in (student, teacher))
        loss = _mean(F.smooth_l1_loss(own.normalised, other.normalised, reduction="none"), pairs)
        if self.rkd_angle == 0:
            return loss
        triples = pairs[:, :, None] & pairs[:, None, :] & pairs  # at the first image, between the two others
        cosines = F.smooth_l1_loss(_cosines(own), _cosines(other), reduction="none")
        return loss + self.rkd_angle * _mean(cosines, triples)

    def describe(self) -> str:
        """Its term of the loss."""
        text = "distances between the images of a batch, and angles with {rkd_angle:g} times the weight "
        return text + "(weight {rkd_weight:g})"


class _Relations(NamedTuple):
    """Of the images of a batch, ``(B, B)``: inner products around their mean, distances, those over their mean."""

    gram: Tensor
    distance: Tensor
    normalised: Tensor


def _relations(x: Tensor, weight: Tensor, pairs: Tensor) -> _Relations:
    share = weight[:, None]
    # around the mean, so that what is far from 0 keeps its digits
    centered = (x - (x * share).sum(dim=0) / weight.sum().clamp_min(1)) * share
    gram = centered @ centered.mT
    lengths = gram.diagonal()
    squared = torch.where(pairs, lengths[:, None] + lengths - 2 * gram, 0)
    apart = squared > _ROUNDING * _mean(squared, pairs).detach()
    distance = torch.where(apart, torch.where(apart, squared, 1).sqrt(), 0)
    mean = _mean(distance, pairs)
    return _Relations(gram, distance, distance / torch.where(mean > 0, mean, 1))


def _cosines(x: _Relations) -> Tensor:
    """``(B, B, B)`` cosine of the angle at the first image between the two others; 0 where one of them is there too."""
    inverse = torch.where(x.distance > 0, 1 / torch.where(x.distance > 0, x.distance, 1), 0)
    gram = x.gram
    products = gram[None] - gram[:, :, None] - gram[:, None, :] + gram.diagonal()[:, None, None]
    return products * inverse[:, :, None] * inverse[:, None, :]


def _mean(values: Tensor, among: Tensor) -> Tensor:
    """Mean of those that are among some; 0 where there are none."""
    return torch.where(among, values, 0).sum() / among.sum().clamp_min(1)
