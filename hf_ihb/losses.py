"""Losses with their weights and schedules; they receive tensors, never models."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_ihb.functional.gram import TokenGram
from hf_ihb.functional.logits import hard_distillation_loss, kd_divergence
from hf_ihb.functional.similarity import center_positions, gram_distance, linear_cka, published_cka, rbf_cka
from hf_ihb.functional.tokens import correlation_divergence, token_cosine_distance


def warmup_factor(epoch: float, warmup_epochs: float, kind: str) -> float:
    """Share of a loss's weight at a (fractional) epoch: 0 to 1 over the warm-up, 1 after it.

    Args:
        epoch: Epochs trained so far, >= 0.
        warmup_epochs: Length of the warm-up; 0 turns it off.
        kind: ``linear`` rises steadily, ``step`` stays at 0 until the end.
    """
    if epoch >= warmup_epochs:
        return 1.0
    return epoch / warmup_epochs if kind == "linear" else 0.0


def task_loss(heads: Sequence[Tensor], targets: Tensor) -> Tensor:
    """Cross-entropy to class probabilities, mean over batch and heads.

    Args:
        heads: Logits ``(B, K)`` of every head that inference uses.
        targets: ``(B, K)`` class probabilities.
    """
    return torch.stack([F.cross_entropy(logits.float(), targets) for logits in heads]).mean()


def logit_distillation_loss(student: Tensor, teacher: Tensor, kind: str, temperature: float) -> Tensor:
    """Soft or hard distillation of logits ``(B, K)``; see `hf_ihb.functional.logits`."""
    return kd_divergence(student, teacher, temperature) if kind == "soft" else hard_distillation_loss(student, teacher)


class TokenPair(NamedTuple):
    """Patch tokens of one layer of student and teacher as a loss compares them, at the same places.

    Attributes:
        student: ``(B, N, D_s)``.
        teacher: ``(B, N, D_t)``; the token loss needs D_t = D_s. For CKA within images and Gram also their `TokenGram`.
        mask: ``(B, N)`` bool, false where the teacher's token would lie outside its image.
    """

    student: Tensor
    teacher: Tensor | TokenGram
    mask: Tensor

    def image_means(self) -> tuple[Tensor, Tensor]:
        """``(B, D_s)`` and ``(B, D_t)`` float32 means of the tokens inside."""
        inside = self.mask.float()[..., None]
        count = inside.sum(dim=1).clamp_min(1)
        student, teacher = ((x.float() * inside).sum(dim=1) / count for x in (self.student, self.teacher))
        return student, teacher


def as_one(layers: Sequence[TokenPair], weight: Tensor) -> tuple[Sequence[TokenPair], Tensor]:
    """Layers of one shape as one batch of all their images, with its weights; others as they are.

    What is a mean over images, and then over layers, is the same: in one operation where it was one for each layer.
    """
    shapes = {tuple((type(x), leaf.shape, leaf.dtype) for x in pair for leaf in _tensors(x)) for pair in layers}
    if len(layers) == 1 or len(shapes) > 1:
        return layers, weight
    return [TokenPair(*map(_concatenated, zip(*layers, strict=True)))], weight.repeat(len(layers))


def _tensors(value: Tensor | TokenGram) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value)


def _concatenated(values: Sequence[Tensor | TokenGram]) -> Tensor | TokenGram:
    if isinstance(values[0], Tensor):
        return torch.cat(tuple(values))
    return TokenGram(*(torch.cat(parts) for parts in zip(*values, strict=True)))


def _batch_mean(per_image: Tensor, weight: Tensor) -> Tensor:
    # divided by the batch size, not by the weights' sum: 8 x 4 images stay equal to 32 x 1
    return (per_image * weight).sum() / len(per_image)


@dataclass(frozen=True)
class StructuralLoss:
    """CKA, Gram, token and relation losses between layers of student and teacher.

    The fields are the keys of `StructuralDistillationTrainingArguments` of the same names. `reduce` and `gather` make
    what is a statistic of the batch (pooled and image CKA, the relation loss, the student's position code) one of the
    batch of all processes.

    Attributes:
        reduce: Sums a tensor over processes, differentiably; None for one process.
        gather: Stacks the rows of all processes, differentiably; None for one process.
    """

    cka_scope: str = "tokens"
    cka_estimator: str = "debiased"
    cka_kernel: str = "linear"
    rbf_bandwidth: float = 1.0
    gram_normalization: str = "mean_square"
    relation_temperature: float = 0.1
    relation_include_self: bool = False
    center_positions: bool = False
    reduce: Callable[[Tensor], Tensor] | None = None
    gather: Callable[[Tensor], Tensor] | None = None

    @classmethod
    def from_arguments(cls, args: Any, **collectives: Any) -> "StructuralLoss":
        """Takes every setting from the arguments of a run."""
        settings = {f.name: getattr(args, f.name) for f in fields(cls) if f.name not in ("reduce", "gather")}
        return cls(**settings, **collectives)

    def __call__(self, pairs: Mapping[str, Sequence[TokenPair]], weight: Tensor) -> dict[str, Tensor]:
        """The losses asked for, each the mean over its layers.

        Args:
            pairs: For each of ``cka``, ``gram``, ``token`` and ``relation`` that is wanted what it compares, one pair
                a layer. With `center_positions` the teacher's tokens of CKA and Gram come without position code, and
                the student's lose the batch mean of each position here.
            weight: ``(B,)`` in {0, 1}; images with 0 (mixed ones) take no part.

        Returns:
            Scalars ``<name>_loss``; with CKA also ``cka_undefined``, the share of images (of batches, where CKA is
            one number a batch) without a defined value, whose loss is the constant 1.
        """
        losses: dict[str, Tensor] = {}
        for name, layers in pairs.items():
            if name in ("cka", "gram") and self.center_positions:
                layers = [p._replace(student=center_positions(p.student, weight, reduce=self.reduce)) for p in layers]
            weights = weight
            per_image = name in ("gram", "token") or (name == "cka" and self.cka_scope == "tokens")
            if per_image and weight.device.type != "cpu":  # there it is bytes that cost, not the number of operations
                layers, weights = as_one(layers, weight)
            if name == "cka":
                values, undefined = zip(*(self.cka(pair, weights) for pair in layers), strict=True)
                losses["cka_undefined"] = torch.stack(undefined).mean()
            else:
                values = [getattr(self, name)(pair, weights) for pair in layers]
            losses[f"{name}_loss"] = torch.stack(values).mean()
        return losses

    def cka(self, pair: TokenPair, weight: Tensor) -> tuple[Tensor, Tensor]:
        """``1 - CKA`` of one pair of layers, and the share of its values that are undefined.

        Scope ``tokens`` is over the tokens of each image, then the mean over images. ``pooled`` is over the tokens of
        all images, ``images`` over the images, each its mean token; these two are not additive over batches.
        """
        if self.cka_scope == "tokens":
            similarity = self._similarity(pair.student, pair.teacher, pair.mask)
            undefined = similarity.isnan() & (weight > 0)
            return _batch_mean(1 - similarity.nan_to_num(0.0), weight), undefined.float().mean()
        if self.cka_scope == "pooled":
            mask = (pair.mask & (weight > 0)[:, None]).flatten()
            similarity = linear_cka(
                pair.student.flatten(0, 1),
                pair.teacher.flatten(0, 1),
                self.cka_estimator,
                mask=mask,
                reduce=self.reduce,
            )
        else:
            student, teacher, weight = self._gathered(*pair.image_means(), weight)
            similarity = self._similarity(student, teacher, weight > 0)
        return 1 - similarity.nan_to_num(0.0), similarity.isnan().float()

    def gram(self, pair: TokenPair, weight: Tensor) -> Tensor:
        """Distance of the token similarity matrices of each image, mean over images."""
        distance = gram_distance(pair.student, pair.teacher, mask=pair.mask, normalization=self.gram_normalization)
        return _batch_mean(distance, weight)

    def token(self, pair: TokenPair, weight: Tensor) -> Tensor:
        """``1 - cosine`` of the tokens of each image, mean over images."""
        return _batch_mean(token_cosine_distance(pair.student, pair.teacher, mask=pair.mask), weight)

    def relation(self, pair: TokenPair, weight: Tensor) -> Tensor:
        """Divergence between the similarities of each image, its mean token, to the others of the batch."""
        student, teacher, weight = self._gathered(*pair.image_means(), weight)
        return correlation_divergence(
            student,
            teacher,
            self.relation_temperature,
            mask=weight > 0,
            include_self=self.relation_include_self,
        )

    def _similarity(self, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        if self.cka_estimator == "published":
            return published_cka(x, y, mask=mask)
        if self.cka_kernel == "rbf":
            return rbf_cka(x, y, self.cka_estimator, mask=mask, bandwidth=self.rbf_bandwidth)
        return linear_cka(x, y, self.cka_estimator, mask=mask)

    def _gathered(self, *tensors: Tensor) -> list[Tensor]:
        return [t if self.gather is None else self.gather(t) for t in tensors]


def scheduled_alpha(
    epoch: float, num_epochs: float, start: float, end: float, schedule: str, warmup_epochs: float, warmup: str
) -> float:
    """Weight of the logit distillation loss at a (fractional) epoch.

    With p the share of the time between warm-up and end that has passed, ``linear`` is ``start + (end - start) p`` and
    ``cosine`` is ``start + (end - start) (1 - cos(pi p)) / 2``. The warm-up leads from 0 to where the schedule begins.

    Args:
        epoch: Epochs trained so far, >= 0.
        num_epochs: Epochs of the whole training.
        start: Where a schedule begins, in [0, 1].
        end: Where it ends; what ``constant`` is throughout.
        schedule: ``constant``, ``linear`` or ``cosine``.
        warmup_epochs: Length of the warm-up.
        warmup: ``linear`` or ``step``, see `warmup_factor`.
    """
    first = end if schedule == "constant" else start
    if epoch < warmup_epochs or schedule == "constant":
        return first * warmup_factor(epoch, warmup_epochs, warmup)
    length = num_epochs - warmup_epochs
    progress = min((epoch - warmup_epochs) / length, 1.0) if length > 0 else 1.0
    return start + (end - start) * (progress if schedule == "linear" else (1 - math.cos(math.pi * progress)) / 2)
