"""Callbacks of the trainers."""

import time
from typing import Any, Self

from torch.utils.data import DataLoader
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from hf_ihb.errors import RecipeError
from hf_ihb.trainer.optimization import hold_back, let_go

logger = logging.get_logger(__name__)


class Hooks(TrainerCallback):
    """Calls back into the trainer where `Trainer` has no method to override."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._skipped = 0

    def on_train_begin(self, *args: Any, train_dataloader: DataLoader | None = None, **kwargs: Any) -> None:
        """Before the first step."""
        self._skipped = 0
        self.trainer._begin_training(train_dataloader)

    def on_optimizer_step(self, *args: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """After the optimizer's step, or after a GradScaler has left it out."""
        let_go(optimizer)
        self._skipped += self.trainer.accelerator.optimizer_step_was_skipped

    def on_pre_optimizer_step(
        self, args: TrainingArguments, *others: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """After the backward pass."""
        if args.device.type == "cpu":
            self.trainer._check_finite()
        else:
            hold_back(optimizer, self.trainer.loss_log.spoiled())

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Sees that what is selected by was measured: what a user's `compute_metrics` returns is not known before.

        Raises:
            RecipeError: If it was not.
        """
        name = (args.metric_for_best_model or "").removeprefix("eval_")
        if name and self.trainer.is_in_train and "eval_runtime" in metrics and f"eval_{name}" not in metrics:
            found = ", ".join(sorted(key.removeprefix("eval_") for key in metrics if key.startswith("eval_")))
            raise RecipeError(
                f"key 'metric_for_best_model': expected a metric of the evaluation, found '{name}' where "
                f"there are {found}"
            )

    def on_train_end(self, args: TrainingArguments, state: TrainerState, *others: Any, **kwargs: Any) -> None:
        """After the last step."""
        self.trainer._check_finite()
        if self._skipped:
            logger.warning(
                f"{self._skipped} of {state.global_step} steps were left out: their float16 gradients overflowed"
            )


def is_over(trainer: Trainer) -> bool:
    """Whether a training that goes on was at its end already, and lost only what follows; it is told to stop then.

    `Trainer` makes a step before it looks.
    """
    state = trainer.state
    stopped = any(
        isinstance(c, EarlyStoppingCallback) and c.early_stopping_patience_counter >= c.early_stopping_patience
        for c in trainer.callback_handler.callbacks
    )
    over = state.global_step > 0 and (state.global_step >= state.max_steps or stopped)
    trainer.control.should_training_stop |= over
    return over


class Clock(TrainerCallback, ExportableState):
    """How long a run has trained, kept in its checkpoints: `Trainer` tells the time since it was last resumed.

    What was trained after the last checkpoint, and lost, does not count: it is trained again.

    Attributes:
        earlier_seconds: Before the part that is running, up to the checkpoint it began from.
    """

    def __init__(self) -> None:
        self.earlier_seconds = 0.0
        self._begin = time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes the time from the checkpoint."""
        saved = state.stateful_callbacks.get(type(self).__name__) if state.global_step > 0 else None
        if state.global_step > 0 and saved is None:
            logger.warning(
                "the checkpoint does not say how long was trained before: train_seconds is of this part alone"
            )
        self.earlier_seconds = saved["attributes"]["earlier_seconds"] if saved else 0.0
        self._begin = time.perf_counter()
        _have_place(self, state)

    def state(self) -> dict[str, Any]:
        """For a checkpoint: what will be earlier to a run that goes on from it."""
        seconds = self.earlier_seconds + time.perf_counter() - self._begin
        return {"args": {}, "attributes": {"earlier_seconds": seconds}}


def _have_place(callback: ExportableState, state: TrainerState) -> None:
    """Where a checkpoint was written without a callback, `Trainer` finds no place for what it would save of it."""
    state.stateful_callbacks.setdefault(type(callback).__name__, callback.state())


def earlier_seconds(trainer: Trainer) -> float:
    """Seconds that a run had trained before it was last resumed."""
    return next(c.earlier_seconds for c in trainer.callback_handler.callbacks if isinstance(c, Clock))


class EarlyStopping(EarlyStoppingCallback):
    """`EarlyStoppingCallback` that goes on counting where a checkpoint left off, and ignores other evaluations.

    All processes stop together because `SupervisedTrainer.evaluation_loop` gives them the same metrics.
    """

    @classmethod
    def of(cls, args: TrainingArguments) -> Self | None:
        """The one that `early_stopping_patience` asks for, if it does."""
        patience = args.early_stopping_patience
        return None if patience is None else cls(patience, args.early_stopping_threshold)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes the count of evaluations without improvement from the checkpoint."""
        super().on_train_begin(args, state, control, **kwargs)
        saved = state.stateful_callbacks.get(type(self).__name__) if state.global_step > 0 else None
        count = saved["attributes"]["early_stopping_patience_counter"] if saved else 0
        self.early_stopping_patience_counter = count
        _have_place(self, state)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Counts an evaluation that has the metric: one of another data set, or of the test split, has not."""
        if f"eval_{args.metric_for_best_model.removeprefix('eval_')}" in metrics:
            super().on_evaluate(args, state, control, metrics, **kwargs)


def renew(trainer: Trainer, *callbacks: TrainerCallback | None) -> None:
    """Puts callbacks of ours in the place of those of their kind that a trainer has; None are those it goes without."""
    ours = [c for c in trainer.callback_handler.callbacks if type(c).__module__.startswith(__package__)]
    for callback in ours:
        trainer.remove_callback(callback)
    for callback in callbacks:
        if callback is not None:
            trainer.add_callback(callback)
