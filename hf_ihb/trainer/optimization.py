"""Which parameters decay, and what an optimizer is made with."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hf_ihb.models.student import TOKEN_PARAMETERS


def decayed_parameters(model: nn.Module, names: list[str], scope: str) -> list[str]:
    """Those of some parameters that are weights: no vectors, tokens or positions; or all parameters.

    Args:
        model: That holds them.
        names: Of those that `Trainer` would let decay.
        scope: A value of `weight_decay_scope`.
    """
    if scope == "all":
        return [name for name, _ in model.named_parameters()]
    # a ConvNeXt V2 keeps the vectors of its response normalisation as (1, 1, 1, C)
    vectors = {n for n, p in model.named_parameters() if p.ndim < 2 or (p.ndim > 2 and p.numel() == p.shape[-1])}
    return [n for n in names if n not in vectors and n.rsplit(".", 1)[-1] not in TOKEN_PARAMETERS]


def optimizer_settings(args: TrainingArguments, model: PreTrainedModel | None) -> tuple[Any, Any]:
    """Class and settings of the optimizer; ``optim_args`` reach SGD too (``momentum=0.9,nesterov=true``)."""
    optimizer, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
    if optimizer is torch.optim.SGD and args.optim_args:
        given = dict(pair.split("=") for pair in args.optim_args.replace(" ", "").split(","))
        nesterov = given.pop("nesterov", "false").lower() == "true"
        kwargs |= {"nesterov": nesterov, **{name: float(value) for name, value in given.items()}}
    return optimizer, kwargs
