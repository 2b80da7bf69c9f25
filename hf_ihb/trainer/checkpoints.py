"""What a trainer saves and reads back: the plain student, the weights that are evaluated, every tensor of them."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from hf_ihb.checkpoint import load_module, save_run
from hf_ihb.storage import folder_lock
from hf_ihb.trainer.averaging import Averaging
from hf_ihb.trainer.saving import check_checkpoint, checkpoint_to_resume, save_checkpoint


class Checkpoints:
    """Saves and loads a trainer's module; sharded weights go through the files of FSDP and DeepSpeed.

    Args:
        trainer: Whose module it is.
        averaging: Of its weights; a checkpoint keeps the raw ones and the average.
    """

    def __init__(self, trainer: Trainer, averaging: Averaging) -> None:
        self.trainer, self.averaging = trainer, averaging

    @property
    def _module(self) -> nn.Module:
        return self.trainer.accelerator.unwrap_model(self.trainer.model)

    @property
    def _is_sharded(self) -> bool:
        return self.trainer.is_fsdp_enabled or self.trainer.is_deepspeed_enabled

    @contextlib.contextmanager
    def training(self, asked: str | bool | None) -> Iterator[str | None]:
        """Around a training: holds the output folder; gives the checkpoint it goes on from.

        Raises:
            CheckpointError: If another process trains into the folder, or there is no checkpoint that verifies.
        """
        trainer = self.trainer
        with folder_lock(Path(trainer.args.output_dir), trainer.is_world_process_zero()):
            yield checkpoint_to_resume(trainer, asked, trainer.args.resume_policy)

    def save_checkpoint(self, trial: Any) -> None:
        """Saves all that a training goes on from, whole or not at all."""
        save_checkpoint(self.trainer, trial)

    def save(self, folder: str | None, is_internal: bool) -> None:
        """Saves the weights that are evaluated; into a checkpoint, which `Trainer` asks for, the raw ones as well."""
        if is_internal and folder is not None:
            Trainer.save_model(self.trainer, folder, _internal_call=True)
            self.averaging.save(Path(folder))
        else:
            with self.averaging.applied():
                Trainer.save_model(self.trainer, folder, is_internal)

    def write(self, folder: str | None, state_dict: dict[str, Tensor] | None) -> None:
        """Writes the files of the module as it is; on one process of a folder."""
        args = self.trainer.args
        if args.should_save:
            save_run(self._module, Path(folder or args.output_dir), state_dict, self.trainer.processing_class)

    def evaluated(self, folder: Path) -> Path:
        """Folder of the weights that were evaluated at a checkpoint."""
        return self.averaging.evaluated(folder)

    def load(self, folder: str, model: Any) -> None:
        """Reads a checkpoint to go on from.

        Raises:
            CheckpointError: If it does not hold every tensor, or another average.
        """
        if self._is_sharded:  # their own files, read by the module's own names
            Trainer._load_from_checkpoint(self.trainer, folder, model)
        else:
            self.averaging.load(Path(folder))
            load_module(self._module, Path(folder))

    def load_best(self) -> None:
        """Reads the weights that were evaluated best."""
        if self._is_sharded:
            Trainer._load_best_model(self.trainer)
        else:
            check_checkpoint(Path(self.trainer.state.best_model_checkpoint))
            self.averaging.load_best(Path(self.trainer.state.best_model_checkpoint))
