"""Structural distillation in the manner of the published study."""

from typing import Any

from hf_ihb.step import Step
from hf_ihb.trainer import StructuralDistillationTrainer

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

    def prepare(self, inputs: dict[str, Any], train: bool) -> Step:
        """As the trainer's own, and once more what the teacher says."""
        step = super().prepare(inputs, train)
        if train:
            step.teacher = self.teacher_side.outputs(step, shuffled=False)
        return step
