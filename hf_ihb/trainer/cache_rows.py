"""What a teacher says of one image as a row of numbers that is stored in half precision, and back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hf_ihb.functional.gram import TokenGram, gram_width, pack_gram, unpack_gram

Features = Literal["tokens", "gram", "mean", "tokens+mean", "gram+mean"]
Kind = Literal[
    "logits", Features, "logits+tokens", "logits+gram", "logits+mean", "logits+tokens+mean", "logits+gram+mean"
]
_DTYPES = {"tokens": torch.float16, "gram": torch.float16, "mean": torch.float16, "logits": torch.float32}


class Code(NamedTuple):
    """How the tokens of a layer become numbers that half precision holds: ``(tokens - mean) / scale``.

    What half precision rounds off is then small beside what tells images apart, not beside what they have in common.

    Attributes:
        mean: ``(N, D)`` float32, of each position over training images; ``(1, D)`` for mean tokens.
        scale: ``(D,)`` float32 > 0, of each channel.
    """

    mean: Tensor
    scale: Tensor

    @classmethod
    def of(cls, mean: Tensor, std: Tensor) -> "Code":
        """Of the means ``(N, D)`` and deviations ``(D,)`` of a layer.

        A channel that hardly varies in the sample may do so elsewhere: no scale is so small that this would be out of
        range, or smaller than what float32 tells apart beside the mean.
        """
        floor = torch.maximum(0.01 * std.max(), 1e-4 * mean.abs().max())
        scale = torch.maximum(std, floor)
        return cls(mean, torch.where(scale > 0, scale, 1))

    def write(self, tokens: Tensor) -> Tensor:
        """``(B, N, D)`` as they are stored."""
        mean, scale = (part.to(tokens.device) for part in self)
        return (tokens.float() - mean) / scale

    def read(self, stored: Tensor) -> Tensor:
        """``(B, N, D)`` as they were."""
        mean, scale = (part.to(stored.device) for part in self)
        return stored * scale + mean


@dataclass(frozen=True)
class Layout:
    """How what a teacher says of one image becomes a row.

    ``tokens``: patch tokens by the `Code` of their layer, half precision. ``gram``: their inner products, half
    precision, see `hf_ihb.functional.gram`. ``mean``: the mean of the final tokens by its `Code`, half precision.
    ``logits``: class scores, float32. With a ``+`` between them they lie side by side: scores, layers, mean; as bytes
    where they are not of one type.

    Attributes:
        kind: What it holds.
        shapes: Class count K of the scores as ``(1, K)``, where there are any; tokens N and width D of each layer; and
            ``(1, D)`` of the mean.
    """

    kind: Kind
    shapes: tuple[tuple[int, int], ...]

    @property
    def dtype(self) -> torch.dtype:
        """Of what is stored."""
        types = {_DTYPES[kind] for kind in self._kinds}
        return torch.uint8 if len(types) > 1 else types.pop()

    @property
    def row_bytes(self) -> int:
        """Bytes an image."""
        return sum(self._bytes)

    @property
    def has_logits(self) -> bool:
        """Whether it holds class scores."""
        return self.kind.startswith("logits")

    @property
    def has_mean(self) -> bool:
        """Whether it holds the mean of the final tokens."""
        return self.kind.endswith("mean")

    @property
    def features(self) -> str:
        """What it holds of features, one of `Features`; empty where there are none."""
        return self.kind.removeprefix("logits").removeprefix("+")

    @property
    def _kinds(self) -> list[str]:
        """Of each part."""
        names = self.kind.split("+")
        layers = len(self.shapes) - len({"logits", "mean"} & set(names))
        return [kind for name in names for kind in [name] * (1 if name in ("logits", "mean") else layers)]

    @property
    def places(self) -> list[slice]:
        """Where among the parts those of each kind are."""
        kinds = self._kinds
        return [slice(kinds.index(kind), kinds.index(kind) + kinds.count(kind)) for kind in dict.fromkeys(kinds)]

    @property
    def _bytes(self) -> list[int]:
        """Of each part."""
        numbers = [gram_width(n) if k == "gram" else n * d for k, (n, d) in zip(self._kinds, self.shapes, strict=True)]
        return [count * _DTYPES[kind].itemsize for kind, count in zip(self._kinds, numbers, strict=True)]

    def pack(self, parts: Sequence[Tensor]) -> Tensor:
        """``(B, 1, K)`` scores and ``(B, N, D)`` of each layer, as far as the row has them -> rows of `dtype`."""
        numbers = [
            (pack_gram(x) if kind == "gram" else x.flatten(1)).to(_DTYPES[kind])
            for kind, x in zip(self._kinds, parts, strict=True)
        ]
        if self.dtype == torch.uint8:
            numbers = [part.contiguous().view(torch.uint8) for part in numbers]
        return torch.cat(numbers, dim=1)

    def numbers(self, rows: Tensor) -> list[Tensor]:
        """Rows -> for each part its numbers ``(B, n)``, as they are stored."""
        parts = rows.split([size // self.dtype.itemsize for size in self._bytes], dim=1)
        if self.dtype == torch.uint8:  # a part begins where its type may begin only in a tensor of its own
            return [part.contiguous().view(_DTYPES[kind]) for kind, part in zip(self._kinds, parts, strict=True)]
        return list(parts)

    def unpack(self, rows: Tensor) -> list[Tensor | TokenGram]:
        """Rows -> for each part ``(B, N, D)`` float32, or of inner products a `TokenGram`."""
        parts = zip(self._kinds, self.shapes, self.numbers(rows), strict=True)
        return [
            unpack_gram(part, shape[0]) if kind == "gram" else part.float().unflatten(1, shape)
            for kind, shape, part in parts
        ]
