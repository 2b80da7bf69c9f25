"""Weights of losses in a training: what is logged of them is what was applied."""

import numpy as np
import pytest
import torch
from scipy.special import softmax

from tests.trainer.test_distillation import gradients, make_trainer, only_student  # noqa: F401


def entries(trainer, key="loss"):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def test_labels_get_what_the_teacher_loses_and_teach_alone_after_the_stop(make_trainer):  # noqa: F811
    keys = {"alpha": 0.8, "cka_weight": 2.0, "distillation_fade_epochs": 0.5, "distillation_stop_epoch": 1.0}
    trainer = make_trainer(**keys, max_steps=6, logging_steps=1)  # 4 steps an epoch
    trainer.train()
    factors = np.array([1, 1, 1, 0.5, 0, 0])
    assert entries(trainer, "kd_weight") == pytest.approx(0.8 * factors)
    assert entries(trainer, "cka_weight") == pytest.approx(2 * factors)
    assert entries(trainer, "task_weight") == pytest.approx(1 - 0.8 * factors)
    total = sum(
        np.array(entries(trainer, f"{name}_weight")) * entries(trainer, f"{name}_loss")
        for name in ("task", "kd", "cka")
    )  # fmt: skip
    assert entries(trainer) == pytest.approx(total.tolist(), abs=1e-5)


def test_shares_stand_beside_weights_and_their_losses_are_those_of_the_step(make_trainer):  # noqa: F811
    keys = {"alpha": 0.4, "cka_weight": 2.0, "token_weight": 1.0, "token_warmup_epochs": 9.0}
    trainer = make_trainer(**keys, uncertainty_weighting=0.7, max_steps=2, logging_steps=1)
    trainer.train()
    assert entries(trainer, "token_weight")[0] == 0  # in its warm-up it takes no share
    losses = [entries(trainer, f"{name}_loss")[0] for name in ("task", "kd", "cka")]
    expected = np.array([0.6, 0.4, 2.0]) * softmax(1 / np.array(losses) / 0.7)
    found = [entries(trainer, f"{name}_weight")[0] for name in ("task", "kd", "cka")]
    assert found == pytest.approx(expected.tolist(), rel=1e-4)
    assert entries(trainer)[0] == pytest.approx(float(expected @ losses), rel=1e-4)


def test_shares_have_no_gradient(make_trainer, make_student):  # noqa: F811
    keys = {"cka_weight": 1.0, "gram_weight": 1.0}
    trainer = make_trainer(make_student(), **keys, uncertainty_weighting=1.0)
    _, found = gradients(trainer)
    values = {}

    def keep(losses, weights, total=trainer.loss_weights.total):
        loss, logged = total(losses, weights)
        values.update({name.removesuffix("_weight"): value.item() for name, value in logged.items()})
        return loss, logged

    trainer.loss_weights.total = keep
    gradients(trainer)
    fixed = {f"{name}_weight": values[name] for name in ("cka", "gram")}
    _, expected = gradients(make_trainer(make_student(), task_loss_weight=values["task"], **fixed))
    for name, gradient in only_student(found).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_nothing_is_logged_of_weights_that_do_not_move(make_trainer):  # noqa: F811
    trainer = make_trainer(cka_weight=1.0, max_steps=1, logging_steps=1)
    trainer.train()
    assert entries(trainer, "cka_weight") == []
