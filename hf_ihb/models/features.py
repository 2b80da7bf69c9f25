"""One way to read block outputs off CNNs and ViTs of transformers and timm.

Layer numbers are 0-based block indices: ``layer l`` is the output of block l of a ViT, of stage l of a CNN, before any
final norm; negative ones count from the last. What a block is, is measured once for each model (`hf_ihb.models.probe`).
"""

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from hf_ihb.models.probe import ModelLayout, StateLayout, probe, states_of


class FeatureMap(NamedTuple):
    """Output of one block.

    Attributes:
        tokens: ``(B, prefix + rows * columns, width)``.
        grid: Rows and columns of the patch tokens (CNN: of the map).
        num_prefix_tokens: Tokens before the patches (cls, distillation, registers); 0 for a CNN.
    """

    tokens: Tensor
    grid: tuple[int, int]
    num_prefix_tokens: int

    @property
    def patch_tokens(self) -> Tensor:
        """``(B, rows * columns, width)``."""
        return self.tokens[:, self.num_prefix_tokens :]


def extract_features(
    model: nn.Module, pixel_values: Tensor, layers: Sequence[int] | None, **kwargs: Any
) -> tuple[ModelOutput, list[FeatureMap]]:
    """Runs a model once and returns its outputs and the feature maps of some layers.

    Args:
        model: A vision model of transformers, or timm behind transformers' wrapper.
        pixel_values: ``(B, C, H, W)``, normalised.
        layers: Block indices, negative ones from the last; none are computed if empty, all if None.
        **kwargs: Passed on to the model.

    Returns:
        The model's own outputs, and one `FeatureMap` for each layer.

    Raises:
        ValueError: If a layer does not exist or the tokens do not form a grid.
    """
    if layers is not None and not layers:
        return model(pixel_values=pixel_values, **kwargs), []
    blocks = layout_of(model, pixel_values, **kwargs).blocks
    chosen = [blocks[layer] for layer in resolve_layers(layers, len(blocks), type(model).__name__)]
    outputs = model(pixel_values=pixel_values, output_hidden_states=True, **kwargs)
    states = states_of(outputs)
    return outputs, [_feature_map(states[block.index], block, pixel_values) for block in chosen]


def layout_of(model: nn.Module, pixel_values: Tensor | None = None, **kwargs: Any) -> ModelLayout:
    """What `probe` sees of a model, asked once.

    Args:
        model: Any image model.
        pixel_values: ``(B, C, H, W)`` to look with, the first time; noise of the size it was made for if None.
        **kwargs: Passed on to the model.
    """
    layout = getattr(model, "_hf_ihb_layout", None)
    if layout is None:
        if pixel_values is None:
            pixel_values = sample_pixels(model)
            kwargs = size_arguments(model, pixel_values)
        layout = model._hf_ihb_layout = probe(model, pixel_values, **kwargs)
    return layout


def sample_pixels(model: nn.Module, size: tuple[int, int] | None = None, num_channels: int | None = None) -> Tensor:
    """``(1, C, H, W)`` noise, the same each time, of the size and channels that a model was made for."""
    parameter = next(model.parameters())
    height, width = size or native_size(model) or (224, 224)
    channels = num_channels or in_channels(model) or 3
    noise = torch.randn(1, channels, height, width, generator=torch.Generator().manual_seed(0))
    return noise.to(parameter.device, parameter.dtype)


def native_size(model: nn.Module) -> tuple[int, int] | None:
    """Height and width a model was made for, as far as it says so."""
    config = vision_config(model)
    size = getattr(config, "image_size", None)
    if size is None and isinstance(own := getattr(config, "pretrained_cfg", None), dict) and own.get("input_size"):
        size = own["input_size"][-2:]
    return (size, size) if isinstance(size, int) else size and tuple(size)


def in_channels(model: nn.Module) -> int | None:
    """Channels of the images that a model takes: those of its first convolution."""
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    return None if first is None else first.in_channels


def vision_config(model: nn.Module) -> Any:
    """The config of what sees images: a part of that of a model that was made to read as well (CLIP, SigLIP)."""
    return getattr(model.config, "vision_config", model.config)


def resolve_layers(layers: Sequence[int] | None, depth: int, name: str) -> list[int]:
    """Layers as numbers from 0, of a model of so many blocks; all if None.

    Raises:
        ValueError: If one does not exist.
    """
    if layers is None:
        return list(range(depth))
    if missing := [layer for layer in layers if not -depth <= layer < depth]:
        raise ValueError(f"{name} has blocks 0 to {depth - 1}, not {missing[0]}")
    return [layer % depth for layer in layers]


def size_arguments(model: nn.Module, pixel_values: Tensor) -> dict[str, Any]:
    """What a forward must be told beside the images: that they are of another size, that none of them is hidden."""
    parameters = inspect.signature(model.forward).parameters
    arguments: dict[str, Any] = {}
    config = vision_config(model)
    if "noise" in parameters and hasattr(config, "patch_size"):
        # a masked autoencoder shuffles its patches unless they are given in order
        count = (pixel_values.shape[-2] // config.patch_size) * (pixel_values.shape[-1] // config.patch_size)
        order = torch.arange(count, device=pixel_values.device, dtype=torch.float32)
        arguments["noise"] = order.expand(len(pixel_values), -1)
    size = getattr(config, "image_size", None)
    fixed = (size, size) if isinstance(size, int) else size
    is_other = fixed is not None and tuple(pixel_values.shape[-2:]) != tuple(fixed)
    if is_other and "interpolate_pos_encoding" in parameters:
        arguments["interpolate_pos_encoding"] = True
    return arguments


def _feature_map(state: Tensor, block: StateLayout, pixel_values: Tensor) -> FeatureMap:
    if block.kind == "map":
        return FeatureMap(state.flatten(2).mT, (state.shape[2], state.shape[3]), 0)
    if block.kind == "map_last":
        return FeatureMap(state.flatten(1, 2), (state.shape[1], state.shape[2]), 0)
    count = state.shape[1] - block.num_prefix_tokens
    for whole in (round, math.floor, math.ceil):
        rows, columns = (whole(px / stride) for px, stride in zip(pixel_values.shape[-2:], block.stride, strict=True))
        if rows * columns == count:
            return FeatureMap(state, (rows, columns), block.num_prefix_tokens)
    raise ValueError(f"{state.shape[1]} tokens do not hold a {rows} x {columns} grid of patches")


def final_norm(model: nn.Module) -> nn.Module | None:
    """The norm a model applies after its last block; None if there is none."""
    norm = layout_of(model).norm
    return None if norm is None else model.get_submodule(norm.path)


def apply_final_norm(model: nn.Module, feature_map: FeatureMap) -> FeatureMap | None:
    """A block's output after the model's final norm; None where there is none of its width."""
    norm = layout_of(model).norm
    tokens = feature_map.tokens
    if norm is None or norm.width != tokens.shape[-1]:
        return None
    module = model.get_submodule(norm.path)
    with _statistics_kept(module):
        if not norm.takes_map:
            return feature_map._replace(tokens=module(tokens))
        patches = module(feature_map.patch_tokens.mT.unflatten(-1, feature_map.grid).contiguous()).flatten(2).mT
    return feature_map._replace(tokens=patches, num_prefix_tokens=0)


@contextmanager
def _statistics_kept(norm: nn.Module) -> Iterator[None]:
    """Inside, a batch norm in training leaves its statistics alone: the model's own forward counts the batch."""
    tracking = [
        module for module in norm.modules() if module.training and getattr(module, "track_running_stats", False)
    ]
    for module in tracking:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in tracking:
            module.track_running_stats = True
