"""Functions of tensors as one graph, where `torch_compile` asks for it."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainingArguments

from hf_ihb.augment.color import fixed_shapes


def compiled(function: Callable, args: TrainingArguments) -> Callable:
    """A function of tensors, compiled where `torch_compile` asks for it, in the way the model then is.

    Its first arguments go through it uncompiled as well: the small tables it reads are made then
    (`hf_ihb.functional.constants`), and are not to be a part of its graph.
    """
    if not args.torch_compile:
        return function
    graph = torch.compile(function, backend=args.torch_compile_backend, mode=args.torch_compile_mode)
    ran = False

    @functools.wraps(function)
    def call(*given: Any) -> Any:
        nonlocal ran
        if not ran:
            with torch.no_grad(), fixed_shapes():
                function(*given)
            ran = True
        return graph(*given)

    return call
