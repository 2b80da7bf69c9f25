"""CKA of every pair of layers of one model or two, over any number of images in the memory of one chunk."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from hf_ihb.functional.hsic import hsic_of_sums
from hf_ihb.functional.similarity import _CONSTANT, _centered_kernel, _float, _rbf_kernel, _squared_distances_of

Kernel = Literal["linear", "rbf"]

# The unbiased HSIC is defined from this number of rows on.
_FEWEST_ROWS = 4


class MinibatchCKA:
    """Debiased CKA of layers, ``mean HSIC_1(K, L) / sqrt(mean HSIC_1(K, K) mean HSIC_1(L, L))``, means over chunks.

    The unbiased HSIC of a chunk of rows estimates that of the whole population, so the means may be taken chunk by
    chunk, and the ratio is formed once, of the means; a mean of ratios would be biased. Its expected numerator and
    self-terms do not depend on `rows_per_batch`, only its variance does. Features are gathered into chunks of exactly
    `rows_per_batch` rows: in which portions they arrive makes no difference, in which order they arrive does.

    The last, incomplete chunk takes part from 4 rows on; fewer are left out. Every chunk is weighted by its number of
    pairs of rows: any weights keep the means unbiased, and these give a short chunk, whose HSIC is noisy, little say.

    The width of the RBF kernel is that of `rbf_cka`, from the median distance of each chunk.

    Gram matrices are float32 (float64 for float64 features) on the features' device, centred and scaled per chunk; the
    scale is put back, and sums over rows, chunks and pairs are float64 on the CPU. A chunk of n rows takes
    about ``12 n^2`` bytes of it per layer and kernel while it is worked on.

    Args:
        rows_per_batch: Rows n of a chunk, >= 4.
        kernels: Which of ``linear`` and ``rbf`` to compute, from one Gram matrix.
        bandwidth: Width of the RBF kernel in median distances, > 0.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Nguyen, Raghu and Kornblith, 2021, https://arxiv.org/abs/2010.15327, eq. 3 and 4; RBF kernel: Kornblith et al.,
        2019, https://arxiv.org/abs/1905.00414
    """

    def __init__(
        self, rows_per_batch: int = 256, kernels: Sequence[Kernel] = ("linear",), *, bandwidth: float = 1.0
    ) -> None:
        if rows_per_batch < _FEWEST_ROWS:
            raise ValueError(f"rows_per_batch must be >= {_FEWEST_ROWS}, got {rows_per_batch}")
        if not kernels or len(set(kernels)) < len(kernels) or not set(kernels) <= set(get_args(Kernel)):
            raise ValueError(f"kernels must be of {get_args(Kernel)}, each once at most, got {kernels!r}")
        if not bandwidth > 0:
            raise ValueError(f"bandwidth must be > 0, got {bandwidth}")
        self.rows_per_batch = rows_per_batch
        self.kernels = tuple(kernels)
        self.bandwidth = bandwidth
        self._widths: tuple[tuple[int, ...], tuple[int, ...] | None] | None = None  # of x and y
        self._pending: list[Tensor] = []  # (< rows_per_batch, width) of each layer of x, then of y
        self._sums: dict[Kernel, _Sums] = {}

    @torch.no_grad()
    def update(self, x: Sequence[Tensor], y: Sequence[Tensor] | None = None) -> None:
        """Adds images.

        Args:
            x: Features of each layer of the one model, ``(B, P_l)``; row i is the same image in all of them.
            y: Features of each layer of the other model for the same images, ``(B, Q_m)``; None compares x with x.

        Raises:
            ValueError: If the features are not paired, or layers or widths differ from those of an earlier call.
        """
        layers = [*x, *(y or ())]
        self._check(x, y)
        if self._pending and len(self._pending[0]):
            layers = [torch.cat(parts) for parts in zip(self._pending, layers, strict=True)]
        whole = len(layers[0]) // self.rows_per_batch * self.rows_per_batch
        for start in range(0, whole, self.rows_per_batch):
            for kernel, sums in self._chunk_sums([f[start : start + self.rows_per_batch] for f in layers]).items():
                self._sums[kernel] = self._sums[kernel] + sums if kernel in self._sums else sums
        self._pending = [f[whole:].clone() for f in layers]  # a view would keep the whole batch in memory

    @torch.no_grad()
    def compute(self, kernel: Kernel | None = None) -> Tensor:
        """CKA of all images so far; more may be added afterwards.

        Args:
            kernel: One of `kernels`; None for the first of them.

        Returns:
            ``(L, M)`` float64 on the CPU, in [-1, 1]; ``(L, L)``, symmetric and 1 on the diagonal, where y was None.
            NaN where it is undefined: fewer than 4 images, constant features, features that are not finite and, for
            ``rbf``, a chunk in which half of the distances are 0.

        Raises:
            ValueError: If there were no features yet, or the kernel is not computed.
        """
        kernel = self.kernels[0] if kernel is None else kernel
        if kernel not in self.kernels:
            raise ValueError(f"kernel must be one of {self.kernels}, got {kernel!r}")
        if self._widths is None:
            raise ValueError("no features yet: call update() first")
        parts = [self._sums[kernel]] if kernel in self._sums else []
        if len(self._pending[0]) >= _FEWEST_ROWS:
            parts.append(self._chunk_sums(self._pending)[kernel])
        if not parts:
            x, y = self._widths
            return torch.full((len(x), len(x if y is None else y)), torch.nan, dtype=torch.float64)
        return sum(parts[1:], start=parts[0]).cka(symmetric=self._widths[1] is None)

    def _check(self, x: Sequence[Tensor], y: Sequence[Tensor] | None) -> None:
        shapes = [tuple(features.shape) for features in (*x, *(y or ()))]
        if not len(x) or (y is not None and not len(y)) or {len(shape) for shape in shapes} != {2}:
            raise ValueError(f"each layer's features must be (B, width), at least one layer a model, got {shapes}")
        if len({rows for rows, _ in shapes}) > 1:
            raise ValueError(f"features must be of the same images, got {shapes}")
        widths = (tuple(f.shape[1] for f in x), None if y is None else tuple(f.shape[1] for f in y))
        if self._widths not in (None, widths):
            raise ValueError(f"layers must have the widths of the first call, {self._widths}, got {widths}")
        self._widths = widths

    def _chunk_sums(self, layers: Sequence[Tensor]) -> dict[Kernel, "_Sums"]:
        """Of one chunk, >= 4 rows of each layer of x, then of y."""
        n = len(layers[0])
        grams = {kernel: torch.empty(len(layers), n, n, dtype=torch.float64) for kernel in self.kernels}
        for i, features in enumerate(layers):  # layer by layer, for one layer's numbers stay in the cache
            self._fill({kernel: gram[i] for kernel, gram in grams.items()}, features)
        num_x = len(self._widths[0])
        return {kernel: _Sums.of_chunk(gram, num_x, self._widths[1] is None) for kernel, gram in grams.items()}

    def _fill(self, grams: dict[Kernel, Tensor], features: Tensor) -> None:
        """Writes the centred Gram matrix ``(n, n)`` of one layer for each kernel."""
        with torch.autocast(features.device.type, enabled=False):
            centered, scale = _centered_and_scale(_float(features))
            inner = centered @ centered.mT
            if "linear" in grams:
                grams["linear"].copy_(inner).mul_(scale.cpu().double().square())
            if "rbf" in grams:
                kernel = _rbf_kernel(_squared_distances_of(inner), None, self.bandwidth)
                gram = grams["rbf"].copy_(_centered_kernel(kernel, None))
                if not gram.trace() > 0:  # it has no median distance
                    gram.fill_(torch.nan)


def _centered_and_scale(features: Tensor) -> tuple[Tensor, Tensor]:
    """Features minus their mean over rows, divided by the largest of them, and that; constant features become zero."""
    centered = features - features.mean(dim=0)
    # once more: beside a channel far from zero, the rounded mean leaves an offset
    centered = centered - centered.mean(dim=0)
    largest, size = (torch.maximum(high, -low) for low, high in (features.aminmax(), centered.aminmax()))
    constant = size <= _CONSTANT * largest
    return centered / torch.where(constant, torch.inf, size), size


@dataclass(frozen=True)
class _Sums:
    """Weighted sums of HSIC over chunks."""

    cross: Tensor  # (L, M): each layer of x with each of y
    self_x: Tensor  # (2, L): each layer of x with itself, unbiased and biased
    self_y: Tensor  # (2, M)

    @classmethod
    def of_chunk(cls, grams: Tensor, num_x: int, symmetric: bool) -> "_Sums":
        """Of centred Gram matrices ``(L + M, n, n)``, or ``(L, n, n)`` of x alone where that is symmetric."""
        n = grams.shape[-1]
        count, pairs = torch.tensor(float(n), dtype=torch.float64), n * (n - 1) / 2
        diagonals, grams = grams.diagonal(dim1=-2, dim2=-1), grams.flatten(1)
        traces = diagonals.sum(dim=-1)
        x, y = slice(num_x), slice(0 if symmetric else num_x, None)
        cross = hsic_of_sums(
            grams[x] @ grams[y].mT, diagonals[x] @ diagonals[y].mT, torch.outer(traces[x], traces[y]), count, "debiased"
        )
        # gram by gram, for the squares of all of them at once would be as large as they are
        inner, products = torch.stack([gram @ gram for gram in grams]), diagonals.square().sum(dim=-1)
        self_terms = torch.stack(
            [hsic_of_sums(inner, products, traces.square(), count, e) for e in ("debiased", "biased")]
        )
        return cls(pairs * cross, pairs * self_terms[:, x], pairs * self_terms[:, y])

    def __add__(self, other: "_Sums") -> "_Sums":
        return _Sums(self.cross + other.cross, self.self_x + other.self_x, self.self_y + other.self_y)

    def cka(self, symmetric: bool) -> Tensor:
        # a self-term that is lost in rounding leaves the ratio undefined
        roots = [
            torch.where(unbiased > _CONSTANT * biased, unbiased, torch.nan).sqrt()
            for unbiased, biased in (self.self_x, self.self_y)
        ]
        ratio = (self.cross / torch.outer(*roots)).clamp(-1, 1)  # within, but for rounding, by Cauchy and Schwarz
        return (ratio + ratio.mT) / 2 if symmetric else ratio
