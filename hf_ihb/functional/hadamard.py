"""Rotations that give all channels the same variance.

References:
    PHI-S: Ranzinger et al., 2024, https://arxiv.org/abs/2410.01680
"""

import math

import torch
from torch import Tensor


def hadamard(width: int) -> Tensor | None:
    """A Hadamard matrix, of entries 1 and -1 and orthogonal rows, where one of three constructions has one.

    Sylvester's for powers of two, Paley's first for q + 1 and second for 2 (q + 1) with a prime q (that is 3, or 1,
    modulo 4), and Kronecker products of Sylvester's with either.

    Args:
        width: Rows and columns, >= 1.

    Returns:
        ``(width, width)`` float64; None for other widths: there is none of a width above 2 that is no multiple of 4.
    """
    doubled, core = (width.bit_length() - 1, 1) if width & (width - 1) == 0 else (0, width)
    while core >= 1:
        if (matrix := _core(core)) is not None:
            for _ in range(doubled):
                matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
            return matrix
        if core % 2:
            return None
        doubled, core = doubled + 1, core // 2
    return None


def _core(width: int) -> Tensor | None:
    """1, or what one of Paley's constructions gives."""
    if width == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if (width - 1) % 4 == 3 and _is_prime(width - 1):
        skew = _bordered(width - 1, -1.0)
        return skew + torch.eye(width, dtype=torch.float64)
    if width % 2 == 0 and (width // 2 - 1) % 4 == 1 and _is_prime(width // 2 - 1):
        symmetric = _bordered(width // 2 - 1, 1.0)
        off, on = (torch.tensor(x, dtype=torch.float64) for x in ([[1, 1], [1, -1]], [[1, -1], [-1, -1]]))
        return torch.kron(symmetric, off) + torch.kron(torch.eye(width // 2, dtype=torch.float64), on)
    return None


def _bordered(prime: int, first_column: float) -> Tensor:
    """``(q + 1, q + 1)``: which differences are squares modulo q (1, -1, and 0 for 0), with a border."""
    squares = torch.full((prime,), -1.0, dtype=torch.float64)
    squares[torch.arange(1, prime).square() % prime] = 1
    squares[0] = 0
    numbers = torch.arange(prime)
    matrix = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    matrix[0, 1:], matrix[1:, 0] = 1, first_column
    matrix[1:, 1:] = squares[(numbers[:, None] - numbers) % prime]
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % factor for factor in range(2, math.isqrt(number) + 1))


def equalizing_rotation(variances: Tensor) -> Tensor:
    """An orthogonal Q for which ``Q diag(variances) Q^T`` has a constant diagonal.

    A Hadamard matrix over the root of its width, which does so whatever the variances are. Where `hadamard` has none,
    plane rotations that set one channel after the other to the mean (Bendel and Mickey, 1978, Population correlation
    matrices for sampling experiments), which does so for these; the published code takes random signs there, made
    orthogonal, which does so nearly.

    Args:
        variances: ``(D,)`` float64, >= 0.

    Returns:
        ``(D, D)`` float64.
    """
    width = len(variances)
    if (matrix := hadamard(width)) is not None:
        return matrix / math.sqrt(width)
    rotation = torch.eye(width, dtype=torch.float64)
    covariance, mean = torch.diag(variances.double()), variances.double().mean()
    for _ in range(width - 1):
        off = covariance.diagonal() - mean
        low, high = int(off.argmin()), int(off.argmax())
        if low == high or off[low] == 0 or off[high] == 0:
            break
        # the angle at which the lower one becomes the mean: b t^2 + 2 c t + a = 0 for its tangent
        a, b, c = off[low], off[high], covariance[low, high]
        tangent = (-c + (c * c - a * b).clamp_min(0).sqrt()) / b
        cosine = 1 / (1 + tangent * tangent).sqrt()
        turn = torch.stack((torch.stack((cosine, cosine * tangent)), torch.stack((-cosine * tangent, cosine))))
        pair = [low, high]
        covariance[pair] = turn @ covariance[pair]
        covariance[:, pair] = covariance[:, pair] @ turn.T
        rotation[pair] = turn @ rotation[pair]
        covariance[low, low] = mean
    return rotation


def phi_s_matrix(covariance: Tensor) -> Tensor:
    """The W of PHI-S: ``W (x - mean)`` has the variance 1 in each channel, and the spectrum of x but for one factor.

    Its PCA's axes, rotated so that each channel has the same share of every one of them, over one scale for all
    channels, the root of the mean variance.

    Args:
        covariance: ``(D, D)`` of the features, positive semi-definite and not 0.

    Returns:
        ``(D, D)`` float64.
    """
    variances, axes = torch.linalg.eigh(covariance.double().cpu())
    variances = variances.clamp_min(0)
    return equalizing_rotation(variances) @ axes.T / variances.mean().sqrt()
