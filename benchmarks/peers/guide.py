"""Online logit distillation in the manner of the Hub's guide to knowledge distillation for computer vision."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, Trainer


class CrossEntropyTrainer(Trainer):
    """Stock `Trainer` on labels, for students whose forward has no loss."""

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, **kwargs: Any) -> Any:
        """Cross-entropy of the logits."""
        outputs = model(pixel_values=inputs["pixel_values"])
        loss = F.cross_entropy(outputs.logits, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


class GuideTrainer(Trainer):
    """A `Trainer` that asks the teacher in `compute_loss`, about the pixels that the student sees.

    Args:
        teacher: Gives logits; moved to the device and set to eval mode.
        temperature: Of both softmaxes.
        weight: Of the distillation loss.
        **kwargs: As in `Trainer`.
    """

    def __init__(self, *, teacher: PreTrainedModel, temperature: float, weight: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.teacher = teacher.to(self.args.device).eval()
        self.temperature, self.weight = temperature, weight

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, **kwargs: Any) -> Any:
        """Cross-entropy and temperature-scaled divergence."""
        with torch.no_grad():
            teacher = self.teacher(pixel_values=inputs["pixel_values"]).logits
        outputs = model(pixel_values=inputs["pixel_values"])
        soft = F.kl_div(
            (outputs.logits / self.temperature).log_softmax(-1),
            (teacher / self.temperature).softmax(-1),
            reduction="batchmean",
        )
        hard = F.cross_entropy(outputs.logits, inputs["labels"])
        loss = (1 - self.weight) * hard + self.weight * self.temperature**2 * soft
        return (loss, outputs) if return_outputs else loss
