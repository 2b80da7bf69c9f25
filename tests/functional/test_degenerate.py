"""A short form of `benchmarks/reliability/degenerate.py`."""

import pytest
import torch

from benchmarks.reliability.degenerate import DTYPES, LOSSES, TOLERANCE, fault, kinds, method_fault, pair
from hf_ihb.functional.tokens import token_cosine_distance, unit_rows
from hf_ihb.methods import METHODS
from tests.methods.steps import TOKENS, WIDTH, keys_of, method


@pytest.mark.parametrize("name", LOSSES)
def test_degenerate_matrices_have_a_finite_loss_and_gradient_in_any_precision(name):
    for number in range(90):
        what, x, y = pair(number)
        for dtype in DTYPES:
            found, off = fault(name, x, y, dtype)
            assert not found, (what, found, dtype)
            assert off <= TOLERANCE, (what, off)


@pytest.mark.parametrize("kind", METHODS, ids=lambda kind: kind.name)
def test_a_student_with_degenerate_tokens_has_a_finite_loss_and_gradient_in_any_precision(kind):
    made = method(kind.name, **keys_of(kind) | {"alpha": 0.5})
    for what, x in kinds(TOKENS, WIDTH, torch.Generator().manual_seed(0)).items():
        for dtype in DTYPES:
            assert not method_fault(made, x, dtype), (what, dtype)


@pytest.mark.parametrize(("own", "other"), [(1e-3, 0.0), (1e-7, 1e-7), (0.0, 1.0), (1e-12, 1.0)])
def test_short_tokens_have_a_finite_gradient(own, other):
    x = (own * torch.ones(1, 1, 3)).requires_grad_()
    distance = token_cosine_distance(x, other * torch.ones(1, 1, 3))
    (gradient,) = torch.autograd.grad(distance.sum(), x)
    assert distance.isfinite().all()
    assert gradient.isfinite().all()


def test_a_vector_of_zeros_has_no_direction_and_no_gradient():
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]]).requires_grad_()
    unit = unit_rows(x)
    assert unit.tolist() == [[0.0, 0.0], [pytest.approx(0.6), pytest.approx(0.8)]]
    (gradient,) = torch.autograd.grad(unit.sum(), x)
    assert gradient[0].tolist() == [0.0, 0.0]
    torch.testing.assert_close(gradient[1], torch.tensor([0.032, -0.024]))
