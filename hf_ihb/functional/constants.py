"""Small tables on a device, made and copied there once.

A copy from the host's ordinary memory waits for the accelerator and cannot be captured in a graph; what is made of a
few numbers in every step must therefore be on the device already.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def table(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorates a function of hashable arguments: its result is kept.

    The tensor is the same object for the same arguments and not to be changed. A function that is compiled reads it as
    an input of its graph, if it was made before (what is compiled is therefore called once uncompiled); the compiler
    looks into a plain dictionary, where it looks through a `functools.lru_cache`, and two results of
    `torch.compiler.assume_constant_result` collide in one graph (seen with torch 2.11 and 2.14).
    """
    kept: dict[tuple, Tensor] = {}

    @functools.wraps(function)
    def call(*args: Any) -> Tensor:
        if args not in kept:
            kept[args] = function(*args)
        return kept[args]

    call.cache_clear = kept.clear
    return call


@table
def _kept(values: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def constant(values: Any, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of fixed numbers, the same object each time.

    Args:
        values: A number or nested tuples of numbers.
        device: Where it is.
        dtype: Of the tensor.
    """
    return _kept(values, device, dtype)


constant.cache_clear = _kept.cache_clear
