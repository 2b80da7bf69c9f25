"""Decoupled knowledge distillation of class scores."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_ihb.config.fields import NON_NEGATIVE, POSITIVE, key
from hf_ihb.methods.logits import LogitMethod
from hf_ihb.step import Step


@dataclass
class DKD(LogitMethod):
    """``temperature^2 * (alpha * KL(b_t || b_s) + beta * KL(q_t || q_s))``, mean over the batch.

    b is the pair (probability of the label's class, probability of all others), q the probabilities among the others.
    Soft distillation is the same with alpha 1 and, for each image, the teacher's probability of the others as beta.

    References:
        Zhao et al., 2022, https://arxiv.org/abs/2203.08679
    """

    name: ClassVar[str] = "dkd"
    label: ClassVar[str] = "decoupled logit"
    said: ClassVar[tuple[str, ...]] = ("dkd_weight", "dkd_alpha", "dkd_beta", "dkd_temperature")

    dkd_weight: float = key(0.0, "Weight of decoupled distillation of class scores.", within=NON_NEGATIVE)
    dkd_warmup_epochs: float = key(0.0, "Warm-up of dkd_weight.", within=NON_NEGATIVE, unit="epochs")
    dkd_alpha: float = key(1.0, "DKD: weight of the label's class against all others.", within=NON_NEGATIVE)
    dkd_beta: float = key(
        8.0, "DKD: weight of the other classes among each other; published with 8 for CIFAR-100.", within=NON_NEGATIVE
    )
    dkd_temperature: float = key(
        4.0, "DKD: softmax temperature of student and teacher.", within=POSITIVE, unit="dimensionless"
    )

    @property
    def references(self) -> tuple[tuple[str, str], ...]:
        """What it stands on."""
        return (("Decoupled knowledge distillation: Zhao et al., 2022", "2203.08679"),)

    def head_loss(self, logits: Tensor, step: Step) -> Tensor:
        """Of one head's logits ``(B, K)``."""
        labels = step.labels if step.labels.ndim == 1 else step.labels.argmax(-1)
        with torch.autocast(logits.device.type, enabled=False):
            sides = [_split(x.float() / self.dkd_temperature, labels) for x in (logits, step.teacher.logits)]
            divergences = [_divergence(ours, theirs) for ours, theirs in zip(*sides, strict=True)]
            per_image = self.dkd_alpha * divergences[0] + self.dkd_beta * divergences[1]
            return self.dkd_temperature**2 * per_image.mean()

    def describe(self) -> str:
        """Its term of the loss."""
        text = "decoupled KL divergence to the teacher's class probabilities (alpha {dkd_alpha:g}, beta {dkd_beta:g}, "
        return text + "temperature {dkd_temperature:g}, weight {dkd_weight:g})"


def _split(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities ``(B, 2)`` of the label's class and of all others, and ``(B, K)`` of the others alone.

    The label's own place among the others is -inf.
    """
    own = torch.nn.functional.one_hot(labels, logits.shape[1]).bool()
    target, others = logits.masked_fill(~own, 0).sum(dim=1, keepdim=True), logits.masked_fill(own, -torch.inf)
    pair = torch.cat((target, others.logsumexp(dim=1, keepdim=True)), dim=1)
    return pair.log_softmax(dim=1), others.log_softmax(dim=1)


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """``(B,)`` KL divergence of log-probabilities from the teacher's; what the teacher rules out adds nothing."""
    possible = teacher > -torch.inf
    difference = torch.where(possible, teacher, 0) - torch.where(possible, student, 0)
    return (teacher.exp() * difference).sum(dim=1)
