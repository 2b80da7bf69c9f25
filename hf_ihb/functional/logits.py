"""Distillation through class scores."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def _float(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _check_logits(student_logits: Tensor, teacher_logits: Tensor) -> None:
    if student_logits.ndim != 2 or student_logits.shape != teacher_logits.shape:
        raise ValueError(
            "student and teacher logits must both be (batch, classes), got "
            f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        )


def kd_divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Soft distillation: ``T^2 * KL(softmax(z_t / T) || softmax(z_s / T))``, mean over the batch.

    Args:
        student_logits: ``(B, K)``.
        teacher_logits: ``(B, K)``, classes in the student's order.
        temperature: T > 0, dimensionless; the factor T^2 keeps the gradient's scale independent of it.

    Returns:
        Scalar >= 0 in nats, float32 (float64 for float64 logits).

    Raises:
        ValueError: If the shapes differ or the temperature is not positive.

    References:
        Hinton, Vinyals, Dean, 2015, https://arxiv.org/abs/1503.02531
    """
    _check_logits(student_logits, teacher_logits)
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    with torch.autocast(student_logits.device.type, enabled=False):
        student = F.log_softmax(_float(student_logits) / temperature, dim=-1)
        teacher = F.log_softmax(_float(teacher_logits) / temperature, dim=-1)
        return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def hard_distillation_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Cross-entropy with the teacher's decision as the label.

    Args:
        student_logits: ``(B, K)``.
        teacher_logits: ``(B, K)``, classes in the student's order.

    Returns:
        Scalar >= 0 in nats, float32 (float64 for float64 logits).

    Raises:
        ValueError: If the shapes differ.

    References:
        Touvron et al., 2021 (DeiT), https://arxiv.org/abs/2012.12877, eq. 3
    """
    _check_logits(student_logits, teacher_logits)
    with torch.autocast(student_logits.device.type, enabled=False):
        return F.cross_entropy(_float(student_logits), teacher_logits.argmax(dim=-1))


def task_loss(heads: Sequence[Tensor], targets: Tensor) -> Tensor:
    """Cross-entropy to class probabilities, mean over batch and heads.

    Args:
        heads: Logits ``(B, K)`` of every head that inference uses.
        targets: ``(B, K)`` class probabilities.
    """
    return torch.stack([F.cross_entropy(logits.float(), targets) for logits in heads]).mean()
