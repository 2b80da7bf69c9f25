"""RSD against correlations by NumPy in float64."""

import numpy as np
import pytest
import torch

from tests.methods.steps import WIDTHS, example, head_of, method


def reference(own, other, kappa):
    width = other.shape[1]
    correlations = np.corrcoef(own, other, rowvar=False)[:width, width:]
    squares = (correlations - np.eye(width)) ** 2
    return (np.trace(squares) + kappa * (squares.sum() - np.trace(squares))) / width


@pytest.mark.parametrize("kappa", [0.0, 0.005, 1.0])
def test_the_loss_equals_numpys_correlations(kappa):
    kind = method("rsd", rsd_kappa=kappa)
    outputs, step = example(kind)
    inside = step.teacher.final.mask[..., None].double()
    teacher = (step.teacher.final.tokens * inside).sum(1) / inside.sum(1)
    expected = reference(outputs.method_heads["rsd"].detach().double().numpy(), teacher.numpy(), kappa)
    # the floor under the variances moves the value by its own size
    assert kind.loss(outputs, step).item() == pytest.approx(expected, rel=5e-3)


def test_images_that_were_mixed_take_no_part():
    kind = method("rsd")
    outputs, step = example(kind)
    kept = torch.arange(12) % 3 > 0
    step.unmixed = kept.float()
    loss = kind.loss(outputs, step).item()
    fewer, part = example(kind, rows=kept)
    assert loss == pytest.approx(kind.loss(fewer, part).item(), rel=1e-5)


def test_features_that_are_the_teachers_cost_what_its_own_redundancy_does():
    kind = method("rsd", rsd_kappa=1.0)
    outputs, step = example(kind)
    inside = step.teacher.final.mask[..., None].float()
    teacher = (step.teacher.final.tokens * inside).sum(1) / inside.sum(1)
    outputs.method_heads = {"rsd": 5 * teacher - 3}  # neither scale nor place of a channel matters
    correlations = np.corrcoef(teacher.double().numpy(), rowvar=False)
    expected = ((correlations**2).sum() - len(correlations)) / len(correlations)
    assert kind.loss(outputs, step).item() == pytest.approx(expected, rel=2e-3)


def test_the_head_has_two_layers_to_the_teachers_width():
    head = head_of(method("rsd"))
    own, other = WIDTHS.final
    assert [tuple(p.shape) for p in head.parameters()] == [(other, own), (other,), (other, other), (other,)]
