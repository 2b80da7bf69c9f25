"""Redundancy suppression: pooled features of student and teacher, decorrelated from each other."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from hf_ihb.config.fields import NON_NEGATIVE, key
from hf_ihb.methods.base import Method, TokenPair, Widths
from hf_ihb.step import Needs, Step, StudentOutput, TeacherOutputs

_VARIANCE_FLOOR = 1e-5


class PooledMap(nn.Sequential):
    """Two layers from the student's mean token to the teacher's width; the loss sees the student through them alone."""

    def __init__(self, width: int, teacher_width: int) -> None:
        super().__init__(nn.Linear(width, teacher_width), nn.GELU(), nn.Linear(teacher_width, teacher_width))

    def forward(self, student: StudentOutput, teacher: TeacherOutputs) -> Tensor:
        """``(B, D_t)`` of the tokens that lie inside the teacher's image."""
        mean, _ = TokenPair(student.final_tokens, *teacher.final).image_means()
        return super().forward(mean.to(self[0].weight.dtype))


@dataclass
class RSD(Method):
    """``(sum_i (1 - C_ii)^2 + kappa * sum_{i != j} C_ij^2) / D``, C the correlations over the batch of all processes.

    C is between the channels of mapped student and of teacher, each the mean over the tokens of the last block of the
    student, and of the deepest of `teacher_layers`, after the final norm. The published loss is the sum; divided by the
    teacher's width D, its weight does not depend on the teacher.

    References:
        Zhang et al., 2025, https://arxiv.org/abs/2507.21844
    """

    name: ClassVar[str] = "rsd"
    label: ClassVar[str] = "redundancy-suppression"
    said: ClassVar[tuple[str, ...]] = ("rsd_weight", "rsd_kappa")

    rsd_weight: float = key(
        0.0,
        "Weight of redundancy suppression: correlations of pooled student and teacher features against the identity.",
        within=NON_NEGATIVE,
    )
    rsd_warmup_epochs: float = key(0.0, "Warm-up of rsd_weight.", within=NON_NEGATIVE, unit="epochs")
    rsd_kappa: float = key(0.005, "RSD: weight of correlations between different channels.", within=NON_NEGATIVE)

    @property
    def references(self) -> tuple[tuple[str, str], ...]:
        """What it stands on."""
        return (("Redundancy suppression: Zhang et al., 2025", "2507.21844"),)

    @property
    def needs(self) -> Needs:
        """The mean token of the last block, after the final norms."""
        return Needs(final="mean", statistics=True)

    def head(self, widths: Widths) -> nn.Module:
        """The two layers."""
        return PooledMap(*widths.final)

    def loss(self, student: StudentOutput, step: Step) -> Tensor:
        """A scalar."""
        _, teacher = TokenPair(student.final_tokens, *step.teacher.final).image_means()
        with torch.autocast(teacher.device.type, enabled=False):
            own, other, weight = step.gathered(student.method_heads[self.name].float(), teacher, step.weight())
            count = weight.sum().clamp_min(1)
            own, other = (_standardized(x, weight, count) for x in (own, other))
            squares = (own.mT @ other / count - torch.eye(other.shape[1], device=other.device)).square()
            same = squares.diagonal().sum()
            return (same + self.rsd_kappa * (squares.sum() - same)) / len(squares)

    def describe(self) -> str:
        """Its term of the loss."""
        return "correlations of pooled features against the identity (kappa {rsd_kappa:g}, weight {rsd_weight:g})"


def _standardized(x: Tensor, weight: Tensor, count: Tensor) -> Tensor:
    """Channels of ``(B, D)`` with mean 0 and variance 1 over the images that take part, 0 in the others."""
    share = weight[:, None]
    centered = (x - (x * share).sum(dim=0) / count) * share
    return centered * (centered.square().sum(dim=0) / count + _VARIANCE_FLOOR).rsqrt()
