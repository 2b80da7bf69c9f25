"""Distillation by class scores."""

from hf_ihb.trainer.arguments import LogitDistillationTrainingArguments
from hf_ihb.trainer.distillation import DistillationTrainer


class LogitDistillationTrainer(DistillationTrainer):
    """`DistillationTrainer` with the defaults of learning from class scores."""

    arguments_class = LogitDistillationTrainingArguments
