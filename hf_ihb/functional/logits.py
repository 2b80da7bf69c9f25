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


# where e^u - 1 - u is summed as a series, and its last term: 2 * 0.5^12 / 14! is below the rounding of float64
_NEAR, _LAST_TERM = 0.5, 14

# scores of a head that is 0 are all the same, and the gradient to them 1 / sqrt(floor) at most
_VARIANCE_FLOOR = 1e-6


def tilted_divergence(log_probabilities: Tensor, difference: Tensor) -> tuple[Tensor, Tensor]:
    """``KL(p || q)`` where q is p tilted by a difference of scores: ``q_i ~ p_i exp(d_i)``.

    With m the mean of d under p and u = d - m it is ``log(1 + sum_i p_i (e^u_i - 1 - u_i))``. No term is negative, so
    that nothing cancels: all digits are there where p and q are nearly the same, as they are at high temperatures. As a
    difference of log-probabilities its terms are of the size of d, and the sum of that of d squared.

    Args:
        log_probabilities: ``(..., K)`` log p; may be -inf where d is finite.
        difference: ``(..., K)`` d, scores of q minus scores of p, up to a constant.

    Returns:
        m ``(...)``, and the divergence ``(...)`` >= 0 in nats. Their sum is ``log(sum_i p_i exp(d_i))``.
    """
    p = log_probabilities.exp()
    mean = (p * difference).sum(dim=-1, keepdim=True)
    u = difference - mean
    tilted = log_probabilities + u
    total = tilted.logsumexp(dim=-1)
    is_large = total > _NEAR  # then it is right as it is, and exponentials might not be finite
    far = tilted.clamp_max(2 * _NEAR).exp() - p * (1 + u)
    excess = torch.where(u.abs() < _NEAR, p * _excess(u.clamp(-_NEAR, _NEAR)), far).sum(dim=-1)
    return mean[..., 0], torch.where(is_large, total, torch.where(is_large, 0, excess).log1p())


def _excess(u: Tensor) -> Tensor:
    """``e^u - 1 - u`` as a series."""
    series = torch.ones_like(u)
    for n in range(_LAST_TERM, 2, -1):
        series = 1 + u / n * series
    return u.square() / 2 * series


def standardized_logits(logits: Tensor) -> Tensor:
    """``(z - mean z) / std z`` over the classes of each row: what it says of them without its level and its scale.

    Args:
        logits: ``(B, K)``, K > 1.

    Returns:
        ``(B, K)`` float32 (float64 for float64), of mean 0 and variance K - 1 over K; 0 where all scores are the same.

    References:
        Sun et al., 2024, https://arxiv.org/abs/2403.01427, where 1e-7 is added to the deviation
    """
    with torch.autocast(logits.device.type, enabled=False):
        centered = _float(logits)
        centered = centered - centered.mean(dim=-1, keepdim=True)
        variance = centered.square().sum(dim=-1, keepdim=True) / (logits.shape[-1] - 1)
        # a floor under the variance: the deviation itself has no gradient at 0
        return centered * (variance + _VARIANCE_FLOOR).rsqrt()


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
        student, teacher = _float(student_logits), _float(teacher_logits)
        log_probabilities = F.log_softmax(teacher / temperature, dim=-1)
        _, divergence = tilted_divergence(log_probabilities, (student - teacher) / temperature)
        return divergence.mean() * temperature**2


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
