"""Tokens of the student, linearly lifted, against those of the teacher, channel by channel."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_ihb.config.fields import NON_NEGATIVE, key
from hf_ihb.methods.base import Method, TokenPair, Widths, as_one, batch_mean, pairs_of
from hf_ihb.methods.token import LinearMaps
from hf_ihb.step import Needs, Step, StudentOutput

_TINY = 1e-12


@dataclass
class FeatureMSE(Method):
    """``(W s - t)^2``, or smooth L1, of student tokens s and standardised teacher tokens t, and W a linear lift.

    Mean over channels, tokens, images and layers; 1 for a lift that says nothing. Smooth L1 is ``e^2 / 2`` where an
    error is below 1 and ``|e| - 1/2`` elsewhere, so that outlier tokens do not decide.

    References:
        Romero et al., 2015, https://arxiv.org/abs/1412.6550 (there through a convolution)
    """

    name: ClassVar[str] = "feature_mse"
    label: ClassVar[str] = "feature"
    said: ClassVar[tuple[str, ...]] = ("feature_mse_weight", "feature_mse_type")

    feature_mse_weight: float = key(
        0.0,
        "Weight of the squared error of linearly lifted student tokens and standardised teacher tokens.",
        within=NON_NEGATIVE,
    )
    feature_mse_warmup_epochs: float = key(0.0, "Warm-up of feature_mse_weight.", within=NON_NEGATIVE, unit="epochs")
    feature_mse_type: Literal["mse", "smooth_l1"] = key(
        "mse", "Error of features: squared, or 'smooth_l1', which is linear above 1."
    )

    @property
    def references(self) -> tuple[tuple[str, str], ...]:
        """What it stands on."""
        return (("FitNets: Romero et al., 2015", "1412.6550"),)

    @property
    def needs(self) -> Needs:
        """The tokens themselves."""
        return Needs(layers="tokens", because="feature_mse_weight", preparation="standardized")

    def head(self, widths: Widths) -> nn.Module:
        """A linear lift for each layer."""
        return LinearMaps(nn.Linear(own, other) for own, other in zip(widths.student, widths.teacher, strict=True))

    def loss(self, student: StudentOutput, step: Step) -> Tensor:
        """A scalar."""
        layers, weight = as_one(pairs_of(self, student, step), step.weight())
        with torch.autocast(weight.device.type, enabled=False):
            return torch.stack([batch_mean(self._error(pair), weight) for pair in layers]).mean()

    def _error(self, pair: TokenPair) -> Tensor:
        """``(B,)`` of one layer, over the tokens that lie inside the teacher's image."""
        error = F.mse_loss if self.feature_mse_type == "mse" else F.smooth_l1_loss
        of_tokens = error(pair.student.float(), pair.teacher.float(), reduction="none").mean(dim=-1)
        share = pair.mask.float()
        return (share * of_tokens).sum(dim=-1) / share.sum(dim=-1).clamp_min(_TINY)

    def describe(self) -> str:
        """Its term of the loss."""
        kind = "squared error" if self.feature_mse_type == "mse" else "smooth L1 distance"
        return kind + " of linearly lifted tokens (weight {feature_mse_weight:g})"
