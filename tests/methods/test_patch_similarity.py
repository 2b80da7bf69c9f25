"""Similarities between the tokens of an image against their definition in float64."""

import numpy as np
import pytest
import torch

from hf_ihb.functional.gram import pack_gram, unpack_gram
from hf_ihb.methods.base import TokenPair
from tests.methods.steps import method, slope, step_of

BATCH, TOKENS = 4, 5


def probabilities(tokens, i, share, temperature):
    unit = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
    others = [j for j in range(len(tokens)) if j != i]
    values = np.array([share[j] * np.exp(unit[i] @ unit[j] / temperature) for j in others])
    return values / values.sum()


def reference(own, other, mask, temperature):
    images = []
    for student, teacher, share in zip(own, other, mask, strict=True):
        rows = []
        for i in range(len(share)):
            p, q = (probabilities(x, i, share, temperature) for x in (teacher, student))
            rows.append(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))
        images.append((share * rows).sum() / share.sum())
    return np.mean(images)


@pytest.fixture
def pair(generator):
    own, other = (torch.randn(BATCH, TOKENS, width, generator=generator) for width in (3, 7))
    return TokenPair(own, other, torch.rand(BATCH, TOKENS, generator=generator) + 0.1)


def loss_of(*layers, weight=None, **keys):
    kind = method("patch_similarity", **keys)
    return kind.loss(*step_of(kind, layers, torch.ones(BATCH) if weight is None else weight))


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_value_and_gradient_equal_the_definition(pair, temperature, outside):
    if outside:
        pair.mask[:, 1] = 0
    own = pair.student.requires_grad_()
    loss = loss_of(pair, patch_similarity_temperature=temperature)
    (gradient,) = torch.autograd.grad(loss, own)
    given = [x.detach().double().numpy() for x in pair]
    assert loss.item() == pytest.approx(reference(*given, temperature), rel=1e-4)
    for place in ((0, 0, 0), (1, 4, 2), (3, 2, 1)):
        expected = slope(lambda x: reference(x, *given[1:], temperature), given[0], place)
        assert gradient[place].item() == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_inner_products_are_enough_and_tell_the_same_as_the_tokens(pair):
    known = unpack_gram(pack_gram(pair.teacher), TOKENS)
    torch.testing.assert_close(loss_of(pair._replace(teacher=known)), loss_of(pair), rtol=1e-4, atol=1e-6)


def test_lengths_and_rotations_of_the_tokens_do_not_count(pair, generator):
    turn, _ = torch.linalg.qr(torch.randn(7, 7, generator=generator))
    lengths = torch.rand(BATCH, TOKENS, 1, generator=generator) + 0.5
    same = pair._replace(student=lengths * pair.teacher @ turn)
    assert loss_of(same).item() == pytest.approx(0, abs=1e-6)
    assert loss_of(pair) > 0.1


def test_layers_and_images_count_the_same_and_mixed_images_not_at_all(pair):
    second = TokenPair(pair.student.flip(0), pair.teacher, pair.mask)
    weight = torch.tensor([1.0, 0, 1, 1])
    found = loss_of(pair, second, weight=weight)
    parts = [
        loss_of(*[TokenPair(*(x[i : i + 1] for x in layer))], weight=weight[i : i + 1])
        for layer in (pair, second)
        for i in range(BATCH)
    ]
    torch.testing.assert_close(found, torch.stack(parts).mean())
    assert parts[1] == 0 < parts[0]


def test_one_token_that_lies_inside_is_compared_with_nothing(pair):
    pair.mask[:, 1:] = 0
    own = pair.student.requires_grad_()
    loss = loss_of(pair)
    assert loss == 0
    assert (torch.autograd.grad(loss, own)[0] == 0).all()
