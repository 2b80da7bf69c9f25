"""Decoupled knowledge distillation of class scores."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_ihb.config.fields import NON_NEGATIVE, POSITIVE, key
from hf_ihb.functional.logits import tilted_divergence
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
        with torch.autocast(logits.device.type, enabled=False):
            student, teacher = (x.float() / self.dkd_temperature for x in (logits, step.teacher.logits))
            binary, others = _divergences(student, teacher, step.classes())
            return self.dkd_temperature**2 * (self.dkd_alpha * binary + self.dkd_beta * others).mean()

    def describe(self) -> str:
        """Its term of the loss."""
        text = "decoupled KL divergence to the teacher's class probabilities (alpha {dkd_alpha:g}, beta {dkd_beta:g}, "
        return text + "temperature {dkd_temperature:g}, weight {dkd_weight:g})"


def _divergences(student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """``(B,)`` KL divergence of the pair (the label's class, all others), and of the others among each other."""
    own = torch.nn.functional.one_hot(labels, teacher.shape[1]).bool()
    difference, others = student - teacher, teacher.masked_fill(own, -torch.inf)
    mean, among_others = tilted_divergence(others.log_softmax(dim=1), difference.masked_fill(own, 0))

    def label_first(of_label: Tensor, of_others: Tensor) -> Tensor:
        return torch.stack((of_label.masked_fill(~own, 0).sum(dim=1), of_others), dim=1)

    log_probabilities = label_first(teacher, others.logsumexp(dim=1)).log_softmax(dim=1)
    # what the others' scores, taken together, differ by
    _, binary = tilted_divergence(log_probabilities, label_first(difference, mean + among_others))
    return binary, among_others
