"""Which parameters decay, and what an optimizer is made with."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.utils import logging

from hf_ihb.errors import RecipeError
from hf_ihb.models.module import StudentModule
from hf_ihb.models.student import TOKEN_PARAMETERS

logger = logging.get_logger(__name__)


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


def take_heads(optimizer: torch.optim.Optimizer, module: StudentModule) -> None:
    """Gives an optimizer of a user's the student-side heads that it does not know; students' parameters are theirs.

    The heads join the largest group, whose settings and schedule they get.

    Raises:
        RecipeError: If it holds no parameter of the student: it is another model's, and nothing would be learned.
    """
    groups = optimizer.param_groups
    known = {id(parameter) for group in groups for parameter in group["params"]}
    if not any(id(parameter) in known for parameter in module.student.parameters()):
        raise RecipeError(
            "optimizers: expected an optimizer of the student's parameters, found one of none of them; make it of "
            "`trainer.student.parameters()`"
        )
    heads = {n: p for n, p in module.named_parameters() if not n.startswith("student.") and p.requires_grad}
    missing = {name: parameter for name, parameter in heads.items() if id(parameter) not in known}
    if missing:
        largest = max(groups, key=lambda group: sum(parameter.numel() for parameter in group["params"]))
        largest["params"].extend(missing.values())
        names = sorted({name.rsplit(".", 1)[0] for name in missing})
        logger.warning(f"the optimizer that was passed in also trains, in its largest group: {', '.join(names)}")


def check_schedule(optimizer: Any, scheduler: Any) -> None:
    """Sees that a user's schedule is one of the user's optimizer.

    Raises:
        RecipeError: If not: no learning rate would ever change.
    """
    if scheduler is not None and getattr(scheduler, "optimizer", optimizer) is not optimizer:
        found = "without one" if optimizer is None else "of another"
        raise RecipeError(f"optimizers: expected a schedule of the optimizer beside it, found one {found}")


def hold_back(optimizer: Any, spoiled: Tensor | None) -> None:
    """Makes the next step of an optimizer one that changes nothing, if a flag on its device is 1.

    Fused optimizers of torch read such a flag for GradScaler, and nobody waits for it. Others read none and step on: to
    leave them out one would have to wait.

    Args:
        optimizer: Maybe wrapped by Accelerate.
        spoiled: Scalar, 0 or 1; None for no flag.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if spoiled is None or not isinstance(inner, torch.optim.Optimizer):
        return
    if all(group.get("fused") for group in inner.param_groups):
        inner.found_inf = spoiled


def let_go(optimizer: Any) -> None:
    """Takes the flag off again: a step of somebody else's would read it."""
    vars(getattr(optimizer, "optimizer", optimizer)).pop("found_inf", None)
