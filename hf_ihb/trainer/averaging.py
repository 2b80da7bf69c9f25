"""Averages of the weights: kept beside the raw ones while training, evaluated and saved in their place."""

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import update_bn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import HubStrategy

from hf_ihb.checkpoint import AVERAGE_FOLDER, load_module, read_average_record, save_average
from hf_ihb.errors import CheckpointError, DataError, RecipeError


def ema_decay(limit: float, step: int) -> float:
    """Decay of the moving average at a step (from 1): it starts low, so that the initial weights are soon forgotten."""
    return min(limit, (1 + step) / (10 + step))


def swa_start_step(share: float, max_steps: int) -> int:
    """Optimizer steps after which SWA begins."""
    return math.ceil(round(share * max_steps, 6))  # 0.1 * 30 is a little more than 3


def anneal_to(schedule: Callable[[int], float], start: int, length: int, target: float) -> Callable[[int], float]:
    """A schedule that leaves another at a step, follows a cosine to its target and stays there.

    Args:
        schedule: Multiple of the learning rate at a step.
        start: Step at which it is left.
        length: Steps of the cosine, > 0.
        target: Multiple of the learning rate that is approached.
    """

    def factor(step: int) -> float:
        if step <= start:
            return schedule(step)
        progress = min((step - start) / length, 1.0)
        return target + (schedule(start) - target) * (1 + math.cos(math.pi * progress)) / 2

    return factor


class _Pairs:
    """Tensors of an average beside those of the module they follow, looked up once: a state dict takes milliseconds.

    Args:
        module: Its tensors are changed in place, never replaced, while it trains.
        state: The average, by the names of the module's state.
    """

    def __init__(self, module: nn.Module, state: dict[str, Tensor]) -> None:
        self.module = module
        current = module.state_dict()
        floating = [name for name, mean in state.items() if mean.is_floating_point()]
        self.means, self.values = [state[name] for name in floating], [current[name] for name in floating]
        self.counters = [(mean, current[n]) for n, mean in state.items() if not mean.is_floating_point()]


class WeightAverage:
    """The running average of a module's state.

    Every floating-point tensor is averaged, the running statistics of BatchNorm too (as timm's `ModelEmaV3` does; SWA
    measures them anew before they are used); counters are copied.

    Args:
        module: Its weights are where the average starts.
        count: How many updates are already in them.
    """

    def __init__(self, module: nn.Module, count: int = 0) -> None:
        self.state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        self.count = count
        self._pairs: _Pairs | None = None

    @torch.no_grad()
    def update(self, module: nn.Module, weight: float) -> None:
        """``average += weight * (module - average)``."""
        if self._pairs is None or self._pairs.module is not module:
            self._pairs = _Pairs(module, self.state)
        torch._foreach_lerp_(self._pairs.means, self._pairs.values, weight)
        for mean, counter in self._pairs.counters:
            mean.copy_(counter)
        self.count += 1

    @torch.no_grad()
    def install(self, module: nn.Module) -> None:
        """Copies the average into the module."""
        for name, tensor in module.state_dict().items():
            tensor.copy_(self.state[name])


class Averaging(TrainerCallback):
    """Keeps the average that `ema_decay` or `swa_start` asks for.

    The module trains on its raw weights. While it is evaluated, or saved by `save_model`, it holds the average; after
    training it keeps it. A checkpoint has the raw weights, and the average in a folder of its own.

    Every process holds the same average, since DDP keeps the weights alike; BatchNorm's running statistics, which it
    does not, are taken from the main process (EMA) or averaged over processes (SWA).

    Args:
        trainer: The trainer whose module is averaged.

    Raises:
        RecipeError: If the weights are sharded or not float32, or checkpoints of SWA would be pushed.

    References:
        Izmailov et al., 2018 (SWA), https://arxiv.org/abs/1803.05407
    """

    def __init__(self, trainer: Trainer) -> None:
        args = trainer.args
        self.trainer = trainer
        self.kind = "ema" if args.ema_decay > 0 else "swa" if args.swa_start is not None else None
        self.average: WeightAverage | None = None
        self._fresh_statistics = True
        self._loader: Any = None
        if self.kind is None:
            return
        self._key = {"ema": "ema_decay", "swa": "swa_start"}[self.kind]
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise RecipeError(f"key '{self._key}': expected whole weights in each process, found FSDP or DeepSpeed")
        if self.kind == "swa" and args.push_to_hub and args.hub_strategy != HubStrategy.END:
            raise RecipeError(
                "keys 'swa_start' and 'hub_strategy' contradict: BatchNorm is measured when an average is "
                f"evaluated, not when it is checkpointed; expected 'end', found '{args.hub_strategy.value}'"
            )

    @property
    def _module(self) -> nn.Module:
        return self.trainer.accelerator.unwrap_model(self.trainer.model)

    # ---- The course of training ----

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Checks the module; a moving average starts from its weights."""
        self._loader = None
        if self.kind is None:
            return
        self._trained = self._module  # unwrapping it in every step takes longer than averaging a small model
        dtypes = {t.dtype for t in self._module.state_dict().values() if t.is_floating_point()} - {torch.float32}
        if dtypes:
            raise RecipeError(f"key '{self._key}': expected a model with float32 weights, found {dtypes.pop()}")
        if self.kind == "swa" and self._batch_norms() and not hasattr(self.trainer.train_dataset, "__len__"):
            raise DataError("key 'swa_start': BatchNorm's statistics need a training set with a length, found none")
        if state.global_step == 0:  # otherwise `load` has been here
            self.average = WeightAverage(self._module) if self.kind == "ema" else None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Updates the average: EMA after each optimizer step, SWA after the last one of an epoch.

        Not `on_epoch_end`: a checkpoint of the epoch's last step is written before it, and would lack that epoch.
        """
        if self.kind == "ema":
            self.average.update(self._trained, 1 - ema_decay(args.ema_decay, state.global_step))
        elif self.kind == "swa":
            ends = float(state.epoch).is_integer() or state.global_step >= state.max_steps
            if ends and state.global_step >= swa_start_step(args.swa_start, state.max_steps):
                self.average = self.average or WeightAverage(self._module)
                self.average.update(self._module, 1 / (self.average.count + 1))
                self._fresh_statistics = False

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leaves the average in the module, unless the best one is already there."""
        if self.average is not None:
            self._install()
            self.average = None

    # ---- In place of the raw weights ----

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The module holds the average inside, and its raw weights, bit for bit, again afterwards."""
        if self.average is None:
            yield
            return
        raw = WeightAverage(self._module)
        try:
            self._install()
            yield
        finally:
            raw.install(self._module)

    def _install(self) -> None:
        module, several = self._module, self.trainer.args.world_size > 1
        if self.kind == "ema" and several:
            for name, _ in module.named_buffers():
                if name in self.average.state:
                    self.average.state[name].copy_(broadcast(self.average.state[name]))
        self.average.install(module)
        if self.kind == "swa" and not self._fresh_statistics:
            self._measure_statistics(module)

    def _batch_norms(self) -> list[nn.Module]:
        return [m for m in self._module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]

    @torch.no_grad()
    def _measure_statistics(self, module: nn.Module) -> None:
        """BatchNorm's statistics of the averaged weights, over one pass through augmented training images.

        It is made once for each average that is evaluated or saved, without a backward pass. Each process takes its
        share of the images; the mean over processes is then the mean over all micro-batches.
        """
        if norms := self._batch_norms():
            device = self.trainer.args.device
            # neither the order nor the masks of training may depend on whether it is evaluated on the way
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(self.trainer.args.seed)
                update_bn(self._training_pixels(), module)
            for norm in norms:
                for statistic in (norm.running_mean, norm.running_var):
                    statistic.copy_(self.trainer.accelerator.reduce(statistic, "mean"))
            current = module.state_dict()
            for name, mean in self.average.state.items():
                mean.copy_(current[name])
        self._fresh_statistics = True

    def _training_pixels(self) -> Iterator[Tensor]:
        trainer = self.trainer
        if self._loader is None:
            self._loader = trainer.get_train_dataloader()
        if hasattr(self._loader, "set_epoch"):  # the same order however often it was read
            self._loader.set_epoch(0)
        for inputs in self._loader:
            inputs = trainer._prepare_inputs(inputs)
            yield trainer.batches.step(inputs, True, trainer.epoch, trainer.train_dataset).pixel_values

    # ---- Checkpoints ----

    def save(self, checkpoint: Path) -> None:
        """Writes the average into a checkpoint."""
        if self.kind is not None and self.trainer.args.should_save:
            state = None if self.average is None else self.average.state
            count = 0 if self.average is None else self.average.count
            save_average(self._module, checkpoint, state, {"kind": self.kind, "count": count})

    def load(self, checkpoint: Path) -> None:
        """Reads the average of a checkpoint; leaves it in the module.

        Raises:
            CheckpointError: If the run that wrote the checkpoint averaged its weights in another way, or not at all.
        """
        record = {"kind": None, "count": 0}
        if (checkpoint / AVERAGE_FOLDER).exists():
            record = read_average_record(checkpoint)
        if record["kind"] != self.kind:
            raise CheckpointError(
                f"{checkpoint}: expected an average by {self.kind or 'nothing'}, found one by "
                f"{record['kind'] or 'nothing'}; 'ema_decay' and 'swa_start' cannot be turned on or off on the way"
            )
        self.average = None
        if record["count"] > 0:
            load_module(self._module, checkpoint / AVERAGE_FOLDER)
            self.average = WeightAverage(self._module, record["count"])
            self._fresh_statistics = False

    def load_best(self, checkpoint: Path) -> None:
        """Leaves in the module, for good, what was evaluated at a checkpoint: the average if there was one yet."""
        load_module(self._module, self.evaluated(checkpoint))
        self.average = None

    def evaluated(self, checkpoint: Path) -> Path:
        """Folder of the student that was evaluated at a checkpoint: the average's if there was one yet."""
        averaged = self.kind is not None and read_average_record(checkpoint)["count"] > 0
        return checkpoint / AVERAGE_FOLDER if averaged else checkpoint

    # ---- Learning rate ----

    def anneal(self, scheduler: Any, num_training_steps: int, steps_per_epoch: int) -> None:
        """Makes a scheduler approach `swa_learning_rate`, in every parameter group, over ten epochs from `swa_start`.

        Raises:
            RecipeError: If the scheduler is not a function of the step, or the learning rate is 0.
        """
        args = self.trainer.args
        if not isinstance(scheduler, LambdaLR):
            raise RecipeError(
                "keys 'swa_learning_rate' and 'lr_scheduler_type' contradict: expected a schedule by step, found "
                f"{type(scheduler).__name__}"
            )
        if 0 in scheduler.base_lrs:
            raise RecipeError("key 'learning_rate': expected a number > 0 with 'swa_learning_rate', found 0")
        start = swa_start_step(args.swa_start, num_training_steps)
        scheduler.lr_lambdas = [
            anneal_to(schedule, start, 10 * steps_per_epoch, args.swa_learning_rate / base_lr)
            for schedule, base_lr in zip(scheduler.lr_lambdas, scheduler.base_lrs, strict=True)
        ]
