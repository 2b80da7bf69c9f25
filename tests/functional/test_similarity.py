import itertools
import math

import numpy as np
import pytest
import torch

from hf_ihb.functional.hsic import gram_moments, hsic, kernel_moments, share_sums
from hf_ihb.functional.similarity import (
    center_positions,
    centered_gram,
    gram_distance,
    linear_cka,
    published_cka,
    rbf_cka,
)

ESTIMATORS = ["biased", "debiased"]


def randn(generator, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=generator, dtype=dtype)


def rotation(generator, width):
    return torch.linalg.qr(randn(generator, width, width))[0]


def orthonormal_centered(generator, rows, columns):
    x = randn(generator, rows, columns)
    return torch.linalg.qr(x - x.mean(dim=0))[0]


def reference_hsic(k, l, estimator):  # noqa: E741
    """The textbook formulas on whole kernel matrices."""
    n = len(k)
    if estimator == "biased":
        h = np.eye(n) - np.ones((n, n)) / n
        return np.trace(k @ h @ l @ h) / (n - 1) ** 2
    k, l, one = k - np.diag(np.diag(k)), l - np.diag(np.diag(l)), np.ones(n)  # noqa: E741
    total = np.trace(k @ l) + (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * one @ k @ l @ one
    return total / (n * (n - 3))


def reference_cka(x, y, estimator):
    k, l = (v.double().numpy() @ v.double().numpy().T for v in (x, y))  # noqa: E741
    self_terms = reference_hsic(k, k, estimator) * reference_hsic(l, l, estimator)
    return reference_hsic(k, l, estimator) / math.sqrt(self_terms)


def hsic_of_features(x, y, estimator):
    x, y = x - x.mean(dim=0), y - y.mean(dim=0)
    k, l = x @ x.T, y @ y.T  # noqa: E741
    return hsic((k * l).sum(), k.diagonal(), l.diagonal(), torch.tensor(float(len(x))), estimator)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("rows", "width_x", "width_y"), [(6, 40, 30), (90, 5, 7), (20, 20, 3), (12, 1, 50), (4, 9, 9)])
def test_cka_equals_the_textbook_formula_in_gram_and_in_feature_form(generator, estimator, rows, width_x, width_y):
    x = 2 + randn(generator, rows, width_x)
    y = randn(generator, rows, width_y) + x[:, :1]
    assert linear_cka(x, y, estimator).item() == pytest.approx(reference_cka(x, y, estimator), abs=1e-10)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_cka_does_not_change_when_zero_columns_make_the_other_form_cheaper(generator, estimator):
    x, y = randn(generator, 40, 6), randn(generator, 40, 8)
    wide = torch.cat((x, torch.zeros(40, 200, dtype=x.dtype)), dim=1)
    assert linear_cka(wide, y, estimator).item() == pytest.approx(linear_cka(x, y, estimator).item(), abs=1e-10)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_hsic_equals_the_textbook_formula(generator, estimator):
    x, y = randn(generator, 9, 5), randn(generator, 9, 7)
    expected = reference_hsic((x @ x.T).numpy(), (y @ y.T).numpy(), estimator)
    assert hsic_of_features(x, y, estimator).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("rows", [6, 60])
def test_cka_ignores_rotation_scale_shift_and_the_joint_order_of_rows(generator, estimator, rows):
    x, y = randn(generator, rows, 12), randn(generator, rows, 12)
    expected = linear_cka(x, y, estimator)
    moved = -3.5 * x @ rotation(generator, 12) + randn(generator, 12)
    order = torch.randperm(rows, generator=generator)
    one = torch.ones((), dtype=torch.float64)
    torch.testing.assert_close(linear_cka(x, moved, estimator), one, rtol=0, atol=1e-10)
    torch.testing.assert_close(linear_cka(moved, y, estimator), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(linear_cka(y, x, estimator), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(linear_cka(x[order], y[order], estimator), expected, rtol=0, atol=1e-10)
    assert abs(linear_cka(x[order], y, estimator) - expected) > 1e-4


def test_cka_does_not_ignore_a_general_linear_map(generator):
    u, a = orthonormal_centered(generator, 40, 8), torch.arange(1, 9, dtype=torch.float64)
    assert linear_cka(u, u * a).item() == pytest.approx(0.7700800320836487, abs=1e-10)


@pytest.mark.parametrize("k", [1, 2, 5, 8])
def test_cka_with_k_of_m_orthonormal_columns_is_the_root_of_their_share(generator, k):
    u = orthonormal_centered(generator, 40, 8)
    assert linear_cka(u, u[:, :k]).item() == pytest.approx(math.sqrt(k / 8), abs=1e-10)


def test_cka_of_disjoint_orthonormal_columns_is_zero(generator):
    u = orthonormal_centered(generator, 40, 8)
    assert linear_cka(u[:, :3], u[:, 3:]).item() == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("m", [4, 5])
def test_debiased_hsic_is_the_mean_over_all_subsets_of_rows(generator, m):
    x, y = randn(generator, 8, 6), randn(generator, 8, 3)
    subsets = [list(rows) for rows in itertools.combinations(range(8), m)]
    mean = {e: torch.stack([hsic_of_features(x[r], y[r], e) for r in subsets]).mean() for e in ESTIMATORS}
    torch.testing.assert_close(mean["debiased"], hsic_of_features(x, y, "debiased"), rtol=0, atol=1e-12)
    assert abs(mean["biased"] - hsic_of_features(x, y, "biased")) > 1e-3


@pytest.mark.parametrize(
    ("rows", "width_x", "width_y", "biased", "debiased"),
    [(64, 256, 256, 0.797, 0.05), (512, 192, 192, 0.275, 0.02), (4096, 192, 384, 0.062, 0.005)],
)
def test_only_the_debiased_estimator_is_zero_for_independent_features(
    generator, rows, width_x, width_y, biased, debiased
):
    x, y = (randn(generator, rows, width, dtype=torch.float32) for width in (width_x, width_y))
    found = linear_cka(x, y).item()
    assert found == pytest.approx(biased, abs=0.01)
    null_value = math.sqrt(width_x * width_y / ((rows + width_x) * (rows + width_y)))
    assert found == pytest.approx(null_value, abs=0.01)
    assert abs(linear_cka(x, y, "debiased").item()) < debiased


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("epsilon", [1.0, 1e-1, 1e-2, 1e-3])
def test_cka_sees_small_variation_around_a_large_mean_in_float32(generator, estimator, epsilon):
    x = 1 + epsilon * randn(generator, 64, 192, dtype=torch.float32)
    y = 1 + epsilon * randn(generator, 64, 192, dtype=torch.float32)
    assert linear_cka(x, x.clone(), estimator).item() == pytest.approx(1, abs=1e-3)
    expected = reference_cka(x.double() - 1, y.double() - 1, estimator)  # the raw kernels would cancel even in float64
    assert linear_cka(x, y, estimator).item() == pytest.approx(expected, abs=1e-3)


def test_position_codes_without_content_do_not_score_once_positions_are_centred(generator):
    code_x, code_y = 3 * randn(generator, 64, 48), 3 * randn(generator, 64, 32)
    code_y[:, :32] = code_x[:, :32]
    x, y = code_x + randn(generator, 32, 64, 48), code_y + randn(generator, 32, 64, 32)
    assert linear_cka(x, y, "debiased").mean() > 0.5
    assert linear_cka(center_positions(x), center_positions(y), "debiased").mean().abs() < 0.05


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("width_x", "width_y"), [(3, 4), (60, 50)])
def test_a_mask_equals_dropping_the_rows(generator, estimator, width_x, width_y):
    x, y = 1 + randn(generator, 5, 14, width_x), randn(generator, 5, 14, width_y)
    mask = torch.rand(5, 14, generator=generator) < 0.7
    garbage = torch.where(mask[..., None], x, torch.nan)
    found = linear_cka(garbage, y, estimator, mask=mask)
    expected = [linear_cka(a[m], b[m], estimator) for a, b, m in zip(x, y, mask, strict=True)]
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-10)
    distance = gram_distance(x, y, mask=mask)
    expected = [gram_distance(a[m], b[m]) for a, b, m in zip(x, y, mask, strict=True)]
    torch.testing.assert_close(distance, torch.stack(expected), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("width_x", "width_y"), [(3, 4), (40, 50)])
def test_a_row_with_a_share_is_a_row_that_is_there_more_than_once(generator, width_x, width_y):
    x, y = (torch.randn(9, width, generator=generator, dtype=torch.float64) for width in (width_x, width_y))
    copies = torch.tensor([3, 0, 1, 2, 3, 3, 1, 2, 0])
    many = [features.repeat_interleave(copies, dim=0) for features in (x, y)]
    for similarity in (linear_cka, gram_distance):
        torch.testing.assert_close(similarity(x, y, mask=copies / 3), similarity(*many))


@pytest.mark.parametrize(("width_x", "width_y"), [(4, 3), (64, 48)])
def test_debiased_cka_of_independent_rows_with_shares_is_zero_on_average(generator, width_x, width_y):
    shares = torch.tensor([1.0, 1, 1, 0.75, 0.5, 0.25, 0.1, 0, 1, 0.6, 0.3, 0.9]).double()
    x, y = (torch.randn(4000, 12, width, generator=generator, dtype=torch.float64) for width in (width_x, width_y))
    # where features are wide, self-terms hardly vary and the ratio is as unbiased as what stands above the line
    found = linear_cka(x, y, "debiased", mask=shares.expand(4000, 12))
    assert found.mean().abs() < 4 * found.std() / 4000**0.5
    assert linear_cka(x, y, mask=shares.expand(4000, 12)).mean() > 0.2
    assert found.std() < 0.3


@pytest.mark.parametrize("shared", [False, True])
def test_sums_of_kernels_are_those_of_centred_kernels(shared, generator):
    x, y = (5 + randn(generator, 3, 12, width) for width in (4, 7))
    share = torch.rand(3, 12, generator=generator, dtype=torch.float64) if shared else None
    if shared:
        share[:, :2], share[1, 5] = torch.tensor([0.0, 1.0]).double(), 0
    root = torch.ones(3, 12, dtype=torch.float64) if share is None else share.sqrt()
    mean = (root.square()[..., None] * x).sum(dim=1, keepdim=True), (root.square()[..., None] * y).sum(1, keepdim=True)
    centered = [
        (f - m / root.square().sum(dim=1)[:, None, None]) * root[..., None] for f, m in zip((x, y), mean, strict=True)
    ]
    raw = [f * root[..., None] for f in (x, y)]
    found = kernel_moments(*(f @ f.mT for f in raw), share)
    expected = gram_moments(*(f @ f.mT for f in centered), share_sums(x, share))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.stack(tuple(one)), torch.stack(tuple(other)))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("other", [3, 7])
def test_a_row_far_from_all_others_does_not_drown_them_in_float32(other, masked, generator):
    x, y = (torch.randn(40, width, generator=generator) for width in (24, 32))
    x[3, 5], y[other, 0] = 1e3, 1e3
    mask = torch.ones(40) if masked else None
    x.requires_grad_()
    found = linear_cka(x, y, "debiased", mask=mask)
    exact = x.detach().double().requires_grad_()
    expected = linear_cka(exact, y.double(), "debiased")
    assert expected.item() == pytest.approx(reference_cka(x.detach(), y, "debiased"), abs=1e-9)
    assert found.item() == pytest.approx(expected.item(), abs=1e-5)
    gradients = [torch.autograd.grad(value, of)[0].double() for value, of in ((found, x), (expected, exact))]
    assert (gradients[0] - gradients[1]).norm() < 1e-3 * gradients[1].norm()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_cka_does_not_know_a_scale_near_the_ends_of_float32(estimator, scale, generator):
    x, y = (torch.randn(12, width, generator=generator) for width in (24, 32))
    found = linear_cka((scale * x).requires_grad_(), y, estimator)
    torch.testing.assert_close(found, linear_cka(x, y, estimator), rtol=0, atol=1e-6)
    constant = torch.full((12, 24), scale, requires_grad=True)
    alike = linear_cka(constant, y, estimator)
    assert alike.isnan() if estimator == "debiased" else alike == 0
    assert torch.autograd.grad(alike.nan_to_num(0), constant)[0].isfinite().all()


def test_cka_hardly_changes_where_a_share_does(generator):
    x = torch.randn(12, 6, generator=generator, dtype=torch.float64)
    y = x @ torch.randn(6, 5, generator=generator, dtype=torch.float64)
    for estimator in ("biased", "debiased"):
        values = []
        for last in (0, 1e-6, 0.5, 1 - 1e-6, 1):
            share = torch.ones(12, dtype=torch.float64)
            share[-1] = last
            values.append(linear_cka(x, y, estimator, mask=share).item())
        assert values[0] == pytest.approx(linear_cka(x[:-1], y[:-1], estimator).item(), rel=1e-12)
        assert values[4] == pytest.approx(linear_cka(x, y, estimator).item(), rel=1e-12)
        assert values[1] == pytest.approx(values[0], abs=1e-5)
        assert values[3] == pytest.approx(values[4], abs=1e-5)
        assert min(values[0], values[4]) - 0.02 < values[2] < max(values[0], values[4]) + 0.02


def test_a_batch_of_feature_sets_is_scored_set_by_set(generator):
    x, y = randn(generator, 2, 3, 10, 4), randn(generator, 2, 3, 10, 6)
    found = linear_cka(x, y, "debiased")
    assert found.shape == (2, 3)
    for i, j in itertools.product(range(2), range(3)):
        torch.testing.assert_close(found[i, j], linear_cka(x[i, j], y[i, j], "debiased"))


@pytest.mark.parametrize("scale", [1.0, 1e-15, 1e15])
@pytest.mark.parametrize("constant", [0.0, 1.0, 0.1])
@pytest.mark.parametrize(("estimator", "value"), [("biased", 0.0), ("debiased", math.nan)])
@pytest.mark.parametrize("rows", [16, 17])
def test_constant_features_have_a_defined_value_and_no_gradient(generator, estimator, value, constant, scale, rows):
    x = (constant * scale * torch.arange(1.0, 9.0)).repeat(rows, 1).requires_grad_()  # the mean of 17 rows is rounded
    y = randn(generator, rows, 8, dtype=torch.float32).requires_grad_()
    for first, second in ((x, y), (y, x), (x, x)):
        x.grad = y.grad = None
        similarity = linear_cka(first, second, estimator)
        assert similarity.item() == pytest.approx(value, nan_ok=True)
        similarity.nan_to_num(0.0).backward()
        for grad in (x.grad, y.grad):
            assert grad is None or torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize(("rows", "defined"), [(1, False), (2, False), (3, False), (4, True)])
def test_debiased_cka_needs_four_rows(generator, rows, defined):
    x, y = randn(generator, 8, 5).requires_grad_(), randn(generator, 8, 5)
    mask = torch.arange(8) < rows
    for similarity in (linear_cka(x[:rows], y[:rows], "debiased"), linear_cka(x, y, "debiased", mask=mask)):
        assert similarity.isfinite().item() == defined
        (grad,) = torch.autograd.grad(similarity.nan_to_num(0.0), x)
        assert torch.isfinite(grad).all()


def test_biased_cka_of_one_row_or_none_is_zero(generator):
    x = randn(generator, 8, 5)
    assert linear_cka(x[:1], x[:1]) == 0
    assert linear_cka(x, x, mask=torch.zeros(8, dtype=torch.bool)) == 0
    assert gram_distance(x, x, mask=torch.zeros(8, dtype=torch.bool)) == 0


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("width_x", "width_y"), [(4, 5), (80, 90)])
@pytest.mark.parametrize("exponent", [-15, -8, 0, 8, 15])
def test_cka_and_its_gradient_survive_any_scale_in_float32(generator, estimator, width_x, width_y, exponent):
    x, y = (randn(generator, 32, width, dtype=torch.float32) for width in (width_x, width_y))
    y = y + x[:, :1]
    expected = reference_cka(x, y, estimator)
    scaled = (x * 10.0**exponent).requires_grad_()
    for other in (y, y * 10.0**exponent, y * 10.0**-exponent):
        scaled.grad = None
        similarity = linear_cka(scaled, other, estimator)
        similarity.backward()
        assert similarity.item() == pytest.approx(expected, abs=1e-5)
        reference = x.double().requires_grad_()
        linear_cka(reference, y.double(), estimator).backward()
        torch.testing.assert_close((scaled.grad.double() * 10.0**exponent), reference.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "function", [linear_cka, lambda x, y: linear_cka(x, y, "debiased"), rbf_cka, published_cka, gram_distance]
)
def test_bf16_autocast_changes_neither_dtype_nor_value(generator, function):
    x, y = (randn(generator, 40, 16, dtype=torch.float32) for _ in range(2))
    expected = function(x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = function(x, y)
        rounded = function(x.bfloat16(), y.bfloat16())
        assert centered_gram(x).dtype == torch.float32
    assert found.dtype == rounded.dtype == torch.float32
    assert torch.equal(found, expected)
    assert rounded.item() == pytest.approx(function(x.bfloat16().double(), y.bfloat16().double()).item(), abs=1e-5)


@pytest.mark.parametrize("function", [linear_cka, gram_distance])
def test_float64_on_either_side_is_accepted(generator, function):
    x, y = randn(generator, 40, 4), randn(generator, 40, 4)
    expected = function(x, y).item()
    assert function(x, y.float()).item() == pytest.approx(expected, abs=1e-5)
    assert function(x.float(), y).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("width_x", "width_y"), [(2, 3), (9, 8)])
@pytest.mark.parametrize("masked", [False, True])
def test_the_gradient_of_cka_equals_finite_differences(generator, estimator, width_x, width_y, masked):
    x, y = 3 + 2 * randn(generator, 2, 7, width_x), randn(generator, 2, 7, width_y)
    y = y + x[..., :1]
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, 5:] = not masked
    inputs = (x.requires_grad_(), y.requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: linear_cka(a, b, estimator, mask=mask if masked else None), inputs)


def test_the_gradient_of_gram_distance_equals_finite_differences(generator):
    inputs = (randn(generator, 2, 6, 4).requires_grad_(), randn(generator, 2, 6, 3).requires_grad_())
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    assert torch.autograd.gradcheck(lambda a, b: gram_distance(a, b, mask=mask), inputs)


def test_centered_gram_is_hkh_at_unit_mean_square(generator):
    x = 5 + randn(generator, 12, 7)
    h = torch.eye(12, dtype=torch.float64) - 1 / 12
    expected = h @ x @ x.T @ h
    expected = expected * 12 * 7 / expected.trace()
    torch.testing.assert_close(centered_gram(x), expected)
    mask = torch.arange(12) < 9
    inside = centered_gram(x, mask)
    assert torch.equal(inside[9:], torch.zeros(3, 12, dtype=torch.float64))
    assert torch.equal(inside[:, 9:], torch.zeros(12, 3, dtype=torch.float64))
    gram = centered_gram(x[:9])
    torch.testing.assert_close(inside[:9, :9] / inside.trace(), gram / gram.trace())


# ---- RBF kernel ----


def reference_rbf_kernel(x, bandwidth=1.0):
    x = x.double().numpy()
    distances = np.array([[np.linalg.norm(a - b) for b in x] for a in x])
    upper = np.sort(distances[np.triu_indices(len(x), 1)])
    sigma = bandwidth * upper[(len(upper) - 1) // 2]
    return np.exp(-(distances**2) / (2 * sigma**2))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("bandwidth", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(("rows", "width_x", "width_y"), [(4, 9, 3), (13, 2, 30), (24, 5, 5)])
def test_rbf_cka_equals_the_textbook_formula(generator, estimator, bandwidth, rows, width_x, width_y):
    x = 2 + randn(generator, rows, width_x)
    y = randn(generator, rows, width_y) + x[:, :1]
    k, l = (reference_rbf_kernel(v, bandwidth) for v in (x, y))  # noqa: E741
    cross, self_x, self_y = (reference_hsic(a, b, estimator) for a, b in ((k, l), (k, k), (l, l)))
    found = rbf_cka(x, y, estimator, bandwidth=bandwidth).item()
    if self_x > 0 < self_y:
        assert found == pytest.approx(cross / math.sqrt(self_x * self_y), abs=1e-10)
    else:
        assert math.isnan(found)


@pytest.mark.parametrize("m", [4, 5])
def test_debiased_hsic_of_centred_rbf_kernels_is_the_mean_over_all_subsets_of_rows(generator, m):
    """Of one kernel matrix: with the width of the whole set, a subset's kernel is a part of the whole one."""
    k, l = (torch.from_numpy(reference_rbf_kernel(randn(generator, 8, 3))) for _ in range(2))  # noqa: E741

    def centred_hsic(rows):
        h = torch.eye(len(rows), dtype=torch.float64) - 1 / len(rows)
        a, b = (h @ v[rows][:, rows] @ h for v in (k, l))
        return hsic((a * b).sum(), a.diagonal(), b.diagonal(), torch.tensor(float(len(rows))), "debiased")

    mean = torch.stack([centred_hsic(list(rows)) for rows in itertools.combinations(range(8), m)]).mean()
    torch.testing.assert_close(centred_hsic(list(range(8))), mean, rtol=0, atol=1e-14)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_rbf_cka_ignores_rotation_scale_shift_and_the_joint_order_of_rows(generator, estimator):
    x, y = randn(generator, 20, 6), randn(generator, 20, 4)
    expected, order = rbf_cka(x, y, estimator), torch.randperm(20, generator=generator)
    moved = -3.5 * x @ rotation(generator, 6) + 100 * randn(generator, 6)
    one = torch.ones((), dtype=torch.float64)
    torch.testing.assert_close(rbf_cka(x, moved, estimator), one, rtol=0, atol=1e-10)
    torch.testing.assert_close(rbf_cka(moved, y, estimator), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(rbf_cka(x[order], y[order], estimator), expected, rtol=0, atol=1e-10)
    assert abs(rbf_cka(x[order], y, estimator) - expected) > 1e-4


def test_a_wide_rbf_kernel_is_the_linear_one(generator):
    x, y = randn(generator, 20, 6), randn(generator, 20, 4)
    for estimator in ESTIMATORS:
        found = rbf_cka(x, y, estimator, bandwidth=300.0)
        torch.testing.assert_close(found, linear_cka(x, y, estimator), rtol=0, atol=1e-4)
        assert abs(rbf_cka(x, y, estimator) - found) > 1e-3


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_mask_of_rbf_cka_equals_dropping_the_rows(generator, estimator):
    x, y = 1 + randn(generator, 5, 14, 3), randn(generator, 5, 14, 6)
    mask = torch.rand(5, 14, generator=generator) < 0.7
    garbage = torch.where(mask[..., None], x, torch.nan).requires_grad_()
    found = rbf_cka(garbage, y, estimator, mask=mask)
    expected = [rbf_cka(a[m], b[m], estimator) for a, b, m in zip(x, y, mask, strict=True)]
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-10)
    (gradient,) = torch.autograd.grad(found.sum(), garbage)
    assert (gradient[~mask] == 0).all()
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_gradient_of_rbf_cka_is_that_of_kernels_of_a_fixed_width(generator, estimator):
    x, y = randn(generator, 9, 3).requires_grad_(), randn(generator, 9, 2).requires_grad_()
    kernels, h = [], torch.eye(9, dtype=torch.float64) - 1 / 9
    for v in (x, y):
        squared = (v[:, None] - v[None]).square().sum(dim=-1)
        upper = squared.detach()[torch.triu_indices(9, 9, 1).unbind()]
        kernels.append(h @ torch.exp(-squared / (2 * upper.median())) @ h)
    pairs = itertools.combinations_with_replacement(kernels, 2)
    self_x, cross, self_y = (
        hsic((a * b).sum(), a.diagonal(), b.diagonal(), torch.tensor(9.0), estimator) for a, b in pairs
    )
    expected = torch.autograd.grad(cross / (self_x * self_y).sqrt(), (x, y))
    found = torch.autograd.grad(rbf_cka(x, y, estimator), (x, y))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("estimator", "value"), [("biased", 0.0), ("debiased", math.nan)])
def test_rbf_cka_of_constant_features_is_undefined_without_a_gradient(generator, estimator, value):
    x, y = torch.full((9, 4), 0.1).requires_grad_(), randn(generator, 9, 4, dtype=torch.float32)
    similarity = rbf_cka(x, y, estimator)
    assert similarity.item() == pytest.approx(value, nan_ok=True)
    similarity.nan_to_num(0.0).backward()
    assert torch.equal(x.grad, torch.zeros_like(x))
    nobody = torch.zeros(9, dtype=torch.bool)
    assert rbf_cka(y, y, estimator, mask=nobody).item() == pytest.approx(value, nan_ok=True)


# ---- Rows of several processes ----


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("width_x", "width_y"), [(3, 4), (60, 50)])
def test_sums_over_processes_are_all_that_cka_needs(generator, estimator, width_x, width_y):
    """Two processes in one: each asks for the sum of what both have, in the same order, until both have answers."""
    x, y = 5 + randn(generator, 24, width_x), randn(generator, 24, width_y)
    y = y + x[:, :1]
    mask = (torch.rand(24, generator=generator) < 0.8) * torch.rand(24, generator=generator)
    halves = [slice(0, 8), slice(8, 24)]
    whole = linear_cka(x, y, estimator, mask=mask)
    parts = in_lockstep([
        lambda reduce, h=h: linear_cka(x[h], y[h], estimator, mask=mask[h], reduce=reduce) for h in halves
    ])  # fmt: skip
    for part in parts:
        torch.testing.assert_close(part, whole, rtol=0, atol=1e-10)
    alone = torch.stack([linear_cka(x[h], y[h], estimator, mask=mask[h]) for h in halves])
    assert abs(alone.mean() - whole) > 1e-3
    tokens, weight = randn(generator, 6, 4, 3), torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    parts = in_lockstep([
        lambda reduce, h=h: center_positions(tokens[h], weight[h], reduce=reduce) for h in (slice(0, 2), slice(2, 6))
    ])  # fmt: skip
    torch.testing.assert_close(torch.cat(parts), center_positions(tokens, weight))


def in_lockstep(functions):
    """Calls each with a `reduce` that sums over all of them: first what they ask is collected, then answered."""
    answers = []
    while True:
        asked, results = [], []
        for function in functions:
            known = iter(answers)

            def reduce(tensor, known=known):
                if (answer := next(known, None)) is None:
                    raise _NotYetError(tensor)
                return answer

            try:
                results.append(function(reduce))
            except _NotYetError as request:
                asked.append(request.args[0])
        if results:
            assert not asked
            return results
        answers.append(sum(asked))


class _NotYetError(Exception):
    """Carries a tensor whose sum over processes is not known yet."""


# ---- As published ----


@pytest.mark.parametrize(("epsilon", "value"), [(0.3, 0.82), (0.1, 0.02)])
def test_the_published_epsilon_drowns_small_variation_that_the_corrected_form_sees(generator, epsilon, value):
    x = 1 + epsilon * randn(generator, 64, 256, dtype=torch.float32)
    assert published_cka(x, x).item() == pytest.approx(value, abs=0.02)
    for estimator in ESTIMATORS:
        assert linear_cka(x, x, estimator) >= 0.999


@pytest.mark.parametrize(("rows", "width_x", "width_y"), [(6, 40, 30), (30, 5, 7)])
def test_published_cka_equals_its_formula_on_whole_matrices(generator, rows, width_x, width_y):
    x, y = 0.5 + randn(generator, rows, width_x), randn(generator, rows, width_y)
    h = np.eye(rows) - 1 / rows
    k, l = (  # noqa: E741
        h @ (u @ u.T) @ h for u in (v.numpy() / np.linalg.norm(v.numpy(), axis=1, keepdims=True) for v in (x, y))
    )
    cross, self_x, self_y = ((a * b).sum() / (rows - 1) ** 2 for a, b in ((k, l), (k, k), (l, l)))
    assert published_cka(x, y).item() == pytest.approx(cross / math.sqrt(self_x * self_y + 1e-8), abs=1e-12)


def test_a_mask_of_published_cka_equals_dropping_the_rows(generator):
    x, y = 1 + randn(generator, 5, 14, 3), randn(generator, 5, 14, 6)
    mask = torch.rand(5, 14, generator=generator) < 0.7
    garbage = torch.where(mask[..., None], x, torch.nan).requires_grad_()
    found = published_cka(garbage, y, mask=mask)
    expected = [published_cka(a[m], b[m]) for a, b, m in zip(x, y, mask, strict=True)]
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-10)
    assert torch.isfinite(torch.autograd.grad(found.sum(), garbage)[0][mask]).all()
    assert published_cka(x, y, mask=torch.zeros(5, 14, dtype=torch.bool)).tolist() == [0.0] * 5


def test_the_published_gram_distance_is_the_norm_over_the_number_of_entries(generator):
    x, y = randn(generator, 3, 9, 4).requires_grad_(), randn(generator, 3, 9, 6)
    published = gram_distance(x, y, normalization="published")
    torch.testing.assert_close(published, (gram_distance(x, y) * 81).sqrt() / 81)
    mask = torch.arange(9) < 6
    inside = gram_distance(x, y, mask=mask.expand(3, 9), normalization="published")
    torch.testing.assert_close(inside, gram_distance(x[:, :6], y[:, :6], normalization="published"))
    (gradient,) = torch.autograd.grad(gram_distance(x, x.detach(), normalization="published").sum(), x)
    assert torch.isfinite(gradient).all()
    with pytest.raises(ValueError, match="'mean'"):
        gram_distance(x, y, normalization="mean")


# ---- Gram ----


def test_gram_distance_equals_loops_over_pairs_of_rows(generator):
    x, y = randn(generator, 9, 4), randn(generator, 9, 6)
    total = 0.0
    for i, j in itertools.product(range(9), range(9)):
        cosines = [(v[i] @ v[j] / (v[i].norm() * v[j].norm())).item() for v in (x, y)]
        total += (cosines[0] - cosines[1]) ** 2
    assert gram_distance(x, y).item() == pytest.approx(total / 81, rel=1e-12)


def test_gram_distance_ignores_rotation_and_the_length_of_each_row(generator):
    x = randn(generator, 10, 6)
    moved = torch.rand(10, 1, generator=generator).add(0.1) * x @ rotation(generator, 6)
    assert gram_distance(x, moved).item() == pytest.approx(0, abs=1e-12)
    assert gram_distance(x, x + 1) > 1e-3


def test_gram_distance_lies_between_zero_and_four(generator):
    a = torch.tensor([1.0, 0.0])
    assert gram_distance(torch.stack((a, a)), torch.stack((a, -a))).item() == pytest.approx(2)
    signs = torch.ones(1000, 1) * torch.tensor([1.0, -1.0]).repeat(500)[:, None]
    assert gram_distance(torch.ones(1000, 1), signs).item() == pytest.approx(2, abs=1e-4)
    for _ in range(20):
        assert 0 <= gram_distance(randn(generator, 8, 2), randn(generator, 8, 2)) <= 4


def test_gram_distance_of_zero_rows_is_finite():
    x = torch.zeros(4, 3, requires_grad=True)
    distance = gram_distance(x, torch.eye(4, 3))
    distance.backward()
    assert torch.isfinite(distance)
    assert torch.isfinite(x.grad).all()


def test_centred_positions_have_no_batch_mean_and_no_position_code(generator):
    tokens, code = randn(generator, 6, 5, 4), 10 * randn(generator, 5, 4)
    centered = center_positions(tokens + code)
    torch.testing.assert_close(centered.mean(dim=0), torch.zeros(5, 4, dtype=torch.float64))
    torch.testing.assert_close(centered, center_positions(tokens))
    expected = torch.stack([t - sum(tokens) / 6 for t in tokens])
    torch.testing.assert_close(centered, expected)


def test_centring_stays_in_float32_under_bf16_autocast(generator):
    tokens = randn(generator, 6, 5, 4, dtype=torch.float32)
    expected = center_positions(tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(center_positions(tokens), expected)


def test_centring_weighs_images_and_leaves_those_without_weight_out_of_the_mean(generator):
    tokens = randn(generator, 6, 5, 4)
    weight = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    expected = tokens - tokens[weight > 0].mean(dim=0)
    torch.testing.assert_close(center_positions(tokens, weight), expected)
    repeated = torch.tensor([2.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    expected = tokens - (2 * tokens[0] + tokens[1]) / 3
    torch.testing.assert_close(center_positions(tokens, repeated), expected)
    assert torch.isfinite(center_positions(tokens, torch.zeros(6))).all()


@pytest.mark.parametrize("function", [linear_cka, rbf_cka, published_cka, gram_distance])
def test_features_that_are_not_paired_are_refused_with_both_shapes(function):
    with pytest.raises(ValueError, match=r"\(16, 8\) and \(15, 8\)"):
        function(torch.zeros(16, 8), torch.zeros(15, 8))
    with pytest.raises(ValueError, match=r"mask must be \(16,\), got \(15,\)"):
        function(torch.zeros(16, 8), torch.zeros(16, 8), mask=torch.ones(15, dtype=torch.bool))


def test_an_unknown_estimator_is_refused():
    for function in (linear_cka, rbf_cka):
        with pytest.raises(ValueError, match="'unbiased'"):
            function(torch.zeros(4, 2), torch.zeros(4, 2), "unbiased")
