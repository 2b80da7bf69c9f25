import itertools
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DeiTConfig, DeiTForImageClassification

from hf_ihb.errors import NumericsError
from hf_ihb.functional.curvature import (
    HessianOperator,
    hessian_vector_product,
    hutchinson_trace,
    lanczos,
    smoothed_spectrum,
    spectral_density,
)

FLOAT64 = torch.float64


def randn(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=FLOAT64)


def symmetric(generator, size):
    a = randn(generator, size, size)
    return a + a.T


def with_eigenvalues(generator, eigenvalues):
    """A full symmetric matrix."""
    eigenvalues = torch.as_tensor(eigenvalues, dtype=FLOAT64)
    q = torch.linalg.qr(randn(generator, len(eigenvalues), len(eigenvalues)))[0]
    return (q * eigenvalues) @ q.T


class Recorded:
    """A matrix (the identity, if none) as a matvec, for one vector or rows of them, that keeps what it was given."""

    def __init__(self, matrix=None):
        self.matrix, self.calls = matrix, []

    def __call__(self, vector):
        self.calls.append(vector.clone())
        return vector if self.matrix is None else vector @ self.matrix.to(vector)

    @property
    def probes(self):
        return torch.cat([v.reshape(-1, v.shape[-1]) for v in self.calls])


def explicit(operator):
    """The Hessian, column by column and by blocks at once."""
    eye = torch.eye(operator.size, dtype=FLOAT64)
    columns = torch.stack([operator(v) for v in eye])
    torch.testing.assert_close(operator(eye), columns, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(columns, columns.T, rtol=1e-10, atol=1e-12)
    return columns


# ---- Hessian-vector products ----


@pytest.fixture
def regression(generator):
    x, labels = randn(generator, 12, 3), torch.randint(4, (12,), generator=generator)
    return x, labels


def softmax_loss(x, labels, parameters):
    return F.cross_entropy(F.linear(x, *parameters), labels)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", [0.0, 0.7])
def test_hessian_of_softmax_regression_is_the_closed_form(generator, regression, bias, scale):
    x, labels = regression
    parameters = [(scale * randn(generator, *shape)).requires_grad_() for shape in [(4, 3), (4,)][: 1 + bias]]
    operator = HessianOperator(lambda: [softmax_loss(x, labels, parameters)], parameters)
    hessian = explicit(operator)

    p = F.linear(x, *parameters).softmax(dim=-1).detach()
    inputs = torch.cat((x, torch.ones(12, 1, dtype=FLOAT64)), dim=1) if bias else x
    among_classes = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    expected = torch.einsum("nkl,ni,nj->kilj", among_classes, inputs, inputs) / 12
    width = inputs.shape[1]
    # parameters are W row by row, then the bias: the order of (k, i) with the last i moved behind all others
    order = torch.arange(4 * width).view(4, width)
    order = torch.cat((order[:, :3].flatten(), order[:, 3:].flatten()))
    torch.testing.assert_close(hessian, expected.reshape(4 * width, -1)[order][:, order], rtol=1e-12, atol=1e-14)

    squared = inputs.square().sum(dim=1)
    trace = ((1 - p.square().sum(dim=1)) * squared).mean()
    torch.testing.assert_close(hessian.trace(), trace, rtol=1e-12, atol=0)
    found = hutchinson_trace(operator, operator.size, max_probes=400, tolerance=0, dtype=FLOAT64, block_size=50)
    assert abs(found.trace - trace) < 3 * found.standard_error
    if scale == 0:
        torch.testing.assert_close(trace, (1 - 1 / 4) * squared.mean(), rtol=1e-12, atol=0)
        covariance = torch.linalg.eigvalsh(inputs.T @ inputs / 12)
        largest = torch.linalg.eigvalsh(hessian)[-4:]
        torch.testing.assert_close(largest[1:], covariance[-1].expand(3) / 4, rtol=1e-12, atol=0)
        assert largest[0] < 0.99 * largest[1]
        result = lanczos(operator, operator.size, operator.size, dtype=FLOAT64)
        assert result.largest == pytest.approx(covariance[-1].item() / 4, rel=1e-10)
        # distinct eigenvalues: those of the covariance over K, and 0
        assert len(result.nodes) == width + 1


def test_hessian_of_linear_regression_is_the_second_moment(generator):
    x, y = randn(generator, 9, 5), randn(generator, 9)
    w = randn(generator, 5).requires_grad_()
    operator = HessianOperator(lambda: [0.5 * (x @ w - y).square().mean()], [w])
    torch.testing.assert_close(explicit(operator), x.T @ x / 9, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(explicit(operator).trace(), x.square().sum(dim=1).mean(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("sizes", [[12], [4, 4, 4], [5, 7], [1, 8, 3], [1] * 12])
def test_micro_batches_sum_to_the_whole_however_they_are_cut(generator, regression, sizes):
    x, labels = regression
    parameters = [randn(generator, 4, 3).requires_grad_(), randn(generator, 4).requires_grad_()]
    vectors = randn(generator, 3, 16)
    whole = hessian_vector_product(lambda: [softmax_loss(x, labels, parameters)], parameters, vectors)

    def losses():
        for part, part_labels in zip(x.split(sizes), labels.split(sizes), strict=True):
            yield len(part) / 12 * softmax_loss(part, part_labels, parameters)

    torch.testing.assert_close(hessian_vector_product(losses, parameters, vectors), whole, rtol=1e-12, atol=1e-14)
    for vector, product in zip(vectors, whole, strict=True):
        found = hessian_vector_product(losses, parameters, vector)
        torch.testing.assert_close(found, product, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("c", [-2.0, 1e-6, 1e6])
def test_scaling_the_loss_scales_products_trace_eigenvalues_and_density(generator, regression, c):
    x, labels = regression
    parameters = [randn(generator, 4, 3).requires_grad_(), randn(generator, 4).requires_grad_()]
    one, scaled = (HessianOperator(lambda c=c: [c * softmax_loss(x, labels, parameters)], parameters) for c in (1.0, c))
    vector = randn(generator, 16)
    torch.testing.assert_close(scaled(vector), c * one(vector), rtol=1e-12, atol=abs(c) * 1e-14)
    traces = [hutchinson_trace(o, 16, min_probes=3, tolerance=0.08, dtype=FLOAT64) for o in (one, scaled)]
    assert 3 < traces[0].num_probes == traces[1].num_probes < 100
    assert traces[1].trace == pytest.approx(c * traces[0].trace, rel=1e-12)
    assert traces[1].standard_error == pytest.approx(abs(c) * traces[0].standard_error, rel=1e-12)
    spectra = [lanczos(o, 16, 5, dtype=FLOAT64) for o in (one, scaled)]
    expected = c * spectra[0].nodes
    torch.testing.assert_close(spectra[1].nodes, expected.sort().values, rtol=1e-10, atol=abs(c) * 1e-12)
    densities = [smoothed_spectrum(s.nodes, s.weights) for s in spectra]
    assert densities[1].density.max() == pytest.approx(densities[0].density.max().item() / abs(c), rel=1e-3)


def test_parameters_without_effect_or_with_a_linear_one_are_zero_rows(generator):
    w, unused, linear = (randn(generator, n).requires_grad_() for n in (3, 2, 4))
    a = symmetric(generator, 3)
    operator = HessianOperator(lambda: [0.5 * w @ a @ w + linear.sum(), linear.sum()], iter([unused, w, linear]))
    expected = torch.zeros(9, 9, dtype=FLOAT64)
    expected[2:5, 2:5] = a
    torch.testing.assert_close(explicit(operator), expected, rtol=1e-12, atol=1e-14)
    assert w.grad is None


@pytest.mark.parametrize("linear", [False, True])
def test_one_micro_batch_is_alive_at_a_time(generator, linear):
    w = randn(generator, 5).requires_grad_()
    alive = []

    def loss():
        hidden = randn(generator, 5) if linear else w.sin()
        alive.append(weakref.ref(hidden))  # the graph keeps it for its backward
        return (w * hidden).sum()

    def losses():
        for _ in range(4):
            assert all(reference() is None for reference in alive)
            yield loss()

    hessian_vector_product(losses, [w], randn(generator, 3, 5))
    assert len(alive) == 4


def tiny_deit():
    config = DeiTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4,
        num_channels=1, num_labels=3, attn_implementation="sdpa",
    )  # fmt: skip
    return DeiTForImageClassification(config).double().eval()


@pytest.fixture(scope="module")
def deit():
    """A transformer, its data, and its Hessian as torch writes it out."""
    torch.manual_seed(0)
    model = tiny_deit()
    for parameter in model.parameters():  # a zero cls token would put LayerNorm's epsilon into every number
        torch.nn.init.normal_(parameter, std=0.5)
    images, labels = torch.randn(5, 1, 8, 8, dtype=FLOAT64), torch.tensor([0, 1, 2, 1, 0])
    names, parameters = zip(*model.named_parameters(), strict=True)
    sizes = [p.numel() for p in parameters]

    def loss(flat):
        state = {n: v.view_as(p) for n, v, p in zip(names, flat.split(sizes), parameters, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, state, (images,)).logits, labels)

    flat = torch.cat([p.detach().flatten() for p in parameters])
    with sdpa_kernel(SDPBackend.MATH):
        hessian = torch.autograd.functional.hessian(loss, flat, vectorize=True)

    def losses():
        for image, label in zip(images.split([2, 3]), labels.split([2, 3]), strict=True):
            yield len(label) / 5 * F.cross_entropy(model(pixel_values=image).logits, label)

    return HessianOperator(losses, parameters), hessian


def test_products_of_a_transformer_with_fused_attention_equal_its_explicit_hessian(generator, deit):
    operator, hessian = deit
    assert len(hessian) == operator.size > 1000
    assert hessian.abs().max() > 0.1
    vectors = randn(generator, 4, operator.size)
    torch.testing.assert_close(operator(vectors), vectors @ hessian, rtol=1e-8, atol=1e-8)
    # the caller's state is neither used nor changed
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        torch.testing.assert_close(operator(vectors[0]), vectors[0] @ hessian, rtol=1e-8, atol=1e-8)
        assert torch.is_autocast_enabled("cpu")
        assert not torch.backends.cuda.math_sdp_enabled()
        assert not torch.is_grad_enabled()


def test_trace_and_extremes_of_a_transformer_equal_those_of_its_explicit_hessian(deit):
    operator, hessian = deit
    matvec = Recorded(hessian)  # the products themselves are the test above
    found = hutchinson_trace(matvec, operator.size, max_probes=500, tolerance=0, dtype=FLOAT64, block_size=50)
    assert found.num_probes == 500
    assert abs(found.trace - hessian.trace().item()) < 3 * found.standard_error
    off_diagonal = hessian - hessian.diagonal().diag()
    assert found.samples.var().item() == pytest.approx(2 * off_diagonal.square().sum().item(), rel=0.25)
    direct = hutchinson_trace(operator, operator.size, max_probes=4, dtype=FLOAT64, block_size=4)
    torch.testing.assert_close(direct.samples, found.samples[:4], rtol=1e-8, atol=1e-8)

    eigenvalues = torch.linalg.eigvalsh(hessian)
    assert eigenvalues[0] < -1e-3
    result = lanczos(operator, operator.size, 60, dtype=FLOAT64)
    assert result.largest == pytest.approx(eigenvalues[-1].item(), rel=1e-8)
    assert result.smallest == pytest.approx(eigenvalues[0].item(), rel=1e-8)


def test_products_run_in_the_precision_of_the_parameters(generator):
    w = randn(generator, 4, 4).float().requires_grad_()
    a = randn(generator, 4, 4).float()
    vector = randn(generator, 16)

    def product():
        return hessian_vector_product(lambda: [(a @ w).square().sum() / 2], [w], vector)

    expected = (a.double().T @ a.double() @ vector.view(4, 4)).flatten()
    assert product().dtype == FLOAT64
    torch.testing.assert_close(product(), expected, rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(product(), product().float().double())
        torch.testing.assert_close(product(), expected, rtol=1e-5, atol=1e-6)


def test_losses_that_cannot_be_used_are_refused(generator):
    w = randn(generator, 4).requires_grad_()
    vector = randn(generator, 4)
    with pytest.raises(ValueError, match=r"\(4,\) or \(V, 4\).*got \(5,\)"):
        hessian_vector_product(lambda: [w.square().sum()], [w], randn(generator, 5))
    with pytest.raises(ValueError, match="scalars with a gradient, got shape \\(4,\\)"):
        hessian_vector_product(lambda: [w.square()], [w], vector)
    with pytest.raises(ValueError, match="requires_grad=False"):
        hessian_vector_product(lambda: [w.detach().square().sum()], [w], vector)
    once = iter([w.square().sum()])
    hessian_vector_product(lambda: once, [w], vector)
    with pytest.raises(ValueError, match="new iterable at every call"):
        hessian_vector_product(lambda: once, [w], vector)


@pytest.mark.parametrize("constant", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_an_error_of_one_line(generator, constant):
    w = randn(generator, 4).requires_grad_()
    for loss in (lambda: constant * w.square().sum(), lambda: constant + w.square().sum()):
        operator = HessianOperator(lambda loss=loss: [loss(), w.sum()], [w])
        for function, arguments in ((operator, [w]), (hutchinson_trace, [operator, 4]), (lanczos, [operator, 4, 2])):
            with pytest.raises(NumericsError, match=f"at a loss of {constant}") as error:
                function(*arguments)
            assert "\n" not in str(error.value)


def test_a_finite_loss_without_finite_derivatives_is_an_error():
    w = torch.zeros(4, requires_grad=True)  # where the norm has a kink
    with pytest.raises(NumericsError, match=r"at a loss of 0\.0"):
        hessian_vector_product(lambda: [w.square().sum().sqrt()], [w], torch.ones(4))


@pytest.mark.parametrize("constant", [math.nan, math.inf])
def test_a_product_that_is_not_finite_is_an_error(constant):
    matvec = Recorded(torch.tensor([[1.0, 0.0], [0.0, constant]]))
    with pytest.raises(NumericsError, match="found NaN or infinity"):
        hutchinson_trace(matvec, 2)
    with pytest.raises(NumericsError, match="found NaN or infinity"):
        lanczos(matvec, 2, 2)


# ---- trace ----


def test_one_probe_is_exact_for_a_diagonal_matrix(generator):
    diagonal = randn(generator, 50)
    found = hutchinson_trace(Recorded(diagonal.diag()), 50, max_probes=1, dtype=FLOAT64)
    assert found.trace == pytest.approx(diagonal.sum().item(), rel=1e-12)
    assert (found.num_probes, found.converged, math.isnan(found.standard_error)) == (1, False, True)


def test_samples_over_all_sign_vectors_have_the_trace_as_mean_and_the_known_variance(generator):
    a = symmetric(generator, 6)
    matvec = Recorded(a)
    found = hutchinson_trace(matvec, 6, max_probes=600, min_probes=600, dtype=FLOAT64)
    torch.testing.assert_close(found.samples, torch.einsum("vi,ij,vj->v", matvec.probes, a, matvec.probes))
    samples = dict(zip(map(tuple, matvec.probes.tolist()), found.samples, strict=True))
    assert len(samples) == 64
    assert {entry for probe in samples for entry in probe} == {-1.0, 1.0}
    population = torch.stack(list(samples.values()))
    torch.testing.assert_close(population.mean(), a.trace(), rtol=1e-12, atol=1e-12)
    expected = 2 * (a - a.diagonal().diag()).square().sum()
    torch.testing.assert_close(population.var(correction=0), expected, rtol=1e-12, atol=1e-12)


def test_probes_are_fair_and_independent_signs():
    matvec = Recorded()
    hutchinson_trace(matvec, 40_000, max_probes=8, min_probes=8)
    probes = torch.cat((matvec.probes, matvec.probes.roll(1, dims=1), matvec.probes.roll(32768, dims=1)))
    correlation = probes @ probes.T / 40_000
    assert (correlation - torch.eye(24)).abs().max() < 5 / math.sqrt(40_000)
    assert probes.mean(dim=1).abs().max() < 5 / math.sqrt(40_000)


def test_probes_are_a_function_of_seed_and_number_alone(generator):
    def probes(seed, size=70, **options):
        matvec = Recorded()
        hutchinson_trace(matvec, size, max_probes=6, min_probes=6, seed=seed, **options)
        return matvec.probes

    reference = probes(3)
    for block_size in (2, 4, 6, 100):
        assert torch.equal(probes(3, block_size=block_size), reference)
    torch.manual_seed(1)
    assert torch.equal(probes(3, dtype=FLOAT64), reference.double())
    assert torch.equal(probes(3, size=33), reference[:, :33])
    assert not torch.equal(probes(4), reference)
    assert len(set(map(tuple, reference.tolist()))) == 6


@pytest.mark.parametrize("block_size", [1, 2, 7, 64])
@pytest.mark.parametrize("tolerance", [0.0, 0.02, 0.1, 0.3, 10.0])
@pytest.mark.parametrize("min_probes", [1, 5, 100])
def test_stops_at_the_first_probe_that_meets_the_tolerance(generator, block_size, tolerance, min_probes):
    a = with_eigenvalues(generator, torch.linspace(0, 1, 20))
    matvec, heard = Recorded(a), []
    found = hutchinson_trace(
        matvec, 20, max_probes=60, min_probes=min_probes, tolerance=tolerance, block_size=block_size, dtype=FLOAT64,
        progress=lambda *counts: heard.append(counts),
    )  # fmt: skip
    everything = hutchinson_trace(Recorded(a), 20, max_probes=60, min_probes=60, dtype=FLOAT64).samples

    def error(count):
        return everything[:count].std().item() / math.sqrt(count)

    expected = 60
    for count in range(max(2, min_probes), 60):
        if error(count) <= tolerance * everything[:count].mean().abs():
            expected = count
            break
    assert found.num_probes == len(found.samples) == expected
    torch.testing.assert_close(found.samples, everything[:expected], rtol=1e-12, atol=1e-12)
    assert found.trace == pytest.approx(everything[:expected].mean().item(), rel=1e-12)
    assert found.standard_error == pytest.approx(error(expected), rel=1e-12)
    assert found.converged == (found.standard_error <= tolerance * abs(found.trace))
    assert heard == [(count, 60) for count in range(1, expected + 1)]
    # no probe is made but those that were said, or whole blocks of them
    assert len(matvec.probes) == min(60, -(-expected // block_size) * block_size)


def test_standard_error_is_calibrated(generator):
    a = symmetric(generator, 12) + 3 * torch.eye(12, dtype=FLOAT64)
    found = [hutchinson_trace(Recorded(a), 12, max_probes=30, tolerance=0, dtype=FLOAT64, block_size=30, seed=seed)
             for seed in range(200)]  # fmt: skip
    deviations = torch.tensor([(f.trace - a.trace().item()) / f.standard_error for f in found])
    # Student's t with 29 degrees of freedom: 94.5 % within 2; four binomial standard deviations around that
    assert abs((deviations.abs() < 2).double().mean().item() - 0.945) < 4 * math.sqrt(0.945 * 0.055 / 200)
    assert abs(deviations.mean()) < 4 / math.sqrt(200)


def test_a_zero_matrix_converges_to_zero():
    found = hutchinson_trace(Recorded(torch.zeros(5, 5)), 5)
    assert (found.trace, found.standard_error, found.num_probes, found.converged) == (0.0, 0.0, 10, True)
    result = lanczos(Recorded(torch.zeros(5, 5)), 5, 4)
    assert (result.nodes.tolist(), result.weights.tolist(), result.residuals.tolist()) == ([0.0], [1.0], [0.0])


@pytest.mark.parametrize(
    "options", [{"max_probes": 0}, {"min_probes": 0}, {"block_size": 0}, {"tolerance": -0.1}, {"tolerance": math.nan}]
)
def test_numbers_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="must be >= 1 and tolerance >= 0"):
        hutchinson_trace(Recorded(torch.eye(3)), 3, **options)


def test_a_matvec_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"keep the shape \(3,\), got \(3, 1\)"):
        hutchinson_trace(lambda v: v[:, None], 3)
    with pytest.raises(ValueError, match="num_steps must be >= 1"):
        lanczos(Recorded(torch.eye(3)), 3, 0)


# ---- spectrum ----


@pytest.mark.parametrize("eigenvalues", [[3.0], [-1.0, 2.0], [-5.0, 0.0, 1.0, 7.0], [-4.0, -3.0, -2.0, -1.0, -0.5]])
@pytest.mark.parametrize("copies", [1, 6])
def test_as_many_steps_as_distinct_eigenvalues_find_them_all(generator, eigenvalues, copies):
    matvec = Recorded(with_eigenvalues(generator, eigenvalues * copies))
    heard = []
    result = lanczos(matvec, len(eigenvalues) * copies, 50, dtype=FLOAT64, progress=lambda *c: heard.append(c))
    assert len(matvec.calls) == len(result.nodes) == len(eigenvalues)
    torch.testing.assert_close(result.nodes, torch.tensor(eigenvalues, dtype=FLOAT64), rtol=1e-8, atol=1e-8)
    assert result.smallest == result.nodes[0] == pytest.approx(eigenvalues[0], rel=1e-8)
    assert result.largest == result.nodes[-1] == pytest.approx(eigenvalues[-1], rel=1e-8)
    assert result.residuals.max() < 1e-8
    total = min(50, len(eigenvalues) * copies)
    assert heard == [(step, total) for step in range(1, len(eigenvalues) + 1)]


def test_steps_past_a_breakdown_that_rounding_hides_only_repeat_eigenvalues(generator):
    eigenvalues = torch.tensor([-5.0, 0.0, 1e-3, 7.0], dtype=FLOAT64)
    a = with_eigenvalues(generator, eigenvalues.repeat(6))
    matvec = Recorded(a)
    result = lanczos(matvec, 24, 24, dtype=FLOAT64)
    assert len(result.nodes) > 4
    distance, nearest = (result.nodes[:, None] - eigenvalues).abs().min(dim=1)
    assert distance.max() < 1e-8
    seen = torch.linalg.eigh(a)[1].T @ matvec.calls[0]  # components of the start vector
    expected = seen.square().view(4, 6).sum(dim=1)
    weights = torch.bincount(nearest, weights=result.weights, minlength=4)
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-8)


def plain_lanczos(matrix, start, steps):
    """The three-term recurrence as Lanczos wrote it."""
    vector, previous, beta = start / start.norm(), torch.zeros_like(start), 0.0
    diagonal, off = [], []
    for _ in range(steps):
        product = matrix @ vector - beta * previous
        diagonal.append(vector @ product)
        product = product - diagonal[-1] * vector
        beta, previous = product.norm(), vector
        off.append(beta)
        vector = product / beta
    off = torch.stack(off[:-1])
    return torch.linalg.eigvalsh(torch.stack(diagonal).diag() + off.diag(1) + off.diag(-1))


def test_converged_eigenvalues_do_not_come_back_as_ghosts(generator):
    eigenvalues = torch.cat((torch.logspace(-8, 0, 97, dtype=FLOAT64), torch.tensor([-20.0, 50.0, 100.0])))
    matrix = with_eigenvalues(generator, eigenvalues)
    matvec = Recorded(matrix)
    result = lanczos(matvec, 100, 60, dtype=FLOAT64)
    assert len(result.nodes) == 60
    assert (result.nodes > 10).sum() == 2
    assert (result.nodes < -10).sum() == 1
    basis = matvec.probes
    torch.testing.assert_close(basis @ basis.T, torch.eye(60, dtype=FLOAT64), rtol=0, atol=1e-13)
    assert (plain_lanczos(matrix, basis[0], 60) > 10).sum() > 2


def test_residuals_bound_the_distance_to_an_eigenvalue_and_the_ends_come_from_inside(generator):
    a = symmetric(generator, 60)
    eigenvalues = torch.linalg.eigvalsh(a)
    ends = []
    for steps in (1, 2, 5, 10, 20, 40, 60):
        result = lanczos(Recorded(a), 60, steps, dtype=FLOAT64)
        assert len(result.nodes) == steps
        distance = (result.nodes[:, None] - eigenvalues).abs().min(dim=1).values
        assert (distance <= result.residuals + 1e-12).all()
        assert eigenvalues[0] - 1e-12 <= result.smallest
        assert result.largest <= eigenvalues[-1] + 1e-12
        ends.append((result.smallest, result.largest))
        # a bound of zero would be no bound: the true residual of the ritz pair has this length
        if steps == 5:
            matvec = Recorded(a)
            lanczos(matvec, 60, steps, dtype=FLOAT64)
            basis = matvec.probes
            nodes, vectors = torch.linalg.eigh(basis @ a @ basis.T)
            residual = (a @ basis.T @ vectors - basis.T @ vectors * nodes).norm(dim=0)
            torch.testing.assert_close(result.residuals, residual, rtol=1e-9, atol=1e-12)
    # more steps look further out; both ends are reached by 40, and from there on they differ by rounding
    assert all(b[0] <= a[0] + 1e-12 and b[1] >= a[1] - 1e-12 for a, b in itertools.pairwise(ends))
    torch.testing.assert_close(lanczos(Recorded(a), 60, 99, dtype=FLOAT64).nodes, eigenvalues, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("detour", [0.0, 1e3, 1e5])
def test_residuals_bound_the_rounding_of_float32_as_well(generator, detour):
    eigenvalues = torch.cat((torch.logspace(-8, 0, 57, dtype=FLOAT64), torch.tensor([-20.0, 50.0, 100.0])))
    for matrix in (with_eigenvalues(generator, eigenvalues), symmetric(generator, 60)):
        single = matrix.float()
        exact = torch.linalg.eigvalsh(single.double())
        through = detour / 60**0.5 * torch.randn(60, 60, generator=generator)  # large numbers that cancel in the end

        def matvec(vector, single=single, through=through):
            return (single @ vector + through @ vector) - through @ vector

        for steps in (20, 40, 60):
            result = lanczos(matvec, 60, steps)
            distance = (result.nodes[:, None] - exact).abs().min(dim=1).values
            assert (distance <= result.residuals).all()
            if steps == 60:  # nothing is left to find but rounding
                assert result.residuals.max() < 1e-5 * exact.abs().max() * max(1, detour / 100)


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_quadrature_is_exact_for_polynomials_of_degree_below_twice_the_steps(generator, steps):
    a = with_eigenvalues(generator, torch.linspace(-1, 1.2, 30))
    matvec = Recorded(a)
    result = lanczos(matvec, 30, steps, dtype=FLOAT64)
    start = matvec.calls[0]
    assert result.weights.sum().item() == pytest.approx(1, rel=1e-12)
    assert (result.weights >= 0).all()
    for degree in range(2 * steps + 1):
        moment = start @ torch.linalg.matrix_power(a, degree) @ start
        found = (result.weights * result.nodes**degree).sum()
        assert math.isclose(found, moment, rel_tol=1e-10, abs_tol=1e-12) == (degree < 2 * steps)


def test_start_vectors_are_isotropic_and_a_function_of_seed_and_number_alone():
    def start(number, seed=5, size=2000, **options):
        matvec = Recorded()
        lanczos(matvec, size, 3, seed=seed, start=number, **options)
        (vector,) = matvec.calls  # one step is enough for the identity
        return vector

    vectors = torch.stack([start(k) for k in range(20)])
    assert (vectors @ vectors.T - torch.eye(20)).abs().max() < 5 / math.sqrt(2000)
    assert vectors.sum(dim=1).abs().max() < 5
    assert torch.equal(start(3), vectors[3])
    torch.testing.assert_close(start(3, dtype=FLOAT64), vectors[3].double(), rtol=1e-6, atol=1e-8)
    assert not torch.equal(start(3, seed=6), vectors[3])
    small = torch.stack([start(k, size=3, dtype=FLOAT64) for k in range(1500)])
    torch.testing.assert_close(small.T @ small / 1500, torch.eye(3, dtype=FLOAT64) / 3, rtol=0, atol=0.04)
    assert small.abs().min() > 0


def test_autocast_around_it_changes_nothing(generator):
    a = symmetric(generator, 40).float()
    expected = lanczos(lambda v: a.mv(v), 40, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = lanczos(lambda v: (a * v).sum(dim=1), 40, 12)
    torch.testing.assert_close(found.nodes, expected.nodes, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.nodes[[0, -1]], lanczos(Recorded(a), 40, 12, dtype=FLOAT64).nodes[[0, -1]],
                               rtol=1e-4, atol=1e-4)  # fmt: skip


def starts(matrix, steps, count):
    results = [lanczos(Recorded(matrix), len(matrix), steps, start=k, dtype=FLOAT64) for k in range(count)]
    return torch.stack([r.nodes for r in results]), torch.stack([r.weights for r in results])


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
@pytest.mark.parametrize("relative_sigma", [0.003, 0.01, 0.1])
def test_density_integrates_to_one_with_the_moments_of_the_spectrum(generator, scale, relative_sigma):
    matrix = scale * with_eigenvalues(generator, [-3.0, *torch.rand(77, generator=generator).tolist(), 4.0, 9.0])
    nodes, weights = starts(matrix, 20, 30)
    points, density, sigma = smoothed_spectrum(nodes, weights, relative_sigma=relative_sigma, num_points=2001)
    assert sigma == pytest.approx(relative_sigma * 12 * scale, rel=1e-6)
    assert torch.trapezoid(density, points).item() == pytest.approx(1, abs=1e-6)
    mean = torch.trapezoid(density * points, points).item()
    means = (nodes * weights).sum(dim=1)  # u^T H u of each start: exact, an unbiased estimate of tr H / P
    assert mean == pytest.approx(means.mean().item(), rel=1e-5)
    assert abs(mean - matrix.trace().item() / 80) < 4 * means.std().item() / math.sqrt(30)
    variance = torch.trapezoid(density * (points - mean).square(), points).item()
    exact = ((nodes - mean).square() * weights).sum().item() / 30 + sigma**2
    assert variance == pytest.approx(exact, rel=1e-4)


def test_density_of_all_starts_approaches_the_smoothed_histogram_of_eigenvalues(generator):
    eigenvalues = torch.cat((torch.linspace(-1, 1, 70, dtype=FLOAT64), torch.linspace(3, 4, 30, dtype=FLOAT64)))
    nodes, weights = starts(with_eigenvalues(generator, eigenvalues), 40, 60)
    points, density, sigma = smoothed_spectrum(nodes, weights, relative_sigma=0.05)
    expected = torch.distributions.Normal(eigenvalues, sigma).log_prob(points[:, None]).exp().mean(dim=1)
    assert torch.trapezoid((density - expected).abs(), points) < 0.06
    assert torch.trapezoid((density - expected.roll(40)).abs(), points) > 0.2


def test_density_is_the_mean_over_starts(generator):
    nodes, weights = starts(symmetric(generator, 15), 6, 4)
    points = torch.linspace(-12, 12, 50, dtype=FLOAT64).view(5, 10)
    each = torch.stack([spectral_density(n, w, points, 0.7) for n, w in zip(nodes, weights, strict=True)])
    torch.testing.assert_close(spectral_density(nodes, weights, points, 0.7), each.mean(dim=0), rtol=1e-12, atol=0)
    one = torch.tensor([2.0])
    expected = torch.distributions.Normal(2.0, 0.7).log_prob(points).exp()
    torch.testing.assert_close(spectral_density(one, torch.ones(1), points, 0.7), expected.double())


def test_spectrum_of_one_eigenvalue_is_one_bell():
    for value in (0.0, 1e-7, -300.0):
        points, density, sigma = smoothed_spectrum(torch.full((3, 1), value), torch.ones(3, 1))
        assert sigma == pytest.approx(0.01 * (abs(value) or 1), rel=1e-6)
        assert torch.trapezoid(density, points).item() == pytest.approx(1, abs=1e-6)
        assert points[density.argmax()].item() == pytest.approx(value, abs=sigma * 1e-3)


def test_grids_too_coarse_and_pairs_that_do_not_fit_are_refused():
    nodes, weights = torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.5])
    with pytest.raises(ValueError, match=r"num_points must be >= 1011 for relative_sigma=0\.001, got 1001"):
        smoothed_spectrum(nodes, weights, relative_sigma=0.001)
    with pytest.raises(ValueError, match="sigma > 0"):
        smoothed_spectrum(nodes, weights, relative_sigma=0.0)
    with pytest.raises(ValueError, match=r"\(2,\), \(1,\)"):
        spectral_density(nodes, weights[:1], nodes, 0.1)
