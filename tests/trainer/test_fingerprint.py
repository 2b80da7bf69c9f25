import json

import pytest
import torch
from transformers import TrainerCallback

from hf_ihb.config.augmentation import AugmentationArguments
from hf_ihb.config.model import ModelArguments
from hf_ihb.errors import CheckpointError
from hf_ihb.storage import read_manifest
from tests.trainer.attacks import small_trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with checkpoints of steps 2 and 4 of 6."""
    folder = tmp_path_factory.mktemp("run")
    small_trainer(folder, max_steps=6, save_total_limit=None).train()
    return folder


def changes(folder, prepare=lambda trainer: None, **overrides):
    """What going on from step 6 would change."""
    trainer = small_trainer(folder, **overrides)
    prepare(trainer)
    with trainer.checkpoints.training(str(folder / "checkpoint-4")):
        return trainer.checkpoints.changed


def test_the_same_settings_go_on(run):
    assert changes(run) == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 2e-3), ("weight_decay", 0.1), ("per_device_train_batch_size", 8), ("seed", 1),
        ("data_seed", 5), ("gradient_accumulation_steps", 2), ("lr_scheduler_type", "cosine"),
        ("warmup_steps", 3), ("max_steps", 9),
        ("label_smoothing_factor", 0.1), ("max_grad_norm", 0.0), ("adam_beta2", 0.9), ("weight_decay_scope", "all"),
        ("dataloader_drop_last", False),
    ],
)  # fmt: skip
def test_a_setting_that_the_course_depends_on_is_refused_with_both_values(name, value, run):
    then = read_manifest(run / "checkpoint-4")["about"]["settings"][name]
    line = rf"found (.*, )?{name} {json.dumps(then)} -> {json.dumps(value)}.* --allow_changed (.* )?{name}"
    with pytest.raises(CheckpointError, match=line):
        changes(run, **{name: value})
    allowed = changes(run, **{name: value}, allow_changed=[name, "data_seed"])
    assert allowed[name] == (then, value)


def test_another_optimizer_is_refused_whatever_is_allowed(run):
    with pytest.raises(CheckpointError, match=r"optim .*adamw.* -> .*sgd.*its state fits no other"):
        changes(run, optim="sgd", allow_changed=["optim"])


@pytest.mark.parametrize(
    "free",
    [
        {"logging_steps": 1}, {"save_steps": 3}, {"save_total_limit": 4}, {"per_device_eval_batch_size": 2},
        {"eval_strategy": "steps", "eval_steps": 1}, {"disable_tqdm": False}, {"run_name": "other"},
        {"resume_policy": "strict"}, {"report_to": []}, {"dataloader_num_workers": 1},
    ],
)  # fmt: skip
def test_what_is_shown_saved_or_evaluated_is_free(free, run):
    assert changes(run, **free) == {}


def test_other_images_augmentation_network_and_structure_are_refused(run):
    def other_images(trainer):
        trainer.train_dataset = trainer.train_dataset.select(torch.arange(127))

    def other_views(trainer):
        trainer.augmentation = AugmentationArguments(random_crop_padding=3)

    def other_keys(trainer):
        trainer.settings = [ModelArguments(drop_path_rate=0.3)]

    def other_drop_path(trainer):
        for part in trainer.model.modules():
            if type(part).__name__ == "DropPath":
                part.drop_prob = 0.4

    for prepare, name in (
        (other_images, "train_images"), (other_views, "random_crop_padding 2 -> 3"), (other_drop_path, "architecture"),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=name):
            changes(run, prepare)
    assert changes(run, other_keys) == {}  # keys that the checkpoint does not know are not compared


class Rates(TrainerCallback):
    def __init__(self):
        self.seen = {}

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.seen[state.global_step] = [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups]


def test_what_may_change_is_applied(run):
    rates, whole = Rates(), Rates()
    changed = {"learning_rate": 5e-3, "weight_decay": 0.3, "lr_scheduler_type": "cosine"}
    trainer = small_trainer(run, **changed, allow_changed=list(changed))
    trainer.add_callback(rates)
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-4"))
    expected = small_trainer(run.parent / "fresh", **changed)
    expected.add_callback(whole)
    expected.train()
    assert rates.seen.keys() == {4, 5}
    assert all(rates.seen[step] == whole.seen[step] for step in rates.seen)
    history = read_manifest(run / "checkpoint-6")["about"]["history"]
    assert [entry["step"] for entry in history] == [4]
    assert history[0]["changed"]["learning_rate"] == [1e-3, 5e-3]
