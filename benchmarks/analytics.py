"""Attention distance, CKA and the Hessian's trace of a DeiT-Tiny, each beside the way it is commonly computed.

python benchmarks/analytics.py --dataset_name DATASET [--parts attention cka hessian] [--images 10000] [--rounds 20]

- Attention distance: against eager attention that returns its maps, reduced batch by batch (for memory also at the
  end). Every round is another part of the images; together the rounds are one pass over all of them.
- CKA of 12 x 12 blocks (mean patch token, linear, debiased): chunks of 256 images against N x N Gram matrices of all
  images, those of all layers at a time or of two. Features are there before; the pass that makes them is timed apart.
- The Hessian's trace: against PyHessian's way, on a list of the same micro-batches and on one batch of all images.

The peers (benchmarks/peers) are ours, in the manner of what they stand for. Pieces of work take turns in one process;
each memory number is from a process of its own: the peak above what it held when the work began. Linux only.
"""

import argparse
import itertools
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from analytics_pieces import Pieces
from process_memory import MIB, in_process, measured
from side_by_side import RESULTS, bar, bars_table, interleave, ratio, write_results
from torch import Tensor

from hf_ihb.runs.tables import markdown_table

PARTS = ("attention", "cka", "hessian")


class Measurements:
    """Bars, and the numbers behind them.

    Args:
        args: The command line.
        folder: For what the processes share.
    """

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.features = args, folder / "features.pt"
        self.pieces = Pieces(args)
        self.bars: list[dict[str, Any]] = []
        given = {name: value for name, value in vars(args).items() if not isinstance(value, Path | None)}
        self.content: dict[str, Any] = {"arguments": given, "revision": self.pieces.revision, "memory": []}

    def time(self, names: Sequence[str], rounds: int, parts: Sequence[Tensor], warmups: int = 1) -> dict[str, Any]:
        """Seconds of pieces in each round; every piece goes through the parts of the images in the same order."""

        def over_parts(piece: Callable[[Tensor], Any]) -> Callable[[], Any]:
            turns = itertools.cycle(parts)
            return lambda: piece(next(turns))

        works = {name: over_parts(getattr(self.pieces, name)) for name in names}
        seconds = interleave(works, rounds, warmups=warmups, device=torch.device("cpu"))
        self.content.setdefault("seconds", {}).update(seconds)
        return seconds

    def peaks(self, piece: str, *counts: int) -> list[int]:
        """Peak bytes of a piece on so many images."""
        own = {
            name: getattr(self.args, name) for name in ("dataset_name", "seed", "batch_size", "micro_batch", "probes")
        }
        words = [f"--{name}={value}" for name, value in own.items()]
        found = [
            {"piece": piece, "images": count}
            | in_process(__file__, [*words, "--images", count, "--worker", piece, "--features", self.features])
            for count in counts
        ]
        self.content["memory"] += found
        return [row["peak_bytes"] for row in found]

    def bar(self, number: int, what: str, wanted: str, numerator: Any, denominator: Any) -> None:
        """Of the seconds of rounds, or of two numbers."""
        lists = [[side] if isinstance(side, int) else side for side in (numerator, denominator)]
        self.bars.append(bar(number, what, wanted, ratio(*lists)))


def attention(m: Measurements) -> None:
    """Time and memory of the attention distance."""
    rows, few = m.pieces.rows, min(1000, len(m.pieces.rows))
    names = ("forward", "distance", "statistics", "materialised")
    forward, ours, six, theirs = m.time(names, m.args.rounds, rows.chunk(m.args.rounds)).values()
    some = rows[:256]
    m.content["attention_difference"] = (m.pieces.distance(some) - m.pieces.materialised(some)).abs().max().item()
    m.bar(7, "attention distance: materialised / ours, s", ">= 2.5", theirs, ours)
    m.bar(7, "the same, ours with five more statistics", ">= 2.5", theirs, six)
    m.bar(7, "the most there is to gain: materialised / a plain forward pass, s", ">= 2.5", theirs, forward)
    beyond = [[s - f for s, f in zip(found, forward, strict=True)] for found in (theirs, ours, six)]
    m.bar(7, "beyond a plain forward pass: materialised / ours, s", ">= 2.5", beyond[0], beyond[1])
    m.bar(7, "the same, ours with five more statistics", ">= 2.5", beyond[0], beyond[2])
    (base,) = m.peaks("forward", few)
    few_peak, peak = m.peaks("distance", few, len(rows))
    six_peak, their_peak = (m.peaks(name, few, len(rows))[1] for name in ("statistics", "materialised"))
    m.peaks("materialised_whole", few // 2, few)
    m.bar(7, "attention distance, peak: ours / materialised", "<= 0.2", peak, their_peak)
    m.bar(7, "the same, ours with five more statistics", "<= 0.2", six_peak, their_peak)
    m.bar(7, "peak beyond a plain forward pass: ours / materialised", "<= 0.2", max(peak - base, 0), their_peak - base)
    m.bar(7, f"attention distance, peak: {len(rows):,} / {few:,} images", "<= 1.1", peak, few_peak)


def cka(m: Measurements) -> None:
    """Time and memory of CKA."""
    rows = m.pieces.rows
    (forward,) = m.time(["extract"], 1, [rows], warmups=0)["extract"]
    torch.save(m.pieces.features, m.features)
    m.content["cka_difference"] = (m.pieces.minibatch(rows) - m.pieces.gram(rows)).abs().max().item()  # warms up
    ours, pairs, grams = m.time(["minibatch", "gram_pairs", "gram"], m.args.gram_rounds, [rows], warmups=0).values()
    m.bar(7, "CKA 12 x 12 of features: Gram form, two layers at a time / ours, s", ">= 50", pairs, ours)
    m.bar(7, "the same, Gram form with all layers at a time", ">= 50", grams, ours)
    whole = [[forward + seconds for seconds in found] for found in (pairs, ours)]
    m.bar(7, "two layers at a time / ours, with the pass that makes the features", ">= 1", *whole)
    (peak,), (pairs_peak,), (grams_peak,) = (m.peaks(n, len(rows)) for n in ("minibatch", "gram_pairs", "gram"))
    m.bar(7, "CKA 12 x 12, peak: ours / Gram form, two layers at a time", "<= 0.2", peak, pairs_peak)
    m.bar(7, "the same, Gram form with all layers at a time", "<= 0.2", peak, grams_peak)
    few = min(1000, len(rows))
    few_peak, peak = m.peaks("similarity", few, len(rows))
    m.bar(7, f"CKA with its forward passes, peak: {len(rows):,} / {few:,} images", "<= 1.1", peak, few_peak)


def hessian(m: Measurements) -> None:
    """Time and memory of Hutchinson's trace."""
    count = m.args.hessian_images
    rows = m.pieces.rows[:count]
    names = ("trace", "trace_micro_batches", "trace_full_batch")
    ours, micro, full = m.time(names, m.args.hessian_rounds, [rows]).values()
    m.content["gradients"] = counts = m.pieces.count_gradients(rows)
    m.bar(8, "a probe: PyHessian-like on micro-batches / ours, s", ">= 1", micro, ours)
    m.bar(8, "a probe: PyHessian-like on one batch / ours, s", ">= 1", full, ours)
    m.bar(8, "probes: asked for / made", ">= 1", counts["probes asked for"], counts["probes made"])
    few, many = m.peaks("trace", count, 4 * count)
    m.peaks("trace_micro_batches", count, 4 * count)
    m.peaks("trace_full_batch", count // 2, count)
    m.bar(8, "trace, peak: 4 x the images / the images", "<= 1.1", many, few)


def tables(m: Measurements) -> list[str]:
    """Bars, seconds and memory."""
    seconds = [("piece", "what it is", "median of rounds, s")]
    for name, found in m.content["seconds"].items():
        seconds.append((name, getattr(Pieces, name).__doc__, f"{statistics.median(found):.3f}"))
    memory = [("piece", "images", "s", "peak, MiB")]
    for row in m.content["memory"]:
        memory.append((row["piece"], f"{row['images']:,}", f"{row['seconds']:.1f}", f"{row['peak_bytes'] / MIB:.0f}"))
    notes = {
        name: m.content[name] for name in ("attention_difference", "cka_difference", "gradients") if name in m.content
    }
    return [bars_table(m.bars), markdown_table(seconds), markdown_table(memory), f"    {json.dumps(notes)}"]


def main() -> None:
    """Measures the parts, or one piece in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", default="uoft-cs/cifar10", help="Hub id or folder of an image set.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="What is measured.")
    parser.add_argument("--images", type=int, default=10000, help="Test images, at random.")
    parser.add_argument("--batch_size", type=int, default=256, help="Images in one forward.")
    parser.add_argument("--rounds", type=int, default=20, help="Of attention, each on its share of the images.")
    parser.add_argument("--gram_rounds", type=int, default=5, help="Of CKA, each on all images.")
    parser.add_argument("--hessian_rounds", type=int, default=15, help="Of the trace.")
    parser.add_argument("--hessian_images", type=int, default=32, help="Of the trace.")
    parser.add_argument("--micro_batch", type=int, default=16, help="Of the trace, images.")
    parser.add_argument("--probes", type=int, default=8, help="Of the trace, in each round.")
    parser.add_argument("--seed", type=int, default=0, help="Of weights and of the choice of images.")
    parser.add_argument("--output_dir", type=Path, default=RESULTS, help="Where the results go.")
    parser.add_argument("--worker", help="Measure this piece here and print JSON.")
    parser.add_argument("--features", type=Path, help="For a worker: features of the images.")
    args = parser.parse_args()
    if args.worker is not None:
        print(json.dumps(_work(args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        m = Measurements(args, Path(folder))
        for part in args.parts:
            {"attention": attention, "cka": cka, "hessian": hessian}[part](m)
    about = (
        f"A DeiT-Tiny with random weights (seed {args.seed}) and {args.images:,} test images of "
        f"`{Path(args.dataset_name).name}` in batches of {args.batch_size}; the trace: {args.hessian_images} images in "
        f"micro-batches of {args.micro_batch}, {args.probes} probes. A ratio is of the same images in one round."
    )
    write_results("analytics", about, m.content | {"bars": m.bars}, tables(m), folder=args.output_dir)


def _work(args: argparse.Namespace) -> dict[str, Any]:
    pieces = Pieces(args)
    if args.features.is_file():
        pieces.features = torch.load(args.features)
    piece = getattr(pieces, args.worker)
    if not args.worker.startswith(("gram", "minibatch")):
        warm_up = args.micro_batch if args.worker.startswith("trace") else args.batch_size
        piece(pieces.rows[:warm_up])  # threads, allocator and kernels are there before
    found = measured(partial(piece, pieces.rows))
    return {"seconds": found["seconds"], "peak_bytes": found["peak_bytes"]}


if __name__ == "__main__":
    main()
