"""Which tokens of an image each token is like, to the student and to the teacher."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_ihb.config.fields import NON_NEGATIVE, POSITIVE, key
from hf_ihb.functional.logits import tilted_divergence
from hf_ihb.functional.similarity import center_positions, cosine_similarities
from hf_ihb.methods.base import Method, TokenPair, as_one, batch_mean, pairs_of
from hf_ihb.step import Needs, Step, StudentOutput

_TINY = 1e-12


@dataclass
class PatchSimilarity(Method):
    """``KL(p_t || p_s)``, p the softmax of a token's cosine similarities to the other tokens of its image, in nats.

    Mean over tokens, images and layers. Each token's similarity to itself, which is always 1, is left out. Tokens count
    by their share inside the teacher's image, as rows and as what a row is compared with; an image of one token costs
    nothing. The published relations are products of queries, keys or values, over the root of their width and with each
    token's own; here they are of the tokens, so that inner products are all that is asked of the teacher.

    References:
        Wang et al., 2020 (MiniLM, of language models), https://arxiv.org/abs/2002.10957; Ren et al., 2023 (TinyMIM, of
        ViTs), https://arxiv.org/abs/2301.01296
    """

    name: ClassVar[str] = "patch_similarity"
    label: ClassVar[str] = "patch-similarity"
    said: ClassVar[tuple[str, ...]] = ("patch_similarity_weight", "patch_similarity_temperature")

    patch_similarity_weight: float = key(
        0.0,
        "Weight of the divergence between the similarities of each token to the others of its image.",
        within=NON_NEGATIVE,
    )
    patch_similarity_warmup_epochs: float = key(
        0.0, "Warm-up of patch_similarity_weight.", within=NON_NEGATIVE, unit="epochs"
    )
    patch_similarity_temperature: float = key(
        0.1, "Softmax temperature of the similarities between tokens.", within=POSITIVE, unit="dimensionless"
    )

    @property
    def references(self) -> tuple[tuple[str, str], ...]:
        """What it stands on."""
        return (
            ("Relations between tokens: Wang et al., 2020", "2002.10957"),
            ("Relations between tokens of ViTs: Ren et al., 2023", "2301.01296"),
        )

    @property
    def needs(self) -> Needs:
        """Inner products of an image's tokens."""
        centered = self.shared.center_positions
        return Needs(layers="gram", preparation="centered" if centered else "plain", statistics=centered)

    def loss(self, student: StudentOutput, step: Step) -> Tensor:
        """A scalar."""
        layers, weight = pairs_of(self, student, step), step.weight()
        if self.shared.center_positions:
            layers = [p._replace(student=center_positions(p.student, weight, reduce=step.reduce)) for p in layers]
        layers, weight = as_one(layers, weight)
        return torch.stack([batch_mean(self._divergence(pair), weight) for pair in layers]).mean()

    def _divergence(self, pair: TokenPair) -> Tensor:
        """``(B,)`` of one layer."""
        with torch.autocast(pair.student.device.type, enabled=False):
            share = pair.mask.float()
            own, other = (cosine_similarities(x) / self.patch_similarity_temperature for x in pair[:2])
            itself = torch.eye(share.shape[-1], dtype=torch.bool, device=share.device)
            left_out = (share <= 0)[:, None] | itself
            # finite, so that a row that is compared with nothing has a gradient of zero rather than NaN
            scores = (other + share.clamp_min(_TINY).log()[:, None]).masked_fill(left_out, torch.finfo(other.dtype).min)
            _, divergence = tilted_divergence(scores.log_softmax(dim=-1), (own - other).masked_fill(left_out, 0))
            return (share * divergence).sum(dim=-1) / share.sum(dim=-1).clamp_min(_TINY)

    def describe(self) -> str:
        """Its term of the loss."""
        return (
            "divergence between the similarities of each token to the others of its image (temperature "
            "{patch_similarity_temperature:g}, weight {patch_similarity_weight:g})"
        )
