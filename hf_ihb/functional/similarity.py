"""Similarity of representations: HSIC, CKA and Gram distance, in float32 whatever the autocast state.

Where one side is a `TokenGram`, its features are known by their inner products alone. These may have been stored in
half precision: what centring leaves of them counts as zero below the rounding of that.

Where rows are spread over processes, `reduce` sums a tensor over them (and is differentiable); everything that depends
on all rows then is a sum of what each process computes from its own.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_ihb.functional.gram import TokenGram

Estimator = Literal["biased", "debiased"]
Reduce = Callable[[Tensor], Tensor]

# Centred features smaller than this share of the raw ones are rounding noise: the features are constant.
_CONSTANT = 1e-6
_CONSTANT_GRAM = 1e-3


def _check_paired(x: Tensor, y: Tensor | TokenGram, mask: Tensor | None) -> None:
    shape = y.centered.shape if isinstance(y, TokenGram) else y.shape
    if x.ndim < 2 or x.shape[:-1] != shape[:-1]:
        raise ValueError(f"features must be paired (..., N, width), got {tuple(x.shape)} and {tuple(shape)}")
    if mask is not None and mask.shape != x.shape[:-1]:
        raise ValueError(f"mask must be {tuple(x.shape[:-1])}, got {tuple(mask.shape)}")


def _checked(
    x: Tensor, y: Tensor | TokenGram, mask: Tensor | None, estimator: str
) -> tuple[Tensor, Tensor | TokenGram]:
    """Both sides in one dtype, float32 or float64."""
    _check_paired(x, y, mask)
    if estimator not in ("biased", "debiased"):
        raise ValueError(f"estimator must be 'biased' or 'debiased', got {estimator!r}")
    if isinstance(y, TokenGram):
        dtype = torch.promote_types(_float(x).dtype, _float(y.centered).dtype)
        return x.to(dtype), TokenGram(*(part.to(dtype) for part in y))
    dtype = torch.promote_types(_float(x).dtype, _float(y).dtype)
    return x.to(dtype), y.to(dtype)


def _float(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _row_count(x: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return torch.full(x.shape[:-2], x.shape[-2], device=x.device, dtype=x.dtype)
    return mask.sum(dim=-1).to(x.dtype)


def _centered(x: Tensor, mask: Tensor | None, reduce: Reduce | None = None) -> Tensor:
    """Features minus their mean over rows, scaled to unit root mean square; constant features become zero.

    CKA ignores scale, so the scale is a constant to autograd; it keeps fourth powers inside float32's range.
    """
    # few passes over the features: this runs for every layer of every step
    if mask is not None:
        x = x.masked_fill(~mask[..., None], 0)
    total, count = x.sum(dim=-2, keepdim=True), _row_count(x, mask)[..., None, None]
    if reduce is not None:
        total, count = reduce(torch.cat((total, count), dim=-1)).split((x.shape[-1], 1), dim=-1)
    centered = x - total / count.clamp_min(1)
    if mask is not None:
        centered = centered.masked_fill(~mask[..., None], 0)
    with torch.no_grad():
        largest, size = (part.abs().amax(dim=(-2, -1), keepdim=True) for part in (x, centered))
        scale = size * (centered / torch.where(size == 0, 1, size)).square().mean(dim=(-2, -1), keepdim=True).sqrt()
        if reduce is not None:  # any scale will do as long as it is everybody's
            largest, size, scale = reduce(torch.stack((largest, size, scale))).unbind()
        factor = torch.where(size <= _CONSTANT * largest, 0, 1 / scale)
    return centered * factor


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


def _centered_features_gram(x: Tensor | TokenGram, mask: Tensor | None) -> Tensor:
    """``(..., N, N)`` inner products of centred features, up to scale."""
    if not isinstance(x, TokenGram):
        centered = _centered(x, mask)
        return centered @ centered.mT
    # subtracting any vector from the features leaves what is centred here as it is
    centered = _centered_kernel(x.centered, mask)
    largest = [g.abs().amax(dim=(-2, -1), keepdim=True) for g in (centered, x.centered)]
    return torch.where(largest[0] <= _CONSTANT_GRAM * largest[1], 0, centered)


def _centered_kernel(kernel: Tensor, mask: Tensor | None) -> Tensor:
    """``H K H`` over the rows and columns that take part, 0 in the others."""
    if mask is None:
        rows = kernel.mean(dim=-1, keepdim=True)
        return kernel - rows - rows.mT + rows.mean(dim=-2, keepdim=True)
    kept = mask.to(kernel.dtype)[..., None]
    count = kept.sum(dim=-2, keepdim=True).clamp_min(1)
    rows = kernel @ kept / count
    center = (rows * kept).sum(dim=-2, keepdim=True) / count
    return (kernel - rows - rows.mT + center) * kept * kept.mT


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
    return _hsic(inner, (diagonal_x * diagonal_y).sum(-1), diagonal_x.sum(-1) * diagonal_y.sum(-1), count, estimator)


def _hsic(inner: Tensor, products: Tensor, traces: Tensor, count: Tensor, estimator: Estimator) -> Tensor:
    if estimator == "biased":
        return inner / (count - 1).clamp_min(1).square()
    n = count.clamp_min(4)
    return (inner - products * n / (n - 2) + traces / ((n - 1) * (n - 2))) / (n * (n - 3))


class _Moments(NamedTuple):
    """What HSIC needs of two centred kernels K and L; each but the count for the pairs (K, L), (K, K) and (L, L)."""

    inners: Sequence[Tensor]
    products: Sequence[Tensor]
    traces: Sequence[Tensor]
    count: Tensor

    def cka(self, estimator: Estimator) -> Tensor:
        terms = zip(self.inners, self.products, self.traces, strict=True)
        cross, self_x, self_y = (_hsic(*term, self.count, estimator) for term in terms)
        # a self-term that is not clearly positive leaves the ratio undefined; keep its gradient out as well
        floor_x, floor_y = (_hsic(i, i, i, self.count, "biased") * _CONSTANT for i in self.inners[1:])
        defined = (self_x > floor_x) & (self_y > floor_y)
        if estimator == "debiased":
            defined = defined & (self.count >= 4)
        ratio = cross / torch.where(defined, self_x * self_y, 1).sqrt()
        return torch.where(defined, ratio, 0.0 if estimator == "biased" else torch.nan)


def _gram_moments(gram_x: Tensor, gram_y: Tensor, count: Tensor) -> _Moments:
    pairs = ((gram_x, gram_y), (gram_x, gram_x), (gram_y, gram_y))
    diagonals = [(a.diagonal(dim1=-2, dim2=-1), b.diagonal(dim1=-2, dim2=-1)) for a, b in pairs]
    return _Moments(
        [torch.linalg.vecdot(a.flatten(-2), b.flatten(-2)) for a, b in pairs],
        [torch.linalg.vecdot(a, b) for a, b in diagonals],
        [a.sum(dim=-1) * b.sum(dim=-1) for a, b in diagonals],
        count,
    )


def _feature_moments(x: Tensor, y: Tensor, count: Tensor, reduce: Reduce | None) -> _Moments:
    """Of linear kernels, from sums over rows alone: ``<K, L> = |X^T Y|^2``, and the diagonals are squared lengths."""
    pairs = ((x, y), (x, x), (y, y))
    dx, dy = x.square().sum(dim=-1), y.square().sum(dim=-1)
    sums = [a.mT @ b for a, b in pairs]
    sums += [torch.stack((dx * dy, dx * dx, dy * dy, dx, dy), dim=-1).sum(dim=-2), count[..., None]]
    if reduce is not None:  # one collective for all of them
        shapes = [t.shape for t in sums]
        flat = [t.flatten(count.ndim) for t in sums]
        parts = reduce(torch.cat(flat, dim=-1)).split([t.shape[-1] for t in flat], dim=-1)
        sums = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
    *cross, diagonals, count = sums
    trace_x, trace_y = diagonals[..., 3], diagonals[..., 4]
    return _Moments(
        [c.square().sum(dim=(-2, -1)) for c in cross],
        diagonals[..., :3].unbind(dim=-1),
        [trace_x * trace_y, trace_x.square(), trace_y.square()],
        count[..., 0],
    )


def linear_cka(
    x: Tensor,
    y: Tensor | TokenGram,
    estimator: Estimator = "biased",
    *,
    mask: Tensor | None = None,
    reduce: Reduce | None = None,
) -> Tensor:
    """Linear centred kernel alignment, ``HSIC(x, y) / sqrt(HSIC(x, x) HSIC(y, y))``.

    Invariant to rotation, isotropic scale and shift of either side. The biased estimator is high for any two sets of
    wide features over few rows (0.80 for independent Gaussians of width 256 over 64 rows); the debiased one is 0 in
    expectation there.

    Args:
        x: ``(..., N, P)``, row i is sample or token i.
        y: ``(..., N, Q)``, the same rows; Q may differ from P. Or a `TokenGram` of them.
        estimator: ``biased`` or ``debiased``.
        mask: ``(..., N)`` bool, false rows are left out.
        reduce: Sums over processes where the rows here are a part of them; only ``P x P``, ``P x Q`` and ``Q x Q``
            matrices and a few sums are exchanged.

    Returns:
        ``(...)`` float32 (float64 for float64). Biased: in [0, 1], 0 for constant features. Debiased: <= 1, can be
        slightly negative, NaN where it is undefined (fewer than 4 rows, constant features).

    Raises:
        ValueError: If the features are not paired or the estimator is unknown.

    References:
        Kornblith et al., 2019, https://arxiv.org/abs/1905.00414; debiased form: Murphy et al., 2024,
        https://arxiv.org/abs/2405.01012
    """
    x, y = _checked(x, y, mask, estimator)
    with torch.autocast(x.device.type, enabled=False):
        if isinstance(y, TokenGram):
            grams = (_centered_features_gram(x, mask), _centered_features_gram(y, mask))
            return _gram_moments(*grams, _row_count(x, mask)).cka(estimator)
        x, y = _centered(x, mask, reduce), _centered(y, mask, reduce)
        count, (rows, p), q = _row_count(x, mask), x.shape[-2:], y.shape[-1]
        if reduce is None and rows * (p + q) <= p**2 + q**2 + p * q:  # the Gram form is cheaper
            return _gram_moments(x @ x.mT, y @ y.mT, count).cka(estimator)
        return _feature_moments(x, y, count, reduce).cka(estimator)


def rbf_cka(
    x: Tensor,
    y: Tensor | TokenGram,
    estimator: Estimator = "biased",
    *,
    mask: Tensor | None = None,
    bandwidth: float = 1.0,
) -> Tensor:
    """CKA with the kernel ``exp(-d^2 / (2 sigma^2))`` on each side, sigma a multiple of the median distance of rows.

    The median (the lower one of an even number) is over pairs of different rows and a constant to autograd.

    Args:
        x: ``(..., N, P)``, row i is sample or token i.
        y: ``(..., N, Q)``, the same rows; Q may differ from P. Or a `TokenGram` of them.
        estimator: ``biased`` or ``debiased``.
        mask: ``(..., N)`` bool, false rows are left out.
        bandwidth: sigma in median distances, > 0.

    Returns:
        ``(...)`` float32 (float64 for float64), as `linear_cka`; undefined as well where half of the distances are 0.

    Raises:
        ValueError: If the features are not paired or the estimator is unknown.

    References:
        Kornblith et al., 2019, https://arxiv.org/abs/1905.00414, section 3
    """
    x, y = _checked(x, y, mask, estimator)
    with torch.autocast(x.device.type, enabled=False):
        grams = [_centered_features_gram(features, mask) for features in (x, y)]
        grams = [_centered_rbf_gram(gram, mask, bandwidth) for gram in grams]
        return _gram_moments(*grams, _row_count(x, mask)).cka(estimator)


def _centered_rbf_gram(inner: Tensor, mask: Tensor | None, bandwidth: float) -> Tensor:
    """Of the linear Gram matrix of the same features; zero where half of the distances are 0."""
    lengths = inner.diagonal(dim1=-2, dim2=-1)
    pairs = torch.ones_like(inner, dtype=torch.bool) if mask is None else mask[..., :, None] & mask[..., None, :]
    others = pairs & ~torch.eye(inner.shape[-1], dtype=torch.bool, device=inner.device)
    # a row's distance to itself is 0, whatever rounding says
    squared = torch.where(others, (lengths[..., :, None] + lengths[..., None, :] - 2 * inner).clamp_min(0), 0)
    median = torch.where(others, squared.detach(), torch.nan).flatten(-2).nanmedian(dim=-1).values[..., None, None]
    defined = median > 0  # false for NaN: no pair at all
    kernel = torch.exp(-squared / (2 * bandwidth**2 * torch.where(defined, median, 1)))
    return _centered_kernel(torch.where(pairs & defined, kernel, 0), mask)


def published_cka(x: Tensor, y: Tensor | TokenGram, *, mask: Tensor | None = None) -> Tensor:
    """CKA as the published study computed it: biased, of rows of unit length, with an absolute epsilon of 1e-8.

    The epsilon is of the order of the self-terms where rows are alike: for 64 tokens that vary by a tenth around their
    mean, the CKA of features with themselves is 0.02.

    Args:
        x: ``(..., N, P)``, row i is sample or token i.
        y: ``(..., N, Q)``, the same rows; Q may differ from P. Or a `TokenGram` of them.
        mask: ``(..., N)`` bool, false rows are left out.

    Returns:
        ``(...)`` float32 (float64 for float64), in [0, 1).

    Raises:
        ValueError: If the features are not paired.
    """
    x, y = _checked(x, y, mask, "biased")
    with torch.autocast(x.device.type, enabled=False):
        count = _row_count(x, mask).clamp_min(2)
        kept = torch.ones_like(x[..., :1]) if mask is None else mask[..., None].to(x.dtype)

        def gram(features: Tensor | TokenGram) -> Tensor:
            if isinstance(features, TokenGram):
                return _centered_kernel(_cosines(features), mask) / (count - 1)[..., None, None]
            unit = F.normalize(torch.where(kept > 0, features, 0), dim=-1)
            centered = (unit - unit.sum(dim=-2, keepdim=True) / count[..., None, None]) * kept
            return centered @ centered.mT / (count - 1)[..., None, None]

        gram_x, gram_y = gram(x), gram(y)
        cross, self_x, self_y = (
            (a * b).sum(dim=(-2, -1)) for a, b in ((gram_x, gram_y), (gram_x, gram_x), (gram_y, gram_y))
        )
        return cross / (self_x * self_y + 1e-8).sqrt()


def _cosines(x: Tensor | TokenGram) -> Tensor:
    """``(..., N, N)`` cosine similarities of rows; those of a zero row are 0."""
    if not isinstance(x, TokenGram):
        unit = F.normalize(_float(x), dim=-1)
        return unit @ unit.mT
    raw = _float(x.raw())
    lengths = raw.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    inverse = torch.where(lengths > 0, 1 / torch.where(lengths > 0, lengths, 1), 0)
    return raw * inverse[..., :, None] * inverse[..., None, :]


def gram_distance(
    x: Tensor,
    y: Tensor | TokenGram,
    *,
    mask: Tensor | None = None,
    normalization: Literal["mean_square", "published"] = "mean_square",
) -> Tensor:
    """Difference between the cosine-similarity matrices G of two sets of rows.

    Args:
        x: ``(..., N, P)``, row i is sample or token i.
        y: ``(..., N, Q)``, the same rows; Q may differ from P. Or a `TokenGram` of them.
        mask: ``(..., N)`` bool, false rows are left out.
        normalization: ``mean_square``: ``|G_x - G_y|_F^2 / N^2``; ``published``: ``|G_x - G_y|_F / N^2``, as in the
            published study, which falls as 1 / N.

    Returns:
        ``(...)`` float32 (float64 for float64), in [0, 4] or [0, 2 / N]; 0 where all pairwise angles agree.

    Raises:
        ValueError: If the features are not paired or the normalization is unknown.

    References:
        Tung and Mori, 2019, https://arxiv.org/abs/1907.09682 (there over a batch, here over any rows)
    """
    _check_paired(x, y, mask)
    if normalization not in ("mean_square", "published"):
        raise ValueError(f"normalization must be 'mean_square' or 'published', got {normalization!r}")
    with torch.autocast(x.device.type, enabled=False):
        difference = _cosines(x) - _cosines(y)
        if mask is not None:
            difference = torch.where(mask[..., :, None] & mask[..., None, :], difference, 0)
        entries = _row_count(x, mask).clamp_min(1).square()
        if normalization == "published":  # this norm has a gradient of 0 at 0, the root of a sum has none
            return torch.linalg.vector_norm(difference, dim=(-2, -1)) / entries
        return difference.square().sum(dim=(-2, -1)) / entries


def center_positions(tokens: Tensor, sample_weight: Tensor | None = None, *, reduce: Reduce | None = None) -> Tensor:
    """Tokens minus the batch mean of their position, so that a fixed position code cannot score as similarity.

    The result depends on the whole batch: 8 x 4 images are not 32 x 1.

    Args:
        tokens: ``(B, N, D)``.
        sample_weight: ``(B,)`` >= 0, weight of each image in the mean; even if None.
        reduce: Sums over processes where the images here are a part of the batch.

    Returns:
        ``(B, N, D)`` float32 (float64 for float64).
    """
    with torch.autocast(tokens.device.type, enabled=False):
        tokens = _float(tokens)
        weight = tokens.new_ones(len(tokens)) if sample_weight is None else sample_weight.to(tokens.dtype)
        total, count = torch.einsum("b,bnd->nd", weight, tokens), weight.sum()
        if reduce is not None:
            total, count = reduce(total), reduce(count)
        return tokens - total / count.clamp_min(1e-12)
