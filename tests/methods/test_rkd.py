"""RKD against loops over pairs and triples in float64."""

import itertools

import numpy as np
import pytest
import torch

from tests.methods.steps import check_definition, pooled_loss


def huber(x):
    return 0.5 * x**2 if abs(x) < 1 else abs(x) - 0.5


def reference(own, other, angle):
    pairs = list(itertools.permutations(range(len(own)), 2))
    distances = [np.array([np.linalg.norm(x[i] - x[j]) for i, j in pairs]) for x in (own, other)]
    total = np.mean([huber(a - b) for a, b in zip(*(d / d.mean() for d in distances), strict=True)])

    def cosine(x, i, j, k):
        a, b = x[i] - x[j], x[k] - x[j]
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    triples = itertools.permutations(range(len(own)), 3)
    return total + angle * np.mean([huber(cosine(own, *t) - cosine(other, *t)) for t in triples])


@pytest.fixture
def features(generator):
    return torch.randn(8, 4, generator=generator), torch.randn(8, 7, generator=generator).exp()


@pytest.mark.parametrize("angle", [0.0, 2.0])
def test_value_and_gradient_equal_the_definition(features, angle):
    places = (0, 0), (4, 3), (7, 1)
    check_definition("rkd", lambda x, y: reference(x, y, angle), features, places, rkd_angle=angle)


def test_moving_turning_and_scaling_the_features_changes_nothing(features, generator):
    own, other = features
    turn, _ = torch.linalg.qr(torch.randn(4, 4, generator=generator))
    expected = pooled_loss("rkd", own, other)
    torch.testing.assert_close(pooled_loss("rkd", 30 * own @ turn + 100, other), expected, rtol=1e-4, atol=1e-5)
    assert pooled_loss("rkd", 0.1 * own @ turn - 1, own).item() == pytest.approx(0, abs=1e-9)


def test_images_that_were_mixed_take_no_part(features):
    own, other = features
    kept = torch.arange(8) % 3 > 0
    own[~kept] = 1e3
    torch.testing.assert_close(pooled_loss("rkd", own, other, kept.float()), pooled_loss("rkd", own[kept], other[kept]))


def test_images_at_the_same_place_have_a_finite_gradient_and_their_distance_is_0(features):
    own, other = features
    own[3] = own[5]
    own = (own + 50).requires_grad_()
    loss = pooled_loss("rkd", own, other, rkd_angle=0.0)
    (gradient,) = torch.autograd.grad(loss, own)
    assert gradient.abs().max() < 10
    found = [x.detach().double() for x in (own, other)]
    distances = [torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") for x in found]
    normalised = [d / (d.sum() / 56) for d in distances]
    expected = torch.nn.functional.smooth_l1_loss(*normalised, reduction="sum") / 56
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    for count in (1, 2):
        assert torch.isfinite(pooled_loss("rkd", own[:count], other[:count]))
