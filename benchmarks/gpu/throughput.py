"""Part 3: images a second of whole trainings, what a step is made of, and whether several at once are faster."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from gpu.builds import Builder, read_keys
from gpu.job import ROOT, Context
from hf_ihb.augment import Augmenter
from hf_ihb.augment.color import fixed_shapes
from hf_ihb.config.augmentation import AugmentationArguments
from hf_ihb.config.model import ModelArguments

PROFILED = 5
WAYS = ("labels", "CKA, cached Gram", "soft logits, live")


class Clock(TrainerCallback):
    """Times windows of steps of a training, then profiles some more.

    Args:
        warm_up: Steps before the first window.
        steps: Of a window.
        windows: How many.
        device: That is waited for at the borders.
    """

    def __init__(self, warm_up: int, steps: int, windows: int, device: torch.device) -> None:
        self.warm_up, self.steps, self.windows, self.device = warm_up, steps, windows, device
        self.borders: list[float] = []
        self.end = warm_up + steps * windows
        self.profiler: profile | None = None
        self.started = time.perf_counter()

    @property
    def max_steps(self) -> int:
        """Of the whole training."""
        return self.end + PROFILED

    @property
    def window_s(self) -> list[float]:
        """Seconds of each window."""
        return [b - a for a, b in zip(self.borders, self.borders[1:], strict=False)]

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Starts the clock."""
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Reads the clock at the borders."""
        done = state.global_step - self.warm_up
        if 0 <= done <= self.steps * self.windows and done % self.steps == 0:
            self._wait()
            self.borders.append(time.perf_counter())
        if state.global_step == self.end:
            kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device.type == "cuda")
            self.profiler = profile(activities=kinds)
            self.profiler.start()
        if state.global_step == self.max_steps:
            self._wait()
            self.profiler.stop()

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)


def throughput(context: Context, batch_size: int, compiled: bool, ways: Sequence[str] = WAYS) -> dict[str, Any]:
    """Whole trainings of the tier's student at one batch size, each way of distilling in turn.

    Returns:
        For each way images a second in each window, seconds until the first one, peak memory and a profile; and what
        augmentation alone takes of a step. A process measures one batch size: a second would be compiled with dynamic
        shapes.
    """
    steps, windows = context.sizes.window
    builder, device = Builder(context), torch.device(context.device)
    recipes = context.sizes.recipes
    augmentation = AugmentationArguments(**read_keys(f"{recipes}/cka.json", AugmentationArguments))
    student = read_keys(f"{recipes}/cka.json", ModelArguments)
    found: dict[str, Any] = {"batch_size": batch_size, "compiled": compiled, "window_steps": steps, "ways": {}}
    for way in ways:
        clock = Clock(max(3, steps // 2), steps, windows, device)
        settings: dict[str, Any] = {"max_steps": clock.max_steps, "per_device_train_batch_size": batch_size}
        settings |= {"bf16": device.type == "cuda", "logging_steps": 10**6, "torch_compile": compiled}
        if compiled and device.type == "cpu":
            settings["torch_compile_backend"] = "aot_eager"
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        trainer = _make(builder, way, student, augmentation, settings)
        trainer.add_callback(clock)
        trainer.train()
        found["ways"][way] = {
            "images_per_second": [batch_size * steps / s for s in clock.window_s],
            "until_first_window_s": clock.borders[0] - clock.started,
            "peak_memory_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
            "profile": summarize(clock.profiler, device),
        }
    found["augmentation_images_per_second"] = _augmentation_rate(builder, augmentation, batch_size, compiled, device)
    return found


def _make(
    builder: Builder,
    way: str,
    student: dict[str, Any],
    augmentation: AugmentationArguments,
    settings: dict[str, Any],
) -> Any:
    full = builder.context.tier == "full"
    if way == "labels":
        return builder.trainer("labels", student, augmentation, **settings)
    if way == "soft logits, live":
        teacher = builder.classifier("resnet18_cifar" if full else "resnet18_cifar_w16")
        keys = {"temperature": 2.0, "distilled_heads": "both"}
        return builder.trainer("logits", student, augmentation, teacher, **settings, **keys)
    size, shape = (112, {}) if full else (56, {"width": 48, "depth": 6, "heads": 3})
    keys = {"student_layers": [5, 8, 11], "teacher_layers": [5, 8, 11]} if full else {"student_layers": [2, 4]}
    keys |= {"cka_weight": 1.0, "teacher_norm": True, "teacher_cache": "gram", "teacher_statistics_samples": 256}
    return builder.trainer("structural", student, augmentation, builder.features(size, **shape), **settings, **keys)


def _augmentation_rate(
    builder: Builder, keys: AugmentationArguments, batch_size: int, compiled: bool, device: torch.device
) -> float:
    split = builder.data.train.to(device)

    def fetch(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return split.images.index_select(0, rows), split.labels[rows]

    augmenter = Augmenter(keys, 0, (0.5,) * 3, fetch, len(split))
    rows = torch.arange(batch_size, device=device)
    images, epoch = split.images[:batch_size], torch.zeros((), dtype=torch.long, device=device)
    with fixed_shapes():
        augmenter(images, rows, epoch)  # its tables are made outside of the graph
    if compiled:
        augmenter = torch.compile(augmenter.__call__, backend="inductor" if device.type == "cuda" else "aot_eager")
    steps, times = builder.context.sizes.window[0], []
    for turn in range(-2, 5):
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        start = time.perf_counter()
        for _ in range(steps):
            augmenter(images, rows, epoch)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        if turn >= 0:
            times.append(time.perf_counter() - start)
    return batch_size * steps / statistics.median(times)


def summarize(profiler: profile, device: torch.device) -> dict[str, Any]:
    """What some steps were made of: kernels a step, share of copies, how long the device had nothing to do.

    Returns:
        On a CPU the operators that took longest, and nothing else.
    """
    if device.type == "cpu":
        averages = sorted(profiler.key_averages(), key=lambda e: -e.self_cpu_time_total)[:10]
        return {"top": [[e.key[:60], round(e.self_cpu_time_total / 1e3 / PROFILED, 3)] for e in averages]}
    events = [
        e
        for e in profiler.events()
        if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation  # spans, not kernels
    ]
    copies = [e for e in events if e.name.startswith(("Memcpy", "Memset"))]
    kernels = [e for e in events if not e.name.startswith(("Memcpy", "Memset"))]
    intervals = sorted((e.time_range.start, e.time_range.end) for e in events)
    busy, until = 0.0, intervals[0][0]
    for start, end in intervals:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    total, span = sum(e.time_range.elapsed_us() for e in events), until - intervals[0][0]
    by_name: dict[str, float] = {}
    for e in kernels:
        by_name[e.name] = by_name.get(e.name, 0.0) + e.time_range.elapsed_us()
    top = sorted(by_name.items(), key=lambda pair: -pair[1])[:10]
    return {
        "kernels_per_step": len(kernels) / PROFILED,
        "copies_per_step": len(copies) / PROFILED,
        "copies_share": sum(e.time_range.elapsed_us() for e in copies) / total,
        "idle_share": 1 - busy / span,
        "top": [[name[:80], round(us / 1e3 / PROFILED, 3)] for name, us in top],
    }


def one_run(context: Context) -> float:
    """Images a second of one training on labels, after its first steps."""
    steps, windows = context.sizes.window
    batch_size, device = min(context.sizes.batch_sizes), torch.device(context.device)
    recipe = f"{context.sizes.recipes}/ce_only.json"
    clock = Clock(max(3, steps // 2), steps, 2 * windows, device)
    trainer = Builder(context).trainer(
        "labels",
        read_keys(recipe, ModelArguments),
        AugmentationArguments(**read_keys(recipe, AugmentationArguments)),
        max_steps=clock.max_steps,
        per_device_train_batch_size=batch_size,
        bf16=device.type == "cuda",
        logging_steps=10**6,
    )
    trainer.add_callback(clock)
    trainer.train()
    return batch_size * steps / statistics.median(clock.window_s)


def at_once(context: Context) -> dict[str, Any]:
    """Images a second of one training, and of two at once together, each in a process of its own."""
    rates = {}
    for number in (1, 2):
        words = [sys.executable, "-c", _ONE_RUN, json.dumps(vars(context) | {"folder": str(context.folder)})]
        runs = [subprocess.Popen(words, cwd=ROOT / "benchmarks", stdout=subprocess.PIPE) for _ in range(number)]
        outputs = [run.communicate()[0].decode() for run in runs]
        if any(run.returncode for run in runs):
            raise RuntimeError(f"{number} at once: a training failed, see the log")
        rates[number] = sum(float(output.splitlines()[-1]) for output in outputs)
    return {"images_per_second": rates, "gain": rates[2] / rates[1]}


_ONE_RUN = """
import json, sys
from pathlib import Path
sys.path.insert(0, str(Path.cwd().parent))
from gpu.job import Context
from gpu.throughput import one_run
told = json.loads(sys.argv[1])
print(one_run(Context(**told | {"folder": Path(told["folder"]), "compiled": tuple(told["compiled"])})), flush=True)
"""
