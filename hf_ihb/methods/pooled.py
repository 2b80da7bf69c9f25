"""Methods that compare the images of a batch, each by its mean token."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_ihb.methods.base import Method, TokenPair
from hf_ihb.step import Needs, Step, StudentOutput


@dataclass
class PooledMethod(Method):
    """A method whose loss is one of pooled features: no projection stands on either side, widths may differ.

    They are the means of the tokens of the student's last block and of the deepest of `teacher_layers`, each after the
    final norm, over those that lie inside the teacher's image.
    """

    @property
    def needs(self) -> Needs:
        """The mean token of the last block, after the final norms."""
        return Needs(final="mean", statistics=True)

    def loss(self, student: StudentOutput, step: Step) -> Tensor:
        """`batch_loss` of the images of all processes."""
        pair = TokenPair(student.final_tokens, *step.teacher.final)
        own, other, weight = step.gathered(*pair.image_means(), step.weight())
        with torch.autocast(own.device.type, enabled=False):
            return self.batch_loss(own, other, weight)

    def batch_loss(self, student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
        """The loss of a batch, a scalar.

        Args:
            student: ``(B, D_s)``.
            teacher: ``(B, D_t)``.
            weight: ``(B,)`` in {0, 1}, 0 for images that take no part.
        """
        raise NotImplementedError


def pairs_among(weight: Tensor) -> Tensor:
    """``(B, B)`` bool, the pairs of two different images that take part."""
    takes_part = weight > 0
    return (takes_part[:, None] & takes_part) & ~torch.eye(len(weight), dtype=torch.bool, device=weight.device)
