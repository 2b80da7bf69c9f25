"""Gradients of every method on this process's share of a batch, averaged over processes, against the whole batch's.

Run by two processes; prints nothing and ends with 0 if they agree.
"""

import sys

import torch
import torch.distributed as dist

from hf_ihb.methods import METHODS, methods_of
from hf_ihb.run import run_script
from hf_ihb.trainer.arguments import DistillationTrainingArguments
from hf_ihb.trainer.collectives import stack_over_processes, sum_over_processes
from hf_ihb.trainer.method_losses import method_losses
from tests.methods.steps import BATCH, WIDTH, example, keys_of

SETTINGS = {kind.name: keys_of(kind) for kind in METHODS}
COMPILED = [*SETTINGS, "cached", "pooled", "images rbf"]
SETTINGS |= {
    "plain": {"cka_weight": 1.0, "gram_weight": 1.0, "center_positions": False},
    "cached": {"cka_weight": 1.0, "gram_weight": 1.0, "center_positions": True},
    "pooled": {"cka_weight": 1.0, "cka_scope": "pooled"},
    "pooled biased": {"cka_weight": 1.0, "cka_scope": "pooled", "cka_estimator": "biased"},
    "images": {"cka_weight": 1.0, "cka_scope": "images"},
    "images rbf": {"cka_weight": 1.0, "cka_scope": "images", "cka_kernel": "rbf"},
    "published": {"cka_weight": 1.0, "cka_estimator": "published"},
    "relation self": {"relation_weight": 1.0, "relation_include_self": True},
}


def gradient(losses, methods, parameter, rows, cached, several):
    """Of a map that makes the student's tokens, by a sum of the losses; each of its own step."""
    reduce, gather = (sum_over_processes, stack_over_processes) if several else (None, None)
    total = 0.0
    for method in methods:
        outputs, step = example(method, parameter=parameter, rows=rows, cached=cached)
        step.reduce, step.gather = reduce, gather
        total = total + losses[method.name](outputs, step)[method.name][0]
    total.backward()
    found, parameter.grad = parameter.grad, None
    return found


def main(argv: list[str]) -> None:
    """Eager, then compiled."""
    for compiled, name in [(False, name) for name in SETTINGS] + [(True, name) for name in COMPILED]:
        args = DistillationTrainingArguments(
            output_dir="unused", student_layers=[0], report_to="none", use_cpu=True, torch_compile=compiled,
            torch_compile_backend="aot_eager" if compiled else None, **SETTINGS[name],
        )  # fmt: skip
        plain = DistillationTrainingArguments(
            output_dir="unused", student_layers=[0], report_to="none", use_cpu=True, **SETTINGS[name]
        )
        methods = methods_of(args)
        parameter = torch.eye(WIDTH).add(0.1).requires_grad_()
        rank, share = dist.get_rank(), BATCH // dist.get_world_size()
        rows, cached = slice(rank * share, (rank + 1) * share), name == "cached"
        torch._dynamo.reset()
        own = {method.name: method_losses([method], args) for method in methods}
        found = gradient(own, methods, parameter, rows, cached, several=True)
        dist.all_reduce(found)
        found /= dist.get_world_size()
        whole = {method.name: method_losses([method], plain) for method in methods}
        expected = gradient(whole, methods, parameter, slice(None), cached, several=False)
        assert expected.abs().max() > 1e-3, name
        error = float((found - expected).norm() / expected.norm())
        assert error < 1e-4, f"{name}, compiled {compiled}: the gradient is {error:.2g} away"


if __name__ == "__main__":
    run_script(main)
    sys.exit(0)
