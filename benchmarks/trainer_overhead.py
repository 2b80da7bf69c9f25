"""What the trainers add to a step: a model that does nothing, trained by a bare loop, by stock `Trainer` and by ours.

python benchmarks/trainer_overhead.py [--rounds 15] [--steps 300]

Every piece is a whole `train()` of the same steps on the same float batches (made-up pixels: only the time around the
model is looked at), with AdamW; ours with components to log and, where said, EMA. The last two rows also augment stored
images, which stock `Trainer` leaves to the data set. The cost of a step is the time of `train()` over its steps, less
that of stock `Trainer` in the same round.
"""

import argparse
import cProfile
import pstats
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peers.guide import CrossEntropyTrainer
from side_by_side import RESULTS, bar, bars_table, interleave, median_interval, write_results
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments
from transformers.modeling_outputs import ImageClassifierOutput

from hf_ihb.config.augmentation import AugmentationArguments
from hf_ihb.data import ImageSplit
from hf_ihb.models.processing import PixelFormat, student_processor
from hf_ihb.models.teacher import Teacher
from hf_ihb.runs.tables import markdown_table
from hf_ihb.trainer import LogitDistillationTrainer, SupervisedTrainer
from hf_ihb.trainer.arguments import LogitDistillationTrainingArguments, SupervisedTrainingArguments

CLASSES = ["a", "b", "c", "d"]
PIXELS = PixelFormat((0.5,) * 3, (0.25,) * 3, (8, 8))
BATCH = 16


class NullConfig(PreTrainedConfig):
    """Of the model that does nothing."""

    model_type = "null"


class NullModel(PreTrainedModel):
    """One linear layer over the mean colour."""

    config_class = NullConfig
    main_input_name = "pixel_values"

    def __init__(self, config: NullConfig) -> None:
        super().__init__(config)
        self.head = nn.Linear(3, len(CLASSES))

    def forward(self, pixel_values: Tensor) -> ImageClassifierOutput:
        """Scores of ``(B, 3, H, W)`` pixels."""
        return ImageClassifierOutput(logits=self.head(pixel_values.mean((2, 3))))


def null_model() -> NullModel:
    """A fresh one."""
    torch.manual_seed(0)
    names = dict(enumerate(CLASSES))
    return NullModel(NullConfig(num_labels=len(CLASSES), id2label=names, label2id={n: i for i, n in names.items()}))


class Bench:
    """Makes the pieces that are compared.

    Args:
        steps: Optimizer steps of each.
        folder: For whatever trainers write.
    """

    def __init__(self, steps: int, folder: str) -> None:
        self.steps, self.folder = steps, folder
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (1024, 3, 8, 8), generator=generator, dtype=torch.uint8)
        self.stored = ImageSplit(images, torch.arange(1024) % len(CLASSES), CLASSES)
        pixels = PIXELS.apply(images)
        self.ready = [{"pixel_values": x, "labels": int(y)} for x, y in zip(pixels, self.stored.labels, strict=True)]

    def _arguments(self, arguments_class: type, **settings: Any) -> Any:
        return arguments_class(
            output_dir=self.folder,
            max_steps=self.steps,
            per_device_train_batch_size=BATCH,
            dataloader_drop_last=True,
            logging_steps=100,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **settings,
        )

    def bare_loop(self) -> None:
        """PyTorch alone."""
        model, loader = null_model(), DataLoader(self.ready, BATCH, shuffle=True, drop_last=True)
        optimizer, done = torch.optim.AdamW(model.parameters()), 0
        while done < self.steps:
            for batch in loader:
                loss = F.cross_entropy(model(batch["pixel_values"]).logits, batch["labels"])
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                if (done := done + 1) == self.steps:
                    break

    def stock(self) -> None:
        """Stock `Trainer`."""
        args = self._arguments(TrainingArguments, remove_unused_columns=False)
        CrossEntropyTrainer(model=null_model(), args=args, train_dataset=self.ready).train()

    def _ours(self, data: Any, trainer_class: type, arguments_class: type, ema: float, **more: Any) -> None:
        stored = data is self.stored
        trainer_class(
            null_model(),
            self._arguments(arguments_class, ema_decay=ema),
            train_dataset=data,
            processing_class=student_processor([0.5] * 3, [0.25] * 3, (8, 8)) if stored else None,
            augmentation=AugmentationArguments(random_crop_padding=1, horizontal_flip=0.5) if stored else None,
            **more,
        ).train()

    def supervised(self, data: Any, ema: float) -> None:
        """Ours on labels."""
        self._ours(data, SupervisedTrainer, SupervisedTrainingArguments, ema)

    def logits(self, data: Any, ema: float) -> None:
        """Ours with a teacher that does nothing; it is scored before training, as always."""
        teacher = Teacher(null_model(), PIXELS, CLASSES, control="untrained")
        self._ours(data, LogitDistillationTrainer, LogitDistillationTrainingArguments, ema, teacher_model=teacher)


def most_time(work: Callable[[], None]) -> list[list[str]]:
    """The functions of ours with the most time in themselves and what they call: calls, ms a call, name."""
    profiler = cProfile.Profile()
    profiler.runcall(work)
    found = [
        (total, calls, f"{Path(file).stem}.{name}")
        for (file, _, name), (_, calls, _, total, _) in pstats.Stats(profiler).stats.items()
        if "hf_ihb" in file and calls >= 10
    ]
    return [
        [name, str(calls), f"{1000 * total / calls:.3f}"] for total, calls, name in sorted(found, reverse=True)[:15]
    ]


def main() -> None:
    """Times all pieces and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=300, help="Optimizer steps of each piece in each round.")
    parser.add_argument("--output_dir", type=Path, default=RESULTS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args.steps, folder)
        works = {
            "bare loop": bench.bare_loop,
            "stock Trainer": bench.stock,
            "ours on labels": lambda: bench.supervised(bench.ready, 0.0),
            "ours on labels, EMA": lambda: bench.supervised(bench.ready, 0.999),
            "ours with a teacher, EMA": lambda: bench.logits(bench.ready, 0.999),
            "ours on labels, EMA, augmenting": lambda: bench.supervised(bench.stored, 0.999),
            "ours with a teacher, EMA, augmenting": lambda: bench.logits(bench.stored, 0.999),
        }
        seconds = interleave(works, args.rounds)
        profile = most_time(works["ours on labels, EMA"])
    milliseconds = {name: [1000 * value / args.steps for value in values] for name, values in seconds.items()}
    rows, over = [["piece", "ms a step", "over stock Trainer, ms", "95 % interval"]], {}
    for name, values in milliseconds.items():
        more = [a - b for a, b in zip(values, milliseconds["stock Trainer"], strict=True)]
        over[name] = {"median": statistics.median(more), "interval": list(median_interval(more)), "rounds": len(more)}
        low, high = over[name]["interval"]
        rows.append(
            [name, f"{statistics.median(values):.3f}", f"{over[name]['median']:+.3f}", f"{low:+.3f} to {high:+.3f}"]
        )
    bars = [bar(6, "ours on labels, EMA: ms a step over stock Trainer", "<= 0.3", over["ours on labels, EMA"])]
    write_results(
        "trainer-overhead",
        f"{args.steps} steps of a model that does nothing; "
        f"`python benchmarks/trainer_overhead.py --rounds {args.rounds}`.",
        {
            "steps": args.steps,
            "milliseconds_per_step": milliseconds,
            "over_stock": over,
            "bars": bars,
            "profile": profile,
        },
        [
            bars_table(bars),
            markdown_table(rows),
            markdown_table([["of ours, profiled", "calls", "ms a call"], *profile]),
        ],
        folder=args.output_dir,
    )


if __name__ == "__main__":
    main()
