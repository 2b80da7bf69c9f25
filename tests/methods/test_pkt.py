"""PKT against its definition in float64."""

import numpy as np
import pytest
import torch

from tests.methods.steps import check_definition, pooled_loss


def reference(own, other):
    total = 0.0
    for i in range(len(own)):
        p = []
        for x in (own, other):
            unit = x / np.linalg.norm(x, axis=1, keepdims=True)
            kernel = np.delete((1 + unit @ unit[i]) / 2, i)
            p.append(kernel / kernel.sum())
        total += (p[1] * np.log(p[1] / p[0])).sum()
    return total / len(own)


@pytest.fixture
def features(generator):
    return torch.randn(10, 4, generator=generator), torch.randn(10, 7, generator=generator)


def test_value_and_gradient_equal_the_definition(features):
    check_definition("pkt", reference, features, ((0, 0), (4, 3), (9, 1)))


def test_turning_the_features_and_scaling_an_image_changes_nothing(features, generator):
    own, other = features
    turn, _ = torch.linalg.qr(torch.randn(4, 4, generator=generator))
    scale = torch.rand(10, 1, generator=generator) + 0.1
    torch.testing.assert_close(pooled_loss("pkt", scale * own @ turn, other), pooled_loss("pkt", own, other))
    assert pooled_loss("pkt", scale * own, own).item() == pytest.approx(0, abs=1e-9)


def test_images_that_were_mixed_take_no_part(features):
    own, other = features
    kept = torch.arange(10) % 3 > 0
    torch.testing.assert_close(pooled_loss("pkt", own, other, kept.float()), pooled_loss("pkt", own[kept], other[kept]))


def test_opposite_images_features_of_0_and_an_image_alone_stay_finite(features):
    own, other = features
    own[1], own[2], other[4] = -own[0], 0, -other[3]
    own.requires_grad_()
    loss = pooled_loss("pkt", own, other)
    assert torch.isfinite(loss)
    assert torch.isfinite(torch.autograd.grad(loss, own)[0]).all()
    assert pooled_loss("pkt", own[:1], other[:1]) == 0
