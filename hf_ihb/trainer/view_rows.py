"""What a teacher says of one view as a row of numbers of two bytes: scores, inner products of tokens, their mean."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_ihb.functional.gram import TokenGram, gram_width, pack_gram, unpack_gram
from hf_ihb.functional.tokens import TokenMean
from hf_ihb.trainer.cache_rows import Code
from hf_ihb.trainer.score_rows import ScoreRow


@dataclass(frozen=True)
class ViewRow:
    """How what a teacher says of one view becomes a row.

    Attributes:
        scores: Of its class scores; None where they are not part of it.
        tokens: Of each layer the number of tokens whose inner products are part of it.
        mean: Width of the mean of the final tokens; 0 where it is not part of it.
        code: Of that mean, of ``(1, D)``; to be known before rows are made or read. What determines it is in the name
            of a cache, so that it is no part of what describes a row.
    """

    scores: ScoreRow | None = None
    tokens: tuple[int, ...] = ()
    mean: int = 0
    code: Code | None = field(default=None, compare=False, repr=False)

    @property
    def _widths(self) -> list[int]:
        scores = [] if self.scores is None else [self.scores.width]
        return scores + [gram_width(count) for count in self.tokens] + ([self.mean] if self.mean else [])

    @property
    def width(self) -> int:
        """Numbers of two bytes a view."""
        return sum(self._widths)

    @property
    def features(self) -> str:
        """What it holds of features, as `Layout.features`."""
        return "+".join(["gram"] * bool(self.tokens) + ["mean"] * bool(self.mean))

    @property
    def is_whole(self) -> bool:
        """Whether nothing is left out but for half precision."""
        return self.scores is None or self.scores.is_whole

    def description(self) -> dict[str, Any]:
        """What determines how a row is read, as JSON."""
        known = {"scores": None if self.scores is None else asdict(self.scores), "tokens": self.tokens}
        return known | ({"mean": self.mean} if self.mean else {})  # rows without one are as old as they are

    def describe(self) -> str:
        """What it holds, for those who read."""
        scores = [] if self.scores is None else [self.scores.describe()]
        grams = ["inner products of tokens"] if self.tokens else []
        return " and ".join(scores + grams + (["the mean token"] if self.mean else []))

    def pack(self, scores: Tensor | None, layers: Sequence[Tensor], mean: Tensor | None = None) -> Tensor:
        """What a teacher says, as far as a row has it.

        Args:
            scores: ``(B, K)``.
            layers: Tokens ``(B, N, D)`` of each.
            mean: ``(B, D)``, as it is.

        Returns:
            ``(B, width)`` int16.
        """
        parts = [] if self.scores is None else [self.scores.pack(scores)]
        numbers = [pack_gram(x) for x in layers] + ([self.code.write(mean)] if self.mean else [])
        return torch.cat(parts + [x.half().view(torch.int16) for x in numbers], dim=1)

    def unpack(self, rows: Tensor) -> tuple[Tensor | None, list[TokenGram | TokenMean] | None]:
        """What `pack` made rows of; None for what they have not.

        Args:
            rows: ``(B, width)`` int16.

        Returns:
            ``(B, K)`` scores, and the inner products of each layer with the mean of the final tokens as the last.
        """
        scores, features = self._split(rows)
        grams = zip(features, self.tokens, strict=False)
        read: list[TokenGram | TokenMean] = [unpack_gram(_numbers(part), count) for part, count in grams]
        if self.mean:
            read.append(TokenMean(self.code.read(_numbers(features[-1]))))
        return None if scores is None else self.scores.unpack(scores), read or None

    def numbers(self, rows: Tensor) -> list[Tensor]:
        """``(B, n)`` float32 of each part, to compare rows by; a mean as it was."""
        scores, features = self._split(rows)
        found = ([] if scores is None else [self.scores.unpack(scores)]) + [_numbers(part) for part in features]
        return [*found[:-1], self.code.read(found[-1])] if self.mean else found

    def undefined(self, rows: Tensor) -> Tensor:
        """``(B,)`` bool, rows of what was no number, or of a mean that half precision does not reach."""
        scores, features = self._split(rows)
        found = [] if scores is None else [self.scores.undefined(scores)]
        return torch.stack(found + [(~_numbers(part).isfinite()).any(dim=1) for part in features]).any(dim=0)

    def _split(self, rows: Tensor) -> tuple[Tensor | None, Sequence[Tensor]]:
        parts = rows.split(self._widths, dim=1)
        return (None, parts) if self.scores is None else (parts[0], parts[1:])


def _numbers(part: Tensor) -> Tensor:
    return part.contiguous().view(torch.float16).float()
