"""Crash-safe, strict checkpoints for any `Trainer` of an image model."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer

from hf_ihb.checkpoint import load_student
from hf_ihb.storage import folder_lock
from hf_ihb.trainer.callbacks import is_over
from hf_ihb.trainer.saving import check_checkpoint, checkpoint_to_resume, save_checkpoint


class CrashSafeCheckpoints:
    """Put before `Trainer` among the bases of a class: its checkpoints are there whole or not at all.

    ``class MyTrainer(CrashSafeCheckpoints, Trainer): ...``

    Checkpoints keep their names, files, `save_total_limit` and `hub_strategy`. ``resume_from_checkpoint=True`` takes
    the newest that verifies and names those it passed over; every tensor of the model must be in it, by whatever name
    `save_pretrained` gave it. One process at a time trains into an output folder.
    """

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """`Trainer.train`.

        Raises:
            CheckpointError: If another process trains into the folder, there is no checkpoint that verifies, or one
                cannot be written.
        """
        with folder_lock(Path(self.args.output_dir), self.is_world_process_zero()):
            folder = checkpoint_to_resume(self, resume_from_checkpoint)
            return super().train(resume_from_checkpoint=folder, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if not is_over(self):
            super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        save_checkpoint(self, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            Trainer._load_from_checkpoint(self, resume_from_checkpoint, model)
        else:
            load_student(self.accelerator.unwrap_model(self.model), Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        check_checkpoint(Path(self.state.best_model_checkpoint))
        self._load_from_checkpoint(self.state.best_model_checkpoint, self.model_wrapped)
