"""What every distillation trainer shares: the frozen teacher and what it sees."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from transformers import PreTrainedModel, TrainingArguments

from hf_ihb.arguments import DistillationTrainingArguments
from hf_ihb.errors import DataError, RecipeError
from hf_ihb.models.processing import pixel_format
from hf_ihb.models.teacher import Teacher
from hf_ihb.trainer.supervised import SupervisedTrainer
from hf_ihb.views import Views, as_float


class DistillationTrainer(SupervisedTrainer):
    """Base of the distillation trainers: owns the frozen teacher and what it sees.

    A teacher whose `control` is ``shuffled`` sees the next image of the per-device batch in training: pairs are lost,
    the distribution of what it says stays. In evaluation, and where statistics are taken, it sees its own.

    Args:
        teacher_model: A `Teacher`, or a model of transformers, which is frozen in place.
        teacher_processor: The image processor of a `teacher_model` that is not a `Teacher`; needed for stored images.
        **kwargs: As in `SupervisedTrainer`. A batch of the user's own may bring ``teacher_pixel_values``; otherwise
            the teacher sees its ``pixel_values``.
    """

    arguments_class = DistillationTrainingArguments
    needs_logits = False

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: TrainingArguments | None = None,
        *positional: Any,
        teacher_model: Teacher | PreTrainedModel,
        teacher_processor: Any = None,
        **kwargs: Any,
    ) -> None:
        ready = isinstance(teacher_model, Teacher)
        pixels = None if teacher_processor is None else pixel_format(teacher_processor)
        self.teacher = teacher_model if ready else Teacher(teacher_model, pixels)
        self._breaks_pairs = False
        if self.teacher.control == "shuffled" and args.per_device_train_batch_size < 2:
            raise RecipeError(
                "keys 'teacher_control' and 'per_device_train_batch_size' contradict: one image has no next"
            )
        super().__init__(model, args, *positional, **kwargs)
        self.teacher.to(self.args.device)
        if self.needs_logits and not ready:
            self.teacher.align_labels(list(self.student.config.id2label.values()))
        self._teacher_decisions: dict[int, tuple[Dataset, Tensor]] = {}

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As `SupervisedTrainer.training_step`; the only place where a ``shuffled`` teacher is."""
        self._breaks_pairs = self.teacher.control == "shuffled"
        try:
            return super().training_step(model, inputs, num_items_in_batch)
        finally:
            self._breaks_pairs = False

    def _teacher_pixels(self, inputs: dict[str, Any], views: Views | None) -> Tensor:
        """What the teacher sees of a batch, normalised."""
        if "teacher_pixel_values" in inputs:
            pixels = inputs["teacher_pixel_values"]
        elif views is not None:
            pixels = self.teacher.prepare(views.augmented if self.args.teacher_view == "identical" else views.stored)
        else:
            pixels = inputs["pixel_values"]
            pixels = self.teacher.prepare(as_float(pixels)) if pixels.dtype == torch.uint8 else pixels
        return pixels.roll(-1, dims=0) if self._breaks_pairs else pixels


def spread(dataset: Dataset, count: int) -> Dataset:
    """`count` items at even distances, so that a set sorted by class is not cut to its first classes."""
    if not hasattr(dataset, "__len__"):
        raise DataError("expected a training set with a length, to score the teacher or take its statistics from it")
    rows = torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).long().unique()
    return Subset(dataset, rows.tolist())
