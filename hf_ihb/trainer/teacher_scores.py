"""What a teacher decides on images that are evaluated on: its accuracy, and whom the student agrees with."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import Trainer

from hf_ihb.data import host_index
from hf_ihb.errors import NumericsError, TeacherMismatchError
from hf_ihb.trainer.teacher_side import spread

_SCORED_TRAINING_IMAGES = 1000


class _Decisions:
    """The classes a teacher gave to the images of a split, and which of them it was asked about.

    The second is kept on the host: asking a device in every batch of an evaluation would wait for it each time.
    """

    def __init__(self, device: torch.device) -> None:
        self._classes = torch.zeros(0, dtype=torch.long, device=device)
        self._known = np.zeros(0, bool)

    def knows(self, rows: np.ndarray) -> bool:
        """Whether it was asked about all of some rows."""
        return rows.max(initial=-1) < len(self._known) and bool(self._known[rows].all())

    def keep(self, rows: np.ndarray, index: Tensor, classes: Tensor) -> None:
        """Takes the classes of some rows, given on the host and on the device."""
        if (missing := rows.max(initial=-1) + 1 - len(self._known)) > 0:
            grown = max(int(missing), len(self._known))  # twice as many, so that it seldom grows
            self._known = np.append(self._known, np.zeros(grown, bool))
            self._classes = torch.cat((self._classes, self._classes.new_zeros(grown)))
        self._classes[index] = classes
        self._known[rows] = True

    def __call__(self, index: Tensor) -> Tensor:
        """``(B,)`` classes of some rows."""
        return self._classes[index]


class TeacherScores:
    """Asks a trainer's teacher once about each stored image that is evaluated on.

    Args:
        trainer: With a teacher whose class scores are learned from.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._decisions: dict[str, _Decisions] = {}
        self._overflows: Tensor | int = 0  # images, added up on the device

    def decisions(self, inputs: Mapping[str, Any]) -> Tensor:
        """``(B,)`` the teacher's classes for a batch that is evaluated on."""
        index, split = inputs.get("index"), inputs.get("split")
        if index is None or split is None or inputs["pixel_values"].dtype != torch.uint8:
            return self._ask(inputs)
        known = self._decisions.setdefault(split, _Decisions(index.device))
        rows = host_index(inputs)
        if not known.knows(rows):
            known.keep(rows, index, self._ask(inputs))
        return known(index)

    def _ask(self, inputs: Mapping[str, Any]) -> Tensor:
        logits = self.trainer.teacher_side.logits(inputs)
        self._overflows = self._overflows + (~logits.isfinite()).any(-1).sum()
        return logits.argmax(-1)

    def accuracy(self) -> float:
        """Accuracy on the evaluation set, or on training images if there is none.

        Raises:
            NumericsError: If a class score is not a finite number.
            TeacherMismatchError: If it is not above chance by three standard errors and not the untrained control.
        """
        trainer = self.trainer
        if trainer.eval_dataset is not None:
            datasets = trainer.eval_dataset
            loader = trainer.get_eval_dataloader(next(iter(datasets.values())) if isinstance(datasets, dict) else None)
        else:
            loader = trainer.get_eval_dataloader(spread(trainer.train_dataset, _SCORED_TRAINING_IMAGES))
        correct, count = 0, 0  # added up on the device: nothing is waited for
        for inputs in tqdm(loader, desc="Scoring the teacher", disable=trainer.is_quiet):
            inputs = trainer._prepare_inputs(inputs)
            labels = inputs["labels"].argmax(-1) if inputs["labels"].ndim == 2 else inputs["labels"]
            hits = trainer.accelerator.gather_for_metrics(self.decisions(inputs) == labels)
            correct, count = correct + hits.sum(), count + len(hits)
        if overflows := int(trainer.accelerator.reduce(torch.as_tensor(self._overflows), "sum")):
            raise NumericsError(
                f"teacher '{trainer.teacher.name}': expected finite class scores, found NaN or Inf for {overflows} of "
                f"{count} images in {trainer.teacher_side.precision}: its weights are damaged, or too large for that "
                "precision (see 'teacher_dtype', and --mixed_precision of the launcher)"
            )
        accuracy, chance = int(correct) / count, 1 / trainer.student.config.num_labels
        control = trainer.teacher.control
        if control != "untrained" and accuracy <= chance + 3 * (chance * (1 - chance) / count) ** 0.5:
            raise TeacherMismatchError(
                f"teacher '{trainer.teacher.name}': expected accuracy above chance, {chance:.3f}, found "
                f"{accuracy:.3f} on {count} images; its labels are probably in another order, or it wants other pixels"
            )
        return accuracy
