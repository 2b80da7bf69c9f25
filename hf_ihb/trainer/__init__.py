"""Trainers: supervised, and distillation by logits or by structure, each a `transformers.Trainer`."""

from hf_ihb.trainer.distillation import DistillationTrainer
from hf_ihb.trainer.logits import LogitDistillationTrainer
from hf_ihb.trainer.structural import StructuralDistillationTrainer
from hf_ihb.trainer.supervised import SupervisedTrainer

__all__ = ["DistillationTrainer", "LogitDistillationTrainer", "StructuralDistillationTrainer", "SupervisedTrainer"]
