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
    """Decorates a function of hashable arguments: its result is kept, and a constant where it is compiled into a graph.

    The tensor is the same object for the same arguments and not to be changed.
    """
    kept = functools.lru_cache(maxsize=256)(function)

    @functools.wraps(function)
    def call(*args: Any) -> Tensor:  # the compiler looks through `lru_cache`, and must not look in here
        return kept(*args)

    call.cache_clear = kept.cache_clear
    return torch.compiler.assume_constant_result(call)


@table
def constant(values: Any, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of fixed numbers.

    Args:
        values: A number or nested tuples of numbers.
        device: Where it is.
        dtype: Of the tensor.
    """
    return torch.tensor(values, dtype=dtype, device=device)
