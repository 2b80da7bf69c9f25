"""Checkpoints under attack: killed, refused space, damaged."""

import errno
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

from hf_ihb.errors import CheckpointError
from hf_ihb.storage import MANIFEST_FILE
from hf_ihb.trainer import SupervisedTrainer
from hf_ihb.trainer.crash_safe import CrashSafeCheckpoints
from hf_ihb.trainer.saving import check_checkpoint
from tests.trainer.attacks import Attack, in_a_process, small_trainer, train_until_killed
from tests.trainer.conftest import make_split


@pytest.fixture(scope="session")
def attack():
    return Attack()


@pytest.fixture
def make_trainer(tmp_path):
    return lambda folder="run", **overrides: small_trainer(tmp_path / folder, **overrides)


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.student.state_dict().items()}


def assert_equal(found, expected):
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.fixture
def uninterrupted(make_trainer):
    trainer = make_trainer("whole")
    trainer.train()
    return weights(trainer)


def test_a_run_killed_anywhere_in_a_save_goes_on_to_the_same_end(make_trainer, uninterrupted, tmp_path):
    number, killed = 1, 0
    while in_a_process(train_until_killed, tmp_path / "run", "checkpoint-4", number) == -signal.SIGKILL:
        killed += 1
        resumed = make_trainer()
        resumed.train(resume_from_checkpoint=True)
        assert_equal(weights(resumed), uninterrupted)
        shutil.rmtree(tmp_path / "run")
        number += 5
    assert killed >= 4


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_refuses_a_save_is_one_line_and_the_run_goes_on_from_the_one_before(
    code, make_trainer, uninterrupted, attack, tmp_path
):
    def refuse():
        raise OSError(code, os.strerror(code))

    for number in (1, 5, 12, 16):  # a folder, the weights, the average, the name
        attack.begin("checkpoint-4", number, refuse)
        with pytest.raises(CheckpointError, match=r"checkpoint-4: could not be written .* bytes, .* are free"):
            make_trainer().train()
        attack.end()
        assert sorted(p.name for p in (tmp_path / "run").iterdir() if p.is_dir()) == ["checkpoint-2"]
        resumed = make_trainer()
        resumed.train(resume_from_checkpoint=True)
        assert_equal(weights(resumed), uninterrupted)
        shutil.rmtree(tmp_path / "run")


def test_a_disk_that_is_too_full_is_said_before_anything_is_written(make_trainer, monkeypatch, tmp_path):
    monkeypatch.setattr("hf_ihb.trainer.saving.shutil.disk_usage", lambda path: shutil._ntuple_diskusage(9, 2, 7))
    with pytest.raises(CheckpointError, match=r"checkpoint-2: does not fit on the disk: .* 7 are free"):
        make_trainer().train()
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "preprocessor_config.json"])
def test_a_student_that_finds_no_room_is_one_line(name, make_trainer, monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    trainer = make_trainer()
    (tmp_path / "run").mkdir(exist_ok=True)
    if name == "model.safetensors":  # written beside it, and renamed
        monkeypatch.setattr("transformers.modeling_utils.safe_save_file", refuse)
    else:
        (tmp_path / "run" / name).symlink_to("/dev/full")
    line = r"run: could not be written .*No space left.* bytes, .* are free"
    with pytest.raises(CheckpointError, match=line) as said:
        trainer.save_model()
    assert len(str(said.value).splitlines()) == 1


FILES = [
    "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "config.json",
    "average/model.safetensors", "average/average.json", MANIFEST_FILE,
]  # fmt: skip


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "zeros", "flipped"])
def test_damage_to_any_file_of_the_newest_checkpoint_is_passed_over(damage, make_trainer, uninterrupted, tmp_path):
    make_trainer().train()
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    kept = tmp_path / "kept"
    shutil.copytree(tmp_path / "run", kept)
    for name in FILES:
        path = tmp_path / "run" / "checkpoint-4" / name
        content = path.read_bytes()
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        versions = {"empty": b"", "cut": content[:middle], "zeros": content[:middle] + bytes(len(content) - middle)}
        path.unlink() if damage == "missing" else path.write_bytes((versions | {"flipped": flipped})[damage])
        if (damage, name) == ("missing", MANIFEST_FILE):  # as one of an earlier version
            check_checkpoint(tmp_path / "run" / "checkpoint-4")
        else:
            with pytest.raises(CheckpointError, match=Path(name).name):
                check_checkpoint(tmp_path / "run" / "checkpoint-4")
            with pytest.raises(CheckpointError, match=rf"{Path(name).name}.*--resume_policy latest_good"):
                make_trainer(resume_policy="strict").train(resume_from_checkpoint=True)
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(kept, tmp_path / "run")
    (tmp_path / "run" / "checkpoint-4" / "optimizer.pt").write_bytes(b"")
    resumed = make_trainer()
    resumed.train(resume_from_checkpoint=True)
    assert_equal(weights(resumed), uninterrupted)


STOPS = {
    "early_stopping_patience": 1, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True,
    "metric_for_best_model": "loss", "greater_is_better": True,
}  # fmt: skip


@pytest.mark.parametrize("keys", [{}, {"ema_decay": 0.0}, {"ema_decay": 0.0, "max_steps": 8}, STOPS])
def test_a_run_that_lost_what_follows_its_last_checkpoint_trains_no_further(keys, make_trainer):
    keys = {"lr_scheduler_type": "constant", **keys}
    whole, resumed = make_trainer(**keys), make_trainer(**keys)
    whole.train()
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.global_step
    assert_equal(weights(resumed), weights(whole))


def test_a_checkpoint_asked_for_by_name_must_verify(make_trainer, tmp_path):
    make_trainer(max_steps=2).train()
    (tmp_path / "run" / "checkpoint-2" / "scheduler.pt").unlink()
    with pytest.raises(CheckpointError, match=r"scheduler\.pt: expected .* bytes, found no such file"):
        make_trainer().train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))


BEST = {
    "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "loss",
    "greater_is_better": True,
}  # fmt: skip


def test_the_best_checkpoint_must_verify_before_it_is_loaded(make_trainer, monkeypatch):
    trainer, load = make_trainer(**BEST), SupervisedTrainer._load_best_model

    def damage(self):
        Path(self.state.best_model_checkpoint, "config.json").write_text("{}")
        load(self)

    monkeypatch.setattr(SupervisedTrainer, "_load_best_model", damage)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        trainer.train()


def test_checkpoints_are_rotated_and_named_as_trainers(make_trainer, tmp_path):
    trainer = make_trainer(save_total_limit=1, **BEST)  # the loss falls: the "best" is an early one
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best == str(tmp_path / "run" / f"checkpoint-{trainer.state.best_global_step}")
    # the last one is deleted by `Trainer` where a limit of 1 leaves room for the best alone
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == [Path(best).name]
    assert not list((tmp_path / "run" / ".staging").glob("*"))


def test_checkpoints_of_weights_alone_are_not_gone_on_from(make_trainer):
    make_trainer(max_steps=2, save_only_model=True).train()
    with pytest.raises(CheckpointError, match="found weights alone"):
        make_trainer().train(resume_from_checkpoint=True)


# ---- As a mixin of anybody's trainer ----


def test_states_are_saved_as_trainer_saves_them(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=1)
    trainer.train()
    (tmp_path / "plain").mkdir()
    Trainer._save_optimizer_and_scheduler(trainer, str(tmp_path / "plain"))
    for name in ("optimizer.pt", "scheduler.pt"):
        ours, theirs = (
            torch.utils._pytree.tree_flatten(torch.load(folder / name, weights_only=True))
            for folder in (tmp_path / "run" / "checkpoint-1", tmp_path / "plain")
        )
        assert ours[1] == theirs[1]
        for one, other in zip(ours[0], theirs[0], strict=True):
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_a_users_way_to_save_states_is_called(make_trainer, monkeypatch, tmp_path):
    trainer, called = make_trainer(max_steps=1), []

    class Own(type(trainer)):
        def _save_optimizer_and_scheduler(self, output_dir):
            called.append(output_dir)
            super()._save_optimizer_and_scheduler(output_dir)

    trainer.__class__ = Own
    trainer.train()
    assert called
    check_checkpoint(tmp_path / "run" / "checkpoint-1")


class SafeTrainer(CrashSafeCheckpoints, Trainer):
    pass


class Noise(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        split = make_split(64, 0)
        return {"pixel_values": split.images[index].float() / 255, "labels": split.labels[index]}


def fine_tuner(folder, **overrides):
    set_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=4,
        num_labels=4, hidden_dropout_prob=0.1,
    )  # fmt: skip
    args = TrainingArguments(
        output_dir=str(folder), max_steps=6, save_steps=2, per_device_train_batch_size=8, report_to="none",
        disable_tqdm=True, use_cpu=True, learning_rate=1e-3, **overrides,
    )  # fmt: skip
    return SafeTrainer(ViTForImageClassification(config), args, train_dataset=Noise(), eval_dataset=Noise())


def test_a_stock_fine_tuning_resumes_to_the_same_end_whatever_became_of_the_newest_checkpoint(tmp_path):
    whole = fine_tuner(tmp_path / "whole")
    whole.train()
    fine_tuner(tmp_path / "run").train()
    (tmp_path / "run" / "checkpoint-6" / "rng_state.pth").unlink()
    resumed = fine_tuner(tmp_path / "run")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert_equal(resumed.model.state_dict(), whole.model.state_dict())


def test_a_stock_fine_tuning_that_was_at_its_end_trains_no_further(tmp_path):
    whole, resumed = (fine_tuner(tmp_path, lr_scheduler_type="constant") for _ in range(2))
    whole.train()
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert_equal(resumed.model.state_dict(), whole.model.state_dict())


def test_a_stock_fine_tuning_ends_with_every_tensor_of_the_best_step(tmp_path):
    trainer = fine_tuner(tmp_path, **BEST)
    trainer.train()
    best = ViTForImageClassification.from_pretrained(trainer.state.best_model_checkpoint)
    assert_equal(trainer.model.state_dict(), best.state_dict())
