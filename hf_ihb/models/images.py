"""Images as a model takes them: of another size than its own, cut into patches beforehand, with none of them hidden."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_ihb.models.features import sample_pixels, size_arguments, vision_config
from hf_ihb.models.files import UNREADABLE


def take_images(model: PreTrainedModel) -> PreTrainedModel:
    """Has a model see whole images as ``(B, C, H, W)`` pixels, whatever its library gives it; returns itself.

    A masked autoencoder hides no patch, and a model that wants its images cut into patches (SigLIP 2's NaFlex) is given
    them so. The weights, and what is saved, stay as they are.

    Args:
        model: Of transformers, or timm behind transformers' wrapper; changed in place.
    """
    for config in {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}.values():
        if getattr(config, "mask_ratio", None) is not None:
            config.mask_ratio = 0.0
    if _takes_patches(model) and not getattr(model, "_cuts_images", False):
        model.register_forward_pre_hook(_cut_into_patches, with_kwargs=True)
        model._cuts_images = True
    return model


def _takes_patches(model: nn.Module) -> bool:
    return "spatial_shapes" in inspect.signature(model.forward).parameters


def _cut_into_patches(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """A forward pre-hook: pixels ``(B, C, H, W)`` -> patches row by row, each ``patch * patch * C`` numbers."""
    pixels = kwargs.get("pixel_values", args[0] if args else None)
    if pixels is None or pixels.ndim != 4:
        return args, kwargs
    side = vision_config(model).patch_size
    rows, columns = pixels.shape[-2] // side, pixels.shape[-1] // side
    if (rows * side, columns * side) != tuple(pixels.shape[-2:]):
        raise ValueError(f"expected images whose sides are multiples of {side} px, found {tuple(pixels.shape[-2:])}")
    patches = pixels.unflatten(-1, (columns, side)).unflatten(-3, (rows, side))  # (B, C, rows, side, columns, side)
    patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    cut = {
        "pixel_values": patches,
        "pixel_attention_mask": torch.ones(patches.shape[:2], dtype=torch.int32, device=pixels.device),
        "spatial_shapes": torch.tensor([[rows, columns]] * len(pixels), device=pixels.device),
    }
    return args[1:], kwargs | cut


def fit_size(model: PreTrainedModel, size: tuple[int, int] | None) -> None:
    """Fits a network of timm to images of another size than it was made for, as timm does it.

    Its positions are resampled and its windows scaled; one that takes such images as it is stays as it is.

    Args:
        model: Changed in place.
        size: Height and width of the images, px; None for any.

    Raises:
        ValueError: If timm has no such way for it.
    """
    network = getattr(model, "timm_model", None)
    if network is None or size is None or _takes(model, size):
        return
    if not hasattr(network, "set_input_size"):
        raise ValueError(
            f"{type(network).__name__} of timm takes images of one size alone, not {size[0]} x {size[1]} px"
        )
    network.set_input_size(img_size=size)


@torch.no_grad()
def _takes(model: PreTrainedModel, size: tuple[int, int]) -> bool:
    pixels: Tensor = sample_pixels(model, size)
    training = model.training
    try:
        model.eval()(pixel_values=pixels, **size_arguments(model, pixels))
    except UNREADABLE:
        return False
    finally:
        model.train(training)
    return True
