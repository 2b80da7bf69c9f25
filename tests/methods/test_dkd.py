"""DKD against its definition in float64, and against the soft distillation it takes apart."""

import numpy as np
import pytest
import torch
from scipy.special import softmax

from hf_ihb.functional.logits import kd_divergence
from tests.methods.steps import logit_loss


def reference(student, teacher, labels, alpha, beta, temperature):
    total = 0.0
    for s, t, label in zip(student, teacher, labels, strict=True):
        p_s, p_t = softmax(s / temperature), softmax(t / temperature)
        binary = [np.array([p[label], 1 - p[label]]) for p in (p_s, p_t)]
        others = [np.delete(p, label) / (1 - p[label]) for p in (p_s, p_t)]
        total += alpha * (binary[1] * np.log(binary[1] / binary[0])).sum()
        total += beta * (others[1] * np.log(others[1] / others[0])).sum()
    return temperature**2 * total / len(labels)


@pytest.fixture
def scores(generator):
    student, teacher = 3 * torch.randn(2, 16, 7, generator=generator)
    return student, teacher, torch.randint(7, (16,), generator=generator)


@pytest.mark.parametrize(("alpha", "beta", "temperature"), [(1.0, 8.0, 4.0), (0.0, 2.0, 1.0), (3.0, 0.0, 2.0)])
def test_value_and_gradient_equal_the_definition(scores, alpha, beta, temperature):
    student, teacher, labels = scores
    keys = {"dkd_alpha": alpha, "dkd_beta": beta, "dkd_temperature": temperature}
    student.requires_grad_()
    loss = logit_loss("dkd", student, teacher, labels, **keys)
    (gradient,) = torch.autograd.grad(loss, student)
    given = [x.detach().double().numpy() for x in (student, teacher)]
    expected = reference(*given, labels.numpy(), alpha, beta, temperature)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    for row, column in ((0, 0), (3, 5), (9, int(labels[9]))):
        moved = [given[0].copy(), given[0].copy()]
        moved[0][row, column] += 1e-5
        moved[1][row, column] -= 1e-5
        ends = [reference(m, given[1], labels.numpy(), alpha, beta, temperature) for m in moved]
        assert gradient[row, column].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-3, abs=1e-6)


def test_with_the_teachers_doubt_as_beta_it_is_soft_distillation(scores):
    student, teacher, labels = scores
    for row in range(len(labels)):
        one = slice(row, row + 1)
        doubt = 1 - (teacher[row] / 4).softmax(-1)[labels[row]].item()
        loss = logit_loss("dkd", student[one], teacher[one], labels[one], dkd_beta=doubt, dkd_temperature=4.0)
        torch.testing.assert_close(loss, kd_divergence(student[one], teacher[one], 4.0), rtol=1e-4, atol=1e-6)


def test_certain_teachers_and_probabilities_as_labels(scores):
    student, teacher, labels = scores
    certain = 1e4 * torch.nn.functional.one_hot(labels, 7).float()
    student.requires_grad_()
    loss = logit_loss("dkd", student, certain, labels)
    assert torch.isfinite(loss)
    assert torch.isfinite(torch.autograd.grad(loss, student)[0]).all()
    mixed = 0.7 * torch.nn.functional.one_hot(labels, 7) + 0.3 / 7
    assert torch.equal(logit_loss("dkd", student, teacher, mixed), logit_loss("dkd", student, teacher, labels))


def test_it_keeps_its_digits_at_high_temperatures(scores):
    student, teacher, labels = scores
    for temperature in (100.0, 1e4):
        loss = logit_loss("dkd", student, teacher, labels, dkd_temperature=temperature)
        exact = reference(student.double().numpy(), teacher.double().numpy(), labels.numpy(), 1.0, 8.0, temperature)
        assert loss.item() == pytest.approx(exact, rel=1e-5)
