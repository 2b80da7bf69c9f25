"""How alike the images of a batch are to each other, to the student and to the teacher."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_ihb.config.fields import NON_NEGATIVE, POSITIVE, key
from hf_ihb.functional.tokens import correlation_divergence
from hf_ihb.methods.pooled import PooledMethod


@dataclass
class Relation(PooledMethod):
    """Divergence between the similarities of each image, its mean token, to the others of the batch of all processes.

    The mean tokens are of the student's last block after its final norm, and of the deepest of `teacher_layers` after
    the teacher's final norm (as it is where the teacher has none).
    """

    name: ClassVar[str] = "relation"
    label: ClassVar[str] = "relation"
    said: ClassVar[tuple[str, ...]] = ("relation_weight",)

    relation_weight: float = key(
        0.0,
        "Weight of the divergence between the similarities of each image to the others of the batch (mean tokens of "
        "the student's last block and of the deepest of teacher_layers, each after its model's final norm).",
        within=NON_NEGATIVE,
    )
    relation_warmup_epochs: float = key(0.0, "Warm-up of relation_weight.", within=NON_NEGATIVE, unit="epochs")
    relation_temperature: float = key(
        0.1, "Softmax temperature of the relation loss.", within=POSITIVE, unit="dimensionless"
    )
    relation_include_self: bool = key(
        False,
        "Relation loss: keep each image's similarity to itself, which is always 1.",
        published={True: "the softmax is nearly one-hot at the image itself"},
    )

    @property
    def references(self) -> tuple[tuple[str, str], ...]:
        """What it stands on."""
        return (("Relations between images: Fang et al., 2021", "2101.04731"),)

    def batch_loss(self, student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
        """A scalar."""
        return correlation_divergence(
            student, teacher, self.relation_temperature, mask=weight > 0, include_self=self.relation_include_self
        )

    def describe(self) -> str:
        """Its term of the loss."""
        return "divergence between similarities of the images of a batch (weight {relation_weight:g})"
