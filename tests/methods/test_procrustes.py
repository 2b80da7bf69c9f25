"""Procrustes distance against the singular value decomposition in float64, and against rotations that are tried."""

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes

from hf_ihb.methods.procrustes import nuclear_norm, orthogonal_factor
from tests.methods.steps import check_definition, pooled_loss


def normalised(x):
    x = x - x.mean(0)
    return x / np.linalg.norm(x)


def reference(own, other):
    own, other = normalised(own), normalised(other)
    own = np.pad(own, ((0, 0), (0, other.shape[1] - own.shape[1])))
    rotation, _ = orthogonal_procrustes(own, other)
    return np.linalg.norm(own @ rotation - other) ** 2


@pytest.fixture(params=[20, 4], ids=["more images than channels", "fewer"])
def features(request, generator):
    return torch.randn(request.param, 5, generator=generator), torch.randn(request.param, 9, generator=generator)


def test_value_and_gradient_equal_the_distance_after_the_best_rotation(features):
    places = (0, 0), (2, 3), (3, 1)
    check_definition("procrustes", reference, features, places, rel=1e-4, slope_rel=2e-3)


def test_the_wider_student_is_compared_the_same_way(features):
    own, other = features
    torch.testing.assert_close(pooled_loss("procrustes", other, own), pooled_loss("procrustes", own, other))


def test_moving_turning_and_scaling_the_features_changes_nothing(features, generator):
    own, other = features
    turn, _ = torch.linalg.qr(torch.randn(5, 5, generator=generator))
    expected = pooled_loss("procrustes", own, other)
    torch.testing.assert_close(pooled_loss("procrustes", 30 * own @ turn + 10, other), expected, rtol=1e-4, atol=1e-5)
    assert pooled_loss("procrustes", 0.1 * own @ turn - 1, own).item() == pytest.approx(0, abs=1e-5)


def test_images_that_were_mixed_take_no_part(generator):
    own, other = torch.randn(9, 5, generator=generator), torch.randn(9, 7, generator=generator)
    kept = torch.arange(9) % 3 > 0
    found = pooled_loss("procrustes", own, other, kept.float())
    torch.testing.assert_close(found, pooled_loss("procrustes", own[kept], other[kept]))


@pytest.mark.parametrize("values", [[1.0] * 6, [3.0, 3.0, 1.0, 1e-3, 0.0, 0.0], [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5]])
def test_where_singular_values_repeat_or_are_0_the_gradient_is_the_orthogonal_factor(values, generator):
    left, right = (torch.linalg.qr(torch.randn(6, 6, generator=generator))[0] for _ in range(2))
    matrix = ((left * torch.tensor(values)) @ right).requires_grad_()
    norm = nuclear_norm(matrix)
    (gradient,) = torch.autograd.grad(norm, matrix)
    assert norm.item() == pytest.approx(sum(values), rel=1e-5)
    positive = (torch.tensor(values) > 0).float()
    expected, found = (left * positive) @ right, (left * positive) @ left.mT @ gradient
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-2)
    assert torch.linalg.matrix_norm(gradient, 2) < 1 + 1e-4


def test_features_that_are_all_the_same_and_a_matrix_of_0_have_no_gradient(features):
    own, other = features
    same = torch.ones_like(own).requires_grad_()
    loss = pooled_loss("procrustes", same, other)
    assert loss == 2
    assert (torch.autograd.grad(loss, same)[0] == 0).all()
    assert (orthogonal_factor(torch.zeros(3, 4)) == 0).all()
