"""Tokens of the student, linearly mapped, against those of the teacher."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from hf_ihb.config.fields import NON_NEGATIVE, key
from hf_ihb.functional.tokens import token_cosine_distance
from hf_ihb.methods.base import Method, Widths, as_one, batch_mean, pairs_of
from hf_ihb.methods.paired import paired_head
from hf_ihb.step import Needs, Step, StudentOutput, TeacherOutputs


class LinearMaps(nn.ModuleList):
    """A linear map for each layer, to the teacher's width."""

    def forward(self, student: StudentOutput, teacher: TeacherOutputs) -> list[Tensor]:
        """``(B, N, D_t)`` of each layer."""
        return [project(tokens) for project, tokens in zip(self, student.features, strict=True)]


@dataclass
class Token(Method):
    """``1 - cosine`` of linearly mapped student tokens and standardised teacher tokens, mean over images and layers."""

    name: ClassVar[str] = "token"
    label: ClassVar[str] = "token"
    said: ClassVar[tuple[str, ...]] = ("token_weight",)

    token_weight: float = key(
        0.0,
        "Weight of 1 - cosine of linearly mapped student tokens and standardised teacher tokens.",
        within=NON_NEGATIVE,
    )
    token_warmup_epochs: float = key(0.0, "Warm-up of token_weight.", within=NON_NEGATIVE, unit="epochs")

    @property
    def needs(self) -> Needs:
        """The tokens themselves."""
        if self.shared.teacher_projector == "trainable":
            return Needs(layers="tokens", because="teacher_projector")
        return Needs(layers="tokens", because="token_weight", preparation="standardized")

    def head(self, widths: Widths) -> nn.Module:
        """Linear maps, or the published study's heads."""
        return paired_head(self.shared, widths, self.needs.preparation) or LinearMaps(
            nn.Linear(own, other) for own, other in zip(widths.student, widths.teacher, strict=True)
        )

    def loss(self, student: StudentOutput, step: Step) -> Tensor:
        """A scalar."""
        layers, weight = as_one(pairs_of(self, student, step), step.weight())
        distances = [token_cosine_distance(pair.student, pair.teacher, mask=pair.mask) for pair in layers]
        return torch.stack([batch_mean(distance, weight) for distance in distances]).mean()

    def describe(self) -> str:
        """Its term of the loss."""
        return "(1 - cosine) of linearly mapped tokens (weight {token_weight:g})"
