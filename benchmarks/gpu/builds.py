"""Trainers as checks and measurements need them: any recipe's student, any loss, a random teacher."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from transformers import Dinov2Config, Dinov2Model, PreTrainedModel

from gpu.job import ROOT, Context
from gpu.machine import data_arguments
from hf_ihb.config.augmentation import AugmentationArguments
from hf_ihb.config.model import ModelArguments
from hf_ihb.data import ImageData, load_image_data
from hf_ihb.models.processing import PixelFormat, pixel_format
from hf_ihb.models.student import build_student
from hf_ihb.models.teacher import Teacher
from hf_ihb.trainer import LogitDistillationTrainer, StructuralDistillationTrainer, SupervisedTrainer
from hf_ihb.trainer.arguments import (
    LogitDistillationTrainingArguments,
    StructuralDistillationTrainingArguments,
    SupervisedTrainingArguments,
)

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
WAYS = {
    "labels": (SupervisedTrainer, SupervisedTrainingArguments),
    "logits": (LogitDistillationTrainer, LogitDistillationTrainingArguments),
    "structural": (StructuralDistillationTrainer, StructuralDistillationTrainingArguments),
}


def read_keys(recipe: str, arguments: type) -> dict[str, Any]:
    """What a recipe, named from the top of the checkout, says of one class of arguments."""
    content = json.loads((ROOT / recipe).read_text("utf-8"))
    return {name: value for name, value in content.items() if name in arguments.__dataclass_fields__}


def dinov2(width: int = 384, depth: int = 12, heads: int = 6) -> Dinov2Model:
    """A DINOv2-small with random weights, the same in each process; or a smaller one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return Dinov2Model(
            Dinov2Config(
                hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, patch_size=14, image_size=518
            )
        )


class Builder:
    """Makes trainers on the data of part 1.

    Args:
        context: Of the job.
        **limits: Keys of the data such as ``max_train_samples``.
    """

    def __init__(self, context: Context, **limits: Any) -> None:
        self.context = context
        self.data: ImageData = load_image_data(data_arguments(context, **limits))
        self.statistics = self.data.train.statistics()

    def model(self, keys: Mapping[str, Any]) -> tuple[PreTrainedModel, Any]:
        """A model and its image processor, from a fixed seed."""
        torch.manual_seed(0)
        return build_student(ModelArguments(**keys), self.data.label_names, self.data.image_size, *self.statistics)

    def classifier(self, architecture: str) -> Teacher:
        """A CNN with random weights as teacher."""
        model, processor = self.model({"architecture": architecture})
        return Teacher(model, pixel_format(processor), self.data.label_names, control="untrained")

    def features(self, size_px: int, **shape: int) -> Teacher:
        """A DINOv2 with random weights as teacher."""
        return Teacher(dinov2(**shape), PixelFormat(*IMAGENET, (size_px, size_px)), control="untrained")

    def trainer(
        self,
        way: str,
        student: Mapping[str, Any],
        augmentation: AugmentationArguments,
        teacher: Teacher | None = None,
        **settings: Any,
    ) -> Any:
        """A trainer of one of the `WAYS`.

        Args:
            way: Which.
            student: Keys of `ModelArguments`.
            augmentation: What images go through.
            teacher: Of the ways that have one.
            **settings: Keys of its arguments.
        """
        trainer_class, arguments = WAYS[way]
        folder = self.context.folder / "trainers" / way
        fixed = {"output_dir": str(folder), "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
        fixed |= {"use_cpu": self.context.device == "cpu"}
        if teacher is not None:
            fixed |= {"teacher_cache_dir": str(self.context.folder / "teacher_caches")}
        model, processor = self.model(student)
        return trainer_class(
            model,
            arguments(**(fixed | settings)),
            train_dataset=self.data.train,
            eval_dataset=self.data.validation,
            processing_class=processor,
            augmentation=augmentation,
            **({} if teacher is None else {"teacher_model": teacher}),
        )
