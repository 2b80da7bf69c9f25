"""The images a model takes, and the image processor that is saved beside it."""

import json
import tempfile
from typing import Any

import torch
from transformers import AutoImageProcessor, BaseImageProcessor, PreTrainedModel, TimmWrapperConfig
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

from hf_ihb.errors import ModelLoadError
from hf_ihb.models.features import vision_config
from hf_ihb.models.files import UNREADABLE
from hf_ihb.models.processing import PixelFormat, pixel_format, timm_processor


def input_size(model: PreTrainedModel) -> tuple[int, int] | None:
    """Height and width that a model's config names; None where it names none."""
    size = getattr(vision_config(model), "image_size", None)
    return (size, size) if isinstance(size, int) else size and tuple(size)


@torch.no_grad()
def takes(model: PreTrainedModel, size: tuple[int, int]) -> bool:
    """Whether a model runs on images of a size as `pipeline` calls it.

    Of another size than its config's it is tried: the config of many a network that takes any size names one.

    Args:
        model: Left in the mode it was in.
        size: Height and width.
    """
    named = input_size(model)
    if named is None or named == tuple(size):
        return True
    parameter = next(model.parameters())
    channels = getattr(vision_config(model), "num_channels", 3)
    training, _ = model.training, model.eval()
    try:
        model(pixel_values=torch.zeros(1, channels, *size, device=parameter.device, dtype=parameter.dtype))
    except (ValueError, RuntimeError):
        return False
    finally:
        model.train(training)
    return True


def format_for(model: PreTrainedModel, processor: Any) -> PixelFormat:
    """What an image processor does to the images of a model, which must take what it makes.

    Args:
        model: That is trained.
        processor: Its image processor.

    Raises:
        ModelLoadError: If its steps cannot be followed, or the model does not take what comes out.
    """
    pixels = pixel_format(processor)
    if pixels.size is not None and not takes(model, pixels.size):
        (height, width), (rows, columns) = input_size(model), pixels.size
        raise ModelLoadError(
            f"image processor {type(processor).__name__}: expected images of {height} x {width} px, which is what "
            f"{type(model).__name__} takes, found {rows} x {columns} px; give it that size"
        )
    return pixels


def _as_read_back(processor: Any) -> Any:
    """What `pipeline` will have for an image processor: one that resizes in Pillow comes back as torchvision's."""
    if not isinstance(processor, BaseImageProcessor):
        return processor
    with tempfile.TemporaryDirectory() as folder:
        try:
            processor.save_pretrained(folder)
            found = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
        except UNREADABLE:  # a class of the user's own, which is not found by its name
            return processor
    return processor if type(found) is type(processor) else found


def processor_beside(model: PreTrainedModel, processor: Any) -> Any:
    """The image processor that will be read back with a model; what it needs is put into the model's config.

    That of a timm model is made from its config, whatever other file lies beside it.

    Args:
        model: That is saved.
        processor: That was chosen for it.

    Raises:
        ModelLoadError: If the model is timm's and its config cannot hold what the processor does.
    """
    if processor is None or not isinstance(model.config, TimmWrapperConfig):
        return processor and _as_read_back(processor)
    if not isinstance(processor, TimmWrapperImageProcessor):
        processor = timm_processor(pixel_format(processor))
    config = model.config
    if TimmWrapperImageProcessor(config.pretrained_cfg or {}).data_config != processor.data_config:
        config.pretrained_cfg = (config.pretrained_cfg or {}) | json.loads(json.dumps(processor.data_config))
    return processor
