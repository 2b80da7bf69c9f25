"""The classes of a student: how many it tells apart and what they are called, in it and in what is saved of it."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_ihb.errors import ModelLoadError
from hf_ihb.models.features import vision_config

_ANY_SIZE = (64, 64)  # px, for networks that take any


def set_classes(config: Any, names: Sequence[str]) -> None:
    """Gives a config its classes, wherever it says them.

    A repo of timm says them again in keys of its own, which count more than those of transformers when it is read.

    Args:
        config: Of any model of transformers, or timm behind transformers' wrapper; changed in place.
        names: Of the classes in label order.
    """
    config.num_labels = len(names)
    config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    for key, value in (("num_classes", len(names)), ("label_names", list(names))):
        if hasattr(config, key):
            setattr(config, key, value)


def class_names(config: Any) -> list[str]:
    """Names of a model's classes in the order of its scores, whatever the order of its ``id2label``.

    Raises:
        ValueError: If the classes are not numbered from 0 without a gap.
    """
    numbers = {int(number): str(name) for number, name in config.id2label.items()}
    if sorted(numbers) != list(range(len(numbers))):
        shown = ", ".join(map(str, sorted(numbers)[:8])) + (", ..." if len(numbers) > 8 else "")
        raise ValueError(f"key 'id2label' of its config: expected classes numbered from 0 without a gap, found {shown}")
    return [numbers[number] for number in range(len(numbers))]


def check_classes(model: PreTrainedModel, names: Sequence[str]) -> None:
    """Sees that a student answers with these classes, that its config says so, and that this is what will be read back.

    Args:
        model: A classifier; one image without content goes through it.
        names: Of the classes in label order.

    Raises:
        ModelLoadError: If not, or if it cannot be run on an image of its size.
    """
    who, expected = type(model).__name__, dict(enumerate(names))
    saved = type(model.config).from_dict(model.config.to_dict())
    for where, config in (("its config", model.config), ("its config, once saved", saved)):
        if config.id2label != expected:
            found = ", ".join(list(map(str, config.id2label.values()))[:5])
            raise ModelLoadError(
                f"{who}: expected the {len(names)} classes {', '.join(names[:5])}, ... in {where}, found "
                f"{len(config.id2label)}: {found}, ..."
            )
    shape, training = _image_shape(model), model.training
    try:
        with torch.no_grad():
            width = model.eval()(pixel_values=torch.zeros(1, *shape, device=model.device)).logits.shape[-1]
    except (RuntimeError, ValueError, AssertionError) as error:
        text = " ".join(str(error).split())[:200]
        raise ModelLoadError(
            f"{who}: expected it to take images of {shape} (see 'image_size'), found: {text}"
        ) from error
    finally:
        model.train(training)
    if width != len(names):
        raise ModelLoadError(f"{who}: expected logits of {len(names)} classes, found {width}")


def _image_shape(model: PreTrainedModel) -> tuple[int, int, int]:
    """Channels, height and width of an image that the model takes."""
    config = vision_config(model)
    if (shape := (getattr(config, "pretrained_cfg", None) or {}).get("input_size")) is not None:
        return tuple(shape)
    size = getattr(config, "image_size", None) or _ANY_SIZE
    size = (size, size) if isinstance(size, int) else tuple(size)
    return (getattr(config, "num_channels", 3), *size)
