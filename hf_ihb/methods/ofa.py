"""One for all: exits of the student learn from the teacher's class scores, whatever the architectures."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from hf_ihb.config.fields import NON_NEGATIVE, POSITIVE, key
from hf_ihb.methods.base import Widths
from hf_ihb.methods.logits import LogitMethod
from hf_ihb.step import Needs, Step, StudentOutput, TeacherOutputs


class Exits(nn.ModuleList):
    """A classifier on the mean patch token of each of some blocks: LayerNorm, Linear, GELU, Linear."""

    def __init__(self, widths: tuple[int, ...], classes: int) -> None:
        super().__init__(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, classes))
            for width in widths
        )

    def forward(self, student: StudentOutput, teacher: TeacherOutputs) -> list[Tensor]:
        """``(B, K)`` logits of each exit."""
        means = (tokens.float().mean(dim=1) for tokens in student.features)
        return [head(mean.to(head[0].weight.dtype)) for head, mean in zip(self, means, strict=True)]


@dataclass
class OFA(LogitMethod):
    """``-sum_k ((p_k + [k = y])^gamma - [k = y]) log q_k``, mean over images, summed over exits and the final scores.

    p are the probabilities of the teacher, q those of an exit after each of `student_layers`, or of the heads that
    `distilled_heads` names, y is the label's class. At gamma 1 it is the cross-entropy to the teacher; above 1 the
    label's class counts by more and the others by less, the less certain the teacher. The power is on all classes, as
    in the authors' code; their text has it on the label's alone. The published exits are larger, blocks of the
    architecture itself, and after blocks 2, 5, 8 and 11 of 12.

    References:
        Hao et al., 2023, https://arxiv.org/abs/2310.19444
    """

    name: ClassVar[str] = "ofa"
    label: ClassVar[str] = "one-for-all"
    said: ClassVar[tuple[str, ...]] = ("ofa_weight", "ofa_gamma", "ofa_temperature")

    ofa_weight: float = key(
        0.0,
        "Weight of the class scores of exits after each of student_layers (published with four), and of the final "
        "ones, against the teacher's.",
        within=NON_NEGATIVE,
    )
    ofa_warmup_epochs: float = key(0.0, "Warm-up of ofa_weight.", within=NON_NEGATIVE, unit="epochs")
    ofa_gamma: float = key(
        1.0,
        "OFA: power of the teacher's probabilities, 1 plus that of the label's class among them; 1.5 in the authors' "
        "example for ImageNet.",
        within=POSITIVE,
    )
    ofa_temperature: float = key(
        1.0, "OFA: softmax temperature of student and teacher.", within=POSITIVE, unit="dimensionless"
    )

    @property
    def references(self) -> tuple[tuple[str, str], ...]:
        """What it stands on."""
        return (("One-for-all: Hao et al., 2023", "2310.19444"),)

    @property
    def needs(self) -> Needs:
        """The teacher's class scores, and the student's blocks."""
        return Needs(logits=True, exits=True)

    def head(self, widths: Widths) -> nn.Module:
        """The exits."""
        return Exits(widths.student, widths.classes)

    def loss(self, student: StudentOutput, step: Step) -> Tensor:
        """A scalar."""
        compared = self.compared_step(step)
        exits = [self.head_loss(self.compared(x), compared) for x in student.method_heads[self.name]]
        return super().loss(student, step) + torch.stack(exits).sum()

    def head_loss(self, logits: Tensor, step: Step) -> Tensor:
        """Of one head's or exit's logits ``(B, K)``."""
        with torch.autocast(logits.device.type, enabled=False):
            student, teacher = (x.float() / self.ofa_temperature for x in (logits, step.teacher.logits))
            own = torch.nn.functional.one_hot(step.classes(), student.shape[1])
            shares = (teacher.softmax(dim=1) + own) ** self.ofa_gamma - own
            return -(shares * student.log_softmax(dim=1)).sum(dim=1).mean()

    def describe(self) -> str:
        """Its term of the loss."""
        text = "cross-entropy to the teacher's class probabilities of exits after student blocks {student_layers} and "
        return (
            text + "of the final scores (gamma {ofa_gamma:g}, temperature {ofa_temperature:g}, weight {ofa_weight:g})"
        )
