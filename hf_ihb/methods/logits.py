"""Distillation of class scores, soft or hard."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hf_ihb.config.fields import FRACTION, NON_NEGATIVE, POSITIVE, key
from hf_ihb.functional.logits import hard_distillation_loss, kd_divergence, standardized_logits
from hf_ihb.methods.base import Method
from hf_ihb.methods.schedules import scheduled_alpha
from hf_ihb.step import Needs, Step, StudentOutput


@dataclass
class LogitMethod(Method):
    """A method that learns from class scores by the heads that `distilled_heads` names, and is the mean over them.

    With `logit_standardization` each of them and the teacher are compared by their standardised scores (Sun et al.,
    2024, https://arxiv.org/abs/2403.01427).
    """

    @property
    def needs(self) -> Needs:
        """The teacher's class scores."""
        return Needs(logits=True)

    def loss(self, student: StudentOutput, step: Step) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Mean of `head_loss` over the heads that learn from the teacher."""
        step = self.compared_step(step)
        heads = map(self.compared, student.distilled(self.shared.distilled_heads))
        return torch.stack([self.head_loss(logits, step) for logits in heads]).mean()

    def compared(self, logits: Tensor) -> Tensor:
        """``(B, K)`` logits of either side as they are compared: standardised where that is asked for."""
        return standardized_logits(logits) if self.shared.logit_standardization else logits

    def compared_step(self, step: Step) -> Step:
        """The step with the teacher's logits as they are compared."""
        return replace(step, teacher=replace(step.teacher, logits=self.compared(step.teacher.logits)))

    def head_loss(self, logits: Tensor, step: Step) -> Tensor:
        """The loss of one head's logits ``(B, K)``, a scalar."""
        raise NotImplementedError

    def phrase(self) -> str:
        """How it learns, for the first sentence of a card."""
        return f"{self.label} distillation"


@dataclass
class LogitDistillation(LogitMethod):
    """Soft or hard distillation, which shares the weight of the task loss: ``(1 - alpha) * CE + alpha * KD``.

    References:
        Hinton et al., 2015, https://arxiv.org/abs/1503.02531; hard: Touvron et al., 2021,
        https://arxiv.org/abs/2012.12877
    """

    name: ClassVar[str] = "kd"
    label: ClassVar[str] = "logits"
    said: ClassVar[tuple[str, ...]] = ("alpha", "temperature", "distillation_type")
    shares_task: ClassVar[bool] = True

    alpha: float | None = key(
        None,
        "Weight of the distillation of class scores (with a schedule: at the end); the task loss gets 1 - alpha. 0.5 "
        "with method 'logits' and 0 otherwise if not given.",
        within=FRACTION,
    )
    alpha_schedule: Literal["constant", "linear", "cosine"] = key(
        "constant", "How alpha goes from alpha_start to alpha between the warm-up and the end of training."
    )
    alpha_start: float = key(0.0, "Where a linear or cosine alpha_schedule begins.", within=FRACTION)
    temperature: float = key(1.0, "Softmax temperature of student and teacher.", within=POSITIVE, unit="dimensionless")
    distillation_type: Literal["soft", "hard"] = key(
        "soft", "'soft': temperature^2 x KL divergence; 'hard': cross-entropy to the teacher's decision."
    )
    distillation_warmup_epochs: float = key(
        0.0, "Epochs over which alpha rises from 0 (see distillation_warmup_type).", within=NON_NEGATIVE, unit="epochs"
    )

    @property
    def references(self) -> tuple[tuple[str, str], ...]:
        """Of the kind that is used."""
        if self.distillation_type == "soft":
            return (("Knowledge distillation: Hinton, Vinyals and Dean, 2015", "1503.02531"),)
        return (("DeiT: Touvron et al., 2021", "2012.12877"),)

    @property
    def is_on(self) -> bool:
        """Whether class scores are asked for: with method 'logits', or where alpha is above 0 at any time."""
        asked = self.shared.method == "logits" or (self.alpha or 0) > 0
        return asked or (self.alpha_schedule != "constant" and self.alpha_start > 0)

    @property
    def weight_key(self) -> str:
        """Alpha, or with a schedule where it starts, whichever is above 0."""
        return "alpha" if (self.alpha or 0) > 0 else "alpha_start"

    @property
    def largest_weight(self) -> float:
        """Alpha where it is largest in a training."""
        return max(self.alpha or 0.0, self.alpha_start if self.alpha_schedule != "constant" else 0.0)

    def risen_weight(self, epoch: float, num_epochs: float) -> float:
        """Alpha after its warm-up, by its schedule."""
        return scheduled_alpha(
            epoch,
            num_epochs,
            self.alpha_start,
            self.alpha or 0.0,
            self.alpha_schedule,
            self.distillation_warmup_epochs,
            self.shared.distillation_warmup_type,
        )

    def loss(self, student: StudentOutput, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """Beside the loss, the share of images on which student and teacher decide alike."""
        heads, teacher = student.distilled(self.shared.distilled_heads), step.teacher.logits
        decision = torch.stack(heads).detach().mean(0).argmax(-1)
        return super().loss(student, step), {"teacher_agreement": (decision == teacher.argmax(-1)).float().mean()}

    def head_loss(self, logits: Tensor, step: Step) -> Tensor:
        """Of one head's logits ``(B, K)``."""
        if self.distillation_type == "soft":
            return kd_divergence(logits, step.teacher.logits, self.temperature)
        return hard_distillation_loss(logits, step.teacher.logits)

    def describe(self) -> str:
        """Its term of the loss."""
        if self.distillation_type == "soft":
            text = "temperature² x KL divergence to the teacher's class probabilities at temperature {temperature:g}"
        else:
            text = "cross-entropy to the teacher's decisions"
        return text + " (weight {alpha:g})"

    def phrase(self) -> str:
        """Soft or hard."""
        at = " at temperature {temperature:g}" if self.distillation_type == "soft" else ""
        return f"{self.distillation_type} logit distillation{at}"

    def summary(self) -> str:
        """Soft or hard."""
        return f"{self.distillation_type} logits"
