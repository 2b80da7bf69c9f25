"""Gradients of every structural loss on this process's share of a batch, averaged over processes, against the whole's.

Run by two processes; prints nothing and ends with 0 if they agree.
"""

import sys

import torch
import torch.distributed as dist

from hf_ihb.functional.gram import pack_gram, unpack_gram
from hf_ihb.losses import StructuralLoss, TokenPair
from hf_ihb.run import run_script
from hf_ihb.trainer.arguments import StructuralDistillationTrainingArguments
from hf_ihb.trainer.structural import structural_loss

SETTINGS = {
    "cka": {"cka_weight": 1.0},
    "gram": {"gram_weight": 1.0},
    "token": {"token_weight": 1.0},
    "relation": {"relation_weight": 1.0},
    "plain": {"cka_weight": 1.0, "gram_weight": 1.0, "center_positions": False},
    "cached": {"cka_weight": 1.0, "gram_weight": 1.0, "center_positions": True},
    "pooled": {"cka_weight": 1.0, "cka_scope": "pooled"},
    "pooled biased": {"cka_weight": 1.0, "cka_scope": "pooled", "cka_estimator": "biased"},
    "images": {"cka_weight": 1.0, "cka_scope": "images"},
    "images rbf": {"cka_weight": 1.0, "cka_scope": "images", "cka_kernel": "rbf"},
    "published": {"cka_weight": 1.0, "cka_estimator": "published"},
    "relation self": {"relation_weight": 1.0, "relation_include_self": True},
}
COMPILED = ("cka", "cached", "pooled", "images rbf", "relation")
BATCH, TOKENS, WIDTH = 12, 9, 6


def gradients(loss, settings, parameter, rows, cached):
    """Of a map that makes the student's tokens, by a sum of all losses."""
    generator = torch.Generator().manual_seed(0)
    seen = torch.randn(BATCH, TOKENS, WIDTH, generator=generator)[rows]
    teacher = torch.randn(BATCH, TOKENS, 2 * WIDTH, generator=generator)[rows]
    wide = torch.randn(WIDTH, 2 * WIDTH, generator=generator)
    mask = torch.rand(BATCH, TOKENS, generator=generator)[rows] > 0.1
    weight = torch.ones(len(seen))  # an equal number on each process: a mean over a batch is one over processes
    student = seen @ parameter
    known = unpack_gram(pack_gram(teacher), TOKENS) if cached else teacher
    pairs = {}
    for name in ("cka", "gram", "token", "relation"):
        if settings.get(f"{name}_weight"):
            mine = student @ wide if name == "token" else student
            pairs[name] = [TokenPair(mine, known if name in ("cka", "gram") else teacher, mask)]
    found = loss(pairs, weight)
    sum(value for name, value in found.items() if name.endswith("_loss")).backward()
    gradient, parameter.grad = parameter.grad, None
    return gradient


def main(argv: list[str]) -> None:
    """Eager, then compiled."""
    runs = [(False, name) for name in SETTINGS] + [(True, name) for name in COMPILED]
    for compiled, name in runs:
        settings = SETTINGS[name]
        args = StructuralDistillationTrainingArguments(
            output_dir="unused", student_layers=[0], report_to="none", use_cpu=True, torch_compile=compiled,
            torch_compile_backend="aot_eager" if compiled else None, **settings,
        )  # fmt: skip
        parameter = torch.eye(WIDTH).add(0.1).requires_grad_()
        rank, share = dist.get_rank(), BATCH // dist.get_world_size()
        rows, cached = slice(rank * share, (rank + 1) * share), name == "cached"
        torch._dynamo.reset()
        gradient = gradients(structural_loss(args), settings, parameter, rows, cached)
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
        expected = gradients(StructuralLoss.from_arguments(args), settings, parameter, slice(None), cached)
        assert expected.abs().max() > 1e-3, name
        error = float((gradient - expected).norm() / expected.norm())
        assert error < 1e-4, f"{name}, compiled {compiled}: the gradient is {error:.2g} away"


if __name__ == "__main__":
    run_script(main)
    sys.exit(0)
