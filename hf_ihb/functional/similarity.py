"""Similarity of representations: HSIC, CKA and Gram distance, in float32 whatever the autocast state."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Estimator = Literal["biased", "debiased"]

# Centred features smaller than this share of the raw ones are rounding noise: the features are constant.
_CONSTANT = 1e-6


def _check_paired(x: Tensor, y: Tensor, mask: Tensor | None) -> None:
    if x.ndim < 2 or x.shape[:-1] != y.shape[:-1]:
        raise ValueError(f"features must be paired (..., N, width), got {tuple(x.shape)} and {tuple(y.shape)}")
    if mask is not None and mask.shape != x.shape[:-1]:
        raise ValueError(f"mask must be {tuple(x.shape[:-1])}, got {tuple(mask.shape)}")


def _float(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _row_count(x: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return torch.full(x.shape[:-2], x.shape[-2], device=x.device, dtype=x.dtype)
    return mask.sum(dim=-1).to(x.dtype)


def _centered(x: Tensor, mask: Tensor | None) -> Tensor:
    """Features minus their mean over rows, scaled to unit root mean square; constant features become zero.

    CKA ignores scale, so the scale is a constant to autograd; it keeps fourth powers inside float32's range.
    """
    rows = torch.ones_like(x[..., :1]) if mask is None else mask[..., None].to(x.dtype)
    x = torch.where(rows > 0, x, 0)
    count = rows.sum(dim=-2, keepdim=True).clamp_min(1)
    centered = (x - x.sum(dim=-2, keepdim=True) / count) * rows
    with torch.no_grad():
        largest = x.abs().amax(dim=(-2, -1), keepdim=True)
        size = centered.abs().amax(dim=(-2, -1), keepdim=True)
        constant = size <= _CONSTANT * largest
        size = torch.where(constant, 1, size)
        scale = size * (centered / size).square().mean(dim=(-2, -1), keepdim=True).sqrt()
        scale = torch.where(constant, 1, scale)
    return torch.where(constant, 0, centered / scale)


def centered_gram(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Gram matrix ``H X X^T H`` of features up to scale, H the centring matrix over rows.

    Args:
        x: ``(..., N, P)``, row i is sample or token i.
        mask: ``(..., N)`` bool, false rows are left out.

    Returns:
        ``(..., N, N)`` float32 (float64 for float64), scaled so that the mean squared centred feature is 1; zero for
        constant features and in the rows and columns that are left out.
    """
    with torch.autocast(x.device.type, enabled=False):
        centered = _centered(_float(x), mask)
        return centered @ centered.mT


def hsic(
    inner: Tensor, diagonal_x: Tensor, diagonal_y: Tensor, count: Tensor, estimator: Estimator = "biased"
) -> Tensor:
    """Hilbert-Schmidt independence criterion of two *centred* Gram matrices K and L.

    The unbiased estimator of Song et al. needs K and L with zeroed diagonals; because rows of a centred Gram matrix
    sum to zero, it only depends on ``<K, L>`` and on both diagonals.

    Args:
        inner: ``(...)`` the Frobenius inner product of K and L.
        diagonal_x: ``(..., N)`` diagonal of K.
        diagonal_y: ``(..., N)`` diagonal of L.
        count: ``(...)`` number of rows n that take part; >= 4 for ``debiased``.
        estimator: ``biased`` divides by (n - 1)^2, ``debiased`` is unbiased and may be negative.

    Returns:
        ``(...)``.

    References:
        Gretton et al., 2005; Song et al., 2012, Feature Selection via Dependence Maximization, eq. 5
    """
    if estimator == "biased":
        return inner / (count - 1).clamp_min(1).square()
    n = count.clamp_min(4)
    products = (diagonal_x * diagonal_y).sum(dim=-1)
    traces = diagonal_x.sum(dim=-1) * diagonal_y.sum(dim=-1)
    return (inner - products * n / (n - 2) + traces / ((n - 1) * (n - 2))) / (n * (n - 3))


def linear_cka(x: Tensor, y: Tensor, estimator: Estimator = "biased", *, mask: Tensor | None = None) -> Tensor:
    """Linear centred kernel alignment, ``HSIC(x, y) / sqrt(HSIC(x, x) HSIC(y, y))``.

    Invariant to rotation, isotropic scale and shift of either side. The biased estimator is high for any two sets of
    wide features over few rows (0.80 for independent Gaussians of width 256 over 64 rows); the debiased one is 0 in
    expectation there.

    Args:
        x: ``(..., N, P)``, row i is sample or token i.
        y: ``(..., N, Q)``, the same rows; Q may differ from P.
        estimator: ``biased`` or ``debiased``.
        mask: ``(..., N)`` bool, false rows are left out.

    Returns:
        ``(...)`` float32 (float64 for float64). Biased: in [0, 1], 0 for constant features. Debiased: <= 1, can be
        slightly negative, NaN where it is undefined (fewer than 4 rows, constant features).

    Raises:
        ValueError: If the features are not paired or the estimator is unknown.

    References:
        Kornblith et al., 2019, https://arxiv.org/abs/1905.00414; debiased form: Murphy et al., 2024,
        https://arxiv.org/abs/2405.01012
    """
    _check_paired(x, y, mask)
    if estimator not in ("biased", "debiased"):
        raise ValueError(f"estimator must be 'biased' or 'debiased', got {estimator!r}")
    with torch.autocast(x.device.type, enabled=False):
        dtype = torch.promote_types(_float(x).dtype, _float(y).dtype)
        x, y = _centered(x.to(dtype), mask), _centered(y.to(dtype), mask)
        rows, width_x, width_y = x.shape[-2], x.shape[-1], y.shape[-1]
        if rows * (width_x + width_y) <= width_x**2 + width_y**2 + width_x * width_y:  # Gram form is cheaper
            gram_x, gram_y = x @ x.mT, y @ y.mT
            inners = [(a * b).sum(dim=(-2, -1)) for a, b in ((gram_x, gram_y), (gram_x, gram_x), (gram_y, gram_y))]
        else:
            inners = [(a.mT @ b).square().sum(dim=(-2, -1)) for a, b in ((x, y), (x, x), (y, y))]
        count = _row_count(x, mask)
        dx, dy = x.square().sum(dim=-1), y.square().sum(dim=-1)
        cross = hsic(inners[0], dx, dy, count, estimator)
        self_x, self_y = hsic(inners[1], dx, dx, count, estimator), hsic(inners[2], dy, dy, count, estimator)
        # a self-term that is not clearly positive leaves the ratio undefined; keep its gradient out as well
        floor_x, floor_y = (hsic(i, dx * 0, dy * 0, count, "biased") * _CONSTANT for i in inners[1:])
        defined = (self_x > floor_x) & (self_y > floor_y)
        if estimator == "debiased":
            defined = defined & (count >= 4)
        ratio = cross / torch.where(defined, self_x * self_y, 1).sqrt()
        return torch.where(defined, ratio, 0.0 if estimator == "biased" else torch.nan)


def gram_distance(x: Tensor, y: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference between the cosine-similarity matrices of two sets of rows.

    Args:
        x: ``(..., N, P)``, row i is sample or token i.
        y: ``(..., N, Q)``, the same rows; Q may differ from P.
        mask: ``(..., N)`` bool, false rows are left out.

    Returns:
        ``(...)`` float32 (float64 for float64), in [0, 4]; 0 where all pairwise angles agree.

    Raises:
        ValueError: If the features are not paired.

    References:
        Tung and Mori, 2019, https://arxiv.org/abs/1907.09682 (there over a batch, here over any rows)
    """
    _check_paired(x, y, mask)
    with torch.autocast(x.device.type, enabled=False):
        x, y = F.normalize(_float(x), dim=-1), F.normalize(_float(y), dim=-1)
        squared = (x @ x.mT - y @ y.mT).square()
        if mask is not None:
            squared = torch.where(mask[..., :, None] & mask[..., None, :], squared, 0)
        return squared.sum(dim=(-2, -1)) / _row_count(x, mask).clamp_min(1).square()


def center_positions(tokens: Tensor, sample_weight: Tensor | None = None) -> Tensor:
    """Tokens minus the batch mean of their position, so that a fixed position code cannot score as similarity.

    The result depends on the whole batch: 8 x 4 images are not 32 x 1.

    Args:
        tokens: ``(B, N, D)``.
        sample_weight: ``(B,)`` >= 0, weight of each image in the mean; even if None.

    Returns:
        ``(B, N, D)`` float32 (float64 for float64).
    """
    tokens = _float(tokens)
    if sample_weight is None:
        return tokens - tokens.mean(dim=0, keepdim=True)
    weight = sample_weight.to(tokens.dtype)
    mean = torch.einsum("b,bnd->nd", weight, tokens) / weight.sum().clamp_min(1e-12)
    return tokens - mean
