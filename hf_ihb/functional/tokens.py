"""Patch tokens of two models, brought to the same places and compared one by one."""

from typing import NamedTuple

import torch
from torch import Tensor

from hf_ihb.functional.constants import constant, table
from hf_ihb.functional.logits import tilted_divergence

# squared lengths below this are those of zero vectors, whose cosine is 0
_TINY = 1e-16
_SHORT = 1e-12
# shares of the tokens of an image below this are no image
_TINY_SHARE = 1e-12
# a side of a token is cut into so many, to see how much of a turned one lies inside
_PIECES = 4
_ROUNDING = 1e-4


class TokenMean(NamedTuple):
    """What is left of an image's tokens where all that is compared is their mean.

    Attributes:
        mean: ``(B, D)`` float32, over all places where the student's tokens look, each of which lies inside the image.
    """

    mean: Tensor


def mean_token(tokens: Tensor, share: Tensor) -> Tensor:
    """``(B, D)`` float32 mean of ``(B, N, D)`` tokens by their ``(B, N)`` shares in [0, 1]; 0 where there are none."""
    share = share.float()[..., None]
    return (tokens.float() * share).sum(dim=1) / share.sum(dim=1).clamp_min(_TINY_SHARE)


def resampling_matrix(affine: Tensor, grid: tuple[int, int], output_grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Bilinear resampling of a token map as a matrix R, so that tokens become ``R T`` and their Gram ``R G R^T``.

    Args:
        affine: ``(B, 2, 3)``, output to input coordinates as in `hf_ihb.augment.ops`.
        grid: Rows and columns of the input token map, N tokens.
        output_grid: Rows and columns wanted, M tokens.

    Returns:
        R ``(B, M, N)`` float32, rows sum to 1 (the border value is repeated outside the outermost token centres);
        and ``(B, M)`` float32, the share of each output token's area that lies inside the input image, see
        `inside_share`.
    """
    source = affine.float() @ _token_centers(output_grid, 1, affine.device)  # (B, 2, M): x, y in [-1, 1] where inside

    def taps(coordinate: Tensor, count: int) -> Tensor:
        position = (((coordinate + 1) * count - 1) / 2).clamp(0, count - 1)
        return (1 - (position[..., None] - torch.arange(count, device=affine.device)).abs()).clamp_min(0)

    columns, rows = taps(source[:, 0], grid[1]), taps(source[:, 1], grid[0])  # (B, M, count)
    return (rows[..., :, None] * columns[..., None, :]).flatten(2), inside_share(affine, output_grid)


def inside_share(affine: Tensor, grid: tuple[int, int]) -> Tensor:
    """How much of each token of a view lies inside the image that the view was made of.

    Exact for views whose sides are parallel to the image's. Turned tokens are taken apart into 4 x 4 pieces, of each of
    which the shares along both axes are multiplied: less than 0.04 off for any angle.

    Args:
        affine: ``(B, 2, 3)``, coordinates of the view to those of the image.
        grid: Rows and columns of the view's tokens, M in all.

    Returns:
        ``(B, M)`` float32 in [0, 1].
    """
    affine = affine.float()
    pieces = affine @ _token_centers(grid, _PIECES, affine.device)  # (B, 2, M * pieces)
    half = affine[:, :, :2].abs() @ constant(((1 / grid[1],), (1 / grid[0],)), affine.device) / _PIECES  # (B, 2, 1)
    along = (1 - pieces.abs()) / (2 * half.clamp_min(1e-6)) + 0.5
    along = ((1 + 2 * _ROUNDING) * along - _ROUNDING).clamp(0, 1)  # what touches the edge is inside or outside
    return (along[:, 0] * along[:, 1]).unflatten(1, (grid[0] * grid[1], -1)).mean(dim=-1)


@table
def _token_centers(grid: tuple[int, int], pieces: int, device: torch.device) -> Tensor:
    """``(3, M * pieces^2)`` x, y and 1 of the centres of the pieces of each token, token by token."""
    y, x = (_cell_centers(count * pieces, device).unflatten(0, (count, pieces)) for count in grid)
    shape = (*grid, pieces, pieces)
    x, y = x[None, :, None, :].expand(shape), y[:, None, :, None].expand(shape)
    return torch.stack((x.flatten(), y.flatten(), torch.ones(x.numel(), device=device)))


def _cell_centers(count: int, device: torch.device) -> Tensor:
    return (2 * torch.arange(count, device=device) + 1) / count - 1


@table
def _area_weights(count: int, output_count: int, device: torch.device) -> Tensor:
    """``(output_count, count)`` share of each cell in each of fewer and larger ones, over the same length."""
    edges = torch.arange(output_count + 1, dtype=torch.float64) * count / output_count
    cells = torch.arange(count)
    overlap = torch.minimum(edges[1:, None], cells + 1) - torch.maximum(edges[:-1, None], cells)
    return (overlap.clamp_min(0) * output_count / count).float().to(device)


def pool_tokens(tokens: Tensor, grid: tuple[int, int], output_grid: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """Averages a token map along each side on which it is finer than the output.

    Every token counts by the area it shares with the larger one, whether or not the factor is whole.

    Args:
        tokens: ``(B, N, D)`` patch tokens, row by row, no prefix tokens.
        grid: Rows and columns of the token map, rows * columns = N.
        output_grid: Rows and columns wanted in the end.

    Returns:
        The tokens and their grid, on no side finer than `output_grid`.

    Raises:
        ValueError: If the grid does not match the number of tokens.
    """
    if grid[0] * grid[1] != tokens.shape[1]:
        raise ValueError(f"a {grid[0]} x {grid[1]} grid needs {grid[0] * grid[1]} tokens, got {tokens.shape[1]}")
    pooled = (min(grid[0], output_grid[0]), min(grid[1], output_grid[1]))
    if pooled == tuple(grid):
        return tokens, grid
    rows, columns = (
        _area_weights(*counts, tokens.device).to(tokens.dtype) for counts in zip(grid, pooled, strict=True)
    )
    maps = torch.einsum("ri,bijd->brjd", rows, tokens.unflatten(1, grid))
    return torch.einsum("cj,brjd->brcd", columns, maps).flatten(1, 2), pooled


def resample_tokens(
    tokens: Tensor, grid: tuple[int, int], affine: Tensor, output_grid: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Moves a token map so that token i looks at the same place as token i of a view made by `affine`.

    A map that is finer than the output is averaged first, see `pool_tokens`.

    Args:
        tokens: ``(B, N, D)`` patch tokens, row by row, no prefix tokens.
        grid: Rows and columns of the token map, rows * columns = N.
        affine: ``(B, 2, 3)``, output to input coordinates as in `hf_ihb.augment.ops`.
        output_grid: Rows and columns wanted; `grid` if None.

    Returns:
        ``(B, M, D)``, and ``(B, M)`` the share of each output token that lies inside the input image.

    Raises:
        ValueError: If the grid does not match the number of tokens.
    """
    output_grid = output_grid or grid
    tokens, grid = pool_tokens(tokens, grid, output_grid)
    matrix, inside = resampling_matrix(affine, grid, output_grid)
    return matrix.to(tokens.dtype) @ tokens, inside


def standardize_tokens(tokens: Tensor, position_mean: Tensor, channel_std: Tensor) -> Tensor:
    """``(t - position_mean) / channel_std``: removes a model's position code and its outlier channels.

    Args:
        tokens: ``(B, N, D)``.
        position_mean: ``(N, D)`` mean token of each position over a data set.
        channel_std: ``(D,)`` standard deviation around it, > 0.

    Returns:
        ``(B, N, D)`` float32.
    """
    return (tokens.float() - position_mean) / channel_std


def unit_rows(x: Tensor) -> Tensor:
    """Vectors ``(..., D)`` over their lengths; a vector of zeros stays one, and has a gradient of 0.

    `F.normalize` divides by 1e-12 there, and so does its gradient, which float16 cannot hold.
    """
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / length.masked_fill(length <= _SHORT, torch.inf)


def token_cosine_distance(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """``1 - mean cos(s_i, t_i)`` over the tokens of each image.

    Args:
        student: ``(B, N, D)``, already mapped to the teacher's width.
        teacher: ``(B, N, D)``, standardised.
        mask: ``(B, N)`` share in [0, 1] of each token in the mean, or bool; an image without tokens scores 1.

    Returns:
        ``(B,)`` float32 in [0, 2].

    Raises:
        ValueError: If the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher tokens must match, got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    with torch.autocast(student.device.type, enabled=False):
        student, teacher = student.float(), teacher.float()
        # sums of products and roots of them: the gradient of `F.cosine_similarity` takes twice as many passes
        dot, own, other = (student * teacher).sum(-1), student.square().sum(-1), teacher.square().sum(-1)
        # root by root: the gradient of the root of a product of tiny squares is beyond float32
        for square in (own, other):
            dot = dot * torch.where(square > _TINY, torch.where(square > _TINY, square, 1).rsqrt(), 0)
        cosine = dot
        if mask is None:
            return 1 - cosine.mean(dim=-1)
        share = mask.to(cosine.dtype)
        return 1 - torch.where(share > 0, share * cosine, 0).sum(dim=-1) / share.sum(dim=-1).clamp_min(_TINY)


def correlation_divergence(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    *,
    mask: Tensor | None = None,
    include_self: bool = False,
) -> Tensor:
    """How differently two models say which images are alike: ``KL(softmax(C_t / T) || softmax(C_s / T))``, row by row.

    ``C`` holds the cosine similarity of each image to the others of the batch.

    Args:
        student: ``(B, D_s)``, one embedding an image.
        teacher: ``(B, D_t)``, the same images; D_t may differ from D_s.
        temperature: T > 0.
        mask: ``(B,)`` bool, false images are left out.
        include_self: Keep each image's similarity to itself, which is always 1 and takes most of the softmax.

    Returns:
        Float32 scalar (float64 for float64) >= 0, the mean over images that take part; 0 if none of them has another
        to be compared with.

    Raises:
        ValueError: If the embeddings are not paired.

    References:
        Tejankar et al., 2021 (ISD), https://arxiv.org/abs/2012.09259; Fang et al., 2021 (SEED),
        https://arxiv.org/abs/2101.04731
    """
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher):
        raise ValueError(f"embeddings must be paired (B, width), got {tuple(student.shape)} and {tuple(teacher.shape)}")
    with torch.autocast(student.device.type, enabled=False):
        mask = torch.ones(len(student), dtype=torch.bool, device=student.device) if mask is None else mask
        pairs = mask[:, None] & mask
        if not include_self:
            pairs = pairs & ~torch.eye(len(student), dtype=torch.bool, device=student.device)
        rows = pairs.any(dim=1)

        def similarities(embeddings: Tensor) -> Tensor:
            unit = unit_rows(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)))
            return unit @ unit.mT / temperature

        student, teacher = similarities(student), similarities(teacher)
        # finite, so that a row without pairs has a gradient of zero rather than NaN
        shares = teacher.masked_fill(~pairs, torch.finfo(teacher.dtype).min).log_softmax(dim=1)
        _, divergence = tilted_divergence(shares, (student - teacher).masked_fill(~pairs, 0))
        return torch.where(rows, divergence, 0).sum() / rows.sum().clamp_min(1)
