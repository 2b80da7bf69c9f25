"""Distillation by the structure of features."""

from hf_ihb.trainer.arguments import StructuralDistillationTrainingArguments
from hf_ihb.trainer.distillation import DistillationTrainer


class StructuralDistillationTrainer(DistillationTrainer):
    """`DistillationTrainer` with the defaults of learning from features."""

    arguments_class = StructuralDistillationTrainingArguments
