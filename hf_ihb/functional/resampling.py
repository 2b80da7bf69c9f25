"""Tokens of a teacher, their inner products or their mean, brought to where a student's look."""

import torch
from torch import Tensor

from hf_ihb.functional.geometry import identity_affine
from hf_ihb.functional.gram import TokenGram
from hf_ihb.functional.tokens import TokenMean, resampling_matrix


class Resampler:
    """Brings the teacher's tokens to where the student's look; a matrix is made once for all layers of a grid.

    Args:
        affine: ``(B, 2, 3)``, from the student's to the teacher's coordinates; None where they are the same.
    """

    def __init__(self, affine: Tensor | None) -> None:
        self.affine = affine
        self._matrices: dict[tuple[tuple[int, int], tuple[int, int]], tuple[Tensor, Tensor]] = {}

    def __call__(
        self, tokens: Tensor | TokenGram | TokenMean, grid: tuple[int, int], output_grid: tuple[int, int]
    ) -> tuple[Tensor | TokenGram | TokenMean, Tensor]:
        """The tokens, and ``(B, M)`` the share of each that lies inside the teacher's image.

        Raises:
            TypeError: If all that is known is a mean, and the student looks elsewhere than it was taken.
        """
        if isinstance(tokens, TokenMean):
            if self.affine is not None:
                raise TypeError("a mean token: expected a student that looks at the whole image, found a view of it")
            places = output_grid[0] * output_grid[1]
            return tokens, torch.ones(len(tokens.mean), places, device=tokens.mean.device)
        first = tokens.centered if isinstance(tokens, TokenGram) else tokens
        if self.affine is None and grid == output_grid:
            return tokens, torch.ones(first.shape[:2], device=first.device)
        if (grid, output_grid) not in self._matrices:
            affine = identity_affine(len(first), first.device) if self.affine is None else self.affine
            self._matrices[grid, output_grid] = resampling_matrix(affine, grid, output_grid)
        matrix, inside = self._matrices[grid, output_grid]
        return (tokens.resampled(matrix) if isinstance(tokens, TokenGram) else matrix @ tokens), inside
