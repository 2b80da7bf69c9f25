"""What a save and a step cost with crash-safe checkpoints and checked numbers, beside plain `Trainer`.

python benchmarks/reliability/price.py [--rounds 15] [--steps 12]

A DeiT-Tiny (5.5 million weights, AdamW) is saved by plain `Trainer`, by `Trainer` with `CrashSafeCheckpoints`, and by
`SupervisedTrainer`, in turns; plain `Trainer` leaves what it wrote to the system, ours is hashed and synced to the disk
before it is named. Before each save the disk is given time to finish what others wrote. Then the same three train a
DeiT of width 96 on the same float pixels, in turns; the time of a step is the median of a training's. Ratios are taken
within a round, and their median is reported.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import DeiTConfig, DeiTForImageClassification, Trainer, TrainerCallback, TrainingArguments

sys.path.insert(0, str(Path(__file__).parents[1]))

from side_by_side import RESULTS, bar, bars_table, interleave, ratio, write_results

from hf_ihb.runs.tables import markdown_table
from hf_ihb.trainer import SupervisedTrainer
from hf_ihb.trainer.arguments import SupervisedTrainingArguments
from hf_ihb.trainer.crash_safe import CrashSafeCheckpoints

TINY = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768}
SMALL = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 384}


class SafeTrainer(CrashSafeCheckpoints, Trainer):
    """Anybody's trainer with our checkpoints."""


class Steps(TrainerCallback):
    """Seconds between the ends of steps."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Reads the clock."""
        self.ends.append(time.perf_counter())

    def median(self) -> float:
        """Of a step's seconds, without the first."""
        return statistics.median(b - a for a, b in zip(self.ends[:-1], self.ends[1:], strict=True))


def trainer_of(kind: str, folder: Path, side: int, shape: dict[str, int], batch: int, steps: int) -> Trainer:
    """A trainer of a kind; all have the same data, model and settings."""
    torch.manual_seed(0)
    network = DeiTForImageClassification(DeiTConfig(image_size=side, patch_size=side // 14, num_labels=10, **shape))
    pixels = torch.randn(4 * batch, 3, side, side)
    data = [{"pixel_values": x, "labels": i % 10} for i, x in enumerate(pixels)]
    settings: dict[str, Any] = {
        "output_dir": str(folder / kind), "max_steps": steps, "per_device_train_batch_size": batch, "report_to": "none",
        "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "logging_steps": 1000,
        "remove_unused_columns": False, "save_total_limit": 1,
    }  # fmt: skip
    if kind == "ours":
        return SupervisedTrainer(network, SupervisedTrainingArguments(**settings), train_dataset=data)
    kinds = {"plain Trainer": Trainer, "Trainer, crash-safe": SafeTrainer}
    return kinds[kind](network, TrainingArguments(**settings), train_dataset=data)


def saves(folder: Path) -> dict[str, Callable[[], Any]]:
    """Kind -> a save of a DeiT-Tiny that has made a step."""
    works = {}
    for kind in ("plain Trainer", "Trainer, crash-safe", "ours"):
        trainer = trainer_of(kind, folder, 224, TINY, 1, 1)
        trainer.train()
        works[kind] = lambda trainer=trainer: trainer._save_checkpoint(trainer.model, trial=None)
    return works


def timed_saves(folder: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of saves in turns, each beside none of its own and on a quiet disk."""
    works, seconds = saves(folder), {}

    def ready() -> None:
        for path in folder.glob("*/checkpoint-*"):
            shutil.rmtree(path)
        os.sync()

    for turn in range(-1, rounds):
        names = list(works)
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            ready()
            started = time.perf_counter()
            works[name]()
            if turn >= 0:
                seconds.setdefault(name, []).append(time.perf_counter() - started)
    return seconds


def timed_steps(folder: Path, rounds: int, steps: int) -> dict[str, list[float]]:
    """Median seconds of a step of each training, in turns."""
    found: dict[str, list[float]] = {}

    def train(kind: str) -> None:
        clock = Steps()
        trainer = trainer_of(kind, folder, 56, SMALL, 16, steps)
        trainer.add_callback(clock)
        trainer.train()
        found.setdefault(kind, []).append(clock.median())

    interleave({kind: (lambda kind=kind: train(kind)) for kind in ("plain Trainer", "ours")}, rounds)
    return {kind: values[1:] for kind, values in found.items()}  # the warm-up's


def main() -> None:
    """Times all pieces and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=12, help="Of each training.")
    parser.add_argument("--output_dir", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        saved, stepped = timed_saves(folder, args.rounds), timed_steps(folder, args.rounds, args.steps)
    bars = [
        bar(5, f"a save: {kind} / plain Trainer", "<= 1.5", ratio(saved[kind], saved["plain Trainer"]))
        for kind in ("Trainer, crash-safe", "ours")
    ]
    bars.append(bar(5, "a step: ours / plain Trainer", "<= 1.02", ratio(stepped["ours"], stepped["plain Trainer"])))
    rows = [["piece", "ms, median"]]
    rows += [[f"save, {kind}", f"{1000 * statistics.median(values):.1f}"] for kind, values in saved.items()]
    rows += [[f"step, {kind}", f"{1000 * statistics.median(values):.1f}"] for kind, values in stepped.items()]
    minutes = (time.perf_counter() - started) / 60
    write_results(
        "price-of-nothing-lost",
        f"`{' '.join(['python', *sys.argv])}`, {minutes:.1f} minutes.",
        {"save_seconds": saved, "step_seconds": stepped, "bars": bars},
        [bars_table(bars), markdown_table(rows)],
        folder=args.output_dir,
    )


if __name__ == "__main__":
    main()
