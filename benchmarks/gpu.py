"""What training and distilling cost on one CUDA GPU: everything about a GPU in one command.

python benchmarks/gpu.py --dataset_name DATASET [--batch_sizes 1024 2048] [--rounds 15] [--roof 123000]
python benchmarks/gpu.py --dataset_name DATASET --toy   (small, without a GPU; measures and writes nothing)

- Steps of a DeiT-Tiny in bf16, eager and compiled, and with a resident teacher cache, in turns in one process. Each
  trainer first trains for a few steps by its own `train()`, so that what is timed is the model it wraps, on batches of
  its own loader. The roof is a limit on paper: images a second at which a DeiT-Tiny's activations fill an H200's memory
  bandwidth.
- Augmentation (crop, flip, RandAugment) alone, and the host synchronisations that CUDA's debug mode finds in it.
- Synchronisations between two logs of a real `train()`, counted in a profiler's trace.
- Micro runs (one process each) at once on the card, against one.

Teachers have random weights and their real sizes.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from distillation_step import Bench
from side_by_side import RESULTS, bar, bars_table, interleave, ratio, write_results
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from hf_ihb.arguments import AugmentationArguments, SupervisedTrainingArguments
from hf_ihb.report import markdown_table
from hf_ihb.trainer import SupervisedTrainer
from hf_ihb.views import Augmenter

WARM_UP = 5
SYNCHRONIZING = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "Memcpy DtoH")
CACHED = {"cka_weight": 1.0, "teacher_cache": "gram"}


def stepper(trainer: Any, steps: int) -> Callable[[], None]:
    """Some optimizer steps of a trainer that has trained, on the batches of its loader."""
    trainer.train()
    model, optimizer = trainer.model_wrapped.train(), trainer.optimizer
    loader = trainer.get_train_dataloader()
    batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def run() -> None:
        for batch in itertools.islice(batches, steps):
            trainer.training_step(model, batch)
            trainer.accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return run


def make_steps(args: argparse.Namespace, bench: Bench) -> dict[str, Callable[[], None]]:
    """The ways that are compared at one batch size, and augmentation alone."""
    given = {"max_steps": WARM_UP, "bf16": not args.toy}
    many: dict[str, Callable[[], None]] = {}
    for name, compiled in (("eager", False), ("compiled", True)):
        more = given | {"torch_compile": compiled, "torch_compile_backend": "inductor" if compiled else None}
        supervised = bench.ours(SupervisedTrainer, SupervisedTrainingArguments, **more)
        many[f"CE only, {name}"] = stepper(supervised, args.steps)
        many[f"CKA, cached Gram, {name}"] = stepper(bench.structural(112, **CACHED, **more), args.steps)
    augment = augmentation(args, bench)
    many["augmentation"] = lambda: [augment() for _ in range(args.steps)]
    return many


def augmentation(args: argparse.Namespace, bench: Bench) -> Callable[[], Any]:
    """One batch cropped, flipped and put through RandAugment, on the device."""
    keys = AugmentationArguments(random_crop_padding=4, horizontal_flip=0.5, auto_augment="randaugment")
    images = bench.stored()["pixel_values"].to(args.device)
    augmenter = Augmenter(keys, 0, bench.statistics[0], None, len(images))
    index = torch.arange(len(images), device=args.device)
    return lambda: augmenter(images, index, 0)


def host_waits(work: Callable[[], Any]) -> list[str]:
    """What CUDA's debug mode says of each synchronisation in a piece of work that has run before."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [str(warning.message) for warning in found if "synchroniz" in str(warning.message)]


class Window(TrainerCallback):
    """Profiles the steps between two logs, the second one included."""

    def __init__(self, steps: int) -> None:
        self.steps, self.profiler = steps, profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts after the first log."""
        if state.global_step == self.steps:
            self.profiler.start()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ends with the second log."""
        if state.global_step == 2 * self.steps:
            self.profiler.stop()


def synchronizations(bench: Bench, steps: int, **settings: Any) -> dict[str, int]:
    """Synchronising calls in a logging window of a real run."""
    more = {"max_steps": 3 * steps, "logging_steps": steps, "logging_strategy": "steps", **settings}
    trainer, window = bench.structural(112, **CACHED, **more), Window(steps)
    trainer.add_callback(window)
    trainer.train()
    calls = Counter(event.name for event in window.profiler.events())
    return {name: sum(count for key, count in calls.items() if key.startswith(name)) for name in SYNCHRONIZING}


def micro_rate(args: argparse.Namespace) -> float:
    """Images a second of a micro student's run."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(argparse.Namespace(**vars(args) | {"size": "micro", "batch_size": 64}), folder)
        step = stepper(bench.ours(SupervisedTrainer, SupervisedTrainingArguments, max_steps=WARM_UP), args.steps)
        start = time.perf_counter()
        for _ in range(args.rounds):
            step()
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        return args.rounds * args.steps * 64 / (time.perf_counter() - start)


def micro_runs(args: argparse.Namespace, number: int) -> float:
    """Images a second of several micro runs at once, together."""
    command = [sys.executable, __file__, "--worker", "--dataset_name", args.dataset_name]
    command += ["--rounds", str(args.rounds), "--steps", str(args.steps), *["--toy"] * args.toy]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(number)]
    outputs = [run.communicate()[0] for run in runs]
    if any(run.returncode for run in runs):
        raise SystemExit("a micro run failed: see above")
    return sum(json.loads(output.splitlines()[-1]) for output in outputs)


def find_bars(args: argparse.Namespace, seconds: dict[int, dict[str, list[float]]]) -> list[dict[str, Any]]:
    """Every bar at every batch size."""
    found = []
    for batch_size, times in seconds.items():
        eager, compiled = times["CE only, eager"], times["CE only, compiled"]
        cached, augment = times["CKA, cached Gram, compiled"], times["augmentation"]
        share = ratio([batch_size * args.steps / args.roof] * len(compiled), compiled)
        found += [
            bar(9, f"batch {batch_size}: eager / compiled step", ">= 2", ratio(eager, compiled)),
            bar(9, f"batch {batch_size}: compiled, of the roof", ">= 0.5", share),
            bar(9, f"batch {batch_size}: augmentation / compiled step", "<= 0.05", ratio(augment, compiled)),
            bar(9, f"batch {batch_size}: CE only / CKA, resident Gram", ">= 0.90", ratio(compiled, cached)),
        ]
    return found


def measure(args: argparse.Namespace) -> None:
    """Everything, then the tables."""
    seconds, waits, windows = {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for batch_size in args.batch_sizes:
            args.batch_size = batch_size
            bench = Bench(args, folder, train_images=2 * batch_size)
            seconds[batch_size] = interleave(make_steps(args, bench), args.rounds, device=args.device)
            if args.device.type == "cuda":
                waits[batch_size] = host_waits(augmentation(args, bench))
            windows[batch_size] = synchronizations(bench, args.steps, bf16=not args.toy)
    rates = {number: micro_runs(args, number) for number in args.micro_runs}
    bars = find_bars(args, seconds)
    for batch_size, found in waits.items():
        bars.append(bar(9, f"batch {batch_size}: host waits in augmentation", "<= 0", {"median": len(found)}))
    for batch_size, found in windows.items():
        bars.append(bar(9, f"batch {batch_size}: waits a logging window", "<= 1", {"median": sum(found.values())}))
    rows = [["batch", "way", "ms a step", "images/s"]]
    for batch_size, times in seconds.items():
        for name, values in times.items():
            each = statistics.median(values) / args.steps
            rows.append([str(batch_size), name, f"{1000 * each:.2f}", f"{batch_size / each:,.0f}"])
    trace = [["batch", *SYNCHRONIZING]]
    trace += [[str(batch_size), *map(str, found.values())] for batch_size, found in windows.items()]
    micro = [["micro runs at once", "images/s together"]] + [[str(n), f"{rate:,.0f}"] for n, rate in rates.items()]
    with tempfile.TemporaryDirectory() as nowhere:
        write_results(
            "gpu-toy" if args.toy else "gpu",
            f"{args.size} steps ({args.steps} a round, bf16); roof on paper {args.roof:,} images a second; "
            f"synchronising calls between logs {args.steps} steps apart; `python benchmarks/gpu.py`.",
            {
                "seconds": seconds,
                "host_waits": waits,
                "windows": windows,
                "micro_images_per_second": rates,
                "roof": args.roof,
                "bars": bars,
            },
            [bars_table(bars), *map(markdown_table, (rows, trace, micro))],
            folder=Path(nowhere) if args.toy else args.output_dir,
        )


def main() -> None:
    """Reads the command line; a worker makes one micro run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", required=True, help="Hub id or folder.")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1024, 2048], help="Of the DeiT-Tiny.")
    parser.add_argument("--micro_runs", type=int, nargs="+", default=[1, 4], help="Runs at once.")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=10, help="Steps of a way in each round, and of a logging window.")
    parser.add_argument("--roof", type=int, default=123_000, help="Images a second, on paper.")
    parser.add_argument("--toy", action="store_true", help="A micro student, few steps, on whatever there is.")
    parser.add_argument("--output_dir", type=Path, default=RESULTS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.toy and not torch.cuda.is_available():
        raise SystemExit("error: expected a CUDA GPU, found none; --toy goes through everything without one")
    args.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.size = "micro" if args.toy else "deit-tiny"
    if args.toy:
        args.batch_sizes, args.rounds, args.steps, args.micro_runs = [8], 2, 2, [1, 2]
    if args.worker:
        print(f"\n{json.dumps(micro_rate(args))}")
    else:
        measure(args)


if __name__ == "__main__":
    main()
