"""NKD against its definition in float64."""

import numpy as np
import pytest
import torch
from scipy.special import softmax

from tests.methods.steps import logit_loss


def reference(student, teacher, labels, gamma, temperature):
    total = 0.0
    for s, t, label in zip(student, teacher, labels, strict=True):
        total -= softmax(t)[label] * np.log(softmax(s)[label])
        others = [softmax(np.delete(x, label) / temperature) for x in (s, t)]
        total -= gamma * temperature**2 * (others[1] * np.log(others[0])).sum()
    return total / len(labels)


@pytest.fixture
def scores(generator):
    student, teacher = 3 * torch.randn(2, 16, 7, generator=generator)
    return student, teacher, torch.randint(7, (16,), generator=generator)


@pytest.mark.parametrize(("gamma", "temperature"), [(1.5, 1.0), (0.0, 1.0), (2.0, 4.0)])
def test_value_and_gradient_equal_the_definition(scores, gamma, temperature):
    student, teacher, labels = scores
    student.requires_grad_()
    loss = logit_loss("nkd", student, teacher, labels, nkd_gamma=gamma, nkd_temperature=temperature)
    (gradient,) = torch.autograd.grad(loss, student)
    given = [x.detach().double().numpy() for x in (student, teacher)]
    assert loss.item() == pytest.approx(reference(*given, labels.numpy(), gamma, temperature), rel=1e-5)
    for row, column in ((0, 0), (3, 5), (9, int(labels[9]))):
        shift = np.zeros_like(given[0])
        shift[row, column] = 1e-5
        ends = [reference(given[0] + sign * shift, given[1], labels.numpy(), gamma, temperature) for sign in (1, -1)]
        assert gradient[row, column].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-3, abs=1e-6)


def test_of_all_students_the_teachers_other_classes_are_best_matched_by_the_teachers_own(scores):
    _, teacher, labels = scores
    own = torch.nn.functional.one_hot(labels, 7).bool()
    for temperature in (1.0, 4.0):
        others = teacher.clone().requires_grad_()
        loss = logit_loss("nkd", others, teacher, labels, nkd_gamma=1.0, nkd_temperature=temperature)
        (gradient,) = torch.autograd.grad(loss, others)
        target = (-teacher.softmax(1).mul(own).sum(1) * others.log_softmax(1)[own]).mean()
        (of_target,) = torch.autograd.grad(target, others)
        torch.testing.assert_close(gradient, of_target, rtol=1e-4, atol=1e-6)


def test_certain_teachers_two_classes_and_probabilities_as_labels(scores):
    student, teacher, labels = scores
    certain = 1e4 * torch.nn.functional.one_hot(labels, 7).float()
    student.requires_grad_()
    loss = logit_loss("nkd", student, certain, labels)
    assert torch.isfinite(loss)
    assert torch.isfinite(torch.autograd.grad(loss, student)[0]).all()
    mixed = 0.7 * torch.nn.functional.one_hot(labels, 7) + 0.3 / 7
    assert torch.equal(logit_loss("nkd", student, teacher, mixed), logit_loss("nkd", student, teacher, labels))
    two = [x[:, :2] for x in (student.detach(), teacher)] + [labels % 2]
    assert logit_loss("nkd", *two, nkd_gamma=9.0) == logit_loss("nkd", *two, nkd_gamma=0.0)
