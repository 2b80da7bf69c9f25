"""DIST against NumPy's correlations in float64."""

import numpy as np
import pytest
import torch
from scipy.special import softmax

from hf_ihb.step import Step, StudentOutput, TeacherOutputs
from tests.methods.steps import logit_loss, method


def reference(student, teacher, beta, gamma, temperature):
    p, q = (softmax(x / temperature, axis=1) for x in (student, teacher))
    images = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p, q, strict=True)])
    classes = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p.T, q.T, strict=True)])
    return temperature**2 * (beta * images + gamma * classes)


@pytest.fixture
def scores(generator):
    return 3 * torch.randn(2, 16, 7, generator=generator)


@pytest.mark.parametrize(("beta", "gamma", "temperature"), [(2.0, 2.0, 4.0), (1.0, 0.0, 1.0), (0.0, 3.0, 2.0)])
def test_value_and_gradient_equal_the_definition(scores, beta, gamma, temperature):
    student, teacher = scores
    student.requires_grad_()
    keys = {"dist_beta": beta, "dist_gamma": gamma, "dist_temperature": temperature}
    loss = logit_loss("dist", student, teacher, **keys)
    (gradient,) = torch.autograd.grad(loss, student)
    given = [x.detach().double().numpy() for x in (student, teacher)]
    assert loss.item() == pytest.approx(reference(*given, beta, gamma, temperature), rel=1e-5)
    for row, column in ((0, 0), (3, 5), (9, 2)):
        shift = np.zeros_like(given[0])
        shift[row, column] = 1e-5
        ends = [reference(given[0] + sign * shift, given[1], beta, gamma, temperature) for sign in (1, -1)]
        assert gradient[row, column].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-3, abs=1e-6)


def test_probabilities_that_are_a_mixture_of_the_teachers_and_the_uniform_cost_nothing(scores):
    _, teacher = scores
    mixture = (0.3 * teacher.softmax(1) + 0.7 / 7).log()
    loss = logit_loss("dist", mixture, teacher, dist_temperature=1.0)
    assert loss.item() == pytest.approx(0, abs=1e-5)
    assert logit_loss("kd", mixture, teacher, method="logits").item() > 0.1  # which divergences do not forgive


def test_probabilities_that_are_all_the_same_are_correlated_with_nothing(scores):
    _, teacher = scores
    student = torch.zeros_like(teacher).requires_grad_()
    loss = logit_loss("dist", student, teacher, dist_temperature=2.0)
    assert loss.item() == pytest.approx(2**2 * (2 + 2), rel=1e-5)
    assert torch.isfinite(torch.autograd.grad(loss, student)[0]).all()
    for one in (slice(0, 1), slice(0, 2)):  # an image alone has no correlations within a class
        assert torch.isfinite(logit_loss("dist", scores[0][one], teacher[one]))


def test_the_batch_is_that_of_all_processes(scores):
    student, teacher = scores

    def gather(rows):
        return student if torch.equal(rows, student[:8]) else teacher

    kind = method("dist")
    step = Step(student[:8], teacher=TeacherOutputs(logits=teacher[:8]), gather=gather)
    found = kind.loss(StudentOutput(logits=student[:8]), step)
    torch.testing.assert_close(found, logit_loss("dist", student, teacher))
    assert kind.needs.statistics


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_it_keeps_its_digits_where_scores_are_nearly_the_same_and_where_one_is_certain(scores, scale):
    student, teacher = scores
    exact = [(scale * x).double() for x in (student, teacher)]
    loss = logit_loss("dist", scale * student, scale * teacher, dist_gamma=0.0)
    assert loss.item() == pytest.approx(reference(*(x.numpy() for x in exact), 2.0, 0.0, 4.0), rel=1e-5)
