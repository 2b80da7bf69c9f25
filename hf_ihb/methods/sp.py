"""Similarity-preserving distillation: which images of a batch are alike."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_ihb.config.fields import NON_NEGATIVE, key
from hf_ihb.functional.tokens import unit_rows
from hf_ihb.methods.pooled import PooledMethod


@dataclass
class SP(PooledMethod):
    """``|| G_s - G_t ||_F^2 / B^2``, G the inner products of the images of a batch, each row of length 1.

    The batch is that of all processes, and B its images that take part. The features are pooled; there they are whole
    flattened maps.

    References:
        Tung and Mori, 2019, https://arxiv.org/abs/1907.09682
    """

    name: ClassVar[str] = "sp"
    label: ClassVar[str] = "similarity-preserving"
    said: ClassVar[tuple[str, ...]] = ("sp_weight",)

    sp_weight: float = key(
        0.0,
        "Weight of the distance of inner products of the images of a batch, which is below 4 over their number; "
        "published with 3000.",
        within=NON_NEGATIVE,
    )
    sp_warmup_epochs: float = key(0.0, "Warm-up of sp_weight.", within=NON_NEGATIVE, unit="epochs")

    @property
    def references(self) -> tuple[tuple[str, str], ...]:
        """What it stands on."""
        return (("Similarity-preserving distillation: Tung and Mori, 2019", "1907.09682"),)

    def batch_loss(self, student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
        """A scalar."""
        own, other = (x * weight[:, None] for x in (student, teacher))
        own, other = (unit_rows(x @ x.mT) for x in (own, other))
        return (own - other).square().sum() / weight.sum().clamp_min(1).square()

    def describe(self) -> str:
        """Its term of the loss."""
        return "distance between inner products of the images of a batch (weight {sp_weight:g})"
