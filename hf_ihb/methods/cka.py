"""CKA between the features of student and teacher."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from hf_ihb.config.fields import NON_NEGATIVE, POSITIVE, key
from hf_ihb.functional.similarity import center_positions, linear_cka, published_cka, rbf_cka
from hf_ihb.methods.base import Method, TokenPair, Widths, as_one, batch_mean, pairs_of
from hf_ihb.methods.paired import paired_head
from hf_ihb.step import Needs, Step, StudentOutput

_SCOPES = {"tokens": "the tokens of an image", "pooled": "all tokens of a batch", "images": "the images of a batch"}


@dataclass
class CKA(Method):
    """``1 - CKA`` of patch tokens, mean over layers; no projection stands on either side.

    References:
        Kornblith et al., 2019, https://arxiv.org/abs/1905.00414; debiased: Murphy et al., 2024,
        https://arxiv.org/abs/2405.01012
    """

    name: ClassVar[str] = "cka"
    label: ClassVar[str] = "CKA"
    said: ClassVar[tuple[str, ...]] = ("cka_weight", "cka_scope", "cka_estimator", "cka_kernel")

    cka_weight: float = key(0.0, "Weight of 1 - CKA.", within=NON_NEGATIVE)
    cka_warmup_epochs: float = key(0.0, "Warm-up of cka_weight.", within=NON_NEGATIVE, unit="epochs")
    cka_scope: Literal["tokens", "pooled", "images"] = key(
        "tokens",
        "CKA over the tokens of each image; over all tokens of the batch, pooled; or over its images (mean tokens). "
        "The batch is that of all processes; gradient accumulation does not widen it.",
    )
    cka_estimator: Literal["biased", "debiased", "published"] = key(
        "debiased",
        "Estimator of CKA; 'published' is the biased one of L2-normalised tokens with an absolute epsilon.",
        published={"published": "the epsilon drowns the value where the tokens of an image are alike"},
    )
    cka_kernel: Literal["linear", "rbf"] = key("linear", "Kernel of CKA; 'rbf' not with cka_scope 'pooled'.")
    rbf_bandwidth: float = key(
        1.0, "Width of the RBF kernel as a multiple of the median distance.", within=POSITIVE, unit="median distances"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cka_kernel == "rbf" and self.cka_scope == "pooled":
            raise ValueError("keys 'cka_kernel' and 'cka_scope' contradict: an RBF kernel of all tokens has no room")
        if self.cka_estimator == "published" and (self.cka_scope == "pooled" or self.cka_kernel == "rbf"):
            raise ValueError(
                "keys 'cka_estimator' and 'cka_scope' contradict: 'published' compares tokens or images, linearly"
            )

    @property
    def references(self) -> tuple[tuple[str, str], ...]:
        """What it stands on."""
        return (("CKA: Kornblith et al., 2019", "1905.00414"),)

    @property
    def needs(self) -> Needs:
        """Inner products of an image's tokens, where that is what is compared."""
        because = "cka_scope" if self.cka_scope != "tokens" else None
        because = "teacher_projector" if self.shared.teacher_projector == "trainable" else because
        return Needs(
            layers="gram" if because is None else "tokens",
            because=because,
            preparation="centered" if self.shared.center_positions else "plain",
            statistics=self.cka_scope != "tokens" or self.shared.center_positions,
        )

    def head(self, widths: Widths) -> nn.Module | None:
        """None, but for the published study's."""
        return paired_head(self.shared, widths, self.needs.preparation)

    def loss(self, student: StudentOutput, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """Beside the loss the share of images (of batches, where CKA is one number a batch) without a defined value.

        Their loss is the constant 1.
        """
        layers, weight = pairs_of(self, student, step), step.weight()
        if self.shared.center_positions:
            layers = [p._replace(student=center_positions(p.student, weight, reduce=step.reduce)) for p in layers]
        if self.cka_scope == "tokens":
            layers, weight = as_one(layers, weight)
        values, undefined = zip(*(self._layer_loss(pair, weight, step) for pair in layers), strict=True)
        return torch.stack(values).mean(), {"cka_undefined": torch.stack(undefined).mean()}

    def _layer_loss(self, pair: TokenPair, weight: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """``1 - CKA`` of one pair of layers, and the share of its values that are undefined.

        Scope ``tokens`` is over the tokens of each image, then the mean over images. ``pooled`` is over the tokens of
        all images, ``images`` over the images, each its mean token; these two are not additive over batches.
        """
        if self.cka_scope == "tokens":
            similarity = self._similarity(pair.student, pair.teacher, pair.mask)
            undefined = similarity.isnan() & (weight > 0)
            return batch_mean(1 - similarity.nan_to_num(0.0), weight), undefined.float().mean()
        if self.cka_scope == "pooled":
            mask = (pair.mask * weight[:, None]).flatten()
            rows = (pair.student.flatten(0, 1), pair.teacher.flatten(0, 1))
            similarity = linear_cka(*rows, self.cka_estimator, mask=mask, reduce=step.reduce)
        else:
            student, teacher, weight = step.gathered(*pair.image_means(), weight)
            similarity = self._similarity(student, teacher, weight > 0)
        return 1 - similarity.nan_to_num(0.0), similarity.isnan().float()

    def _similarity(self, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        if self.cka_estimator == "published":
            return published_cka(x, y, mask=mask)
        if self.cka_kernel == "rbf":
            return rbf_cka(x, y, self.cka_estimator, mask=mask, bandwidth=self.rbf_bandwidth)
        return linear_cka(x, y, self.cka_estimator, mask=mask)

    def describe(self) -> str:
        """Its term of the loss."""
        what = f"(1 - CKA) over {_SCOPES[self.cka_scope]}"
        return what + " ({cka_kernel} kernel, {cka_estimator} estimator, weight {cka_weight:g})"
