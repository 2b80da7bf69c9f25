"""Similarity of representations: CKA and Gram distance, in float32 whatever the autocast state.

Where one side is a `TokenGram`, its features are known by their inner products alone. These may have been stored in
half precision: what centring leaves of them counts as zero below the rounding of that.

Where rows are spread over processes, `reduce` sums a tensor over them (and is differentiable); everything that depends
on all rows then is a sum of what each process computes from its own.
"""

from typing import Literal

import torch
from torch import Tensor

from hf_ihb.functional.gram import TokenGram
from hf_ihb.functional.hsic import (
    Estimator,
    Reduce,
    feature_moments,
    gram_moments,
    kernel_moments,
    share_sums,
    wide_dtype,
)
from hf_ihb.functional.tokens import unit_rows

# Centred features smaller than this share of the raw ones are rounding noise: the features are constant.
_CONSTANT = 1e-6
_CONSTANT_GRAM = 1e-3
_FEW_ROWS = 64  # whose inner products are cheap, whatever the widths are
_TINY = 1e-12  # in the place of a divisor of 0, where what it divides is 0


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


def _shares(x: Tensor, mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.to(x.dtype)


def _row_count(x: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return torch.full(x.shape[:-2], x.shape[-2], device=x.device, dtype=x.dtype)
    return mask.sum(dim=-1, dtype=x.dtype)


def _centered(x: Tensor, mask: Tensor | None, reduce: Reduce | None = None) -> Tensor:
    """Features minus their mean over rows, scaled to unit root mean square; constant features become zero.

    Each row is multiplied by the root of its share, so that inner products are weighted. CKA ignores scale, so the
    scale is a constant to autograd; it keeps fourth powers inside float32's range.
    """
    # few passes over the features: this runs for every layer of every step
    share = _shares(x, mask)
    if share is None:
        total = x.sum(dim=-2, keepdim=True)
    else:
        x = x.masked_fill((share == 0)[..., None], 0)
        total = (x * share[..., None]).sum(dim=-2, keepdim=True)
    count = _row_count(x, mask)[..., None, None]
    if reduce is not None:
        total, count = reduce(torch.cat((total, count), dim=-1)).split((x.shape[-1], 1), dim=-1)
    centered = x - total / count.clamp_min(_TINY)
    if share is not None:
        centered = centered * share.sqrt()[..., None]
    with torch.no_grad():
        largest, size = (part.abs().amax(dim=(-2, -1), keepdim=True) for part in (x, centered))
        scale = size * (centered / torch.where(size == 0, 1, size)).square().mean(dim=(-2, -1), keepdim=True).sqrt()
        if reduce is not None:  # any scale will do as long as it is everybody's
            largest, size, scale = reduce(torch.stack((largest, size, scale))).unbind()
        factor = torch.where(size <= _CONSTANT * largest, 0, 1 / scale)
    return centered * factor


def _shifted(x: Tensor, mask: Tensor | None) -> Tensor:
    """Features minus one vector, scaled to unit root mean square; constant features and rows left out become zero.

    Each row is multiplied by the root of its share. For kernels that are centred afterwards any vector will do. This
    one is a mean in which rows count by the inverse of their squared distance to the mean: close to most rows, however
    far some are, so that what tells those apart is not rounded off. It is a constant to autograd, as the scale is.
    """
    if mask is not None:
        x = x.masked_fill((mask == 0)[..., None], 0)
    with torch.no_grad():
        share = torch.ones_like(x[..., :1]) if mask is None else mask[..., None].to(x.dtype)
        count = share.sum(dim=-2, keepdim=True).clamp_min(_TINY)
        largest = x.abs().amax(dim=(-2, -1), keepdim=True)
        unit = torch.where(largest == 0, 1, largest)
        mean = (x * share).sum(dim=-2, keepdim=True) / count
        distance = ((x - mean) / unit).square().sum(dim=-1, keepdim=True)
        weight = share / (distance + 1e-3 * (share * distance).sum(dim=-2, keepdim=True) / count + _TINY)
        weight = weight / weight.sum(dim=-2, keepdim=True).clamp_min(_TINY)  # before it meets what may be large
        center = (x * weight).sum(dim=-2, keepdim=True)
        away = (x - center) * (share > 0)
        size = away.abs().amax(dim=(-2, -1), keepdim=True)
        scale = size * (away / torch.where(size == 0, 1, size)).square().mean(dim=(-2, -1), keepdim=True).sqrt()
        factor = torch.where(size <= _CONSTANT * largest, 0, 1 / scale) * share.sqrt()
    return (x - center) * factor


def centered_gram(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Gram matrix ``H X X^T H`` of features up to scale, H the centring matrix over rows.

    Args:
        x: ``(..., N, P)``, row i is sample or token i.
        mask: ``(..., N)`` share of each row in [0, 1], or bool; rows are multiplied by its root.

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


def _features_kernel(x: Tensor | TokenGram, mask: Tensor | None) -> Tensor:
    """``(..., N, N)`` inner products of features up to shift and scale, by the roots of the shares of their rows."""
    if isinstance(x, TokenGram):
        return _by_shares(x.centered, mask)
    shifted = _shifted(x, mask)
    return shifted @ shifted.mT


def _by_shares(kernel: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return kernel
    root = mask.to(kernel.dtype).sqrt()
    return torch.where(root[..., None] * root[..., None, :] > 0, kernel, 0) * root[..., None] * root[..., None, :]


def _centered_kernel(kernel: Tensor, mask: Tensor | None) -> Tensor:
    """``H K H`` over the rows and columns that take part, by the roots of their shares; 0 in the others."""
    if mask is None:
        rows = kernel.mean(dim=-1, keepdim=True)
        return kernel - rows - rows.mT + rows.mean(dim=-2, keepdim=True)
    share = mask.to(kernel.dtype)[..., None]
    count = share.sum(dim=-2, keepdim=True).clamp_min(_TINY)
    rows = kernel @ share / count
    center = (rows * share).sum(dim=-2, keepdim=True) / count
    return (kernel - rows - rows.mT + center) * (share * share.mT).sqrt()


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
        mask: ``(..., N)`` share of each row in [0, 1], or bool.
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
        if isinstance(y, TokenGram) or (reduce is None and _by_rows(x, y, estimator)):
            if estimator == "debiased":
                kernels = [_features_kernel(features, mask) for features in (x, y)]
                rounding = _CONSTANT_GRAM if isinstance(y, TokenGram) else 0.0
                return kernel_moments(*kernels, _shares(x, mask), rounding).cka(estimator).to(x.dtype)
            grams = [_centered_features_gram(features, mask) for features in (x, y)]
            return gram_moments(*grams, share_sums(x, mask)).cka(estimator)
        x, y = _centered(x, mask, reduce), _centered(y, mask, reduce)
        return feature_moments(x, y, share_sums(x, mask), reduce).cka(estimator)


def _by_rows(x: Tensor, y: Tensor, estimator: Estimator) -> bool:
    """Whether inner products of rows are cheaper than those of channels, or cheap enough to be more exact."""
    (rows, p), q = x.shape[-2:], y.shape[-1]
    return rows * (p + q) <= p**2 + q**2 + p * q or (estimator == "debiased" and rows <= _FEW_ROWS)


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
        mask: ``(..., N)`` share of each row in [0, 1], or bool.
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
        taken = None if mask is None else mask > 0
        kernels = [_rbf_kernel(_squared_distances(features, taken), mask, bandwidth) for features in (x, y)]
        if estimator == "debiased":  # all but a trace of such a kernel may be subtracted
            kernels = [kernel.to(wide_dtype(kernel)) for kernel in kernels]
        grams = [_centered_kernel(kernel, mask) for kernel in kernels]
        return gram_moments(*grams, share_sums(grams[0], mask)).cka(estimator).to(x.dtype)


def _squared_distances(x: Tensor | TokenGram, mask: Tensor | None) -> Tensor:
    """``(..., N, N)`` between rows, up to scale."""
    if not isinstance(x, TokenGram):  # of differences: those of inner products drown beside an outlier
        shifted = _shifted(x, mask)
        return torch.cdist(shifted, shifted, compute_mode="donot_use_mm_for_euclid_dist").square()
    return _squared_distances_of(_centered_features_gram(x, mask))


def _squared_distances_of(inner: Tensor) -> Tensor:
    """``(..., N, N)`` between rows, by their inner products."""
    lengths = inner.diagonal(dim1=-2, dim2=-1)
    return (lengths[..., :, None] + lengths[..., None, :] - 2 * inner).clamp_min(0)


def _rbf_kernel(squared: Tensor, mask: Tensor | None, bandwidth: float) -> Tensor:
    """Of squared distances; zero where half of them are 0."""
    pairs = (
        torch.ones_like(squared, dtype=torch.bool) if mask is None else (mask[..., :, None] * mask[..., None, :]) > 0
    )
    others = pairs & ~torch.eye(squared.shape[-1], dtype=torch.bool, device=squared.device)
    # a row's distance to itself is 0, whatever rounding says
    squared = torch.where(others, squared, 0)
    median = torch.where(others, squared.detach(), torch.nan).flatten(-2).nanmedian(dim=-1).values[..., None, None]
    defined = median > 0  # false for NaN: no pair at all
    kernel = torch.exp(-squared / (2 * bandwidth**2 * torch.where(defined, median, 1)))
    return torch.where(pairs & defined, kernel, 0)


def published_cka(x: Tensor, y: Tensor | TokenGram, *, mask: Tensor | None = None) -> Tensor:
    """CKA as the published study computed it: biased, of rows of unit length, with an absolute epsilon of 1e-8.

    The epsilon is of the order of the self-terms where rows are alike: for 64 tokens that vary by a tenth around their
    mean, the CKA of features with themselves is 0.02.

    Args:
        x: ``(..., N, P)``, row i is sample or token i.
        y: ``(..., N, Q)``, the same rows; Q may differ from P. Or a `TokenGram` of them.
        mask: ``(..., N)`` share of each row in [0, 1], or bool.

    Returns:
        ``(...)`` float32 (float64 for float64), in [0, 1).

    Raises:
        ValueError: If the features are not paired.
    """
    x, y = _checked(x, y, mask, "biased")
    with torch.autocast(x.device.type, enabled=False):
        count = _row_count(x, mask).clamp_min(2)
        share = torch.ones_like(x[..., :1]) if mask is None else mask[..., None].to(x.dtype)

        def gram(features: Tensor | TokenGram) -> Tensor:
            if isinstance(features, TokenGram):
                return _centered_kernel(cosine_similarities(features), mask) / (count - 1)[..., None, None]
            unit = unit_rows(torch.where(share > 0, features, 0))
            mean = (unit * share).sum(dim=-2, keepdim=True) / count[..., None, None]
            centered = (unit - mean) * share.sqrt()
            return centered @ centered.mT / (count - 1)[..., None, None]

        gram_x, gram_y = gram(x), gram(y)
        cross, self_x, self_y = (
            (a * b).sum(dim=(-2, -1)) for a, b in ((gram_x, gram_y), (gram_x, gram_x), (gram_y, gram_y))
        )
        return cross / (self_x * self_y + 1e-8).sqrt()


def cosine_similarities(x: Tensor | TokenGram) -> Tensor:
    """``(..., N, N)`` cosine similarities of rows ``(..., N, D)``, or of those of a `TokenGram`; of a zero row 0."""
    if not isinstance(x, TokenGram):
        unit = unit_rows(_float(x))
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
        mask: ``(..., N)`` share of each row in [0, 1], or bool.
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
        difference = cosine_similarities(x) - cosine_similarities(y)
        if mask is not None:
            share = mask.to(difference.dtype)
            pair = share[..., :, None] * share[..., None, :]
            difference = torch.where(pair > 0, difference * pair.sqrt(), 0)
        entries = _row_count(x, mask).clamp_min(_TINY).square()
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
