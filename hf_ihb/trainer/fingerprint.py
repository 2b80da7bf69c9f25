"""What a training is made of: every setting that its course depends on, compared before one is gone on with."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import nn
from transformers import Trainer, TrainingArguments

from hf_ihb.config.run import RunArguments
from hf_ihb.data import StoredSplit
from hf_ihb.errors import CheckpointError
from hf_ihb.models.pretrained import weights_digest
from hf_ihb.models.teacher import Teacher

# Keys that say where things are, what is shown, saved, evaluated or pushed, and how fast it goes.
_FREE_STARTS = (
    "do_", "eval_", "hub_", "push_", "log_", "logging_", "save_", "report_", "trackio_", "ddp_", "dataloader_num_",
    "dataloader_p", "dataloader_in_", "dataloader_mul", "early_stopping_", "decoded_", "include_", "enable_jit_",
)  # fmt: skip
_FREE = {
    "output_dir", "run_name", "project", "disable_tqdm", "prediction_loss_only", "per_device_eval_batch_size",
    "batch_eval_metrics", "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "ignore_data_skip",
    "resume_from_checkpoint", "resume_policy", "allow_changed", "restore_callback_states_from_checkpoint",
    "skip_memory_metrics", "torch_empty_cache_steps", "local_rank", "deepspeed_plugin", "remove_unused_columns",
    "label_names", "accelerator_config", "use_cpu", "preprocessing_num_workers", "decode", "dataset_name",
    "dataset_revision", "teacher_model", "teacher_revision", "teacher_cache_dir", "image_column_name",
    "label_column_name", "train_split", "validation_split", "test_split", "selection_split", "max_eval_samples",
    "model_name_or_path", "model_revision", "teacher_assume_same_label_order",
}  # fmt: skip
_NOT_OF_TRAINING = (RunArguments,)
# What the optimizer's state belongs to: it cannot be let go of.
_FIXED = {"optim", "architecture"}
# Keys that the optimizer keeps in its groups or that its schedule is made with: they are applied where they may change.
SCHEDULED = {
    "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim_args", "lr_scheduler_type",
    "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio", "num_train_epochs", "max_steps", "swa_learning_rate",
    "weight_decay_scope",
}  # fmt: skip


def fingerprint(trainer: Trainer, settings: Sequence[Any]) -> dict[str, Any]:
    """Name -> value, as JSON, of all that a training's course depends on.

    Args:
        trainer: About to train.
        settings: Further dataclasses of keys that its parts were made of.
    """
    found: dict[str, Any] = {}
    for part in (*settings, trainer.args):
        if isinstance(part, _NOT_OF_TRAINING):
            continue
        own = part.to_dict() if isinstance(part, TrainingArguments) else vars(part)
        names = (f.name for f in fields(part) if f.init and not is_free(f.name))
        found |= {name: _plain(own.get(name)) for name in names}
    if found.get("augmentation_seed") == trainer.args.seed:
        found["augmentation_seed"] = None  # as if it was not given
    images = trainer.train_dataset
    found["processes"] = trainer.args.world_size
    found["train_images"] = len(images) if hasattr(images, "__len__") else None
    if isinstance(images, StoredSplit):
        found["train_images"] = images.fingerprint()[:16]
    found["architecture"] = _structure(trainer.accelerator.unwrap_model(trainer.model))
    if len(teachers := getattr(trainer, "teachers", ())) > 1:
        found["teachers"] = [_teacher(teacher) for teacher in teachers]
    elif teachers:
        found["teacher"] = _teacher(teachers[0])
    if found.get("teacher_models") is not None:  # names and places are free there as well
        found["teacher_models"] = [{k: v for k, v in e.items() if not is_free(k)} for e in found["teacher_models"]]
    return found


def _teacher(teacher: Teacher) -> str:
    """What a teacher says depends on this."""
    pixels = json.dumps(None if teacher.pixels is None else teacher.pixels.description(), sort_keys=True)
    return f"{weights_digest(teacher.model)[:16]} {teacher.control} {_hash(pixels)}"


def is_free(name: str) -> bool:
    """Whether a key may be another one when a run goes on."""
    return name in _FREE or name.startswith(_FREE_STARTS)


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Name -> value then and now, of what is not the same; a key that one of both does not know is not compared."""
    return {name: (saved[name], now[name]) for name in sorted(saved.keys() & now.keys()) if saved[name] != now[name]}


def check_same(
    folder: str, saved: Mapping[str, Any], now: Mapping[str, Any], allowed: Sequence[str]
) -> dict[str, tuple[Any, Any]]:
    """Refuses to go on with other settings than a checkpoint was trained with.

    Args:
        folder: Of the checkpoint.
        saved: Its fingerprint.
        now: That of the training that would go on.
        allowed: Names of settings that may differ.

    Returns:
        Those that do.

    Raises:
        CheckpointError: If others differ; it names each with both values.
    """
    changed = differences(saved, now)
    refused = {name: values for name, values in changed.items() if name not in allowed or name in _FIXED}
    if not refused:
        return changed
    listed = ", ".join(f"{name} {json.dumps(then)} -> {json.dumps(new)}" for name, (then, new) in refused.items())
    free = [name for name in refused if name not in _FIXED]
    remedy = f"--allow_changed {' '.join(free)}" if len(free) == len(refused) else "a new run; its state fits no other"
    raise CheckpointError(
        f"{folder}: expected the settings it was trained with, found {listed}; take those, or {remedy}"
    )


def _plain(value: Any) -> Any:
    """A value as JSON gives it back."""
    return json.loads(json.dumps(value, default=str, sort_keys=True))


def _structure(module: nn.Module) -> str:
    return f"{type(module).__name__} {_hash(str(module))}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
