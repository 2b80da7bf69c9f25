"""What a teacher says of one view as a row of numbers of two bytes: class scores, inner products of tokens, or both."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_ihb.functional.gram import TokenGram, gram_width, pack_gram, unpack_gram
from hf_ihb.trainer.score_rows import ScoreRow


@dataclass(frozen=True)
class ViewRow:
    """How what a teacher says of one view becomes a row.

    Attributes:
        scores: Of its class scores; None where they are not part of it.
        tokens: Of each layer the number of tokens whose inner products are part of it.
    """

    scores: ScoreRow | None = None
    tokens: tuple[int, ...] = ()

    @property
    def _widths(self) -> list[int]:
        return ([] if self.scores is None else [self.scores.width]) + [gram_width(count) for count in self.tokens]

    @property
    def width(self) -> int:
        """Numbers of two bytes a view."""
        return sum(self._widths)

    @property
    def is_whole(self) -> bool:
        """Whether nothing is left out but for half precision."""
        return self.scores is None or self.scores.is_whole

    def describe(self) -> str:
        """What it holds, for those who read."""
        scores = [] if self.scores is None else [self.scores.describe()]
        return " and ".join(scores + (["inner products of tokens"] if self.tokens else []))

    def pack(self, scores: Tensor | None, layers: Sequence[Tensor]) -> Tensor:
        """``(B, K)`` scores and ``(B, N, D)`` tokens of each layer, as far as it has them -> ``(B, width)`` int16."""
        parts = [] if self.scores is None else [self.scores.pack(scores)]
        return torch.cat(parts + [pack_gram(x).half().view(torch.int16) for x in layers], dim=1)

    def unpack(self, rows: Tensor) -> tuple[Tensor | None, list[TokenGram] | None]:
        """``(B, width)`` int16 -> ``(B, K)`` scores and the inner products of each layer; None for what it has not."""
        scores, grams = self._split(rows)
        read = [unpack_gram(_numbers(part), count) for part, count in zip(grams, self.tokens, strict=True)]
        return None if scores is None else self.scores.unpack(scores), read or None

    def numbers(self, rows: Tensor) -> list[Tensor]:
        """``(B, n)`` float32 of each part, to compare rows by."""
        scores, grams = self._split(rows)
        return ([] if scores is None else [self.scores.unpack(scores)]) + [_numbers(part) for part in grams]

    def undefined(self, rows: Tensor) -> Tensor:
        """``(B,)`` bool, rows of what was no number."""
        scores, grams = self._split(rows)
        found = [] if scores is None else [self.scores.undefined(scores)]
        return torch.stack(found + [_numbers(part).isnan().any(dim=1) for part in grams]).any(dim=0)

    def _split(self, rows: Tensor) -> tuple[Tensor | None, Sequence[Tensor]]:
        parts = rows.split(self._widths, dim=1)
        return (None, parts) if self.scores is None else (parts[0], parts[1:])


def _numbers(part: Tensor) -> Tensor:
    return part.contiguous().view(torch.float16).float()
