"""The losses of all methods of a run as one function of tensors."""

from collections.abc import Callable, Sequence

import torch
from packaging import version
from torch import Tensor
from transformers import TrainingArguments
from transformers.utils import logging

from hf_ihb.methods import Method
from hf_ihb.step import Step, StudentOutput
from hf_ihb.trainer.compiling import compiled

logger = logging.get_logger(__name__)

Losses = dict[str, tuple[Tensor, dict[str, Tensor]]]


def method_losses(methods: Sequence[Method], args: TrainingArguments) -> Callable[[StudentOutput, Step], Losses]:
    """Of each method, by its name, the loss and what is logged beside it; one graph where that is asked for and right.

    Before torch 2.14 a compiled collective is differentiated wrongly, without a sign: the losses are the same, the
    gradient of pooled CKA is 0, that of others off by a quarter. They are left as they are then.
    """

    def losses(outputs: StudentOutput, step: Step) -> Losses:
        values = {}
        for method in methods:
            loss = method.loss(outputs, step)
            values[method.name] = loss if isinstance(loss, tuple) else (loss, {})
        return values

    collectives = args.world_size > 1 and any(method.needs.statistics for method in methods)
    if not (collectives and args.torch_compile) or version.parse(torch.__version__).release >= (2, 14):
        return compiled(losses, args)
    logger.warning_once(
        f"torch {torch.__version__}: losses that are statistics of the batch of several processes are not compiled, "
        "since their gradients would be wrong before torch 2.14"
    )
    return losses
