"""How far attention reaches, how spread it is, and how much of it leaves the patches.

Attention maps are ``(B, H, T, T)``: row i is what query i gives to each token, and sums to 1. Tokens are prefix tokens
(cls, distillation, registers) and then the patches of a grid, row by row. Distances are between the centres of patches,
in patches. Everything but `special_token_mass` looks at patches alone: rows are renormalised over them.

A row that gives the patches nothing (a mass below the smallest normal number) has no distance and no entropy: it is
left out of the mean over queries, and where no row is left the result is NaN. Computed in float32, or float64 for
float64, whatever the autocast state.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class AttentionStatistics(NamedTuple):
    """Statistics of one layer's attention, each ``(B, H)``.

    Attributes:
        distance: See `attention_distance`.
        entropy: See `attention_entropy`.
        effective_number: See `effective_number`.
        special_token_mass: See `special_token_mass`.
        cls_dispersion: See `cls_dispersion`; None without a cls token.
        legacy_map_entropy: See `legacy_map_entropy`.
    """

    distance: Tensor
    entropy: Tensor
    effective_number: Tensor
    special_token_mass: Tensor
    cls_dispersion: Tensor | None
    legacy_map_entropy: Tensor


def attention_statistics(
    attention: Tensor, grid: tuple[int, int], num_prefix_tokens: int, *, has_cls: bool | None = None
) -> AttentionStatistics:
    """All statistics of one layer, next to whose map one more of its size is held (two for a half-precision map).

    Args:
        attention: ``(B, H, T, T)``, rows sum to 1.
        grid: Rows and columns of the patches.
        num_prefix_tokens: Tokens before the patches.
        has_cls: Whether token 0 is a cls token; None says so of every map with prefix tokens.

    Returns:
        An `AttentionStatistics`.

    Raises:
        ValueError: If the map does not hold the prefix tokens and the grid.
    """
    with torch.autocast(attention.device.type, enabled=False):
        rows = _PatchRows.of(attention, grid, num_prefix_tokens)
        entropy, effective = _entropies(rows)
        has_cls = num_prefix_tokens > 0 if has_cls is None else has_cls
        return AttentionStatistics(
            distance=_distance(rows, grid),
            entropy=entropy,
            effective_number=effective,
            special_token_mass=rows.special_mass,
            cls_dispersion=cls_dispersion(attention, grid, num_prefix_tokens) if has_cls else None,
            legacy_map_entropy=_legacy_map_entropy(rows),
        )


def attention_distance(attention: Tensor, grid: tuple[int, int], num_prefix_tokens: int) -> Tensor:
    """Mean attention distance ``mean_i sum_j A_ij |c_i - c_j|`` over patches i and j, rows renormalised over patches.

    Args:
        attention: ``(B, H, T, T)``, rows sum to 1.
        grid: Rows and columns of the patches.
        num_prefix_tokens: Tokens before the patches.

    Returns:
        ``(B, H)`` >= 0, in patches. Identity gives 0; for no selectivity at all see `uniform_attention_distance`.

    Raises:
        ValueError: If the map does not hold the prefix tokens and the grid.

    References:
        Dosovitskiy et al., 2021 (ViT), appendix D.7, https://arxiv.org/abs/2010.11929; Raghu et al., 2021,
        https://arxiv.org/abs/2108.08810
    """
    with torch.autocast(attention.device.type, enabled=False):
        return _distance(_PatchRows.of(attention, grid, num_prefix_tokens), grid)


def uniform_attention_distance(grid: tuple[int, int]) -> float:
    """`attention_distance` of uniform attention, in float64.

    ``(R C)^-2 sum_ab w_R(a) w_C(b) sqrt(a^2 + b^2)``, where of the pairs of n places ``w_n(0) = n`` are 0 apart and
    ``w_n(k) = 2 (n - k)`` are k apart.

    Args:
        grid: Rows R and columns C.

    Returns:
        Patches; 4.1365 for 8 x 8.

    Raises:
        ValueError: If the grid is empty.
    """
    _check_grid(grid)
    rows, columns = grid

    def pairs(count: int, apart: int) -> int:
        return 2 * (count - apart) if apart else count

    apart = ((a, b) for a in range(rows) for b in range(columns))
    total = math.fsum(pairs(rows, a) * pairs(columns, b) * math.hypot(a, b) for a, b in apart)
    return total / (rows * columns) ** 2


def special_token_mass(attention: Tensor, grid: tuple[int, int], num_prefix_tokens: int) -> Tensor:
    """Share of their attention that patch queries give to prefix tokens, which every other statistic hides.

    Args:
        attention: ``(B, H, T, T)``, rows sum to 1.
        grid: Rows and columns of the patches.
        num_prefix_tokens: Tokens before the patches.

    Returns:
        ``(B, H)`` in [0, 1], the mean over all patch queries; 0 without prefix tokens.

    Raises:
        ValueError: If the map does not hold the prefix tokens and the grid.

    References:
        Darcet et al., 2024 (registers), https://arxiv.org/abs/2309.16588
    """
    return _PatchRows.of(attention, grid, num_prefix_tokens).special_mass


def attention_entropy(attention: Tensor, grid: tuple[int, int], num_prefix_tokens: int) -> Tensor:
    """Entropy ``-sum_j A_ij ln A_ij`` of each patch query's row over patches, averaged over queries.

    Args:
        attention: ``(B, H, T, T)``, rows sum to 1.
        grid: Rows and columns of the patches.
        num_prefix_tokens: Tokens before the patches.

    Returns:
        ``(B, H)`` in [0, ln N] nats for N patches; identity gives 0, uniform attention ln N.

    Raises:
        ValueError: If the map does not hold the prefix tokens and the grid.
    """
    return _entropies(_PatchRows.of(attention, grid, num_prefix_tokens))[0]


def effective_number(attention: Tensor, grid: tuple[int, int], num_prefix_tokens: int) -> Tensor:
    """How many patches a query attends to: ``exp(entropy)`` of its row (perplexity), averaged over queries.

    The exponential is taken row by row, before the mean: half of the queries on 1 patch and half on 64 is 32.5 patches
    a query, whereas the exponential of the mean entropy would be 8.

    Args:
        attention: ``(B, H, T, T)``, rows sum to 1.
        grid: Rows and columns of the patches.
        num_prefix_tokens: Tokens before the patches.

    Returns:
        ``(B, H)`` in [1, N] for N patches.

    Raises:
        ValueError: If the map does not hold the prefix tokens and the grid.
    """
    return _entropies(_PatchRows.of(attention, grid, num_prefix_tokens))[1]


def cls_dispersion(attention: Tensor, grid: tuple[int, int], num_prefix_tokens: int) -> Tensor:
    """Spread ``var_x + var_y`` of where the cls token (token 0) looks, its row renormalised over patches.

    Args:
        attention: ``(B, H, T, T)``, rows sum to 1.
        grid: Rows and columns of the patches.
        num_prefix_tokens: Tokens before the patches, the cls token among them.

    Returns:
        ``(B, H)`` in patches^2; one patch gives 0, uniform attention ``(R^2 + C^2 - 2) / 12``.

    Raises:
        ValueError: If there is no prefix token, or the map does not hold the prefix tokens and the grid.
    """
    if num_prefix_tokens < 1:
        raise ValueError("the dispersion of the cls token needs a cls token, got 0 prefix tokens")
    row = _checked(attention, grid, num_prefix_tokens)[:, :, 0, num_prefix_tokens:]
    row = row / _or_nan(row.sum(dim=-1, keepdim=True))
    row = row.unflatten(-1, grid)

    def variance(weights: Tensor) -> Tensor:
        place = torch.arange(weights.shape[-1], device=weights.device, dtype=weights.dtype)
        mean = (weights * place).sum(dim=-1, keepdim=True)
        return (weights * (place - mean).square()).sum(dim=-1)

    return variance(row.sum(dim=-1)) + variance(row.sum(dim=-2))


def legacy_map_entropy(attention: Tensor, grid: tuple[int, int], num_prefix_tokens: int) -> Tensor:
    """Entropy of the row that averages all patch queries' rows; kept to compare with older tables.

    It tells how evenly patches are attended to, not how focused queries are: identity attention, each query on one
    patch, scores the maximum ln N. `attention_entropy` measures focus.

    Args:
        attention: ``(B, H, T, T)``, rows sum to 1.
        grid: Rows and columns of the patches.
        num_prefix_tokens: Tokens before the patches.

    Returns:
        ``(B, H)`` in [0, ln N] nats for N patches, never below `attention_entropy`.

    Raises:
        ValueError: If the map does not hold the prefix tokens and the grid.
    """
    with torch.autocast(attention.device.type, enabled=False):
        return _legacy_map_entropy(_PatchRows.of(attention, grid, num_prefix_tokens))


def attention_map(
    attention: Tensor, grid: tuple[int, int], num_prefix_tokens: int, *, has_cls: bool | None = None
) -> Tensor:
    """Where the cls token looks, averaged over heads; without one, where patch queries look on average.

    Args:
        attention: ``(B, H, T, T)``, rows sum to 1.
        grid: Rows and columns of the patches.
        num_prefix_tokens: Tokens before the patches.
        has_cls: Whether token 0 is a cls token; None says so of every map with prefix tokens.

    Returns:
        ``(B, rows, columns)``, renormalised to sum 1 after the mean over heads.

    Raises:
        ValueError: If the map does not hold the prefix tokens and the grid.
    """
    attention = _checked(attention, grid, num_prefix_tokens)
    has_cls = num_prefix_tokens > 0 if has_cls is None else has_cls
    queries = slice(0, 1) if has_cls else slice(num_prefix_tokens, None)
    weights = attention[:, :, queries, num_prefix_tokens:].mean(dim=(1, 2))  # (B, N)
    return (weights / _or_nan(weights.sum(dim=-1, keepdim=True))).unflatten(-1, grid)


class _PatchRows(NamedTuple):
    """Rows of the patch queries, not renormalised."""

    patches: Tensor  # (B, H, N, N) attention to patches, a view of the map
    mass: Tensor  # (B, H, N) its sum; 1 where there is none
    valid: Tensor  # (B, H, N) where there is any
    special_mass: Tensor  # (B, H) mean mass on prefix tokens

    @classmethod
    def of(cls, attention: Tensor, grid: tuple[int, int], num_prefix_tokens: int) -> "_PatchRows":
        rows = _checked(attention, grid, num_prefix_tokens)[:, :, num_prefix_tokens:]
        special, patches = rows[..., :num_prefix_tokens], rows[..., num_prefix_tokens:]
        mass = patches.sum(dim=-1)
        valid = _has_mass(mass)
        return cls(patches, torch.where(valid, mass, 1), valid, special.sum(dim=-1).mean(dim=-1))

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the rows that have mass; ``(B, H, N)`` -> ``(B, H)``."""
        return torch.where(self.valid, values, 0).sum(dim=-1) / self.valid.sum(dim=-1)


def _distance(rows: _PatchRows, grid: tuple[int, int]) -> Tensor:
    # a matrix product for each query, over all images and heads at once: no copy of the map is made
    reach = torch.einsum("bhij,ij->bhi", rows.patches, _distance_matrix(grid, rows.patches))
    return rows.mean(reach / rows.mass)


def _entropies(rows: _PatchRows) -> tuple[Tensor, Tensor]:
    """Mean over queries of the entropy of their rows, and of its exponential."""
    # with A = m p: sum -p ln p = sum(-A ln A) / m + ln m; rounding may leave less than 0
    entropy = (torch.special.entr(rows.patches).sum(dim=-1) / rows.mass + rows.mass.log()).clamp_min(0)
    return rows.mean(entropy), rows.mean(entropy.exp())


def _legacy_map_entropy(rows: _PatchRows) -> Tensor:
    share = rows.valid / (rows.mass * rows.valid.sum(dim=-1, keepdim=True))
    return torch.special.entr(torch.einsum("bhij,bhi->bhj", rows.patches, share)).sum(dim=-1)


def _distance_matrix(grid: tuple[int, int], like: Tensor) -> Tensor:
    """``(N, N)``; not `torch.cdist`, whose matrix product loses half of the digits."""

    def apart(count: int) -> Tensor:
        place = torch.arange(count, device=like.device, dtype=like.dtype)
        return place[:, None] - place

    distance = torch.hypot(apart(grid[0])[:, None, :, None], apart(grid[1])[None, :, None, :])
    return distance.reshape(grid[0] * grid[1], -1)


def _has_mass(mass: Tensor) -> Tensor:
    """False for nothing, and for so little that dividing by it overflows; true for NaN, which is to be seen."""
    return ~(mass < torch.finfo(mass.dtype).tiny)


def _or_nan(mass: Tensor) -> Tensor:
    return torch.where(_has_mass(mass), mass, torch.nan)


def _check_grid(grid: tuple[int, int]) -> None:
    if len(grid) != 2 or min(grid) < 1:
        raise ValueError(f"a grid is (rows, columns), each at least 1, got {tuple(grid)}")


def _checked(attention: Tensor, grid: tuple[int, int], num_prefix_tokens: int) -> Tensor:
    """The map in float32 or float64, if it is one of these tokens."""
    _check_grid(grid)
    tokens = num_prefix_tokens + grid[0] * grid[1]
    if num_prefix_tokens < 0 or attention.ndim != 4 or attention.shape[-2:] != (tokens, tokens):
        raise ValueError(
            f"attention of {num_prefix_tokens} prefix tokens and {grid[0]} x {grid[1]} patches must be "
            f"(B, H, {tokens}, {tokens}), got {tuple(attention.shape)}"
        )
    return attention.to(torch.promote_types(attention.dtype, torch.float32))
