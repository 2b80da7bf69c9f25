"""What a trainer saves and reads back: the plain student, the weights that are evaluated, every tensor of them."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer

from hf_ihb.checkpoint import load_module, save_run
from hf_ihb.errors import CheckpointError, NumericsError
from hf_ihb.storage import folder_lock, read_manifest
from hf_ihb.trainer.averaging import Averaging
from hf_ihb.trainer.fingerprint import SCHEDULED, check_same, fingerprint
from hf_ihb.trainer.machines import check_shared
from hf_ihb.trainer.preemption import Preemption, together
from hf_ihb.trainer.saving import check_checkpoint, checkpoint_to_resume, save_checkpoint, writing


class Checkpoints:
    """Saves and loads a trainer's module; sharded weights go through the files of FSDP and DeepSpeed.

    Args:
        trainer: Whose module it is.
        averaging: Of its weights; a checkpoint keeps the raw ones and the average.

    Attributes:
        settings: What the training that is under way is made of.
        changed: Settings that are not those of the checkpoint it goes on from: values then and now.
        history: The same of every time it was gone on with, with the step.
    """

    def __init__(self, trainer: Trainer, averaging: Averaging) -> None:
        self.trainer, self.averaging = trainer, averaging
        self.preemption = Preemption(trainer)
        self.settings: dict[str, Any] = {}
        self.changed: dict[str, tuple[Any, Any]] = {}
        self.history: list[dict[str, Any]] = []

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
            CheckpointError: If another process trains into the folder or a machine does not see it, if there is no
                checkpoint that verifies, or it was trained with other settings.
            ProcessLostError: If another process of it ends.
        """
        trainer, args = self.trainer, self.trainer.args
        locked = folder_lock(Path(args.output_dir), trainer.is_world_process_zero())
        with locked, self.preemption.watched(), together(trainer):
            check_shared(args)
            folder = checkpoint_to_resume(trainer, asked, args.resume_policy)
            self.settings, self.changed = fingerprint(trainer, (*trainer.settings, trainer.augmentation)), {}
            self.history = []
            if folder is not None and (manifest := read_manifest(Path(folder))) is not None:
                about = manifest["about"]
                self.changed = check_same(folder, about.get("settings", {}), self.settings, args.allow_changed or ())
                self.history = [*about.get("history", [])]
                self.history += [{"step": about["step"], "changed": self.changed}] if self.changed else []
            yield folder

    def save_checkpoint(self, trial: Any) -> None:
        """Saves all that a training goes on from, whole or not at all."""
        save_checkpoint(self.trainer, trial, lambda: {"settings": self.settings, "history": self.history})

    def load_optimizer(self, folder: str | None, load: Callable[[str | None], None]) -> None:
        """Loads optimizer and schedule; what was allowed to change is applied, not what the checkpoint had.

        Args:
            folder: The checkpoint.
            load: What `Trainer` does.
        """
        if not SCHEDULED & self.changed.keys():
            self._load(folder, load)
            return
        optimizer, scheduler = self.trainer.optimizer, self.trainer.lr_scheduler
        fresh = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        if not isinstance(scheduler, LambdaLR):
            raise CheckpointError(
                f"key 'allow_changed': expected a schedule that is a function of the step, found "
                f"{type(scheduler).__name__}, whose state fits no other settings"
            )
        base_lrs = list(scheduler.base_lrs)
        self._load(folder, load)
        scheduler.base_lrs = base_lrs
        for group, own, base, schedule in zip(
            optimizer.param_groups, fresh, base_lrs, scheduler.lr_lambdas, strict=True
        ):
            group.update(own | {"lr": base * schedule(scheduler.last_epoch)})
        scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]

    def _load(self, folder: str | None, load: Callable[[str | None], None]) -> None:
        try:
            load(folder)
        except ValueError as error:
            if "parameter group" not in str(error):
                raise
            raise CheckpointError(
                f"{folder}: expected the state of an optimizer of the parameters that are trained today, found one of "
                "others; it was written by a version that trained other parameters: start anew, from its weights by "
                "--model_name_or_path"
            ) from error

    def save(self, folder: str | None, is_internal: bool) -> None:
        """Saves the weights that are evaluated; into a checkpoint, which `Trainer` asks for, the raw ones as well."""
        if is_internal and folder is not None:
            Trainer.save_model(self.trainer, folder, _internal_call=True)
            self.averaging.save(Path(folder))
        else:
            with self.averaging.applied(), writing(self.trainer, Path(folder or self.trainer.args.output_dir)):
                Trainer.save_model(self.trainer, folder, is_internal)

    def write(self, folder: str | None, state_dict: dict[str, Tensor] | None) -> None:
        """Writes the files of the module as it is; on one process of a folder.

        Raises:
            NumericsError: If a weight is not finite; nothing is written.
        """
        args = self.trainer.args
        check_weights(self._module if state_dict is None else state_dict)
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


def check_weights(weights: nn.Module | Mapping[str, Tensor]) -> None:
    """Refuses weights that are not finite.

    Raises:
        NumericsError: If one is not; it names the first.
    """
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    floating = {name: tensor for name, tensor in state.items() if tensor.is_floating_point() and tensor.numel() > 0}
    if not floating:  # a process that gets no part of a sharded state
        return
    # sums keep NaN and Inf, and take no memory; where a sum has them, the extremes say whether its tensor has
    sums = [tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32)).double() for tensor in floating.values()]
    if torch.stack(sums).isfinite().all():
        return
    extremes = [torch.stack(tensor.aminmax()).double() for tensor in floating.values()]
    finite = torch.stack(extremes).isfinite().all(dim=1).tolist()
    if not all(finite):
        name = next(name for name, whole in zip(floating, finite, strict=True) if not whole)
        raise NumericsError(f"expected finite weights, found NaN or Inf in {name}; nothing of them was saved")
