"""Arguments that change between trainings of one trainer: the values of a trial, or what a user set in between."""

import copy
import dataclasses
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import HPSearchBackend
from transformers.utils import logging

from hf_ihb.config.augmentation import AugmentationArguments
from hf_ihb.config.fields import expected_value, matches, plain, shown, type_hints
from hf_ihb.errors import RecipeError
from hf_ihb.trainer.averaging import Averaging
from hf_ihb.trainer.callbacks import Clock, EarlyStopping, Hooks, renew
from hf_ihb.trainer.checkpoints import Checkpoints
from hf_ihb.trainer.checks import check_metrics
from hf_ihb.trainer.fitting import fit_batch_norms
from hf_ihb.trainer.idle_heads import IdleHeads

logger = logging.get_logger(__name__)


class Trials:
    """Gives a trainer the arguments of a training, checked as those it was made with, before its model is made.

    Stock `Trainer` writes the values of a trial into the arguments after `model_init`, unchecked, cast to the type of
    what was there (0.003 becomes 0 where the recipe said 1), and leaves those of the trial before where a search space
    does not name them. Here each trial starts from the arguments of the search.

    Args:
        trainer: Its arguments are changed in place.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._base: tuple[Any, AugmentationArguments] | None = None

    def start(self) -> None:
        """Keeps what each trial of a search starts from."""
        self._base = (copy.copy(self.trainer.args), self.trainer.augmentation)

    def begin(self, trial: Any) -> None:
        """Takes the values of a trial, or those that were set by hand since, and makes anew what read others.

        Raises:
            RecipeError: If a value is none of those its key takes, contradicts another, or cannot be honoured.
        """
        trainer = self.trainer
        if trainer.hp_search_backend is None or trial is None:
            augmentation, args, values, where = trainer.augmentation, trainer.args, {}, "arguments of the trainer"
            if args.is_as_made and augmentation is trainer.batches.augmentation:
                return
        else:
            (args, augmentation), values = self._base, self._values_of(trial)
            where = f"trial {getattr(trial, 'number', '')}".rstrip()
        try:
            new, augmentation = self._checked(args, augmentation, values)
        except (TypeError, ValueError) as error:
            raise RecipeError(f"{where}: {error}") from error
        trainer.args.take(new)
        trainer.augmentation = augmentation
        trainer.create_accelerator_and_postprocess()  # takes the seed of the data's order, and accumulation
        trainer.batches = trainer.batches.remade(trainer.args, augmentation)
        trainer._fit_to_arguments()

    def _values_of(self, trial: Any) -> dict[str, Any]:
        optuna = self.trainer.hp_search_backend == HPSearchBackend.OPTUNA
        values = dict(self.trainer.hp_space(trial) if optuna else trial)
        return {name: plain(value) for name, value in values.items() if name != "wandb"}

    def _checked(
        self, args: Any, augmentation: AugmentationArguments, values: dict[str, Any]
    ) -> tuple[Any, AugmentationArguments]:
        training, mixing = ({f.name for f in dataclasses.fields(x) if f.init} for x in (args, augmentation))
        if unknown := values.keys() - training - mixing:
            if not self.trainer.model_init.takes_trial:
                raise ValueError(
                    f"key '{sorted(unknown)[0]}': expected an argument of training or augmentation, or a `model_init` "
                    "that takes the trial, found neither"
                )
            logger.warning_once(f"left to model_init, being no arguments of training: {', '.join(sorted(unknown))}")
        if "teacher_dtype" in values:
            raise ValueError("key 'teacher_dtype': expected no key of a trial: the teacher is converted once, for all")
        new = args.remade(**{name: _typed(args, name, value) for name, value in values.items() if name in training})
        augmentation = dataclasses.replace(augmentation, **{k: v for k, v in values.items() if k in mixing})
        new.check_with([augmentation])
        return new, augmentation


def _typed(args: Any, name: str, value: Any) -> Any:
    """A value as its key takes it: a search draws whole numbers as floats as well."""
    hint = type_hints(type(args))[name]
    if not matches(value, hint) and isinstance(value, float) and value.is_integer():
        value = int(value)
    if not matches(value, hint):
        raise ValueError(f"key '{name}': expected {expected_value(type(args), name)}, found {shown(value)}")
    return value


def fit_to_arguments(trainer: Trainer) -> None:
    """Makes what reads the arguments when it is made, for the first time or in the place of what there is.

    Raises:
        RecipeError: If the arguments do not fit the student, the metrics or the way the run is started.
    """
    args = trainer.args
    args.set_float32_precision()
    check_metrics(trainer)
    trainer._autocasts = fit_batch_norms(trainer)
    trainer._averaging = Averaging(trainer)
    trainer.checkpoints = Checkpoints(trainer, trainer._averaging)
    own = (trainer._averaging, EarlyStopping.of(args), IdleHeads(trainer), Clock(), Hooks(trainer))
    renew(trainer, *own, trainer.checkpoints.preemption)
