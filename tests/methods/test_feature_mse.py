"""Errors of lifted tokens against NumPy in float64."""

import numpy as np
import pytest
import torch

from hf_ihb.methods.base import TokenPair
from tests.methods.steps import WIDTHS, example, head_of, method, slope, step_of


def reference(tokens, lift, bias, teacher, mask, kind):
    error = tokens @ lift.T + bias - teacher
    values = error**2 if kind == "mse" else np.where(abs(error) < 1, error**2 / 2, abs(error) - 0.5)
    of_tokens = values.mean(2)
    return ((of_tokens * mask).sum(1) / mask.sum(1)).mean()


@pytest.mark.parametrize("kind", ["mse", "smooth_l1"])
def test_value_and_gradients_equal_the_definition(kind):
    learned = method("feature_mse", feature_mse_type=kind)
    head = head_of(learned)
    parameter = torch.eye(6).requires_grad_()
    outputs, step = example(learned, parameter=parameter, head=head)
    loss = learned.loss(outputs, step)
    lift = head[0]
    gradients = torch.autograd.grad(loss, (lift.weight, lift.bias, parameter))
    layer = step.teacher.layers["standardized"][0]
    values = (outputs.features[0], lift.weight, lift.bias, layer.tokens, layer.mask)
    tokens, weight, bias, teacher, mask = (x.detach().double().numpy() for x in values)
    assert loss.item() == pytest.approx(reference(tokens, weight, bias, teacher, mask, kind), rel=1e-5)
    of_weight = slope(lambda w: reference(tokens, w, bias, teacher, mask, kind), weight, (7, 2))
    of_bias = slope(lambda b: reference(tokens, weight, b, teacher, mask, kind), bias, (3,))
    of_map = slope(lambda m: reference(tokens @ m, weight, bias, teacher, mask, kind), np.eye(6), (1, 4))
    found = (gradients[0][7, 2], gradients[1][3], gradients[2][1, 4])
    for gradient, expected in zip(found, (of_weight, of_bias, of_map), strict=True):
        assert gradient.item() == pytest.approx(expected, rel=1e-3, abs=1e-7)


def pairs(generator, count=2):
    shapes = ((6, 5, 4), (6, 5, 4))
    return [TokenPair(*(torch.randn(s, generator=generator) for s in shapes), torch.rand(6, 5)) for _ in range(count)]


def test_layers_and_images_count_the_same_and_mixed_images_not_at_all(generator):
    kind, layers, weight = method("feature_mse"), pairs(generator), torch.tensor([1.0, 0, 1, 1, 0, 1])
    whole = kind.loss(*step_of(kind, layers, weight)).item()
    parts = [
        kind.loss(*step_of(kind, [TokenPair(*(x[i : i + 1] for x in layer))], weight[i : i + 1])).item()
        for layer in layers
        for i in range(6)
    ]
    assert whole == pytest.approx(np.mean(parts), rel=1e-5)
    assert parts[1] == parts[4] == 0 < parts[0]


def test_images_without_tokens_cost_nothing_and_a_single_outlier_costs_smooth_l1_little(generator):
    (layer,) = pairs(generator, 1)
    nothing = TokenPair(layer.student.requires_grad_(), layer.teacher, torch.zeros(6, 5))
    kind = method("feature_mse")
    loss = kind.loss(*step_of(kind, [nothing], torch.ones(6)))
    assert loss == 0
    assert (torch.autograd.grad(loss, nothing.student)[0] == 0).all()
    outlier = layer.student.detach().clone()
    outlier[0, 0, 0] += 1000
    far = TokenPair(outlier, layer.teacher, layer.mask)
    kinds = (method("feature_mse", feature_mse_type=kind) for kind in ("mse", "smooth_l1"))
    squared, smooth = (m.loss(*step_of(m, [far], torch.ones(6))).item() for m in kinds)
    assert squared > 300 * smooth


def test_the_lift_is_one_linear_map_a_layer_to_the_teachers_width():
    (own,), (other,) = WIDTHS.student, WIDTHS.teacher
    assert [tuple(p.shape) for p in head_of(method("feature_mse")).parameters()] == [(other, own), (other,)]
