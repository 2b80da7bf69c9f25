"""Callbacks of the trainers."""

from typing import Any

from torch.utils.data import DataLoader
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)


class Hooks(TrainerCallback):
    """Calls back into the trainer where `Trainer` has no method to override."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *args: Any, train_dataloader: DataLoader | None = None, **kwargs: Any) -> None:
        """Before the first step."""
        self.trainer._begin_training(train_dataloader)

    def on_pre_optimizer_step(self, args: TrainingArguments, *others: Any, **kwargs: Any) -> None:
        """After the backward pass."""
        if args.device.type == "cpu":
            self.trainer._check_finite()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """After the last step."""
        self.trainer._check_finite()


def early_stopping(args: TrainingArguments) -> list[TrainerCallback]:
    """The callback that `early_stopping_patience` asks for, if it does."""
    if args.early_stopping_patience is None:
        return []
    return [EarlyStopping(args.early_stopping_patience, args.early_stopping_threshold)]


class EarlyStopping(EarlyStoppingCallback):
    """`EarlyStoppingCallback` that goes on counting where a checkpoint left off, and ignores other evaluations.

    All processes stop together because `SupervisedTrainer.evaluation_loop` gives them the same metrics.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes the count of evaluations without improvement from the checkpoint."""
        super().on_train_begin(args, state, control, **kwargs)
        saved = state.stateful_callbacks.get(type(self).__name__) if state.global_step > 0 else None
        count = saved["attributes"]["early_stopping_patience_counter"] if saved else 0
        self.early_stopping_patience_counter = count

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
