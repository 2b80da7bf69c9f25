"""Attention transfer against its definition in float64."""

import numpy as np
import pytest
import torch

from hf_ihb.step import Step, StudentOutput, TeacherOutputs, TeacherTokens
from tests.methods.steps import method, slope

BATCH, HEADS, TOKENS, PREFIX = 5, 2, 6, 2


def reference(scores, teachers, masks):
    """Of ``(layers, B, H, T, T)`` attention logits of the student."""
    total = []
    for layer, teacher, mask in zip(scores, teachers, masks, strict=True):
        exp = np.exp(layer - layer.max(-1, keepdims=True))
        attention = (exp / exp.sum(-1, keepdims=True)).mean(1)[:, PREFIX:, PREFIX:]
        for own, other, share in zip(attention, teacher, mask, strict=True):
            rows = []
            for q, p in zip(own, other, strict=True):
                q, p = (x * share / (x * share).sum() for x in (q, p))
                rows.append(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))
            total.append((share * rows).sum() / share.sum())
    return np.mean(total)


@pytest.fixture
def sides(generator):
    """Attention logits of the student, maps of the teacher whose rows are not normalised, and shares of the tokens."""
    scores = 2 * torch.randn(2, BATCH, HEADS, PREFIX + TOKENS, PREFIX + TOKENS, generator=generator)
    teachers = torch.randn(2, BATCH, TOKENS, TOKENS, generator=generator).exp()
    return scores, teachers, torch.rand(2, BATCH, TOKENS, generator=generator) + 0.1


def loss_of(scores, teachers, masks, weight=None):
    kind = method("attention", student_layers=[1, -1])
    maps = scores.softmax(-1)
    unused = torch.zeros_like(maps[0])
    tokens = torch.zeros(BATCH, TOKENS, 3)
    outputs = StudentOutput(features=(tokens, tokens), attentions=(unused, maps[0], unused, maps[1]))
    layers = [TeacherTokens(tokens, mask) for mask in masks]
    says = TeacherOutputs(layers={"plain": layers}, attentions=list(teachers))
    return kind.loss(outputs, Step(tokens, teacher=says, unmixed=weight))


@pytest.mark.parametrize("outside", [False, True])
def test_value_and_gradient_equal_the_definition(sides, outside):
    scores, teachers, masks = sides
    if outside:
        masks[:, :, 0] = 0
    scores.requires_grad_()
    loss = loss_of(scores, teachers, masks)
    (gradient,) = torch.autograd.grad(loss, scores)
    given = [x.detach().double().numpy() for x in (scores, teachers, masks)]
    assert loss.item() == pytest.approx(reference(*given), rel=1e-5)
    for place in ((0, 0, 0, 3, 4), (1, 4, 1, 7, 2), (1, 2, 0, 5, 6), (0, 1, 1, 4, 0)):
        expected = slope(lambda x: reference(x, *given[1:]), given[0], place)
        assert gradient[place].item() == pytest.approx(expected, rel=1e-3, abs=1e-7)


def test_the_teachers_own_attention_costs_nothing_whatever_goes_to_other_tokens(sides):
    scores, _, masks = sides
    between = scores.softmax(-1).mean(2)[:, :, PREFIX:, PREFIX:]
    assert loss_of(scores, between, masks).item() == pytest.approx(0, abs=1e-6)
    assert loss_of(scores, 7 * between, masks).item() == pytest.approx(0, abs=1e-6)


def test_images_that_were_mixed_cost_nothing_and_leave_the_others_alone(sides):
    scores, teachers, masks = sides
    weight = torch.tensor([1.0, 0, 1, 1, 0])
    scores.requires_grad_()
    loss = loss_of(scores, teachers, masks, weight)
    (gradient,) = torch.autograd.grad(loss, scores)
    (whole,) = torch.autograd.grad(loss_of(scores, teachers, masks), scores)
    assert (gradient[:, weight == 0] == 0).all()
    torch.testing.assert_close(gradient[:, weight > 0], whole[:, weight > 0])


def test_rows_of_0_and_images_without_tokens_have_a_finite_gradient(sides):
    scores, teachers, masks = sides
    scores = (100 * scores).requires_grad_()  # nearly all of a row on one token, which may be before the patches
    teachers[0, 1], masks[:, 2] = 0, 0
    loss = loss_of(scores, teachers, masks)
    assert torch.isfinite(loss)
    gradient = torch.autograd.grad(loss, scores)[0]
    assert torch.isfinite(gradient).all()
    assert (gradient[:, 2] == 0).all()
