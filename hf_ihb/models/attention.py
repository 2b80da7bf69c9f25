"""Attention maps of vision transformers, one layer of one batch at a time.

Maps are taken where every plain ViT of transformers and timm passes, in `scaled_dot_product_attention`, so no module
names are needed. ``layer l`` is the self-attention of block l, 0-based.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from statistics import fmean
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from hf_ihb.errors import ModelLoadError, RecipeError
from hf_ihb.functional.attention import (
    AttentionStatistics,
    attention_map,
    attention_statistics,
    uniform_attention_distance,
)
from hf_ihb.models.features import layout_of, size_arguments, vision_config
from hf_ihb.models.files import UNREADABLE

# Parameters that ViTs of transformers and timm put before the patches; where there is a cls token, it comes first.
_CLS_TOKENS = ("cls_token", "class_token", "class_embedding")
_PREFIX_TOKENS = (*_CLS_TOKENS, "distillation_token", "dist_token", "register_tokens", "reg_token")


class AttentionGeometry(NamedTuple):
    """What the tokens of an attention map are.

    Attributes:
        grid: Rows and columns of the patches.
        num_prefix_tokens: Tokens before the patches (cls, distillation, registers).
        patch_size: Side of a patch, px.
        has_cls: Whether token 0 is a cls token.
    """

    grid: tuple[int, int]
    num_prefix_tokens: int
    patch_size: int
    has_cls: bool

    @property
    def num_tokens(self) -> int:
        """Prefix tokens and patches."""
        return self.num_prefix_tokens + self.grid[0] * self.grid[1]

    def statistics(self, attention: Tensor) -> AttentionStatistics:
        """`attention_statistics` of a ``(B, H, T, T)`` map of these tokens."""
        return attention_statistics(attention, self.grid, self.num_prefix_tokens, has_cls=self.has_cls)

    def map(self, attention: Tensor) -> Tensor:
        """`attention_map` of a ``(B, H, T, T)`` map of these tokens."""
        return attention_map(attention, self.grid, self.num_prefix_tokens, has_cls=self.has_cls)


def attention_geometry(model: PreTrainedModel, pixel_values: Tensor) -> AttentionGeometry:
    """The tokens of a ViT for images of some size, from its patch size and the prefix tokens among its parameters.

    `capture_attention` checks them against the number of tokens that the model really attends over.

    Args:
        model: A vision transformer of transformers, or timm behind transformers' wrapper.
        pixel_values: ``(B, C, H, W)``; the size may be another than the model was made for.

    Returns:
        Its `AttentionGeometry`.

    Raises:
        ModelLoadError: If the model has no patches, or they are not square.
    """
    timm_model = getattr(model, "timm_model", None)
    owner = vision_config(model) if timm_model is None else getattr(timm_model, "patch_embed", None)
    patch = getattr(owner, "patch_size", None)
    if patch is None:
        raise _no_attention(model)
    sides = {patch} if isinstance(patch, int) else set(patch)
    if len(sides) != 1:
        raise ModelLoadError(f"{_name(model)}, key 'patch_size': expected square patches of one size, found {patch}")
    side = sides.pop()
    prefix, has_cls = 0, False
    for path, parameter in model.named_parameters():
        name = path.rpartition(".")[2]
        if name in _PREFIX_TOKENS:
            prefix += parameter.shape[-2] if parameter.ndim > 1 else 1
            has_cls |= name in _CLS_TOKENS
    if timm_model is None and (measured := _measured_prefix(model, pixel_values)) is not None:
        # AIMv2's head has a cls token of its own, which no block sees
        prefix, has_cls = measured, has_cls and measured > 0
    return AttentionGeometry((pixel_values.shape[-2] // side, pixel_values.shape[-1] // side), prefix, side, has_cls)


def _measured_prefix(model: PreTrainedModel, pixel_values: Tensor) -> int | None:
    """Tokens before the patches in every block; None where that cannot be seen, or differs."""
    try:
        blocks = layout_of(model, pixel_values, **size_arguments(model, pixel_values)).blocks
    except UNREADABLE:
        return None
    found = {block.num_prefix_tokens if block.kind == "tokens" else None for block in blocks}
    return found.pop() if len(found) == 1 else None


def has_attention(model: PreTrainedModel, pixel_values: Tensor) -> bool:
    """Whether `capture_attention` finds the attention of a plain ViT in a model: one image is enough to see.

    Args:
        model: Any image model.
        pixel_values: ``(1, C, H, W)``, normalised.
    """
    try:
        capture_attention(model, pixel_values, lambda layer, attention: None)
    except ModelLoadError:
        return False
    return True


@torch.no_grad()
def capture_attention(
    model: PreTrainedModel, pixel_values: Tensor, callback: Callable[[int, Tensor], None], **kwargs: Any
) -> ModelOutput:
    """Runs a model once, without gradients and in the mode it is in, and hands on the attention of each block.

    A map lives until the callback returns, so one layer's is held at a time. A model that runs under another attention
    implementation is switched to sdpa for the call.

    Args:
        model: A vision transformer of transformers, or timm behind transformers' wrapper.
        pixel_values: ``(B, C, H, W)``, normalised.
        callback: Called with the layer and its attention ``(B, H, T, T)``, the softmax before dropout, float32
            (float64 for a float64 model).
        **kwargs: Passed on to the model.

    Returns:
        The model's own outputs.

    Raises:
        ModelLoadError: If the model has no self-attention over all patches (CNNs, windowed and pooled attention).
    """
    with attention_seen(model, attention_geometry(model, pixel_values), callback):
        return model(pixel_values=pixel_values, **kwargs)


@contextmanager
def attention_seen(
    model: PreTrainedModel, geometry: AttentionGeometry, callback: Callable[[int, Tensor], None]
) -> Iterator[None]:
    """Inside, each block of the model that runs hands its attention to a callback.

    Where gradients are on, they flow through the map. It is what eager attention returns, and beside the fused one: a
    student is not run otherwise because somebody looks.

    Args:
        model: As in `capture_attention`, run once inside.
        geometry: Its tokens, by `attention_geometry`.
        callback: As in `capture_attention`.

    Raises:
        ModelLoadError: If the model has no self-attention over all patches.
        RecipeError: If reentrant gradient checkpointing would take the gradients away.
    """
    capture = _Capture(geometry, callback, _name(model), checkpointed=model.is_gradient_checkpointing)
    with _sdpa(model), capture:
        yield
    if not capture.num_layers:
        raise _no_attention(model)


def cls_attention_maps(model: PreTrainedModel, pixel_values: Tensor, **kwargs: Any) -> list[Tensor]:
    """Where the cls token looks in each layer (without one, where patches look on average), averaged over heads.

    Args:
        model: A vision transformer of transformers, or timm behind transformers' wrapper.
        pixel_values: ``(B, C, H, W)``, normalised.
        **kwargs: Passed on to the model.

    Returns:
        For each layer ``(B, rows, columns)`` on the CPU, each map summing to 1.

    Raises:
        ModelLoadError: If the model has no self-attention over all patches.
    """
    geometry = attention_geometry(model, pixel_values)
    maps: list[Tensor] = []
    capture_attention(model, pixel_values, lambda _, attention: maps.append(geometry.map(attention).cpu()), **kwargs)
    return maps


class AttentionAccumulator:
    """Means and deviations over images of the attention statistics of each layer, in float64.

    Memory does not grow with the number of images, and the split into batches does not matter. An image whose statistic
    is NaN makes its mean NaN.

    Args:
        geometry: The tokens, the same for all images.
    """

    def __init__(self, geometry: AttentionGeometry) -> None:
        self.geometry = geometry
        self._sums: dict[int, _Sums] = {}

    def update(self, layer: int, statistics: AttentionStatistics) -> None:
        """Adds a batch of one layer.

        Args:
            layer: 0-based block index.
            statistics: Each ``(B, H)``.
        """
        found = {name: value for name, value in statistics._asdict().items() if value is not None}
        values = torch.stack(list(found.values())).cpu().double()  # one tensor, so that a device is waited for once
        values = torch.cat((values, values.mean(dim=-1, keepdim=True)), dim=-1)  # (statistic, B, H + 1)
        seen = self._sums.get(layer, _Sums(tuple(found), 0, torch.zeros(()), torch.zeros(())))
        count = seen.count + values.shape[1]
        self._sums[layer] = _Sums(seen.names, count, seen.total + values.sum(1), seen.squares + values.square().sum(1))

    @property
    def num_images(self) -> int:
        """Images seen so far."""
        return max((sums.count for sums in self._sums.values()), default=0)

    @property
    def mean_distance(self) -> float:
        """Mean over layers, patches."""
        return fmean(layer["distance"] for layer in self.layers())

    def layers(self) -> list[dict[str, Any]]:
        """Plain numbers of each layer, in order.

        Returns:
            For each layer a dictionary: ``layer``; ``distance`` in patches, ``distance_px``, ``distance_relative``
            (to uniform attention); ``distance_std_over_images``, the sample deviation of the mean over heads (NaN for
            one image); and each field of `AttentionStatistics` by its name. These are means over images and heads;
            ``*_per_head`` are means over images. Without a cls token ``cls_dispersion`` is None.
        """
        return [self._layer(layer) for layer in sorted(self._sums)]

    def _layer(self, layer: int) -> dict[str, Any]:
        sums = self._sums[layer]
        means, deviations = sums.means(), sums.deviations()
        uniform = uniform_attention_distance(self.geometry.grid)
        distance = means["distance"][-1]
        row: dict[str, Any] = {
            "layer": layer,
            "distance": distance,
            "distance_px": distance * self.geometry.patch_size,
            "distance_relative": distance / uniform if uniform else math.nan,
            "distance_per_head": means["distance"][:-1],
            "distance_std_over_images": deviations["distance"][-1],
        }
        for name in AttentionStatistics._fields[1:]:
            values = means.get(name)
            row[name] = None if values is None else values[-1]
            row[f"{name}_per_head"] = None if values is None else values[:-1]
        return row


class _Sums(NamedTuple):
    """Sums over images; the last column is that of the mean over heads."""

    names: tuple[str, ...]
    count: int
    total: Tensor  # (statistic, H + 1)
    squares: Tensor  # (statistic, H + 1)

    def means(self) -> dict[str, list[float]]:
        return dict(zip(self.names, (self.total / self.count).tolist(), strict=True))

    def deviations(self) -> dict[str, list[float]]:
        squares = (self.squares - self.total.square() / self.count).clamp_min(0)
        # a tensor as divisor: 0 / 0 is NaN, the deviation of one image
        deviations = (squares / torch.tensor(self.count - 1.0, dtype=squares.dtype)).sqrt()
        return dict(zip(self.names, deviations.tolist(), strict=True))


class _Capture(TorchFunctionMode):
    """Hands the attention of every self-attention call to a callback, then lets the call go on."""

    def __init__(
        self, geometry: AttentionGeometry, callback: Callable[[int, Tensor], None], name: str, *, checkpointed: bool
    ) -> None:
        super().__init__()
        self.checkpointed = checkpointed and torch.is_grad_enabled()
        self.geometry = geometry
        self.callback = callback
        self.name = name
        self.num_layers = 0

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._see(*args, **kwargs)
        return func(*args, **kwargs)

    def _see(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> None:
        if query.shape[-2] != key.shape[-2]:  # a pooling head, which looks from a query of its own
            return
        if query.shape[-2] != self.geometry.num_tokens:
            rows, columns = self.geometry.grid
            raise ModelLoadError(
                f"{self.name}: expected attention over {self.geometry.num_tokens} tokens ({rows} x {columns} patches "
                f"and {self.geometry.num_prefix_tokens} before them), found {query.shape[-2]}; leave attention out"
            )
        if self.checkpointed and not torch.is_grad_enabled():
            raise RecipeError(
                "key 'gradient_checkpointing_kwargs': expected {\"use_reentrant\": false} where attention is learned "
                "from, found a reentrant one, which leaves them without gradients"
            )
        # what a map is made of is kept: a block that is run again does not make its map again
        with saved_tensors_hooks(_as_it_is, _as_it_is) if self.checkpointed else nullcontext():
            attention = _attention_weights(query, key, value, *args, **kwargs)
        self.callback(self.num_layers, attention)
        self.num_layers += 1


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _attention_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The softmax inside `scaled_dot_product_attention`, before dropout, in float32 or float64; ``(B, H, T, T)``."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    if enable_gqa:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    with torch.autocast(query.device.type, enabled=False):
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        scores = (query.to(dtype) * scale) @ key.to(dtype).mT
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores.masked_fill_(~attn_mask, -torch.inf)
        elif attn_mask is not None:
            scores += attn_mask
        return scores.softmax(dim=-1)  # a second map, until this returns


@contextmanager
def _sdpa(model: PreTrainedModel) -> Iterator[None]:
    """Has a model call `scaled_dot_product_attention`, and puts back what it used before."""
    owners = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    configs = {id(config): config for owner in owners for config in _with_parts(owner.config)}
    before = [(config, config._attn_implementation) for config in configs.values()]
    unfused = [module for module in model.modules() if getattr(module, "fused_attn", None) is False]  # timm's
    if not unfused and all(owner.config._attn_implementation == "sdpa" for owner in owners):
        yield
        return
    try:
        if any(owner.config._attn_implementation != "sdpa" for owner in owners):
            _set_sdpa(model)
        for module in unfused:
            module.fused_attn = True
        yield
    finally:
        for module in unfused:
            module.fused_attn = False
        for config, implementation in before:  # outer ones first, because setting one sets its parts
            config._attn_implementation = implementation


def _set_sdpa(model: PreTrainedModel) -> None:
    try:
        model.set_attn_implementation("sdpa")
    except ValueError as error:
        raise _no_attention(model) from error


def _with_parts(config: Any) -> Iterator[Any]:
    yield config
    for name in config.sub_configs:
        if getattr(config, name, None) is not None:
            yield from _with_parts(getattr(config, name))


def _name(model: PreTrainedModel) -> str:
    timm_model = getattr(model, "timm_model", None)
    return type(model).__name__ + (f" ({type(timm_model).__name__})" if timm_model is not None else "")


def _no_attention(model: PreTrainedModel) -> ModelLoadError:
    return ModelLoadError(
        f"{_name(model)}: expected a ViT with self-attention over all patches, found none; leave attention out"
    )
