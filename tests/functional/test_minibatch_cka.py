import itertools
import math

import pytest
import torch

from hf_ihb.functional.minibatch_cka import MinibatchCKA
from hf_ihb.functional.similarity import linear_cka, rbf_cka

KERNELS = ("linear", "rbf")


def randn(generator, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=generator, dtype=dtype)


def related(generator, rows, widths, dtype=torch.float64):
    """Layers that share content, each with noise and a mean of its own."""
    content = randn(generator, rows, 4)
    return [(3 + content @ randn(generator, 4, w) + randn(generator, rows, w)).to(dtype) for w in widths]


def cka_of(x, y=None, rows_per_batch=256, kernel="linear", batch=None, **kwargs):
    accumulator = MinibatchCKA(rows_per_batch, [kernel], **kwargs)
    batch = batch or len(x[0])
    for start in range(0, len(x[0]), batch):
        rows = slice(start, start + batch)
        accumulator.update([f[rows] for f in x], None if y is None else [f[rows] for f in y])
    return accumulator.compute()


# ---- Brute force: the formula in loops ----


def linear_kernel(x):
    x = x.double() - x.double().mean(dim=0)  # HSIC ignores the shift; raw products of far features would cancel
    return [[(a @ b).item() for b in x] for a in x]


def rbf_kernel(x, bandwidth=1.0):
    x = x.double()
    distances = [[(a - b).norm().item() for b in x] for a in x]
    upper = sorted(distances[i][j] for i, j in itertools.combinations(range(len(x)), 2))
    sigma = bandwidth * upper[(len(upper) - 1) // 2]
    return [[math.exp(-(d**2) / (2 * sigma**2)) for d in row] for row in distances]


def unbiased_hsic(k, l):  # noqa: E741
    """Song et al., 2012, eq. 5, sum by sum; the kernels' diagonals are skipped."""
    n = len(k)
    pairs = list(itertools.permutations(range(n), 2))
    trace = sum(k[i][j] * l[j][i] for i, j in pairs)
    totals = sum(k[i][j] for i, j in pairs) * sum(l[i][j] for i, j in pairs)
    paths = sum(k[i][j] * l[j][q] for i, j in pairs for q in range(n) if q != j)
    return (trace + totals / ((n - 1) * (n - 2)) - 2 * paths / (n - 2)) / (n * (n - 3))


def brute_force(x, y, rows_per_batch, kernel):
    """The ratio of weighted means; a chunk weighs what it has of pairs of rows."""
    sums = [0.0, 0.0, 0.0]
    for start in range(0, len(x), rows_per_batch):
        if (n := len(x[start : start + rows_per_batch])) >= 4:
            k, l = (kernel(f[start : start + rows_per_batch]) for f in (x, y))  # noqa: E741
            for i, (a, b) in enumerate(((k, l), (k, k), (l, l))):
                sums[i] += n * (n - 1) * unbiased_hsic(a, b)
    return sums[0] / math.sqrt(sums[1] * sums[2])


@pytest.mark.parametrize(("rows", "rows_per_batch"), [(24, 8), (20, 6), (19, 8), (21, 8), (9, 4), (13, 12), (5, 8)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_it_is_the_ratio_of_mean_unbiased_hsics_over_chunks(generator, rows, rows_per_batch, kernel):
    """Leftovers of 0, 2, 3, 5, 1, 1 rows and a lone short chunk; chunks differ in scale."""
    x, y = related(generator, rows, (3, 20, 5)), related(generator, rows, (6, 2))
    for features in (*x, *y):
        features += 5 * randn(generator, rows, 1)
        features[rows_per_batch:] *= 4
    found = cka_of(x, y, rows_per_batch, kernel)
    function = {"linear": linear_kernel, "rbf": rbf_kernel}[kernel]
    assert found.shape == (3, 2)
    assert found.dtype == torch.float64
    for i, j in itertools.product(range(3), range(2)):
        assert found[i, j].item() == pytest.approx(brute_force(x[i], y[j], rows_per_batch, function), abs=1e-10)


def test_the_mean_over_all_ways_to_cut_rows_into_chunks_is_the_value_of_all_rows(generator):
    """Unbiasedness, exactly: of 8 rows, the 35 ways to cut two chunks of 4 hold every subset of 4 once."""
    x, y = randn(generator, 8, 3), randn(generator, 8, 2)
    y = y + x[:, :1]
    accumulator = MinibatchCKA(4)
    for others in itertools.combinations(range(1, 8), 3):
        order = [0, *others, *(i for i in range(1, 8) if i not in others)]
        accumulator.update([x[order]], [y[order]])
    expected = linear_cka(x, y, "debiased")
    assert accumulator.compute().item() == pytest.approx(expected.item(), abs=1e-12)


# ---- One chunk is the estimator of the whole set ----


@pytest.mark.parametrize("rows_per_batch", [40, 41, 1000])
@pytest.mark.parametrize("bandwidth", [0.5, 1.0, 3.0])
def test_one_chunk_gives_the_debiased_cka_of_the_set_for_each_kernel_in_one_pass(generator, rows_per_batch, bandwidth):
    x, y = related(generator, 40, (3, 70)), related(generator, 40, (6, 2, 50))
    accumulator = MinibatchCKA(rows_per_batch, KERNELS, bandwidth=bandwidth)
    accumulator.update(x, y)
    for i, j in itertools.product(range(2), range(3)):
        linear, rbf = (accumulator.compute(kernel)[i, j] for kernel in KERNELS)
        torch.testing.assert_close(linear, linear_cka(x[i], y[j], "debiased"), rtol=0, atol=1e-10)
        torch.testing.assert_close(rbf, rbf_cka(x[i], y[j], "debiased", bandwidth=bandwidth), rtol=0, atol=1e-10)
    assert torch.equal(accumulator.compute(), accumulator.compute("linear"))
    assert (accumulator.compute("linear") - accumulator.compute("rbf")).abs().max() > 1e-3


def test_it_nears_the_value_of_the_set_as_chunks_grow(generator):
    x, y = related(generator, 1024, (8,)), [randn(generator, 1024, 16)]
    y[0][:, :8] += x[0]
    whole = linear_cka(x[0], y[0], "debiased").item()
    errors = [abs(cka_of(x, y, n).item() - whole) for n in (8, 64, 512, 1024)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 0.05
    assert errors[-1] < 1e-12


# ---- What it does not depend on ----


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_callers_batch_size_makes_no_difference(generator, kernel):
    x, y = (related(generator, 150, widths, torch.float32) for widths in ((5, 40), (9, 3, 60)))
    expected = cka_of(x, y, 32, kernel)
    for batch in (1, 7, 32, 33, 64, 149):
        assert torch.equal(cka_of(x, y, 32, kernel, batch=batch), expected)
    assert (cka_of(x, y, 50, kernel) - expected).abs().max() > 1e-4  # the size of the chunks does


def test_the_expected_value_does_not_depend_on_the_size_of_chunks(generator):
    x, y = [randn(generator, 6000, 6)], [randn(generator, 6000, 12)]
    y[0][:, :6] += x[0]
    whole = linear_cka(x[0], y[0], "debiased").item()
    assert 0.2 < whole < 0.9
    for rows_per_batch in (4, 10, 50, 500):
        assert cka_of(x, y, rows_per_batch).item() == pytest.approx(whole, abs=0.025)
    biased = torch.stack([linear_cka(a, b) for a, b in zip(x[0].split(10), y[0].split(10), strict=True)])
    assert biased.mean() > whole + 0.1


@pytest.mark.parametrize("kernel", KERNELS)
def test_it_ignores_rotation_scale_and_shift_of_a_layer(generator, kernel):
    x, y = related(generator, 50, (6, 6)), related(generator, 50, (4,))
    rotation = torch.linalg.qr(randn(generator, 6, 6))[0]
    moved = [-3.5 * f @ rotation + 100 * randn(generator, 6) for f in x]
    both = cka_of(x, moved, 16, kernel)
    torch.testing.assert_close(both.diagonal(), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-10)
    torch.testing.assert_close(both, cka_of(x, x, 16, kernel), rtol=0, atol=1e-10)
    torch.testing.assert_close(cka_of(moved, y, 16, kernel), cka_of(x, y, 16, kernel), rtol=0, atol=1e-10)
    stretched = [f * torch.arange(1.0, 7.0) for f in x]
    assert (cka_of(stretched, y, 16, kernel) - cka_of(x, y, 16, kernel)).abs().max() > 1e-3


@pytest.mark.parametrize("kernel", KERNELS)
def test_swapping_the_models_transposes_the_matrix(generator, kernel):
    x, y = related(generator, 50, (6, 9, 2)), related(generator, 50, (4, 7))
    torch.testing.assert_close(cka_of(y, x, 16, kernel), cka_of(x, y, 16, kernel).T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_model_gives_the_symmetric_matrix_of_the_model_with_itself(generator, kernel):
    x = related(generator, 50, (6, 9, 2), torch.float32)
    found = cka_of(x, None, 16, kernel)
    assert torch.equal(found, found.T)
    torch.testing.assert_close(found, cka_of(x, x, 16, kernel), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.diagonal(), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-12)


def test_independent_features_score_zero(generator):
    x, y = ([randn(generator, 4096, w, dtype=torch.float32)] for w in (192, 384))
    for kernel in KERNELS:
        assert abs(cka_of(x, y, 256, kernel).item()) < 0.02
    assert linear_cka(x[0][:256], y[0][:256]) > 0.4  # what a mean of biased values would report


# ---- Numerics ----


@pytest.mark.parametrize(("mean", "deviation"), [(0, 1000), (1000, 1), (1000, 1000), (1e5, 3)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_an_outlier_channel_keeps_float32_within_1e_5_of_brute_force(generator, kernel, mean, deviation):
    x, y = related(generator, 60, (48,), torch.float32), related(generator, 60, (30,), torch.float32)
    x[0][:, 7] = mean + deviation * randn(generator, 60)
    function = {"linear": linear_kernel, "rbf": rbf_kernel}[kernel]
    expected = brute_force(x[0], y[0], 20, function)
    assert cka_of(x, y, 20, kernel).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("exponent", [-15, 15])
def test_any_scale_is_inside_the_range_of_float32(generator, kernel, exponent):
    x, y = related(generator, 60, (8,), torch.float32), related(generator, 60, (5,), torch.float32)
    scaled = [f * 10.0**exponent for f in x]
    expected = cka_of(x, y, 20, kernel)
    torch.testing.assert_close(cka_of(scaled, y, 20, kernel), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(cka_of(scaled, scaled, 20, kernel).item(), 1.0, rtol=0, atol=1e-5)


def test_bf16_features_and_autocast_are_computed_in_float32(generator):
    x = [f.bfloat16() for f in related(generator, 40, (8, 5))]
    expected = cka_of([f.float() for f in x], None, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(cka_of(x, None, 16), expected)


# ---- Memory ----


def tensors_in(thing):
    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, dict):
        yield from tensors_in(list(thing.values()))
    elif isinstance(thing, (list, tuple)):
        for part in thing:
            yield from tensors_in(part)
    elif hasattr(thing, "__dict__"):
        yield from tensors_in(vars(thing))


def test_what_is_kept_is_less_than_a_chunk_of_rows_however_many_came(generator):
    widths, rows_per_batch = (20, 30), 16
    accumulator = MinibatchCKA(rows_per_batch, KERNELS)
    sizes = set()
    for _ in range(40):
        accumulator.update([randn(generator, 100, w, dtype=torch.float32).requires_grad_() for w in widths])
        held = list(tensors_in(accumulator))
        rows = [t for t in held if t.shape[-1] in widths]
        assert sum(t.untyped_storage().nbytes() for t in rows) < rows_per_batch * sum(widths) * 4
        sizes.add(sum(t.untyped_storage().nbytes() for t in held if t.shape[-1] not in widths))
    assert max(sizes) <= 2 * 8 * (2 * 2 + 2 * 2 * 2 + 8)  # sums of pairs and of layers, for two kernels
    assert not any(t.requires_grad for t in held)


def test_the_callers_tensors_may_be_overwritten_afterwards(generator):
    x = related(generator, 40, (6, 9))
    accumulator, buffer = MinibatchCKA(16), [torch.empty(10, w, dtype=torch.float64) for w in (6, 9)]
    for start in range(0, 40, 10):
        for target, features in zip(buffer, x, strict=True):
            target.copy_(features[start : start + 10])
        accumulator.update(buffer)
    assert torch.equal(accumulator.compute(), cka_of(x, None, 16))


def test_computing_between_updates_changes_nothing(generator):
    x = related(generator, 40, (6, 9))
    accumulator = MinibatchCKA(16)
    for start in range(0, 40, 10):
        accumulator.update([f[start : start + 10] for f in x])
        so_far = cka_of([f[: start + 10] for f in x], None, 16)
        assert torch.equal(accumulator.compute(), so_far)
        assert torch.equal(accumulator.compute(), so_far)


# ---- Undefined ----


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bad", [0.1, math.nan, math.inf])
def test_constant_or_infinite_features_are_undefined_and_spoil_no_other_layer(generator, kernel, bad):
    x, y = related(generator, 40, (6, 9, 4), torch.float32), related(generator, 40, (5, 3), torch.float32)
    expected = cka_of(x, y, 16, kernel)
    expected[1] = torch.nan
    x[1] = torch.full_like(x[1], bad) if bad == 0.1 else x[1].index_fill(0, torch.tensor([20]), bad)
    found = cka_of(x, y, 16, kernel)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12, equal_nan=True)
    one = cka_of(x, None, 16, kernel)
    assert torch.equal(one.isnan(), torch.tensor([[False, True, False], [True] * 3, [False, True, False]]))


def test_a_layer_that_is_constant_in_one_chunk_is_defined_by_the_others(generator):
    x, y = related(generator, 40, (6,)), related(generator, 40, (5,))
    x[0][16:32] = 2.0
    assert cka_of(x, y, 16).item() == pytest.approx(brute_force(x[0], y[0], 16, linear_kernel), abs=1e-10)
    assert cka_of(x, y, 16, "rbf").isnan()  # that chunk has no median distance


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_that_are_equally_far_from_each_other_are_undefined(generator, kernel, dtype):
    """Their unbiased self-term is 0, but for rounding."""
    simplex = (torch.eye(9, dtype=torch.float64) @ torch.linalg.qr(randn(generator, 9, 9))[0]).to(dtype)
    x, y = [simplex, randn(generator, 9, 3).to(dtype)], [randn(generator, 9, 4).to(dtype)]
    for n in (9, 5):
        assert cka_of(x, y, n, kernel).isnan().tolist() == [[True], [False]]


@pytest.mark.parametrize(("rows", "defined"), [(0, False), (3, False), (4, True)])
def test_four_images_are_needed(generator, rows, defined):
    x, y = related(generator, rows, (6, 9)), related(generator, rows, (5,))
    accumulator = MinibatchCKA(16)
    accumulator.update(x, y)
    assert accumulator.compute().shape == (2, 1)
    assert accumulator.compute().isfinite().all().item() == defined
    assert MinibatchCKA(16).update(x) is None


# ---- Refusals ----


def test_features_that_do_not_fit_are_refused_with_what_was_found():
    accumulator = MinibatchCKA(8)
    with pytest.raises(ValueError, match="no features yet"):
        accumulator.compute()
    with pytest.raises(ValueError, match=r"same images, got \[\(5, 2\), \(4, 3\)\]"):
        accumulator.update([torch.zeros(5, 2)], [torch.zeros(4, 3)])
    for layers in ([], [torch.zeros(5, 4, 2)]):
        with pytest.raises(ValueError, match=r"\(B, width\)"):
            accumulator.update(layers)
    with pytest.raises(ValueError, match="at least one layer"):
        accumulator.update([torch.zeros(5, 2)], [])
    accumulator.update([torch.zeros(5, 2)], [torch.zeros(5, 3)])
    for x, y in (([torch.zeros(5, 4)], [torch.zeros(5, 3)]), ([torch.zeros(5, 2)], None)):
        with pytest.raises(ValueError, match=r"widths of the first call, \(\(2,\), \(3,\)\), got"):
            accumulator.update(x, y)
    with pytest.raises(ValueError, match=r"one of \('linear',\), got 'rbf'"):
        accumulator.compute("rbf")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows_per_batch": 3}, ">= 4, got 3"),
        ({"kernels": ("cosine",)}, "cosine"),
        ({"kernels": ()}, "kernels"),
        ({"kernels": ("rbf", "rbf")}, "once"),
        ({"bandwidth": 0.0}, "> 0, got 0.0"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MinibatchCKA(**arguments)
