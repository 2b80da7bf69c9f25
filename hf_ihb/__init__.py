"""Knowledge distillation between image models of different families, on `transformers.Trainer`."""

from hf_ihb.config.augmentation import AugmentationArguments
from hf_ihb.config.data import DataArguments
from hf_ihb.config.model import ModelArguments, TeacherArguments
from hf_ihb.data import load_image_data, open_image_data
from hf_ihb.models.processing import pixel_format
from hf_ihb.models.student import build_student
from hf_ihb.models.teacher import Teacher, load_teacher
from hf_ihb.trainer import (
    DistillationTrainer,
    LogitDistillationTrainer,
    StructuralDistillationTrainer,
    SupervisedTrainer,
)
from hf_ihb.trainer.arguments import (
    DistillationTrainingArguments,
    LogitDistillationTrainingArguments,
    StructuralDistillationTrainingArguments,
    SupervisedTrainingArguments,
)

__all__ = [
    "AugmentationArguments",
    "DataArguments",
    "DistillationTrainer",
    "DistillationTrainingArguments",
    "LogitDistillationTrainer",
    "LogitDistillationTrainingArguments",
    "ModelArguments",
    "StructuralDistillationTrainer",
    "StructuralDistillationTrainingArguments",
    "SupervisedTrainer",
    "SupervisedTrainingArguments",
    "Teacher",
    "TeacherArguments",
    "build_student",
    "load_image_data",
    "load_teacher",
    "open_image_data",
    "pixel_format",
]
__version__ = "0.1.0"
