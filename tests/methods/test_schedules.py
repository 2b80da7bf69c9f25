"""How weights rise, fall, and are shared out by uncertainty."""

import numpy as np
import pytest
import torch
from scipy.special import softmax

from hf_ihb.methods import METHODS
from hf_ihb.methods.schedules import fade_factor, uncertainty_shares
from tests.methods.steps import keys_of, method


def test_a_weight_falls_steadily_to_0_at_the_end_or_where_it_stops():
    epochs = (0, 5, 6, 7, 8, 10, 12)
    assert [fade_factor(e, 10, 4, None) for e in epochs] == [1, 1, 1, 0.75, 0.5, 0, 0]
    assert [fade_factor(e, 10, 4, 8.0) for e in epochs] == [1, 0.75, 0.5, 0.25, 0, 0, 0]
    assert [fade_factor(e, 10, 0, 8.0) for e in epochs] == [1, 1, 1, 1, 0, 0, 0]
    assert [fade_factor(e, 10, 0, None) for e in epochs] == [1] * 7
    assert [fade_factor(e, 10, 20, None) for e in (0, 5)] == [0.5, 0.25]  # longer than the training


@pytest.mark.parametrize("name", [kind.name for kind in METHODS])
def test_the_shared_keys_stop_and_fade_any_method_beside_its_warm_up(name):
    warm_up = "distillation_warmup_epochs" if name == "kd" else f"{name}_warmup_epochs"
    keys = keys_of(method(name)) | {"alpha": 1.0, warm_up: 4.0}
    kind = method(name, **keys, distillation_fade_epochs=4.0, distillation_stop_epoch=8.0)
    assert [kind.weight(e, 20) for e in (0, 1, 4, 6, 8, 20)] == [0, 0.25, 1, 0.5, 0, 0]
    assert [method(name, **keys).weight(e, 20) for e in (1, 4, 20)] == [0.25, 1, 1]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 20.0])
def test_shares_are_the_softmax_of_inverse_losses(temperature):
    values = {"task": 2.3, "cka": 0.4, "kd": 1.1}
    losses = {name: torch.tensor(value, requires_grad=True) for name, value in values.items()}
    shares = uncertainty_shares(losses, temperature, lambda x: x)
    expected = softmax(1 / np.array(list(values.values())) / temperature)
    assert list(shares) == list(values)
    assert [share.item() for share in shares.values()] == pytest.approx(expected.tolist(), rel=1e-5)
    assert not any(share.requires_grad for share in shares.values())


def test_shares_are_those_of_the_mean_over_processes():
    own, other = torch.tensor([1.0, 3.0]), torch.tensor([2.0, 0.5])

    def shares(values, mean=lambda x: x):
        return uncertainty_shares(dict(zip("ab", values, strict=True)), 1.0, mean)

    found = [shares(x, lambda x: (own + other) / 2) for x in (own, other)]
    assert found[0] == found[1] == shares((own + other) / 2)


def test_losses_of_0_and_below_take_all_and_nothing_is_shared_out_among_none():
    shares = uncertainty_shares({"a": torch.tensor(-0.1), "b": torch.tensor(1.0)}, 1.0, lambda x: x)
    assert [share.item() for share in shares.values()] == [1, 0]
    assert uncertainty_shares({}, 1.0, lambda x: x) == {}
    assert uncertainty_shares({"a": torch.tensor(0.3)}, 1.0, lambda x: x)["a"] == 1
