"""Hilbert-Schmidt independence criterion of rows that may take part by shares, and CKA as a ratio of three.

A row takes part by a share w in [0, 1]: a centred kernel is ``W^(1/2) H K H^T W^(1/2)``, H the centring by the weighted
mean. What the debiased estimator subtracts is what rows of these shares have in common by chance, so that it is 0 in
expectation for independent features.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Estimator = Literal["biased", "debiased"]
Reduce = Callable[[Tensor], Tensor]

# Self-terms smaller than this share of the biased ones are rounding noise.
_CONSTANT = 1e-6
_TINY = 1e-12  # in the place of a divisor of 0, where what it divides is 0


def wide_dtype(x: Tensor) -> torch.dtype:
    """float64 where the device of x has it."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def share_sums(x: Tensor, mask: Tensor | None) -> Tensor:
    """``(..., 5)`` sums of the shares of the rows of x, to the powers 0 (rows that take part) to 4."""
    if mask is None:
        return torch.full((*x.shape[:-2], 5), x.shape[-2], device=x.device, dtype=x.dtype)
    share = mask.to(x.dtype)
    powers = [(share > 0).to(x.dtype), share, share**2, share**3, share**4]
    return torch.stack(powers, dim=-1).sum(dim=-2)


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
    return hsic_of_sums(
        inner, (diagonal_x * diagonal_y).sum(-1), diagonal_x.sum(-1) * diagonal_y.sum(-1), count, estimator
    )


def hsic_of_sums(inner: Tensor, products: Tensor, traces: Tensor, count: Tensor, estimator: Estimator) -> Tensor:
    """`hsic` from the sum of the products of both diagonals, and the product of both traces, each ``(...)``."""
    sums = count.to(inner.dtype)[..., None].expand(*count.shape, 5)
    return _Estimate.of(sums).hsic(inner, products, traces, estimator)


class _Estimate(NamedTuple):
    """How HSIC is estimated from rows that take part by shares.

    Attributes:
        rows: How many take part.
        count: How many of share 1 they are worth, ``(sum w)^2 / sum w^2``.
        products: Weight of the products of both diagonals in what is debiased.
        traces: Of the product of both traces.
    """

    rows: Tensor
    count: Tensor
    products: Tensor
    traces: Tensor

    @classmethod
    def of(cls, sums: Tensor) -> "_Estimate":
        """Of the sums of the shares' powers ``(..., 5)``.

        With C the centring of weighted rows, ``A = C C^T``, independent features have ``<K, L>`` of ``|A|^2``, products
        of ``sum A_ii^2`` and traces of ``(tr A)^2`` in expectation, each up to one factor: what is debiased must be 0
        for these. For shares of 0 and 1 this is the estimator of Song et al.
        """
        rows, first, second, third, fourth = sums.unbind(dim=-1)
        whole = first.clamp_min(_TINY)
        trace, ratio = first - second / whole, second / whole.square()
        squared = second - 2 * third / whole + (second / whole).square()
        diagonal = (1 + ratio).square() * second - 4 * (1 + ratio) * third / whole + 4 * fourth / whole.square()
        count = first.square() / second.clamp_min(_TINY)
        n = count.clamp_min(4)
        traces = 1 / ((n - 1) * (n - 2))
        return cls(rows, count, (squared + traces * trace.square()) / diagonal.clamp_min(_TINY), traces)

    def hsic(self, inner: Tensor, products: Tensor, traces: Tensor, estimator: Estimator) -> Tensor:
        """``(...)``, see `hsic`."""
        if estimator == "biased":
            return inner / (self.count - 1).clamp_min(1).square()
        n = self.count.clamp_min(4)
        return (inner - products * self.products + traces * self.traces) / (n * (n - 3).clamp_min(1))


class Moments(NamedTuple):
    """What HSIC needs of two centred kernels K and L; the first three for the pairs (K, L), (K, K) and (L, L).

    Attributes:
        inners: ``(...)`` each, the Frobenius inner product.
        products: Sum of the products of both diagonals.
        traces: Product of both traces.
        sums: ``(..., 5)`` of the shares of rows, see `share_sums`.
    """

    inners: Sequence[Tensor]
    products: Sequence[Tensor]
    traces: Sequence[Tensor]
    sums: Tensor

    def cka(self, estimator: Estimator) -> Tensor:
        """``(...)``; where it is undefined 0, or NaN for the debiased estimator."""
        estimate = _Estimate.of(self.sums)
        terms = zip(self.inners, self.products, self.traces, strict=True)
        cross, self_x, self_y = (estimate.hsic(*term, estimator) for term in terms)
        # a self-term that is not clearly positive leaves the ratio undefined; keep its gradient out as well
        floor_x, floor_y = (estimate.hsic(i, i, i, "biased") * _CONSTANT for i in self.inners[1:])
        defined = (self_x > floor_x) & (self_y > floor_y)
        if estimator == "debiased":
            defined = defined & (estimate.rows >= 4)
        ratio = cross / torch.where(defined, self_x * self_y, 1).sqrt()
        return torch.where(defined, ratio, 0.0 if estimator == "biased" else torch.nan)


def gram_moments(gram_x: Tensor, gram_y: Tensor, sums: Tensor) -> Moments:
    """Of centred kernels ``(..., N, N)``, with the sums of the shares of their rows."""
    pairs = ((gram_x, gram_y), (gram_x, gram_x), (gram_y, gram_y))
    diagonals = [(a.diagonal(dim1=-2, dim2=-1), b.diagonal(dim1=-2, dim2=-1)) for a, b in pairs]
    return Moments(
        [torch.linalg.vecdot(a.flatten(-2), b.flatten(-2)) for a, b in pairs],
        [torch.linalg.vecdot(a, b) for a, b in diagonals],
        [a.sum(dim=-1) * b.sum(dim=-1) for a, b in diagonals],
        sums,
    )


def kernel_moments(kernel_x: Tensor, kernel_y: Tensor, share: Tensor | None, rounding: float = 0.0) -> Moments:
    """Of kernels that are not centred: what centring does to the sums is worked out without making centred ones.

    The debiased estimator does not depend on diagonals (where all shares are 0 or 1), and a row far from all others has
    an entry there whose rounding would drown the rest: diagonals are kept apart, and what cancels is added in float64.

    Args:
        kernel_x: ``(..., N, N)``, rows and columns multiplied by the roots of their shares.
        kernel_y: ``(..., N, N)``, likewise.
        share: ``(..., N)`` of each row; None for all.
        rounding: The second kernel is constant if centring leaves less than this share of it, in root mean square.
    """
    root = torch.ones_like(kernel_x[..., 0]) if share is None else share.sqrt()
    others = 1 - torch.eye(root.shape[-1], dtype=root.dtype, device=root.device)
    wide = wide_dtype(root)
    whole = root.to(wide).square().sum(dim=-1, keepdim=True).clamp_min(_TINY)
    parts = [_of_kernel(kernel, others, root, whole) for kernel in (kernel_x, kernel_y)]
    pairs = ((parts[0], parts[1]), (parts[0], parts[0]), (parts[1], parts[1]))
    raw = [
        torch.linalg.vecdot(a.kernel.flatten(-2), b.kernel.flatten(-2)).to(wide) + (a.diagonal * b.diagonal).sum(dim=-1)
        for a, b in pairs
    ]
    cross = [(a.rows * b.rows).sum(dim=-1, keepdim=True) for a, b in pairs]
    inners = [
        r - (2 * c / whole - a.total * b.total / whole.square()).squeeze(-1)
        for r, c, (a, b) in zip(raw, cross, pairs, strict=True)
    ]
    if rounding > 0:
        is_there = (inners[2] > rounding**2 * raw[2]).to(wide)
        inners = [inners[0] * is_there, inners[1], inners[2] * is_there]
    return Moments(
        inners,
        [(a.centered * b.centered).sum(dim=-1) for a, b in pairs],
        [a.centered.sum(dim=-1) * b.centered.sum(dim=-1) for a, b in pairs],
        share_sums(root[..., None].to(wide), share),
    )


class _OfKernel(NamedTuple):
    """A kernel without its diagonal, which is apart; sums over its rows and of all; and its centred diagonal."""

    kernel: Tensor
    diagonal: Tensor
    rows: Tensor
    total: Tensor
    centered: Tensor


def _of_kernel(kernel: Tensor, others: Tensor, root: Tensor, whole: Tensor) -> _OfKernel:
    wide = whole.dtype
    diagonal, kernel = kernel.diagonal(dim1=-2, dim2=-1).to(wide), kernel * others
    wide_root = root.to(wide)
    rows = (kernel @ root[..., None]).squeeze(-1).to(wide) + diagonal * wide_root
    total = (rows * wide_root).sum(dim=-1, keepdim=True)
    centered = diagonal - 2 * wide_root * rows / whole + wide_root.square() * total / whole.square()
    return _OfKernel(kernel, diagonal, rows, total, centered)


def feature_moments(x: Tensor, y: Tensor, sums: Tensor, reduce: Reduce | None) -> Moments:
    """Of linear kernels, from sums over rows alone: ``<K, L> = |X^T Y|^2``, and the diagonals are squared lengths."""
    pairs = ((x, y), (x, x), (y, y))
    dx, dy = x.square().sum(dim=-1), y.square().sum(dim=-1)
    totals = [a.mT @ b for a, b in pairs]
    totals += [torch.stack((dx * dy, dx * dx, dy * dy, dx, dy), dim=-1).sum(dim=-2), sums]
    if reduce is not None:  # one collective for all of them
        shapes = [t.shape for t in totals]
        flat = [t.flatten(sums.ndim - 1) for t in totals]
        parts = reduce(torch.cat(flat, dim=-1)).split([t.shape[-1] for t in flat], dim=-1)
        totals = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
    *cross, diagonals, sums = totals
    trace_x, trace_y = diagonals[..., 3], diagonals[..., 4]
    return Moments(
        [c.square().sum(dim=(-2, -1)) for c in cross],
        diagonals[..., :3].unbind(dim=-1),
        [trace_x * trace_y, trace_x.square(), trace_y.square()],
        sums,
    )
