"""Degenerate matrices through every similarity loss: finite, and in float32 what float64 says.

python benchmarks/reliability/degenerate.py [--matrices 2000] [--name NAME]

Pairs of matrices that a student and a teacher might have, each of a kind that is no noise: zero, constant, equal rows,
rank one, one row or column that is not zero, outliers, a large mean, huge and tiny scales, one-hot, fewer rows than an
estimator needs. Each pair goes through every similarity loss in float32, bfloat16 and float16, as the student's dtype
(the teacher's is float32): loss and gradient must be finite. In float32 the loss must be within 1e-5 of the one in
float64 of the same numbers. Losses of methods, with their heads, must be finite too.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

from small_runs import begin_with, table, write

from hf_ihb.functional.similarity import gram_distance, linear_cka, published_cka, rbf_cka
from hf_ihb.functional.tokens import correlation_divergence, token_cosine_distance
from hf_ihb.methods import METHODS
from tests.methods.steps import BATCH, CLASSES, TOKENS, WIDTH, attention_of, example, head_of, keys_of, method, scalar

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = 1e-5


def of_cka(similarity: Callable[..., Tensor], *args: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """``1 - CKA``, and the constant 1 where it is undefined, as the loss has it."""
    return lambda x, y: 1 - similarity(x, y, *args).nan_to_num(0.0)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear CKA, biased": of_cka(linear_cka, "biased"),
    "linear CKA, debiased": of_cka(linear_cka, "debiased"),
    "RBF CKA, biased": of_cka(rbf_cka, "biased"),
    "RBF CKA, debiased": of_cka(rbf_cka, "debiased"),
    "published CKA": of_cka(published_cka),
    "Gram": gram_distance,
    "Gram, published": lambda x, y: gram_distance(x, y, normalization="published"),
    "token cosine": lambda x, y: token_cosine_distance(x[None], y[None, :, : x.shape[1]]).sum(),
    "relations": lambda x, y: correlation_divergence(x, y, 0.1),
}


def token_cosine(x: Tensor, y: Tensor) -> Tensor:
    """By its definition, in the dtype of its arguments; `token_cosine_distance` is in float32 whatever they are."""
    y = y[:, : x.shape[1]]
    lengths = torch.linalg.vector_norm(x, dim=1) * torch.linalg.vector_norm(y, dim=1)
    return 1 - torch.where(lengths > 0, (x * y).sum(dim=1) / torch.where(lengths > 0, lengths, 1), 0).mean()


REFERENCES = {**LOSSES, "token cosine": token_cosine}


def kinds(rows: int, width: int, g: torch.Generator) -> dict[str, Tensor]:
    """Kind -> a matrix of it, float32."""

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    x, row, column = noise(rows, width), noise(1, width), noise(rows, 1)
    at = int(torch.randint(rows, (), generator=g)), int(torch.randint(width, (), generator=g))
    one_row, one_column, outlier, one_hot = (torch.zeros(rows, width) for _ in range(4))
    one_row[at[0]], one_column[:, at[1]] = row[0], column[:, 0]
    outlier[at] = 1e4
    one_hot[torch.arange(rows), torch.randint(width, (rows,), generator=g)] = 1
    half = x.clone()
    half[: rows // 2] = x[0].clone()
    return {
        "noise": x, "zero": torch.zeros(rows, width), "constant": torch.full((rows, width), float(row[0, 0])),
        "equal rows": row.expand(rows, width).clone(), "rank one": column * row, "one row": one_row,
        "one column": one_column, "outlier": x + outlier, "large mean": x + 100 * row, "one-hot": one_hot,
        "half equal": half, "huge": x * 1e4, "tiny": x * 1e-3, "equal columns": column.expand(rows, width).clone(),
        "signs": x.sign(), "constant but one": torch.ones(rows, width) + outlier * 1e-4,
    }  # fmt: skip


def pair(number: int) -> tuple[str, Tensor, Tensor]:
    """The n-th pair ``(N, P)``, ``(N, Q)``, P <= Q, and the names of its kinds."""
    g = torch.Generator().manual_seed(number)
    rows, width, more = (int(torch.randint(*span, (), generator=g)) for span in ((1, 33), (1, 25), (0, 9)))
    own, other = kinds(rows, width, g), kinds(rows, width + more, g)
    names = list(own)
    first, second = names[1 + number % (len(names) - 1)], names[int(torch.randint(len(names), (), generator=g))]
    if number % 7 == 0:
        return f"{first} / itself", own[first], torch.cat((own[first], own[first].new_zeros(rows, more)), dim=1)
    return f"{first} / {second}", own[first], other[second]


def fault(name: str, x: Tensor, y: Tensor, dtype: torch.dtype) -> tuple[str, float]:
    """What is not finite, ``""`` if nothing, and how far a loss in float32 is from the one in float64."""
    x = x.to(dtype).requires_grad_()
    value = LOSSES[name](x, y)
    if not value.isfinite():
        return "loss", 0.0
    (gradient,) = torch.autograd.grad(value, x, allow_unused=True)
    if gradient is not None and not gradient.isfinite().all():
        return "gradient", 0.0
    if dtype != torch.float32:
        return "", 0.0
    return "", abs(value.item() - REFERENCES[name](x.detach().double(), y.double()).item())


def method_fault(kind: Any, x: Tensor, dtype: torch.dtype) -> str:
    """What is not finite of a method whose student has tokens of a degenerate kind."""
    outputs, step = example(kind, dtype=dtype)
    tokens = x.repeat(BATCH, 1, 1).to(dtype).requires_grad_()
    outputs.features, outputs.final_tokens, outputs.logits = (tokens,), tokens, tokens[:, 0, :CLASSES]
    if outputs.attentions is not None:
        outputs.attentions = (attention_of(tokens, torch.zeros_like(outputs.attentions[0])),)
    if (head := head_of(kind, dtype=dtype)) is not None:
        outputs.method_heads = {kind.name: head(outputs, step.teacher)}
    value = scalar(kind.loss(outputs, step))
    if not value.isfinite():
        return "loss"
    (gradient,) = torch.autograd.grad(value, tokens, allow_unused=True)
    return "gradient" if gradient is not None and not gradient.isfinite().all() else ""


def main() -> None:
    """Writes a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--matrices", type=int, default=2000)
    parser.add_argument("--name", default=None, help="Of the results, without ending; printed alone if not given.")
    args = parser.parse_args()
    begin_with()
    started, rows = time.monotonic(), []
    torch.set_num_threads(1)
    for name in LOSSES:
        faults: Counter[str] = Counter()
        worst = (0.0, "")
        for number in range(args.matrices):
            what, x, y = pair(number)
            for dtype in DTYPES:
                found, off = fault(name, x, y, dtype)
                faults[f"{what}: {found}, {dtype}"] += bool(found)
                faults[f"{what}: off, {dtype}"] += off > TOLERANCE
                worst = max(worst, (off, what))
        bad = {what: count for what, count in faults.items() if count}
        unfinite = sum(count for what, count in bad.items() if ": off" not in what)
        row = {
            "loss": name,
            "pairs": args.matrices,
            "not finite": unfinite,
            "off by > 1e-5": sum(bad.values()) - unfinite,
        }
        rows.append(row | {"farthest": f"{worst[0]:.1e} ({worst[1]})", "faults": bad})
        print(rows[-1], file=sys.stderr)
    generator = torch.Generator().manual_seed(0)
    for kind in METHODS:
        made = method(kind.name, **keys_of(kind) | {"alpha": 0.5})
        bad = Counter(
            f"{what}: {found}, {dtype}"
            for what, x in kinds(TOKENS, WIDTH, generator).items()
            for dtype in DTYPES
            if (found := method_fault(made, x, dtype))
        )
        rows.append({"loss": f"method {kind.name}", "pairs": 16, "not finite": sum(bad.values()), "faults": dict(bad)})
        print(rows[-1], file=sys.stderr)
    text = table(rows, ["loss", "pairs", "not finite", "off by > 1e-5", "farthest"])
    write(args.name, "Degenerate matrices in float32, bfloat16 and float16", text, rows, started)


if __name__ == "__main__":
    main()
