"""Normalised knowledge distillation of class scores."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_ihb.config.fields import NON_NEGATIVE, POSITIVE, key
from hf_ihb.methods.logits import LogitMethod
from hf_ihb.step import Step


@dataclass
class NKD(LogitMethod):
    """``-t_y log s_y - gamma * temperature^2 * sum_{k != y} t'_k log s'_k``, mean over the batch.

    s and t are the probabilities of student and teacher, y the label's class, s' and t' the probabilities among the
    other classes at the temperature; the label's class is compared at temperature 1. As published it is a
    cross-entropy: it does not fall to 0, but to the teacher's entropies.

    References:
        Yang et al., 2023, https://arxiv.org/abs/2303.13005
    """

    name: ClassVar[str] = "nkd"
    label: ClassVar[str] = "normalised logit"
    said: ClassVar[tuple[str, ...]] = ("nkd_weight", "nkd_gamma", "nkd_temperature")

    nkd_weight: float = key(0.0, "Weight of normalised distillation of class scores.", within=NON_NEGATIVE)
    nkd_warmup_epochs: float = key(0.0, "Warm-up of nkd_weight.", within=NON_NEGATIVE, unit="epochs")
    nkd_gamma: float = key(1.5, "NKD: weight of the other classes among each other.", within=NON_NEGATIVE)
    nkd_temperature: float = key(
        1.0, "NKD: softmax temperature of the other classes.", within=POSITIVE, unit="dimensionless"
    )

    @property
    def references(self) -> tuple[tuple[str, str], ...]:
        """What it stands on."""
        return (("Normalised knowledge distillation: Yang et al., 2023", "2303.13005"),)

    def head_loss(self, logits: Tensor, step: Step) -> Tensor:
        """Of one head's logits ``(B, K)``."""
        with torch.autocast(logits.device.type, enabled=False):
            student, teacher = logits.float(), step.teacher.logits.float()
            own = torch.nn.functional.one_hot(step.classes(), student.shape[1]).bool()
            target = -(teacher.softmax(dim=1) * student.log_softmax(dim=1)).masked_fill(~own, 0).sum(dim=1)
            student, teacher = (x.masked_fill(own, -torch.inf) / self.nkd_temperature for x in (student, teacher))
            # the label's class has no share, and a logarithm of -inf
            shares = teacher.softmax(dim=1) * student.log_softmax(dim=1).masked_fill(own, 0)
            return (target - self.nkd_gamma * self.nkd_temperature**2 * shares.sum(dim=1)).mean()

    def describe(self) -> str:
        """Its term of the loss."""
        text = "normalised cross-entropy to the teacher's class probabilities (gamma {nkd_gamma:g}, temperature "
        return text + "{nkd_temperature:g}, weight {nkd_weight:g})"
