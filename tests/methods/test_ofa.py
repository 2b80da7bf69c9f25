"""OFA against its definition in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import softmax

from hf_ihb.step import Step, StudentOutput, TeacherOutputs
from tests.methods.steps import CLASSES, WIDTH, WIDTHS, example, head_of, method, slope


def reference(student, teacher, labels, gamma, temperature):
    total = 0.0
    for s, t, label in zip(student, teacher, labels, strict=True):
        q, p = softmax(s / temperature), softmax(t / temperature)
        weights = p**gamma
        weights[label] = (1 + p[label]) ** gamma - 1
        total -= (weights * np.log(q)).sum()
    return total / len(labels)


@pytest.fixture
def scores(generator):
    student, first, second, teacher = 3 * torch.randn(4, 16, 7, generator=generator)
    return student, [first, second], teacher, torch.randint(7, (16,), generator=generator)


def loss_of(student, exits, teacher, labels, **keys):
    outputs = StudentOutput(logits=student, method_heads={"ofa": exits})
    return method("ofa", **keys).loss(outputs, Step(student, labels, teacher=TeacherOutputs(logits=teacher)))


@pytest.mark.parametrize(("gamma", "temperature"), [(1.0, 1.0), (1.5, 1.0), (2.0, 4.0)])
def test_value_and_gradients_equal_the_definition_of_final_scores_and_exits(scores, gamma, temperature):
    student, exits, teacher, labels = scores
    heads = [x.clone().requires_grad_() for x in (student, *exits)]
    loss = loss_of(heads[0], heads[1:], teacher, labels, ofa_gamma=gamma, ofa_temperature=temperature)
    gradients = torch.autograd.grad(loss, heads)
    other, given = teacher.double().numpy(), [x.detach().double().numpy() for x in heads]

    def one(x):
        return reference(x, other, labels.numpy(), gamma, temperature)

    assert loss.item() == pytest.approx(sum(one(x) for x in given), rel=1e-5)
    for gradient, x in zip(gradients, given, strict=True):
        for place in ((0, 0), (3, 5), (9, int(labels[9]))):
            assert gradient[place].item() == pytest.approx(slope(one, x, place), rel=1e-3, abs=1e-6)


def test_at_gamma_1_it_is_the_cross_entropy_to_the_teacher(scores):
    student, exits, teacher, labels = scores
    expected = sum(F.cross_entropy(x, teacher.softmax(1)) for x in (student, *exits))
    torch.testing.assert_close(loss_of(student, exits, teacher, labels), expected)
    torch.testing.assert_close(loss_of(student, exits, teacher, (labels + 1) % 7), expected)  # labels do not matter


def test_certain_teachers_and_probabilities_as_labels(scores):
    student, exits, teacher, labels = scores
    certain = 1e4 * F.one_hot(labels, 7).float()
    student.requires_grad_()
    loss = loss_of(student, exits, certain, labels, ofa_gamma=1.5)
    assert torch.isfinite(loss)
    assert torch.isfinite(torch.autograd.grad(loss, student)[0]).all()
    mixed = 0.7 * F.one_hot(labels, 7) + 0.3 / 7
    found = [loss_of(student, exits, teacher, x, ofa_gamma=1.5) for x in (mixed, labels)]
    assert torch.equal(*found)


def test_an_exit_is_a_classifier_of_the_mean_token_of_its_block():
    kind = method("ofa")
    head = head_of(kind)
    outputs, _ = example(kind, head=head)
    shapes = [(WIDTH,), (WIDTH,), (WIDTH, WIDTH), (WIDTH,), (CLASSES, WIDTH), (CLASSES,)]
    assert [tuple(p.shape) for p in head.parameters()] == shapes
    (expected,) = [head[0](outputs.features[0].mean(1))]
    torch.testing.assert_close(outputs.method_heads["ofa"][0], expected)
    assert len(kind.head(WIDTHS._replace(student=(4, 8, 16)))) == 3
