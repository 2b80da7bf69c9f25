"""Losses with their weights and schedules; they receive tensors, never models."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_ihb.functional.logits import hard_distillation_loss, kd_divergence
from hf_ihb.functional.similarity import center_positions, gram_distance, linear_cka
from hf_ihb.functional.tokens import token_cosine_distance


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
    """Patch tokens of one student layer and of the teacher layer it is compared with, at the same places.

    Attributes:
        student: ``(B, N, D_s)``.
        teacher: ``(B, N, D_t)``.
        mask: ``(B, N)`` bool, false where the teacher's token would lie outside its image.
        projected: ``(B, N, D_t)`` student tokens mapped to the teacher's width, where a loss needs them.
        standardized: ``(B, N, D_t)`` teacher tokens without position code and channel scale, likewise.
    """

    student: Tensor
    teacher: Tensor
    mask: Tensor
    projected: Tensor | None = None
    standardized: Tensor | None = None


def _batch_mean(per_image: Tensor, weight: Tensor) -> Tensor:
    # divided by the batch size, not by the weights' sum: 8 x 4 images stay equal to 32 x 1
    return (per_image * weight).sum() / len(per_image)


def cka_loss(pair: TokenPair, weight: Tensor, scope: str, estimator: str) -> tuple[Tensor, Tensor]:
    """``1 - CKA`` of one pair of layers.

    Args:
        pair: Tokens, centred per position by the caller where that is wanted.
        weight: ``(B,)`` in {0, 1}; images with 0 take no part.
        scope: ``tokens``: over the tokens of each image, then the mean over images. ``images``: over the images of the
            batch, each its mean token; not additive over batches.
        estimator: ``biased`` or ``debiased``.

    Returns:
        The loss, and the number of images (or of batches) for which CKA was undefined and the loss constant 1.
    """
    if scope == "tokens":
        similarity = linear_cka(pair.student, pair.teacher, estimator, mask=pair.mask)
        undefined = similarity.isnan() & (weight > 0)
        return _batch_mean(1 - similarity.nan_to_num(0.0), weight), undefined.sum()
    inside = pair.mask.float()[..., None]
    count = inside.sum(dim=1).clamp_min(1)
    student, teacher = ((x.float() * inside).sum(dim=1) / count for x in (pair.student, pair.teacher))
    similarity = linear_cka(student, teacher, estimator, mask=weight > 0)
    return 1 - similarity.nan_to_num(0.0), similarity.isnan().sum()


def structural_losses(
    pairs: Sequence[TokenPair],
    weight: Tensor,
    *,
    cka: bool,
    gram: bool,
    token: bool,
    cka_scope: str = "tokens",
    cka_estimator: str = "debiased",
    center: bool = False,
) -> dict[str, Tensor]:
    """The structural losses, each the mean over layers.

    Args:
        pairs: One for each layer; with `center` the teacher's tokens come without position code.
        weight: ``(B,)`` in {0, 1}; images with 0 (mixed ones) take no part.
        cka: Whether to compute ``cka_loss``.
        gram: Whether to compute ``gram_loss``.
        token: Whether to compute ``token_loss``.
        cka_scope: ``tokens`` or ``images``.
        cka_estimator: ``biased`` or ``debiased``.
        center: Remove the batch mean of each position from the student's tokens before CKA and Gram.

    Returns:
        Scalars by name; with CKA also ``cka_undefined``, the share of images without a defined value.
    """
    sums: dict[str, list[Tensor]] = {}
    for pair in pairs:
        compared = pair._replace(student=center_positions(pair.student, weight)) if center else pair
        if cka:
            loss, undefined = cka_loss(compared, weight, cka_scope, cka_estimator)
            sums.setdefault("cka_loss", []).append(loss)
            sums.setdefault("cka_undefined", []).append(undefined / (len(weight) if cka_scope == "tokens" else 1))
        if gram:
            distance = gram_distance(compared.student, compared.teacher, mask=compared.mask)
            sums.setdefault("gram_loss", []).append(_batch_mean(distance, weight))
        if token:
            distance = token_cosine_distance(pair.projected, pair.standardized, mask=pair.mask)
            sums.setdefault("token_loss", []).append(_batch_mean(distance, weight))
    return {name: torch.stack(values).mean() for name, values in sums.items()}
