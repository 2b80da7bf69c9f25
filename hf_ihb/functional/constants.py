"""Small tables on a device, copied there once.

A copy from the host's ordinary memory waits for the accelerator and cannot be captured in a graph; what is made of a
few numbers in every step must therefore be on the device already.
"""

import functools
from typing import Any

import torch
from torch import Tensor


@torch.compiler.assume_constant_result
@functools.lru_cache(maxsize=256)
def constant(values: Any, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of fixed numbers, the same object for the same ones; not to be changed.

    Args:
        values: A number or nested tuples of numbers.
        device: Where it is.
        dtype: Of the tensor.
    """
    return torch.tensor(values, dtype=dtype, device=device)
