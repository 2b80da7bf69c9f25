"""Collectives a loss needs: sums and stacks over processes that gradients flow through.

Each process runs the whole loss on what came back, so a tensor of one process takes part in the losses of all of them,
and its gradient is the sum of theirs. `DistributedDataParallel` then averages the gradients of the parameters. For a
loss L that is the same number on all W processes, every process gets ``W dL/dx`` for its own x, and the mean over
processes of ``W dL/dx dx/dw`` is ``dL/dw``: the gradient of one process that holds the whole batch. For losses that
differ, the result is likewise the gradient of their mean.
"""

import torch
import torch.distributed as dist
from torch import Tensor


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, tensor: Tensor) -> Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        return _Sum.apply(gradient)


class _Stack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, tensor: Tensor) -> Tensor:
        ctx.rows = len(tensor)
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        # a sum and a slice where gloo has no reduce-scatter; these are a few embeddings
        return _Sum.apply(gradient).split(ctx.rows)[dist.get_rank()]


def sum_over_processes(tensor: Tensor) -> Tensor:
    """Sum over all processes, the same on each; differentiable."""
    return _Sum.apply(tensor)


def stack_over_processes(tensor: Tensor) -> Tensor:
    """Rows of all processes in their order, ``(B, ...) -> (W * B, ...)``; B the same on each; differentiable."""
    return _Stack.apply(tensor)
