"""Structural distillation in the manner of the published study."""

from typing import Any

from torch import Tensor

from hf_ihb.trainer import StructuralDistillationTrainer
from hf_ihb.views import Views

# Four layers, trainable heads on both sides of each layer of each loss, a teacher at 224 px, activation checkpointing.
KEYS = {
    "teacher_cache": "off",
    "teacher_projector": "trainable",
    "teacher_view": "clean",
    "center_positions": False,
    "cka_estimator": "published",
    "cka_weight": 0.5,
    "token_weight": 0.5,
    "relation_weight": 0.05,
    "relation_include_self": True,
    "task_heads": "cls",
    "gradient_checkpointing": True,
}


class PublishedWay(StructuralDistillationTrainer):
    """Asks the teacher twice a step, once for the token and once for the CKA loss, as the study's engine did."""

    def _teacher_answer(self, inputs: dict[str, Any], views: Views | None) -> list[Tensor]:
        super()._teacher_answer(inputs, views)
        return super()._teacher_answer(inputs, views)
