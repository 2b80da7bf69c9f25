"""Patch tokens of two models, brought to the same places and compared one by one."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_ihb.functional.logits import tilted_divergence

# squared lengths below this are those of zero vectors, whose cosine is 0
_TINY = 1e-16


def resampling_matrix(affine: Tensor, grid: tuple[int, int], output_grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Bilinear resampling of a token map as a matrix R, so that tokens become ``R T`` and their Gram ``R G R^T``.

    Args:
        affine: ``(B, 2, 3)``, output to input coordinates as in `hf_ihb.augment.ops`.
        grid: Rows and columns of the input token map, N tokens.
        output_grid: Rows and columns wanted, M tokens.

    Returns:
        R ``(B, M, N)`` float32, rows sum to 1 (the border value is repeated outside the outermost token centres);
        and ``(B, M)`` bool, true where the centre of the output token lies inside the input image.
    """
    device = affine.device

    def centers(count: int) -> Tensor:
        return (2 * torch.arange(count, device=device) + 1) / count - 1

    y, x = torch.meshgrid(centers(output_grid[0]), centers(output_grid[1]), indexing="ij")
    points = torch.stack((x.flatten(), y.flatten(), torch.ones_like(x).flatten()))  # (3, M)
    source = affine.float() @ points  # (B, 2, M): x, y in [-1, 1] where inside
    # rounding must not decide what is inside
    inside = (source.abs() <= 1 + 1e-6).all(dim=1)

    def taps(coordinate: Tensor, count: int) -> Tensor:
        position = (((coordinate + 1) * count - 1) / 2).clamp(0, count - 1)
        return (1 - (position[..., None] - torch.arange(count, device=device)).abs()).clamp_min(0)  # (B, M, count)

    columns, rows = taps(source[:, 0], grid[1]), taps(source[:, 1], grid[0])
    return (rows[..., :, None] * columns[..., None, :]).flatten(2), inside


def pool_tokens(tokens: Tensor, grid: tuple[int, int], output_grid: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """Averages a token map over blocks where it is finer than the output by a whole factor.

    Args:
        tokens: ``(B, N, D)`` patch tokens, row by row, no prefix tokens.
        grid: Rows and columns of the token map, rows * columns = N.
        output_grid: Rows and columns wanted in the end.

    Returns:
        The tokens and their grid: `output_grid`, or as they were.

    Raises:
        ValueError: If the grid does not match the number of tokens.
    """
    if grid[0] * grid[1] != tokens.shape[1]:
        raise ValueError(f"a {grid[0]} x {grid[1]} grid needs {grid[0] * grid[1]} tokens, got {tokens.shape[1]}")
    factors = (grid[0] // output_grid[0], grid[1] // output_grid[1])
    if max(factors) > 1 and (factors[0] * output_grid[0], factors[1] * output_grid[1]) == tuple(grid):
        return F.avg_pool2d(tokens.mT.unflatten(2, grid), factors).flatten(2).mT, output_grid
    return tokens, grid


def resample_tokens(
    tokens: Tensor, grid: tuple[int, int], affine: Tensor, output_grid: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Moves a token map so that token i looks at the same place as token i of a view made by `affine`.

    A map that is finer than the output by a whole factor is averaged over blocks first.

    Args:
        tokens: ``(B, N, D)`` patch tokens, row by row, no prefix tokens.
        grid: Rows and columns of the token map, rows * columns = N.
        affine: ``(B, 2, 3)``, output to input coordinates as in `hf_ihb.augment.ops`.
        output_grid: Rows and columns wanted; `grid` if None.

    Returns:
        ``(B, M, D)``, and ``(B, M)`` bool, false where the output token's centre lies outside the input image.

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


def token_cosine_distance(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """``1 - mean cos(s_i, t_i)`` over the tokens of each image.

    Args:
        student: ``(B, N, D)``, already mapped to the teacher's width.
        teacher: ``(B, N, D)``, standardised.
        mask: ``(B, N)`` bool, false tokens are left out; an image without tokens scores 1.

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
        cosine = dot * (own.clamp_min(_TINY) * other.clamp_min(_TINY)).rsqrt()
        if mask is None:
            return 1 - cosine.mean(dim=-1)
        return 1 - torch.where(mask, cosine, 0).sum(dim=-1) / mask.sum(dim=-1).clamp_min(1)


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
            unit = F.normalize(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)), dim=1)
            return unit @ unit.mT / temperature

        student, teacher = similarities(student), similarities(teacher)
        # finite, so that a row without pairs has a gradient of zero rather than NaN
        shares = teacher.masked_fill(~pairs, torch.finfo(teacher.dtype).min).log_softmax(dim=1)
        _, divergence = tilted_divergence(shares, (student - teacher).masked_fill(~pairs, 0))
        return torch.where(rows, divergence, 0).sum() / rows.sum().clamp_min(1)
