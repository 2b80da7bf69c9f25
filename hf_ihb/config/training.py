"""Keys of `TrainingArguments` that would be read and not honoured, or fail after the data was loaded."""

import copy
import inspect
import os
import sys
import warnings
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_utils import HubStrategy

from hf_ihb.config.fields import shown

# what each may be, since its other values speak of texts; not every version of transformers has all of them
_OF_TEXTS: dict[str, tuple[tuple[Any, ...], str]] = {
    "label_names": ((None, [], ["labels"]), "['labels'], the one key of a batch that is learned from"),
    "neftune_noise_alpha": ((None,), "none: it is noise on embeddings of words, and images have none"),
    "train_sampling_strategy": (("random", "sequential"), "'random' or 'sequential': images are all of one length"),
    "use_liger_kernel": ((False,), "false: its kernels are those of language models"),
    "include_num_input_tokens_seen": (("no", False), "'no': it would count pixels"),
}


def meet_in_time(args: TrainingArguments) -> None:
    """Lets processes that train on CPUs meet with `ddp_timeout`, which `TrainingArguments` gives to accelerators alone.

    They would wait half an hour for one that cannot be reached.
    """
    on_cpus = args.use_cpu or parse_flag_from_env("ACCELERATE_USE_CPU")
    if on_cpus and int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.distributed.is_initialized():
        PartialState(cpu=True, backend=args.ddp_backend, timeout=args.ddp_timeout_delta)


def refuse_unhonoured(args: TrainingArguments) -> None:
    """Refuses settings that images have no counterpart for, or nothing to go by, and what is not installed.

    Raises:
        ValueError: Naming the first.
    """
    for key, (values, expected) in _OF_TEXTS.items():
        if getattr(args, key, values[0]) not in values:
            _refuse(args, key, expected)
    _check_loading(args)
    reports = [args.report_to] if isinstance(args.report_to, str) else args.report_to or []
    installed = get_available_reporting_integrations()
    if missing := [name for name in reports if name not in ("all", "none", *installed)]:
        found = ", ".join(installed) or "none"
        raise ValueError(f"key 'report_to': expected 'none', or loggers that are installed ({found}), found {missing}")
    if args.ema_decay > 0 and args.swa_start is not None:
        raise ValueError("keys 'ema_decay' and 'swa_start' contradict: one average is evaluated and saved")
    if args.swa_learning_rate is not None and args.swa_start is None:
        raise ValueError("key 'swa_learning_rate': expected 'swa_start' with it, found none")
    if args.early_stopping_patience is not None and (args.eval_strategy == "no" or args.metric_for_best_model is None):
        raise ValueError(
            "key 'early_stopping_patience': expected 'eval_strategy' and 'metric_for_best_model' with it, found "
            f"{args.eval_strategy} and {args.metric_for_best_model}"
        )
    if args.push_to_hub and args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        raise ValueError(
            "key 'hub_strategy': expected 'end' or 'every_save', found "
            f"'{HubStrategy(args.hub_strategy).value}': the optimizer's state in a checkpoint is never pushed"
        )
    _check_optimizer(args)
    _check_schedule(args)


def refuse_several_gpus(args: TrainingArguments) -> None:
    """Refuses one process that sees several GPUs.

    Raises:
        ValueError: With the command that starts one for each.
    """
    if args.n_gpu > 1:
        raise ValueError(
            f"expected one process for each GPU, found one that sees {args.n_gpu}; start it as `accelerate launch "
            f"--multi_gpu --num_processes {args.n_gpu} {sys.argv[0] or 'SCRIPT'} ...`, or on one GPU "
            "with CUDA_VISIBLE_DEVICES=0"
        )


def _refuse(args: TrainingArguments, name: str, expected: str) -> None:
    raise ValueError(f"key '{name}': expected {expected}, found {shown(getattr(args, name))}")


def _check_loading(args: TrainingArguments) -> None:
    """That a loader can be made: some of its keys ask for workers."""
    keys = ("persistent_workers", "multiprocessing_context", "prefetch_factor")
    settings = {key: getattr(args, f"dataloader_{key}") for key in keys}
    try:
        DataLoader([0], num_workers=args.dataloader_num_workers, **settings)
    except ValueError as error:
        given = ", ".join(f"'dataloader_{key}'" for key, value in settings.items() if value)
        raise ValueError(
            f"key 'dataloader_num_workers': expected a number that suits {given}, found {args.dataloader_num_workers}: "
            f"{_first_line(error)}"
        ) from error


def _check_optimizer(args: TrainingArguments) -> None:
    """That the optimizer is installed, and takes settings where there are any."""
    plain, model = copy.copy(args), nn.Linear(1, 1)
    plain.optim_args = None
    try:
        Trainer.get_optimizer_cls_and_kwargs(plain, model)
    except (ImportError, ValueError, RuntimeError) as error:
        if args.optim_target_modules is not None and not isinstance(error, ImportError):
            return  # they are looked for in the student, when the optimizer is made
        raise ValueError(f"key 'optim': cannot make '{_name(args.optim)}': {_first_line(error)}") from error
    if not args.optim_args:
        return
    if any("=" not in pair for pair in args.optim_args.split(",")):
        _refuse(args, "optim_args", "name=value,name=value")
    names = [pair.split("=")[0].strip() for pair in args.optim_args.split(",")]
    try:
        optimizer, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)
        is_known = optimizer.__module__.startswith("torch.")
        if is_known:
            optimizer([torch.zeros(1, requires_grad=True)], **settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"key 'optim_args': '{_name(args.optim)}' does not take {args.optim_args}: {error}") from error
    # the settings of SGD are read by the trainer, whatever the version of transformers
    read = inspect.signature(optimizer).parameters if optimizer is torch.optim.SGD else settings
    if is_known and (unread := [name for name in names if name not in read]):
        _refuse(args, "optim_args", f"settings that '{_name(args.optim)}' reads, and '{unread[0]}' is none of them")


def _check_schedule(args: TrainingArguments) -> None:
    """That the schedule takes its settings."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate or 1.0)
    settings: dict[str, Any] = dict(args.lr_scheduler_kwargs or {})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            get_scheduler(args.lr_scheduler_type, optimizer, 0, 100, settings)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"key 'lr_scheduler_kwargs': the schedule '{_name(args.lr_scheduler_type)}' does not take "
            f"{shown(settings)}: {_first_line(error)}"
        ) from error


def _name(choice: Any) -> str:
    return str(getattr(choice, "value", choice))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
