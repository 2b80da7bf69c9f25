"""The values that flow through a training step: made in one place, handed to student and methods, gone after it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from hf_ihb.functional.gram import TokenGram
from hf_ihb.functional.tokens import TokenMean

Preparation = Literal["plain", "centered", "standardized"]


@dataclass
class Views:
    """A batch before and after augmentation.

    Attributes:
        images: ``(B, C, H, W)`` uint8, as they are stored.
        seen: ``(B, C, H, W)`` what the student sees of them: uint8, or float in [0, 1] where it is mixed or covered.
        affine: ``(B, 2, 3)`` from augmented to stored coordinates.
        own_share: ``(B,)`` share of the own image, 1 where it is not mixed.
        partner_labels: ``(B,)`` labels of the mixing partners; None without mixing.
        targets: ``(B, K)`` class probabilities, mixed like the images; None where nobody made them.
    """

    images: Tensor
    seen: Tensor
    affine: Tensor
    own_share: Tensor
    partner_labels: Tensor | None = None
    targets: Tensor | None = None

    @property
    def stored(self) -> Tensor:
        """``(B, C, H, W)`` float in [0, 1], `images`."""
        return as_float(self.images)

    @property
    def augmented(self) -> Tensor:
        """``(B, C, H, W)`` float in [0, 1], `seen`."""
        return as_float(self.seen)

    @property
    def unmixed(self) -> Tensor:
        """``(B,)`` float, 1 where the image shows itself alone."""
        return (self.own_share == 1).float()


def as_float(images: Tensor) -> Tensor:
    """uint8 in [0, 255] -> float32 in [0, 1]; float as it is."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


class TeacherTokens(NamedTuple):
    """What a teacher says of one of its layers, at the places where the student's tokens look.

    Attributes:
        tokens: ``(B, N, D)``, or their `TokenGram` or `TokenMean` where that is all that is asked for.
        mask: ``(B, N)`` in [0, 1], how much of each token lies inside the teacher's image.
    """

    tokens: Tensor | TokenGram | TokenMean
    mask: Tensor


@dataclass
class TeacherOutputs:
    """What a teacher says of the images of a step.

    Attributes:
        logits: ``(B, K)`` class scores in the student's order; None where no method needs them.
        layers: For each preparation that a method needs one `TeacherTokens` a layer.
        final: Of the deepest of the layers after the teacher's final norm; None where no method needs it.
        attentions: For each layer ``(B, N, N)``, what the student's token i would give to each other by the teacher's
            attention between patches, mean over heads; rows are not normalised. None where no method needs them.
    """

    logits: Tensor | None = None
    layers: dict[Preparation, list[TeacherTokens]] = field(default_factory=dict)
    final: TeacherTokens | None = None
    attentions: list[Tensor] | None = None


@dataclass
class StudentOutput(ModelOutput):
    """What losses need of a student.

    Attributes:
        logits: ``(B, K)`` what the saved model returns; the mean of both heads where it averages them.
        cls_logits: ``(B, K)`` of the cls head, None with one head.
        distillation_logits: ``(B, K)`` of the distillation head (the student's or a student-side one), likewise.
        heads: ``(B, K)`` of each head that inference uses.
        features: Patch tokens ``(B, N, D)`` of the chosen layers.
        final_tokens: Patch tokens ``(B, N, D)`` of the last block, after the student's final norm.
        attentions: ``(B, H, T, T)`` attention maps of each block, with gradients.
        method_heads: What the student-side head of each method that has one made of the above.
        masked: The same of another forward, of masked images, for each method that asks for one, by its name.
    """

    logits: Tensor | None = None
    cls_logits: Tensor | None = None
    distillation_logits: Tensor | None = None
    heads: tuple[Tensor, ...] | None = None
    features: tuple[Tensor, ...] | None = None
    final_tokens: Tensor | None = None
    attentions: tuple[Tensor, ...] | None = None
    method_heads: dict[str, Any] | None = None
    masked: dict[str, ModelOutput] | None = None

    def distilled(self, heads: Literal["distillation", "both"]) -> tuple[Tensor, ...]:
        """``(B, K)`` logits that learn from a teacher's; of a student with one head those it has."""
        if self.cls_logits is None:
            return (self.logits,)
        both = (self.cls_logits, self.distillation_logits)
        return both if heads == "both" else both[1:]


@dataclass(frozen=True)
class Needs:
    """What a method asks of teacher and student.

    Attributes:
        logits: The teacher's class scores.
        layers: Of the teacher's layers their ``tokens``, or ``gram``, the inner products of an image's tokens alone.
        because: The key that whole tokens are needed for, where they are; that of the method's weight if not given.
        preparation: What is done to the teacher's tokens before: ``centered`` takes off the mean of their position over
            the training images, ``standardized`` the mean and the deviation of each channel.
        final: Of the last block of the student and of the deepest teacher layer, each after the final norm, the
            ``tokens``; or ``mean``, where all that is taken of the teacher's is `TokenPair.image_means`.
        exits: Patch tokens of the chosen blocks of the student, for a head on them that asks nothing of the teacher's.
        attention: Attention maps of every block of the student, with gradients.
        teacher_attention: The attention between patches of the teacher's layers; beside `attention` and `layers`.
        masked: A second forward of the student, of the images that `Method.masked_pixels` returns.
        statistics: The loss is one of the batch of all processes.
    """

    logits: bool = False
    layers: Literal["tokens", "gram"] | None = None
    because: str | None = None
    preparation: Preparation = "plain"
    final: Literal["tokens", "mean"] | None = None
    exits: bool = False
    attention: bool = False
    teacher_attention: bool = False
    masked: bool = False
    statistics: bool = False

    def __post_init__(self) -> None:
        if self.final not in (None, "tokens", "mean"):
            raise ValueError(f"needs of a method: 'final': expected 'tokens', 'mean' or None, found {self.final!r}")


@dataclass
class Step:
    """One micro-batch on its way through student and losses.

    Attributes:
        pixel_values: ``(B, C, H, W)`` what the student sees, normalised.
        labels: ``(B,)``, or ``(B, K)`` probabilities; None for a batch without.
        targets: ``(B, K)`` class probabilities, smoothed and mixed; None in evaluation.
        views: How the images came about; None where the batch brought its own pixels.
        teacher: What the teacher says; None where it was not asked.
        unmixed: ``(B,)`` float, 0 for images whose tokens have no counterpart at the teacher's (mixed ones); None if
            all have one.
        inputs: The batch as it came.
        epoch: Whole epochs trained before it, which its views were drawn for.
        reduce: Sums a tensor over processes, differentiably; None for one process.
        gather: Stacks the rows of all processes, differentiably; None for one process.
        of_teachers: The step as what is learned from each of several teachers sees it; empty with one.
    """

    pixel_values: Tensor
    labels: Tensor | None = None
    targets: Tensor | None = None
    views: Views | None = None
    teacher: TeacherOutputs | None = None
    unmixed: Tensor | None = None
    inputs: Mapping[str, Any] = field(default_factory=dict)
    epoch: int = 0
    reduce: Callable[[Tensor], Tensor] | None = None
    gather: Callable[[Tensor], Tensor] | None = None
    of_teachers: tuple["Step", ...] = ()

    def weight(self) -> Tensor:
        """``(B,)`` share of each image in feature losses, in {0, 1}."""
        if self.unmixed is None:
            return torch.ones(len(self.pixel_values), device=self.pixel_values.device)
        return self.unmixed

    def classes(self) -> Tensor:
        """``(B,)`` int64 class of each image, of class probabilities the likeliest."""
        return self.labels if self.labels.ndim == 1 else self.labels.argmax(-1)

    def gathered(self, *tensors: Tensor) -> list[Tensor]:
        """Rows of all processes of some tensors ``(B, ...)``."""
        return [t if self.gather is None else self.gather(t) for t in tensors]
