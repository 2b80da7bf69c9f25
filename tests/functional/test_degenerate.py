"""A short form of `benchmarks/reliability/degenerate.py`."""

import pytest
import torch

from benchmarks.reliability.degenerate import DTYPES, LOSSES, TOLERANCE, fault, pair
from hf_ihb.functional.tokens import unit_rows

# a normalisation that is itself near 0, or distances that are inner products' differences, keep fewer digits
LOOSE = {"linear CKA, debiased": 1e-3, "RBF CKA, debiased": 1e-3}


@pytest.mark.parametrize("name", LOSSES)
def test_degenerate_matrices_have_a_finite_loss_and_gradient_in_any_precision(name):
    for number in range(90):
        what, x, y = pair(number)
        for dtype in DTYPES:
            found, off = fault(name, x, y, dtype)
            assert not found, (what, found, dtype)
            assert off <= LOOSE.get(name, TOLERANCE), (what, off)


def test_a_vector_of_zeros_has_no_direction_and_no_gradient():
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]]).requires_grad_()
    unit = unit_rows(x)
    assert unit.tolist() == [[0.0, 0.0], [pytest.approx(0.6), pytest.approx(0.8)]]
    (gradient,) = torch.autograd.grad(unit.sum(), x)
    assert gradient[0].tolist() == [0.0, 0.0]
    torch.testing.assert_close(gradient[1], torch.tensor([0.032, -0.024]))
