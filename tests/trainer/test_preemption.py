import os
import signal

import pytest
import torch
from accelerate import Accelerator
from transformers import TrainerCallback

from hf_ihb.errors import CheckpointError, NumericsError, Preempted
from tests.trainer.attacks import small_trainer


class Act(TrainerCallback):
    """Does something at the beginning of a step."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.act()


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("more", [{}, {"save_strategy": "no"}, {"enable_jit_checkpoint": True}])
def test_a_run_that_is_told_to_end_saves_its_step_and_goes_on_to_the_same_end(more, tmp_path):
    whole = small_trainer(tmp_path / "whole")
    whole.train()
    before = signal.getsignal(signal.SIGTERM)
    ended = small_trainer(tmp_path / "run", **more)
    ended.add_callback(Act(2, terminate))
    with pytest.raises(Preempted, match="step 3: told to end") as caught:
        ended.train()
    assert caught.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert (tmp_path / "run" / "checkpoint-3").is_dir()
    resumed = small_trainer(tmp_path / "run", **more)
    resumed.train(resume_from_checkpoint=True)
    for name, tensor in whole.student.state_dict().items():
        assert torch.equal(resumed.student.state_dict()[name], tensor), name


def test_a_handler_of_somebody_else_stays(tmp_path):
    heard = []
    signal.signal(signal.SIGTERM, lambda *args: heard.append(1))
    try:
        trainer = small_trainer(tmp_path, max_steps=2, save_strategy="no")
        trainer.add_callback(Act(0, terminate))
        trainer.train()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert heard == [1]
    assert trainer.state.global_step == 2


def test_a_gradient_that_is_not_finite_ends_the_run_before_the_step_and_names_what_is_good(tmp_path):
    trainer = small_trainer(tmp_path / "run", save_steps=1)
    weight, states = trainer.student.deit.layers[0].mlp.fc1.weight, []
    blow_up = Act(2, lambda: (states.append(weight.detach().clone()), weight.register_hook(lambda g: g * torch.inf)))
    trainer.add_callback(blow_up)
    with pytest.raises(NumericsError, match=r"step 3: expected a finite gradient, .* verifies is .*checkpoint-2"):
        trainer.train()
    assert torch.equal(weight, states[0])
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def test_the_images_of_a_step_that_is_not_finite_are_named(tmp_path):
    trainer, seen = small_trainer(tmp_path / "run", gradient_accumulation_steps=2), []
    prepare, losses = trainer.prepare, trainer.training_losses

    def note(inputs, train):
        seen.append(inputs["index"].tolist())
        return prepare(inputs, train)

    def blow_up(outputs, step):
        loss, components = losses(outputs, step)
        return (loss * torch.nan if len(seen) == 3 else loss), components

    trainer.prepare, trainer.training_losses = note, blow_up
    with pytest.raises(NumericsError, match="step 2: expected a finite loss") as caught:
        trainer.train()
    assert f"with training images {', '.join(map(str, seen[2]))};" in str(caught.value)


def test_steps_that_a_scaler_leaves_out_are_counted(tmp_path, monkeypatch):
    said = []
    trainer = small_trainer(tmp_path / "run", save_strategy="no")
    left_out = property(lambda self: trainer.state.global_step in (0, 2))
    monkeypatch.setattr(Accelerator, "optimizer_step_was_skipped", left_out)
    monkeypatch.setattr("hf_ihb.trainer.callbacks.logger.warning", said.append)
    trainer.train()
    assert said == ["2 of 6 steps were left out: their float16 gradients overflowed"]


def test_a_state_of_other_parameters_is_one_line(tmp_path):
    trainer = small_trainer(tmp_path / "run", max_steps=2)
    trainer.train()
    path = tmp_path / "run" / "checkpoint-2" / "optimizer.pt"
    state = torch.load(path, weights_only=True)
    state["param_groups"][0]["params"].pop()
    torch.save(state, path)
    (path.parent / "manifest.json").unlink()  # as of an earlier version
    with pytest.raises(CheckpointError, match=r"checkpoint-2: expected the state of an optimizer of the parameters"):
        small_trainer(tmp_path / "run").train(resume_from_checkpoint=True)


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    trainer = small_trainer(tmp_path / "run")
    with torch.no_grad():
        trainer.student.deit.layers[1].mlp.fc1.bias[3] = torch.nan
    with pytest.raises(NumericsError, match=r"expected finite weights, found NaN or Inf in student\.deit\.layers\.1\."):
        trainer.save_model()
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_weights_whose_sum_is_not_finite_are_saved_if_they_are(tmp_path):
    trainer = small_trainer(tmp_path / "run")
    with torch.no_grad():
        trainer.student.deit.layers[1].mlp.fc1.bias[:4] = 3e38
    trainer.save_model()
    assert list((tmp_path / "run").glob("*.safetensors"))
