"""What a student needs of the way it is run: layouts of its weights, and BatchNorm under sharding."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hf_ihb.errors import RecipeError
from hf_ihb.models.inputs import input_size
from hf_ihb.models.module import StudentModule, freeze_unused
from hf_ihb.models.processing import PixelFormat

BATCH_KEYS = ("pixel_values", "teacher_pixel_values", "labels", "label", "label_ids", "index")  # of those a step reads


def fit_batch_norms(trainer: Trainer) -> bool:
    """Whether a trainer's student runs under autocast, though FSDP2 casts its weights.

    FSDP2 casts the weights of a BatchNorm and not its statistics, which torch refuses together; it is told to leave
    both alone then.

    Raises:
        RecipeError: If DeepSpeed would do the same in half precision, where nothing can be told.
    """
    statistics = any(isinstance(part, nn.modules.batchnorm._NormBase) for part in trainer.model.modules())
    if statistics and trainer.is_deepspeed_enabled and trainer.accelerator.mixed_precision != "no":
        raise RecipeError(
            "expected a student without BatchNorm under DeepSpeed, which leaves statistics in float32 beside half "
            "weights, found one with it; take recipes/accelerate/ddp.yaml, or --mixed_precision no"
        )
    if not (statistics and trainer.accelerator.is_fsdp2):
        return False
    trainer.accelerator.state.fsdp_plugin.mixed_precision_policy = None
    return True


def take_losses(trainer: Trainer) -> None:
    """Tells a `Trainer` what it would otherwise do to losses and labels, and what is done where labels are mixed."""
    # our losses are means over a micro-batch; saying so makes 8 x 4 images equal 32 x 1
    trainer.model_accepts_loss_kwargs = False
    trainer.loss_is_scaled_for_ga = False
    trainer.label_smoother = None
    if trainer.args.label_names is None:
        trainer.label_names = ["labels"]
    # what `remove_unused_columns` leaves of a data set: it would ask the module, which takes pixels alone
    trainer._signature_columns = list(BATCH_KEYS)


def empty_image(
    student: PreTrainedModel, pixels: PixelFormat | None, first_batch: Callable[[], dict[str, Any]]
) -> Tensor:
    """``(1, C, H, W)`` an image without content, to see which parameters a student uses.

    Args:
        student: That is to see it.
        pixels: How it wants its images; None if batches bring them.
        first_batch: A batch of one image, to see shapes with.
    """
    size = input_size(student) if pixels is None else pixels.size
    if size is None:
        images = first_batch()["pixel_values"][:1]
        stored = pixels is not None and images.dtype == torch.uint8
        return torch.zeros_like(pixels.apply(images) if stored else images, dtype=torch.float32)
    return torch.zeros(1, getattr(student.config, "num_channels", 3), *size)


def lay_out(model: nn.Module) -> None:
    """Gives weights of convolutions that look beside their own place the layout they run fastest in.

    A ViT's patches are cut by one that does not.
    """
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    if any(size > step for m in convolutions for size, step in zip(m.kernel_size, m.stride, strict=True)):
        model.to(memory_format=torch.channels_last)


def wrapped(
    trainer: Trainer, args: TrainingArguments, first_batch: Callable[[], dict[str, Any]], student: Any
) -> StudentModule:
    """The module that a trainer trains of a student, without what no output of it depends on."""
    module = trainer._module(student, args, first_batch)
    freeze_unused(module, empty_image(student, trainer.batches.pixels, first_batch))
    return module


class WrappedInit:
    """A user's `model_init`, with or without a trial, whose model is wrapped.

    Args:
        model_init: The user's.
        wrap: Makes of its model the module that is trained.
    """

    def __init__(self, model_init: Callable, wrap: Callable[[Any], nn.Module]) -> None:
        self.takes_trial = len(inspect.signature(model_init).parameters) > 0
        self._init, self._wrap = model_init, wrap

    def __call__(self, trial: Any = None) -> nn.Module:
        """The module of a trial."""
        return self._wrap(self._init(trial) if self.takes_trial else self._init())
