"""Class scores by their correlations, within images and within classes."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_ihb.config.fields import NON_NEGATIVE, POSITIVE, key
from hf_ihb.methods.logits import LogitMethod
from hf_ihb.step import Needs, Step

# probabilities that deviate by less, in root mean square, are the same but for the rounding of their mean
_ROUNDING = 1e-7


@dataclass
class DIST(LogitMethod):
    """``temperature^2 * (beta * mean_b (1 - r(p_s[b], p_t[b])) + gamma * mean_k (1 - r(p_s[:, k], p_t[:, k])))``.

    r is Pearson's correlation, over the classes of an image and over the images of a class; the batch is that of all
    processes.

    References:
        Huang et al., 2022, https://arxiv.org/abs/2205.10536
    """

    name: ClassVar[str] = "dist"
    label: ClassVar[str] = "correlation logit"
    said: ClassVar[tuple[str, ...]] = ("dist_weight", "dist_beta", "dist_gamma", "dist_temperature")

    dist_weight: float = key(0.0, "Weight of 1 - correlation of class probabilities.", within=NON_NEGATIVE)
    dist_warmup_epochs: float = key(0.0, "Warm-up of dist_weight.", within=NON_NEGATIVE, unit="epochs")
    dist_beta: float = key(
        2.0, "DIST: weight of correlations over the classes of an image; 2 for CIFAR-100.", within=NON_NEGATIVE
    )
    dist_gamma: float = key(
        2.0, "DIST: weight of correlations over the images of a class; 2 for CIFAR-100.", within=NON_NEGATIVE
    )
    dist_temperature: float = key(
        4.0,
        "DIST: softmax temperature of student and teacher; 4 for CIFAR-100.",
        within=POSITIVE,
        unit="dimensionless",
    )

    @property
    def references(self) -> tuple[tuple[str, str], ...]:
        """What it stands on."""
        return (("DIST: Huang et al., 2022", "2205.10536"),)

    @property
    def needs(self) -> Needs:
        """The teacher's class scores."""
        return Needs(logits=True, statistics=True)

    def head_loss(self, logits: Tensor, step: Step) -> Tensor:
        """Of one head's logits ``(B, K)``."""
        with torch.autocast(logits.device.type, enabled=False):
            both = step.gathered(logits.float(), step.teacher.logits.float())
            student, teacher = (_above_uniform(x / self.dist_temperature) for x in both)
            of_images, of_classes = (1 - _correlation(student, teacher, dim).mean() for dim in (1, 0))
            return self.dist_temperature**2 * (self.dist_beta * of_images + self.dist_gamma * of_classes)

    def describe(self) -> str:
        """Its term of the loss."""
        text = "1 - correlation with the teacher's class probabilities within images (weight {dist_beta:g}) and within "
        return text + "classes (weight {dist_gamma:g}) at temperature {dist_temperature:g} (weight {dist_weight:g})"


def _above_uniform(logits: Tensor) -> Tensor:
    """``(B, K)`` softmax less 1 / K, with all its digits where scores are nearly the same, as in a first step."""
    above = torch.expm1(logits - logits.detach().amax(dim=1, keepdim=True))
    return (above - above.mean(dim=1, keepdim=True)) / (logits.shape[1] + above.sum(dim=1, keepdim=True))


def _correlation(x: Tensor, y: Tensor, dim: int) -> Tensor:
    """Pearson's correlation of two ``(B, K)`` along a dimension; 0, without a gradient, where one is constant."""
    units = []
    for z in (x, y):
        deviation = z - z.mean(dim=dim, keepdim=True)
        squared = deviation.square().sum(dim=dim, keepdim=True)
        varies = squared > z.shape[dim] * _ROUNDING**2
        units.append(deviation * torch.where(varies, squared, 1).rsqrt() * varies)
    return (units[0] * units[1]).sum(dim=dim)
