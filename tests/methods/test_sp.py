"""Similarity-preserving distillation against NumPy in float64."""

import numpy as np
import pytest
import torch

from tests.methods.steps import check_definition, pooled_loss


def reference(own, other):
    grams = [x @ x.T for x in (own, other)]
    rows = [g / np.linalg.norm(g, axis=1, keepdims=True) for g in grams]
    return np.linalg.norm(rows[0] - rows[1]) ** 2 / len(own) ** 2


@pytest.fixture
def features(generator):
    return torch.randn(10, 4, generator=generator), torch.randn(10, 7, generator=generator)


def test_value_and_gradient_equal_the_definition(features):
    check_definition("sp", reference, features, ((0, 0), (4, 3), (9, 1)), slope_abs=1e-7)


def test_turning_and_scaling_the_features_changes_nothing(features, generator):
    own, other = features
    turn, _ = torch.linalg.qr(torch.randn(4, 4, generator=generator))
    torch.testing.assert_close(pooled_loss("sp", 30 * own @ turn, other), pooled_loss("sp", own, other))
    assert pooled_loss("sp", 0.1 * own @ turn, own).item() == pytest.approx(0, abs=1e-10)


def test_images_that_were_mixed_and_features_of_0_take_no_part(features):
    own, other = features
    kept = torch.arange(10) % 3 > 0
    torch.testing.assert_close(pooled_loss("sp", own, other, kept.float()), pooled_loss("sp", own[kept], other[kept]))
    blank = (own * kept[:, None]).requires_grad_()
    loss = pooled_loss("sp", blank, other)
    assert torch.isfinite(loss)
    assert torch.isfinite(torch.autograd.grad(loss, blank)[0]).all()
