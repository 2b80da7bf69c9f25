"""Standardised scores against NumPy in float64, through every method that learns from class scores."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax

from hf_ihb.functional.logits import standardized_logits
from hf_ihb.methods import METHODS
from hf_ihb.methods.logits import LogitMethod
from hf_ihb.step import Step, StudentOutput, TeacherOutputs
from tests.methods.steps import keys_of, logit_loss, method, scalar

LOGIT_METHODS = [kind.name for kind in METHODS if issubclass(kind, LogitMethod)]


def z_scores(logits):
    return (logits - logits.mean(1, keepdims=True)) / logits.std(1, ddof=1, keepdims=True)


def reference(student, teacher, temperature):
    student, teacher = (z_scores(x) / temperature for x in (student, teacher))
    divergence = softmax(teacher, 1) * (log_softmax(teacher, 1) - log_softmax(student, 1))
    return temperature**2 * divergence.sum(1).mean()


@pytest.fixture
def scores(generator):
    student, teacher = 3 * torch.randn(2, 16, 7, generator=generator)
    return student, teacher, torch.randint(7, (16,), generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_value_and_gradient_of_soft_distillation_equal_the_definition(scores, temperature):
    student, teacher, labels = scores
    keys = {"logit_standardization": True, "temperature": temperature, "method": "logits"}
    student.requires_grad_()
    loss = logit_loss("kd", student, teacher, labels, **keys)
    (gradient,) = torch.autograd.grad(loss, student)
    given = [x.detach().double().numpy() for x in (student, teacher)]
    assert loss.item() == pytest.approx(reference(*given, temperature), rel=1e-5)
    for row, column in ((0, 0), (3, 5), (9, 2)):
        shift = np.zeros_like(given[0])
        shift[row, column] = 1e-5
        ends = [reference(given[0] + sign * shift, given[1], temperature) for sign in (1, -1)]
        assert gradient[row, column].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("name", LOGIT_METHODS)
def test_no_method_sees_level_or_scale_of_either_sides_scores(name, scores):
    student, teacher, labels = scores
    kind = method(name, logit_standardization=True, distilled_heads="both", **keys_of(method(name)))
    moved = torch.rand(2, 16, 1) * 5 + 0.5

    def loss(own, other):
        heads = StudentOutput(cls_logits=own, distillation_logits=2 * own, logits=own, method_heads={name: [own]})
        return scalar(kind.loss(heads, Step(own, labels, teacher=TeacherOutputs(logits=other))))

    expected = loss(student, teacher)
    torch.testing.assert_close(loss(moved[0] * student - 7, teacher), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss(student, moved[1] * teacher + 7), expected, rtol=1e-4, atol=1e-5)
    assert logit_loss("kd", student, teacher, labels, method="logits") != logit_loss(
        "kd", 2 * student, teacher, labels, method="logits"
    )


def test_what_a_method_was_given_is_left_as_it_was(scores):
    student, teacher, labels = scores
    step = Step(student, labels, teacher=TeacherOutputs(logits=teacher.clone()))
    method("dkd", logit_standardization=True).loss(StudentOutput(logits=student), step)
    assert torch.equal(step.teacher.logits, teacher)


def test_scores_that_are_all_the_same_stay_finite():
    logits = torch.full((3, 5), 2.0, requires_grad=True)
    standardized = standardized_logits(logits)
    assert (standardized == 0).all()
    (gradient,) = torch.autograd.grad((standardized * torch.arange(5.0)).sum(), logits)
    assert torch.isfinite(gradient).all()
    half = standardized_logits(torch.randn(4, 6).bfloat16())
    assert half.dtype == torch.float32
