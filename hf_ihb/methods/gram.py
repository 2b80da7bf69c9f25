"""Distance between the token similarity matrices of student and teacher."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from hf_ihb.config.fields import NON_NEGATIVE, key
from hf_ihb.functional.similarity import center_positions, gram_distance
from hf_ihb.methods.base import Method, Widths, as_one, batch_mean, pairs_of
from hf_ihb.methods.paired import paired_head
from hf_ihb.step import Needs, Step, StudentOutput


@dataclass
class Gram(Method):
    """Distance of the cosine similarities between the tokens of an image, mean over images and layers.

    References:
        Tung and Mori, 2019, https://arxiv.org/abs/1907.09682 (there over the images of a batch)
    """

    name: ClassVar[str] = "gram"
    label: ClassVar[str] = "Gram"
    said: ClassVar[tuple[str, ...]] = ("gram_weight",)

    gram_weight: float = key(0.0, "Weight of the distance of token similarity matrices.", within=NON_NEGATIVE)
    gram_warmup_epochs: float = key(0.0, "Warm-up of gram_weight.", within=NON_NEGATIVE, unit="epochs")
    gram_normalization: Literal["mean_square", "published"] = key(
        "mean_square",
        "Gram loss: squared differences over N^2 entries, or the published Frobenius norm over N^2.",
        published={"published": "the loss is about 0.001 and has no gradient to speak of"},
    )

    @property
    def references(self) -> tuple[tuple[str, str], ...]:
        """What it stands on."""
        return (("Similarity matrices: Tung and Mori, 2019", "1907.09682"),)

    @property
    def needs(self) -> Needs:
        """Inner products of an image's tokens."""
        trainable = self.shared.teacher_projector == "trainable"
        return Needs(
            layers="tokens" if trainable else "gram",
            because="teacher_projector" if trainable else None,
            preparation="centered" if self.shared.center_positions else "plain",
            statistics=self.shared.center_positions,
        )

    def head(self, widths: Widths) -> nn.Module | None:
        """None, but for the published study's."""
        return paired_head(self.shared, widths, self.needs.preparation)

    def loss(self, student: StudentOutput, step: Step) -> Tensor:
        """A scalar."""
        layers, weight = pairs_of(self, student, step), step.weight()
        if self.shared.center_positions:
            layers = [p._replace(student=center_positions(p.student, weight, reduce=step.reduce)) for p in layers]
        layers, weight = as_one(layers, weight)
        normalization = self.gram_normalization
        distances = [gram_distance(p.student, p.teacher, mask=p.mask, normalization=normalization) for p in layers]
        return torch.stack([batch_mean(distance, weight) for distance in distances]).mean()

    def describe(self) -> str:
        """Its term of the loss."""
        return "distance between Gram matrices of the tokens (weight {gram_weight:g})"
