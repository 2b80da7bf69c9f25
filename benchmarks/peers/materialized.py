"""Attention distance from materialised maps, and CKA in its Gram form: the way both are commonly computed."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn


def _distance_matrix(grid: tuple[int, int]) -> Tensor:
    places = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])).float()
    return torch.cdist(places, places)


def _distances(maps: Tensor, grid: tuple[int, int], num_prefix_tokens: int) -> Tensor:
    """``(L, B, H, T, T)`` maps -> ``(L, B, H)`` distances, in patches."""
    patches = maps[..., num_prefix_tokens:, num_prefix_tokens:]
    patches = patches / patches.sum(dim=-1, keepdim=True)
    return (patches * _distance_matrix(grid)).sum(dim=-1).mean(dim=-1)


@torch.no_grad()
def distances_batch_by_batch(
    model: nn.Module, batches: Iterable[Tensor], grid: tuple[int, int], num_prefix_tokens: int
) -> Tensor:
    """Mean distance ``(L, H)``; the maps of all layers of a batch are held at a time.

    Args:
        model: With eager attention, which returns its maps.
        batches: ``(B, C, H, W)``, normalised.
        grid: Rows and columns of the patches.
        num_prefix_tokens: Tokens before the patches.
    """
    total, count = torch.zeros(()), 0
    for pixels in batches:
        maps = torch.stack(model(pixel_values=pixels, output_attentions=True).attentions)
        total = total + _distances(maps, grid, num_prefix_tokens).sum(dim=1)
        count += len(pixels)
    return total / count


@torch.no_grad()
def distances_of_all_maps(
    model: nn.Module, batches: Iterable[Tensor], grid: tuple[int, int], num_prefix_tokens: int
) -> Tensor:
    """`distances_batch_by_batch`, with the maps of all images kept until the end."""
    kept = [torch.stack(model(pixel_values=pixels, output_attentions=True).attentions) for pixels in batches]
    return _distances(torch.cat(kept, dim=1), grid, num_prefix_tokens).mean(dim=1)


def _centered_gram(features: Tensor) -> Tensor:
    """Centred without its diagonal, so that inner products are unbiased (Szekely and Rizzo, 2014), as a vector."""
    n, gram = len(features), features @ features.T
    gram.fill_diagonal_(0)
    means = gram.sum(dim=0) / (n - 2)
    means -= means.sum() / (2 * (n - 1))
    gram -= means
    gram -= means[:, None]
    return gram.fill_diagonal_(0).ravel()


def _normalized(hsic: Tensor) -> Tensor:
    return hsic / torch.outer(hsic.diagonal(), hsic.diagonal()).sqrt()


@torch.no_grad()
def gram_cka(layers: Sequence[Tensor]) -> Tensor:
    """Debiased linear CKA ``(L, L)`` of ``(N, P_l)`` features; the N x N matrices of all layers are held."""
    grams = [_centered_gram(features) for features in layers]
    hsic = torch.zeros(len(layers), len(layers))
    for i, gram in enumerate(grams):
        for j in range(i + 1):
            hsic[i, j] = hsic[j, i] = gram @ grams[j]
    return _normalized(hsic)


@torch.no_grad()
def gram_cka_pair_by_pair(layers: Sequence[Tensor]) -> Tensor:
    """`gram_cka` with two N x N matrices at a time; that of a pair's second layer is made anew for each pair."""
    hsic = torch.zeros(len(layers), len(layers))
    for i, features in enumerate(layers):
        gram = _centered_gram(features)
        hsic[i, i] = gram @ gram
        for j in range(i):
            hsic[i, j] = hsic[j, i] = gram @ _centered_gram(layers[j])
    return _normalized(hsic)
