"""Attention transfer: where the patches of the student look, against where the teacher's do."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_ihb.config.fields import NON_NEGATIVE, key
from hf_ihb.functional.logits import tilted_divergence
from hf_ihb.methods.base import Method, batch_mean
from hf_ihb.step import Needs, Step, StudentOutput

_TINY = 1e-12


@dataclass
class AttentionTransfer(Method):
    """``KL(A_t || A_s)`` of attention between patches, mean over queries, images and layers, in nats.

    A is the mean over heads, from patch to patch: tokens before the patches are left out, and each row is normalised
    over those that lie inside the teacher's image. The teacher is asked in every step, as no cache holds its maps; both
    models are ViTs with attention over all patches. Where a student lacks what made the teacher's maps, LayerScale or
    registers, it may be worse with them than without: a likely negative control for DINOv2, CLIP and BEiT.

    References:
        Li et al., 2024, https://arxiv.org/abs/2411.09702; its failures: https://arxiv.org/abs/2605.07191
    """

    name: ClassVar[str] = "attention"
    label: ClassVar[str] = "attention"
    said: ClassVar[tuple[str, ...]] = ("attention_weight",)

    attention_weight: float = key(
        0.0,
        "Weight of attention transfer: KL divergence of the attention between patches from a ViT, mean over heads. A "
        "likely negative control for teachers such as DINOv2, CLIP and BEiT (arXiv 2605.07191).",
        within=NON_NEGATIVE,
    )
    attention_warmup_epochs: float = key(0.0, "Warm-up of attention_weight.", within=NON_NEGATIVE, unit="epochs")

    @property
    def references(self) -> tuple[tuple[str, str], ...]:
        """What it stands on."""
        return (
            ("Attention transfer: Li et al., 2024", "2411.09702"),
            ("Where attention transfer fails", "2605.07191"),
        )

    @property
    def needs(self) -> Needs:
        """Attention of both sides, and the grids of their tokens."""
        return Needs(layers="tokens", because="attention_weight", attention=True, teacher_attention=True)

    def loss(self, student: StudentOutput, step: Step) -> Tensor:
        """A scalar."""
        weight, losses = step.weight(), []
        layers = step.teacher.layers[self.needs.preparation]
        sides = zip(self.shared.student_layers, student.features, step.teacher.attentions, layers, strict=True)
        for block, tokens, teacher, layer in sides:
            own = student.attentions[block].mean(dim=1)
            patches = slice(own.shape[1] - tokens.shape[1], None)  # the others come before
            losses.append(batch_mean(_divergence(own[:, patches, patches], teacher, layer.mask), weight))
        return torch.stack(losses).mean()

    def describe(self) -> str:
        """Its term of the loss."""
        text = "KL divergence of the attention between patches, mean over heads (weight {attention_weight:g}; a likely "
        return text + "negative control for teachers such as DINOv2, CLIP and BEiT)"


def _divergence(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """``(B,)`` KL divergence of the rows of ``(B, N, N)``, mean over queries by their ``(B, N)`` share; 0 without."""
    with torch.autocast(student.device.type, enabled=False):
        share = mask.float()
        weighed = teacher.float() * share[:, None]
        log_teacher = weighed.clamp_min(_TINY).log()
        keys = (share > 0)[:, None]
        # a column's share is that of both sides, and what has none is left out of both; finite, for its gradient
        probabilities = log_teacher.masked_fill(~keys, torch.finfo(log_teacher.dtype).min).log_softmax(dim=-1)
        difference = (student.float() * share[:, None]).clamp_min(_TINY).log() - log_teacher
        _, divergence = tilted_divergence(probabilities, difference.masked_fill(~keys, 0))
        return (share * divergence).sum(dim=-1) / share.sum(dim=-1).clamp_min(_TINY)
