"""Procrustes distance: how far student features are from the teacher's after the best rotation."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_ihb.config.fields import NON_NEGATIVE, key
from hf_ihb.methods.pooled import PooledMethod

# squared norms below this are those of features that are all the same
_TINY = 1e-12
# singular values above 1e-6 of the Frobenius norm have come to 1: they grow by 3/2, and then converge quadratically
_ITERATIONS = 40


@dataclass
class Procrustes(PooledMethod):
    """``min_R || X R - Y ||_F^2 = 2 - 2 ||X^T Y||_*`` of features X of the student, Y of the teacher, R orthogonal.

    Both ``(B, D)`` of the batch of all processes, around their means and of Frobenius norm 1; the narrower one is
    thought to be filled up with zeros, so that R needs no parameters and no width. In [0, 2]; 2 where features of one
    side are all the same.

    References:
        Bhattarai et al., 2025, https://arxiv.org/abs/2509.25253
    """

    name: ClassVar[str] = "procrustes"
    label: ClassVar[str] = "Procrustes"
    said: ClassVar[tuple[str, ...]] = ("procrustes_weight",)

    procrustes_weight: float = key(
        0.0,
        "Weight of the squared distance of pooled features after the best rotation, between 0 and 2.",
        within=NON_NEGATIVE,
    )
    procrustes_warmup_epochs: float = key(0.0, "Warm-up of procrustes_weight.", within=NON_NEGATIVE, unit="epochs")

    @property
    def references(self) -> tuple[tuple[str, str], ...]:
        """What it stands on."""
        return (("Procrustes distance: Bhattarai et al., 2025", "2509.25253"),)

    def batch_loss(self, student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
        """A scalar."""
        own, other = (_normalised(x, weight[:, None]) for x in (student, teacher))
        return 2 - 2 * nuclear_norm(own.mT @ other)

    def describe(self) -> str:
        """Its term of the loss."""
        return "Procrustes distance of pooled features (weight {procrustes_weight:g})"


def nuclear_norm(matrix: Tensor) -> Tensor:
    """Sum of the singular values of a ``(M, N)`` matrix, a scalar.

    Its gradient is the orthogonal factor ``U V^T`` of the singular value decomposition, which is held constant: that is
    bounded by 1 where singular values repeat or are 0, and the derivatives of U and V are not. The factor is found by
    Newton's iteration: products of matrices alone, where a decomposition would make an accelerator wait for the host.
    Singular values below 1e-6 of the norm count by less than they are.
    """
    return (orthogonal_factor(matrix.detach()) * matrix).sum()


def orthogonal_factor(matrix: Tensor) -> Tensor:
    """``U V^T`` of a ``(M, N)`` matrix ``U S V^T``, without its part where S is 0.

    References:
        Higham, 2008, Functions of Matrices, chapter 8
    """
    factor = matrix * matrix.square().sum().clamp_min(_TINY**2).rsqrt()
    if factor.shape[0] > factor.shape[1]:
        return orthogonal_factor(matrix.mT).mT
    for _ in range(_ITERATIONS):
        factor = 1.5 * factor - 0.5 * (factor @ factor.mT) @ factor
    return factor


def _normalised(x: Tensor, share: Tensor) -> Tensor:
    """``(B, D)`` around the mean of the images that take part, of Frobenius norm 1; 0 in the others."""
    centered = (x - (x * share).sum(dim=0) / share.sum().clamp_min(1)) * share
    return centered * centered.square().sum().clamp_min(_TINY).rsqrt()
