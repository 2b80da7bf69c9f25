"""Class scores of one image as a short row of numbers: whole where classes are few, else the largest and the rest."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

WHOLE_CLASSES, TOP = 32, 16
MOST_CLASSES = 2**16  # whose numbers fit into two bytes
_OFFSET = 2**15
_LOWEST = torch.finfo(torch.float16).min


@dataclass(frozen=True)
class ScoreRow:
    """How the class scores of an image become a row.

    Losses of class scores do not change where a number is added to all scores of an image. So what is stored, in half
    precision, is how far each lies below the largest: what half precision rounds off is then at most 2^-12 of that
    distance (2^-25 below 2^-14), nothing where it matters most, and the teacher's decision stays what it is.

    Up to 32 classes all are stored. Above, the 16 largest, and the logarithm of the summed exponentials of the others,
    which are read as equal scores of that sum: at temperature 1 every probability among the 16, and that of the rest
    together, is what it was. At a higher one the rest gets more than it had, as equal scores spread further.

    Attributes:
        num_classes: K, at most 65,536.
    """

    num_classes: int

    @property
    def is_whole(self) -> bool:
        """Whether it holds the scores of all classes."""
        return self.num_classes <= WHOLE_CLASSES

    @property
    def width(self) -> int:
        """Numbers of two bytes an image."""
        return self.num_classes if self.is_whole else 2 * TOP + 1

    def describe(self) -> str:
        """What of the scores it holds, for those who read."""
        if self.is_whole:
            return "whole scores"
        return f"the {TOP} largest scores of {self.num_classes:,} and the sum of the others"

    def pack(self, scores: Tensor) -> Tensor:
        """``(B, K)`` scores -> ``(B, width)`` int16."""
        below = scores.float() - scores.float().amax(dim=1, keepdim=True)
        if self.is_whole:
            return _half(below)
        largest, classes = below.topk(TOP, dim=1)
        rest = below.scatter(1, classes, -torch.inf).logsumexp(dim=1, keepdim=True)
        return torch.cat(((classes - _OFFSET).to(torch.int16), _half(largest), _half(rest)), dim=1)

    def unpack(self, rows: Tensor) -> Tensor:
        """``(B, width)`` int16 -> ``(B, K)`` float32 scores, the largest 0."""
        if self.is_whole:
            return _float(rows)
        classes, numbers = rows[:, :TOP].long() + _OFFSET, _float(rows[:, TOP:])
        each = numbers[:, TOP:] - math.log(self.num_classes - TOP)
        return each.repeat(1, self.num_classes).scatter(1, classes, numbers[:, :TOP])

    def undefined(self, rows: Tensor) -> Tensor:
        """``(B,)`` bool, rows of scores that were no numbers; of as many rows as there are, none is read whole."""
        return _float(rows if self.is_whole else rows[:, TOP:]).isnan().any(dim=1)


def _half(below: Tensor) -> Tensor:
    """What lies further below than half precision reaches has no probability to speak of."""
    return below.clamp_min(_LOWEST).half().view(torch.int16)


def _float(rows: Tensor) -> Tensor:
    return rows.contiguous().view(torch.float16).float()
