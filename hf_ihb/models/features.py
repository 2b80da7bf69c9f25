"""One way to read block outputs off CNNs and ViTs of transformers and timm.

Layer numbers are 0-based block indices: ``layer l`` is the output of block l of a ViT, of stage l of a CNN, before any
final norm.
"""

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.utils import ModelOutput

# Names of the modules that hold blocks or stages in timm; a feature taken before them is the stem's.
_TIMM_STAGES = ("layer", "stages", "blocks", "levels", "features")


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
        layers: 0-based block indices; none are computed if empty, all if None.
        **kwargs: Passed on to the model.

    Returns:
        The model's own outputs, and one `FeatureMap` for each layer.

    Raises:
        ValueError: If a layer does not exist or the tokens do not form a grid.
    """
    if layers is not None and not layers:
        return model(pixel_values=pixel_values, **kwargs), []
    outputs = model(pixel_values=pixel_values, output_hidden_states=True, **kwargs)
    # Swin and its kin keep tokens in `hidden_states` and maps here
    states = getattr(outputs, "reshaped_hidden_states", None) or outputs.hidden_states
    first = first_block(model, len(states))
    depth = len(states) - first
    layers = range(depth) if layers is None else layers
    if missing := [layer for layer in layers if not 0 <= layer < depth]:
        raise ValueError(f"{type(model).__name__} has blocks 0 to {depth - 1}, not {missing[0]}")
    return outputs, [_feature_map(states[first + layer], pixel_values, vision_config(model)) for layer in layers]


def vision_config(model: nn.Module) -> Any:
    """The config of what sees images: a part of that of a model that was made to read as well (CLIP, SigLIP)."""
    return getattr(model.config, "vision_config", model.config)


def size_arguments(model: nn.Module, pixel_values: Tensor) -> dict[str, bool]:
    """What a ViT's forward must be told where the images are not of the size it was made for."""
    size = getattr(vision_config(model), "image_size", None)
    fixed = (size, size) if isinstance(size, int) else size
    if fixed is None or tuple(pixel_values.shape[-2:]) == tuple(fixed):
        return {}
    takes = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    return {"interpolate_pos_encoding": True} if takes else {}


def first_block(model: nn.Module, num_states: int) -> int:
    """How many hidden states come before that of block 0 (embeddings or stem)."""
    timm_model = getattr(model, "timm_model", None)
    if timm_model is not None:
        info = list(getattr(timm_model, "feature_info", None) or [])
        module = info[0]["module"] if info and isinstance(info[0], dict) else "blocks"
        return 0 if module.startswith(_TIMM_STAGES) else 1
    config = vision_config(model)
    depths = getattr(config, "depths", None)
    depth = len(depths) if depths is not None else config.num_hidden_layers
    return num_states - depth


def _feature_map(state: Tensor, pixel_values: Tensor, config: Any) -> FeatureMap:
    if state.ndim == 4:
        return FeatureMap(state.flatten(2).mT, tuple(state.shape[-2:]), 0)
    patch = config.patch_size
    patch = (patch, patch) if isinstance(patch, int) else tuple(patch)
    grid = (pixel_values.shape[-2] // patch[0], pixel_values.shape[-1] // patch[1])
    prefix = state.shape[1] - grid[0] * grid[1]
    if prefix < 0:
        raise ValueError(f"{state.shape[1]} tokens do not hold a {grid[0]} x {grid[1]} grid of patches")
    return FeatureMap(state, grid, prefix)


def final_norm(model: nn.Module) -> nn.Module | None:
    """The norm a ViT applies after its last block; None if there is none to be found."""
    for owner in (getattr(model, "timm_model", None), model, getattr(model, "base_model", None)):
        for name in ("layernorm", "norm"):
            norm = getattr(owner, name, None)
            if isinstance(norm, nn.Module) and not isinstance(norm, nn.Identity):
                return norm
    return None
