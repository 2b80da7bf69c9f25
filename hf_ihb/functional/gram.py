"""Inner products of an image's patch tokens as a small row of numbers that can be stored, resampled and compared.

CKA and Gram losses need a teacher's tokens T ``(N, D)`` only through ``T T^T``. With the mean token m over positions
and C = T - m, the row holds the upper triangle of ``C C^T``, ``C m`` and ``m m^T``: N (N + 1) / 2 + N + 1 numbers
whatever D is. Kept apart from the mean, what CKA compares survives half precision where the mean is large. Resampling
is linear: with a matrix R whose rows sum to 1, ``R T`` has ``R C C^T R^T``, ``R C m`` and the same ``m m^T``.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from hf_ihb.functional.constants import table

# Centred tokens smaller than this share of the raw ones are rounding noise: the tokens are alike.
_CONSTANT = 1e-6


class TokenGram(NamedTuple):
    """Inner products of tokens around their mean, up to a positive factor an image.

    Attributes:
        centered: ``(..., N, N)`` of the tokens minus a vector m.
        cross: ``(..., N)`` of the tokens minus m, with m.
        square: ``(...)`` of m with itself.
    """

    centered: Tensor
    cross: Tensor
    square: Tensor

    def resampled(self, matrix: Tensor) -> "TokenGram":
        """Of the tokens ``R T``.

        Args:
            matrix: R ``(..., M, N)``, rows sum to 1.
        """
        centered = matrix @ self.centered @ matrix.mT
        return TokenGram(centered, (matrix @ self.cross[..., None])[..., 0], self.square)

    def raw(self) -> Tensor:
        """``(..., N, N)`` inner products of the tokens as they are."""
        cross = self.cross + self.square[..., None] / 2
        return self.centered + cross[..., :, None] + cross[..., None, :]


def gram_width(num_tokens: int) -> int:
    """Numbers that `pack_gram` makes of N tokens."""
    return num_tokens * (num_tokens + 1) // 2 + num_tokens + 1


def pack_gram(tokens: Tensor) -> Tensor:
    """Inner products of the tokens of each image.

    Args:
        tokens: ``(..., N, D)``.

    Returns:
        ``(..., gram_width(N))`` float32 (float64 for float64), scaled so that the largest number is 1 (0 stays 0): fit
        for half precision.
    """
    tokens = tokens if tokens.dtype == torch.float64 else tokens.float()
    with torch.autocast(tokens.device.type, enabled=False):
        largest = tokens.abs().amax(dim=(-2, -1), keepdim=True)
        tokens = tokens / torch.where(largest == 0, 1, largest)  # squares of large activations stay finite
        mean = tokens.mean(dim=-2, keepdim=True)
        centered = tokens - mean
        alike = centered.abs().amax(dim=(-2, -1), keepdim=True) <= _CONSTANT
        centered = torch.where(alike, 0, centered)
        upper = _upper(tokens.shape[-2], tokens.device)
        triangle = (centered @ centered.mT).flatten(-2)[..., upper]
        cross, square = (centered @ mean.mT)[..., 0], (mean @ mean.mT)[..., 0]
        packed = torch.cat((triangle, cross, square), dim=-1)
        scale = packed.abs().amax(dim=-1, keepdim=True)
        return packed / torch.where(scale == 0, 1, scale)


def unpack_gram(packed: Tensor, num_tokens: int) -> TokenGram:
    """What `pack_gram` made of N tokens, in float32 (float64 for float64).

    Raises:
        ValueError: If the width is not that of N tokens.
    """
    if packed.shape[-1] != gram_width(num_tokens):
        raise ValueError(f"{num_tokens} tokens make {gram_width(num_tokens)} numbers, got {packed.shape[-1]}")
    packed = packed if packed.dtype == torch.float64 else packed.float()
    triangle, cross, square = packed.split((gram_width(num_tokens) - num_tokens - 1, num_tokens, 1), dim=-1)
    centered = triangle.index_select(-1, _places(num_tokens, packed.device))
    return TokenGram(centered.unflatten(-1, (num_tokens, num_tokens)), cross, square[..., 0])


@table
def _upper(num_tokens: int, device: torch.device) -> Tensor:
    """Positions of the upper triangle in a flattened matrix."""
    rows, columns = torch.triu_indices(num_tokens, num_tokens)
    return (rows * num_tokens + columns).to(device)


@table
def _places(num_tokens: int, device: torch.device) -> Tensor:
    """For each entry of a symmetric matrix, flattened, its position in the upper triangle."""
    rows, columns = torch.triu_indices(num_tokens, num_tokens)
    places = torch.empty(num_tokens, num_tokens, dtype=torch.long)
    places[rows, columns] = places[columns, rows] = torch.arange(len(rows))
    return places.flatten().to(device)
