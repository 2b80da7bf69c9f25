"""Curvature of a loss: Hessian-vector products, the Hessian's trace, its extreme eigenvalues and spectral density.

The Hessian is never formed. What describes it is a *matvec*, any function that returns ``H v`` for a ``(P,)`` vector v
(and, if it is to be used in blocks, ``(V, P)`` products for ``(V, P)`` rows); `HessianOperator` makes one of a loss.

Scaling the two sides of a ReLU against each other, or what stands before a LayerNorm, changes the Hessian and leaves
the function alone (Dinh et al., 2017, https://arxiv.org/abs/1703.04933): compare these numbers between models of one
parametrisation, or next to a measure of the weights' scale.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_ihb.errors import NumericsError
from hf_ihb.functional.random import counter_uniforms, counter_words

Losses = Callable[[], Iterable[Tensor]]
Matvec = Callable[[Tensor], Tensor]
Progress = Callable[[int, int], None]

# Far from the streams of the views, so that a run's seed can be used here as well.
_PROBE_STREAM, _START_STREAM = 0xFFFE, 0xFFFF
_WORDS = 1024  # random words drawn under one counter index
_BREAKDOWN = 100  # units of rounding, relative to |H|, below which a Lanczos vector is noise
_TAIL = 5.0  # sigma of a Gaussian that are kept around the spectrum: all but 3e-7 of one side


@contextmanager
def _differentiable_twice(device_type: str) -> Iterator[None]:
    """Gradients on, full precision, and attention without the fused kernels, whose backward has no derivative."""
    with torch.enable_grad(), torch.autocast(device_type, enabled=False), sdpa_kernel(SDPBackend.MATH):
        yield


def _accumulate(loss: Tensor, parameters: Sequence[Tensor], vectors: Tensor, products: Tensor) -> None:
    """Add the Hessian-vector products of one micro-batch to the rows of ``products``."""
    if loss.numel() != 1 or not loss.requires_grad:
        raise ValueError(
            f"losses must be scalars with a gradient, got shape {tuple(loss.shape)}, requires_grad={loss.requires_grad}"
        )
    gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
    sizes = [p.numel() for p in parameters]
    # a gradient that is missing or constant has no second derivative
    active = [i for i, g in enumerate(gradients) if g is not None and g.requires_grad]
    if not active:
        return
    outputs = [gradients[i] for i in active]
    for vector, product in zip(vectors, products, strict=True):
        pieces = vector.split(sizes)
        directions = [pieces[i].view_as(parameters[i]).to(parameters[i]) for i in active]
        seconds = torch.autograd.grad(outputs, parameters, directions, retain_graph=True, allow_unused=True)
        for total, second in zip(product.split(sizes), seconds, strict=True):
            if second is not None:
                total += second.flatten().to(total)


def _all_finite(values: Tensor) -> bool:
    """Without a tensor of their size; both ends are NaN where anything is."""
    return all(end.isfinite() for end in values.aminmax())


def hessian_vector_product(losses: Losses, parameters: Iterable[Tensor], vector: Tensor) -> Tensor:
    """``H v``, H the Hessian of the sum of all losses with respect to the parameters, by double backward.

    Several vectors share the forward and the first backward pass of a micro-batch. Autocast is off and
    `scaled_dot_product_attention` runs unfused meanwhile; nothing is added to ``.grad``. The model should be in eval
    mode, for a loss that draws random numbers has no Hessian.

    Args:
        losses: Returns an iterable that lazily yields one scalar loss a micro-batch, weighted so that they sum to the
            loss whose curvature is asked for; called once per product. Only one micro-batch is in memory at a time
            if the iterable keeps no reference to what it yields (``yield f(x)``, not ``y = f(x); yield y``).
        parameters: Leaf tensors that require gradients, P elements in all. Those without an effect on the loss are zero
            rows of H.
        vector: ``(P,)``, in the order of ``parameters``, or ``(V, P)`` for V vectors; computed in the parameters'
            dtype and on their device.

    Returns:
        Shape, dtype and device of ``vector``.

    Raises:
        NumericsError: If the loss or the product is not finite.
        ValueError: If the vector does not fit the parameters, or the losses are none, not scalar or without gradient.

    References:
        Pearlmutter, 1994, Fast Exact Multiplication by the Hessian
    """
    parameters = tuple(parameters)
    size = sum(p.numel() for p in parameters)
    if vector.ndim not in (1, 2) or vector.shape[-1] != size:
        raise ValueError(f"vector must be ({size},) or (V, {size}) for these parameters, got {tuple(vector.shape)}")
    vectors = vector.reshape(-1, size)
    products = torch.zeros_like(vectors)
    total, count = 0.0, 0
    with _differentiable_twice(parameters[0].device.type):
        for loss in losses():
            _accumulate(loss, parameters, vectors, products)
            total, count = total + loss.item(), count + 1
            del loss  # or its graph lives on while the next one is built
    if count == 0:
        raise ValueError("losses() yielded nothing; it must return a new iterable at every call")
    if not (math.isfinite(total) and _all_finite(products)):
        found = f"found NaN or infinity at a loss of {total}"
        raise NumericsError(f"Hessian-vector product: expected finite numbers, {found}")
    return products.reshape(vector.shape)


class HessianOperator:
    """`hessian_vector_product` of one loss as a matvec.

    Attributes:
        size: P, number of rows of the Hessian.
    """

    def __init__(self, losses: Losses, parameters: Iterable[Tensor]):
        self.losses = losses
        self.parameters = tuple(parameters)
        self.size = sum(p.numel() for p in self.parameters)

    def __call__(self, vector: Tensor) -> Tensor:
        """``H v`` or V products, in the shape of ``vector``."""
        return hessian_vector_product(self.losses, self.parameters, vector)


def _apply(matvec: Matvec, vectors: Tensor) -> Tensor:
    products = matvec(vectors)
    if products.shape != vectors.shape:
        raise ValueError(f"matvec must keep the shape {tuple(vectors.shape)}, got {tuple(products.shape)}")
    if not _all_finite(products):
        raise NumericsError("matrix-vector product: expected finite numbers, found NaN or infinity")
    return products


def _signs(seed: int, numbers: range, size: int, like: Tensor) -> Tensor:
    """Rademacher probes ``(len(numbers), size)``, one bit of the counter-based generator each."""
    blocks = torch.arange(-(-size // (32 * _WORDS)), device=like.device)
    shifts = torch.arange(0, 32, 8, device=like.device)
    bits = torch.arange(8, device=like.device, dtype=torch.uint8)
    probes = like.new_empty(len(numbers), size)
    for probe, number in zip(probes, numbers, strict=True):
        words = counter_words(seed, number, blocks, _PROBE_STREAM, _WORDS).flatten()
        octets = (words[:, None] >> shifts & 0xFF).to(torch.uint8)  # bits as bytes, not as int64
        probe.copy_((octets[..., None] >> bits & 1).flatten()[:size])
    return probes.mul_(2).sub_(1)


class TraceEstimate(NamedTuple):
    """What `hutchinson_trace` found.

    Attributes:
        trace: Mean of the samples.
        standard_error: Their standard deviation (n - 1) over the root of their number; NaN for one probe.
        num_probes: Their number.
        converged: Whether the standard error met the tolerance.
        samples: ``(num_probes,)`` float64 on the CPU, ``v^T H v`` of each probe.
    """

    trace: float
    standard_error: float
    num_probes: int
    converged: bool
    samples: Tensor


def _estimate(samples: list[float], tolerance: float) -> TraceEstimate:
    values = torch.tensor(samples, dtype=torch.float64)
    trace = values.mean().item()
    error = values.std().item() / math.sqrt(len(samples)) if len(samples) > 1 else math.nan
    return TraceEstimate(trace, error, len(samples), error <= tolerance * abs(trace), values)


@torch.no_grad()
def hutchinson_trace(
    matvec: Matvec,
    size: int,
    *,
    max_probes: int = 100,
    min_probes: int = 10,
    tolerance: float = 0.01,
    seed: int = 0,
    block_size: int = 1,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> TraceEstimate:
    """Trace of a symmetric matrix as the mean of ``v^T H v`` over random sign vectors v.

    A sample has the expectation ``tr H`` and the variance ``2 sum_{i != j} H_ij^2``. Probes are made until the standard
    error of the mean is at most ``tolerance |mean|``; where eigenvalues of both signs cancel in the trace, that may
    never be. Probe k is a function of (seed, k) alone, on any device.

    Args:
        matvec: ``H v`` of a ``(P,)`` vector.
        size: P, number of rows of H.
        max_probes: Largest number of probes, >= 1.
        min_probes: Smallest one (``max_probes``, if that is smaller); a standard error of few samples is itself noise.
        tolerance: Relative standard error to stop at, >= 0.
        seed: Of the probes, in [0, 2^64).
        block_size: Probes per call, >= 1; above 1, ``matvec`` is given ``(V, P)`` rows, V <= block_size. It changes the
            speed alone: samples of a block that lie behind the one to stop at are dropped.
        device: Of the probes, torch's default if None.
        dtype: Of the probes, torch's default if None.
        progress: Called with the number of probes so far and ``max_probes`` after each.

    Returns:
        The estimate, its standard error and the samples.

    Raises:
        NumericsError: If a product is not finite.
        ValueError: If a number is out of range or ``matvec`` changes the shape.

    References:
        Hutchinson, 1989, A stochastic estimator of the trace of the influence matrix; for Hessians: Yao et al., 2019,
        https://arxiv.org/abs/1912.07145
    """
    if min(size, max_probes, min_probes, block_size) < 1 or not tolerance >= 0:
        raise ValueError(
            "size, max_probes, min_probes and block_size must be >= 1 and tolerance >= 0, got "
            f"{size}, {max_probes}, {min_probes}, {block_size} and {tolerance}"
        )
    like = torch.empty(0, device=device, dtype=dtype)
    samples: list[float] = []
    while True:
        done = len(samples)
        probes = _signs(seed, range(done, min(done + block_size, max_probes)), size, like)
        products = _apply(matvec, probes if block_size > 1 else probes[0])
        for sample in (probes * products).sum(dim=-1).tolist():
            samples.append(sample)
            if progress is not None:
                progress(len(samples), max_probes)
            estimate = _estimate(samples, tolerance)
            if len(samples) == max_probes or (estimate.converged and len(samples) >= min_probes):
                return estimate


class LanczosResult(NamedTuple):
    """What `lanczos` found, m steps long, float64 on the CPU.

    Attributes:
        nodes: ``(m,)`` Ritz values, ascending; the outer ones converge to the ends of the spectrum, from inside.
        weights: ``(m,)`` in [0, 1], sum 1: with the nodes, the Gauss quadrature of the spectrum as the start vector u
            sees it, ``sum_j w_j f(theta_j) = u^T f(H) u`` for polynomials f of degree < 2 m.
        residuals: ``(m,)``; within this distance of its node there is an eigenvalue. Never below the rounding of the
            products, measured by how far they are from those of a symmetric matrix.
    """

    nodes: Tensor
    weights: Tensor
    residuals: Tensor

    @property
    def largest(self) -> float:
        """Estimate of the largest eigenvalue, never above it but for rounding."""
        return self.nodes[-1].item()

    @property
    def smallest(self) -> float:
        """Estimate of the smallest eigenvalue, never below it but for rounding."""
        return self.nodes[0].item()


def _start_vector(seed: int, number: int, size: int, like: Tensor) -> Tensor:
    """A unit vector with entries uniform in (-1, 1) before scaling.

    Its outer product has the expectation I / P, as quadrature needs it; unlike a sign vector it is not orthogonal to
    simple eigenvectors such as (1, -1), and unlike a Gaussian one the same on all devices.
    """
    blocks = torch.arange(-(-size // _WORDS), device=like.device)
    uniforms = counter_uniforms(seed, number, blocks, _START_STREAM, _WORDS).flatten()[:size]
    vector = (2 * uniforms + (2.0**-24 - 1)).to(like)  # exact, symmetric around 0 and never 0
    return vector / vector.norm()


def _orthogonalized(vector: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """The part of a vector that is orthogonal to the rows of the basis, and its components along them."""
    with torch.autocast(vector.device.type, enabled=False):
        components = basis @ vector
        vector = vector - components @ basis
        correction = basis @ vector  # what rounding left: twice is enough (Parlett, 1980, section 6.9)
        return vector - correction @ basis, components + correction


def _quadrature(products: Tensor, norms: list[float], rounding: float) -> LanczosResult:
    """Eigenvalues and first and last components of the eigenvectors of the tridiagonal matrix.

    Args:
        products: ``(m, m)`` inner products of the basis with what the matrix makes of it, above the diagonal and on it.
        norms: Of the part of each that is orthogonal to the basis so far; the last one is what remains.
        rounding: Of one matrix-vector product.
    """
    products, off = products.double().cpu(), torch.tensor(norms[:-1], dtype=torch.float64)
    tridiagonal = products.diagonal().diag() + off.diag(1) + off.diag(-1)
    nodes, vectors = torch.linalg.eigh(tridiagonal)
    # what the products have that the tridiagonal matrix has not: in exact arithmetic nothing
    difference = (products - tridiagonal).triu()
    noise = ((difference + difference.mT) @ vectors).norm(dim=0) + rounding
    return LanczosResult(nodes, vectors[0].square(), torch.hypot(norms[-1] * vectors[-1], noise))


@torch.no_grad()
def lanczos(
    matvec: Matvec,
    size: int,
    num_steps: int,
    *,
    seed: int = 0,
    start: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> LanczosResult:
    """Both ends of the spectrum of a symmetric matrix, and a quadrature of all of it.

    The matrix is reduced to a tridiagonal one, ``Q H Q^T = T``, on the vectors ``u, H u, ..., H^(m-1) u`` made
    orthonormal. All of them are kept and every new one is orthogonalised against all, twice: without that, rounding
    brings back directions that have converged, and T shows copies of their eigenvalues. Memory is ``num_steps`` vectors
    of P, 1.1 GB for 50 steps and 5.4 M parameters in float32.

    Stops early when the vectors span an invariant subspace, which holds every distinct eigenvalue that the start vector
    has a part in; of a multiple eigenvalue one copy is seen. Where rounding hides that, further steps repeat
    eigenvalues and share out their weights, which changes neither the ends nor the density.

    Args:
        matvec: ``H v`` of a ``(P,)`` vector.
        size: P, number of rows of H.
        num_steps: Largest number of products, >= 1; never more than P are made.
        seed: Of the start vector, in [0, 2^64).
        start: Number of the start vector under this seed, >= 0; average several for `spectral_density`.
        device: Of the vectors, torch's default if None.
        dtype: Of the vectors, torch's default if None.
        progress: Called with the number of steps so far and ``num_steps`` after each.

    Returns:
        Nodes, weights and residuals; their length is the number of steps made.

    Raises:
        NumericsError: If a product is not finite.
        ValueError: If a number is out of range or ``matvec`` changes the shape.

    References:
        Lanczos, 1950, An iteration method for the solution of the eigenvalue problem; Golub and Meurant, 2010,
        Matrices, Moments and Quadrature; Parlett, 1980, The Symmetric Eigenvalue Problem
    """
    if min(size, num_steps) < 1 or start < 0:
        raise ValueError(f"size and num_steps must be >= 1 and start >= 0, got {size}, {num_steps} and {start}")
    like = torch.empty(0, device=device, dtype=dtype)
    vector = _start_vector(seed, start, size, like)
    num_steps = min(num_steps, size)
    basis = like.new_empty(num_steps, size)
    products = like.new_zeros(num_steps, num_steps)
    norms: list[float] = []
    scale = 0.0
    for step in range(num_steps):
        basis[step] = vector
        product = _apply(matvec, vector)
        scale = max(scale, product.norm().item())
        vector, components = _orthogonalized(product, basis[: step + 1])
        products[: step + 1, step] = components
        norms.append(vector.norm().item())
        if progress is not None:
            progress(step + 1, num_steps)
        if norms[-1] <= _BREAKDOWN * torch.finfo(basis.dtype).eps * scale:
            break
        vector = vector / norms[-1]
    count = len(norms)
    return _quadrature(products[:count, :count], norms, torch.finfo(basis.dtype).eps * scale)


def spectral_density(nodes: Tensor, weights: Tensor, points: Tensor, sigma: float) -> Tensor:
    """Density of the eigenvalues by stochastic Lanczos quadrature, smoothed by a Gaussian.

    ``p(t) = sum_j w_j exp(-(t - theta_j)^2 / (2 sigma^2)) / (sigma sqrt(2 pi)) / sum_j w_j``

    over the nodes of all starts. Each start's weights sum to 1, so that this is the mean of their densities. Its
    integral is 1; its mean is that of the eigenvalues, ``tr H / P``, in expectation over the starts.

    Args:
        nodes: ``(...)`` Ritz values of all starts, stacked or concatenated.
        weights: Same shape, >= 0.
        points: ``(...)`` where the density is asked for.
        sigma: Standard deviation of the Gaussian, in units of eigenvalues, > 0.

    Returns:
        Shape of ``points``, float64, >= 0, per unit of eigenvalue.

    Raises:
        ValueError: If the shapes differ or sigma is not positive.

    References:
        Ghorbani, Krishnan and Xiao, 2019, https://arxiv.org/abs/1901.10159, section 2; Golub and Meurant, 2010
    """
    if nodes.shape != weights.shape or not sigma > 0:
        raise ValueError(
            f"expected nodes and weights of one shape and sigma > 0, got {tuple(nodes.shape)}, {tuple(weights.shape)} "
            f"and {sigma}"
        )
    theta, weight = nodes.double().flatten(), weights.double().flatten()
    bells = torch.exp(-0.5 * ((points.double()[..., None] - theta) / sigma).square()) / (sigma * math.sqrt(2 * math.pi))
    return (bells * weight).sum(dim=-1) / weight.sum()


class SpectralDensity(NamedTuple):
    """A density over a grid.

    Attributes:
        points: ``(N,)`` float64, evenly spaced eigenvalues.
        density: ``(N,)`` float64.
        sigma: Width of the Gaussian, in units of eigenvalues.
    """

    points: Tensor
    density: Tensor
    sigma: float


def smoothed_spectrum(
    nodes: Tensor, weights: Tensor, *, relative_sigma: float = 0.01, num_points: int = 1001
) -> SpectralDensity:
    """`spectral_density` over a grid that covers all nodes and the tails around them.

    Args:
        nodes: Eigenvalues of each start, see `spectral_density`.
        weights: Their shares, see `spectral_density`.
        relative_sigma: Width of the Gaussian as a share of the range of the nodes (of their size, where they are all
            the same), > 0.
        num_points: Points of the grid, at least one a sigma, or peaks would fall between them.

    Returns:
        The grid, the density and sigma.

    Raises:
        ValueError: If the grid is too coarse, or as in `spectral_density`.
    """
    low, high = nodes.min().item(), nodes.max().item()
    largest = max(abs(low), abs(high))
    spread = high - low if high - low > 1e-6 * largest else largest or 1.0  # less is rounding
    sigma = relative_sigma * spread
    needed = math.ceil((high - low) / sigma + 2 * _TAIL) + 1 if sigma > 0 else 0
    if num_points < needed:
        raise ValueError(f"num_points must be >= {needed} for relative_sigma={relative_sigma}, got {num_points}")
    points = torch.linspace(low - _TAIL * sigma, high + _TAIL * sigma, num_points, dtype=torch.float64)
    return SpectralDensity(points, spectral_density(nodes, weights, points.to(nodes.device), sigma), sigma)
