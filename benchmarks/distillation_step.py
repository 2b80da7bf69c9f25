"""What one optimizer step costs with each way of distilling, side by side in one process.

python benchmarks/distillation_step.py --dataset_name DATASET --size micro [--rounds 15] [--batch_size 64]
python benchmarks/distillation_step.py --dataset_name DATASET --size deit-tiny [--rounds 15] [--batch_size 16]

A step is augmentation (crop, flip), forward, losses, backward, clipping and AdamW, on one batch that is at hand. Every
way has a student of its own from the same seed. Peers are given their pixels ready: what they cost before the step is
in `input_pipeline.py`. Teachers have random weights and their real sizes (ResNet-18 with a CIFAR stem, DINOv2-small);
caches are built over a few images before the clock runs. Ratios are taken round by round.
"""

import argparse
import copy
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peers.guide import CrossEntropyTrainer, GuideTrainer
from peers.published import KEYS, PublishedWay
from side_by_side import RESULTS, bar, bars_table, interleave, ratio, write_results
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import Dinov2Config, Dinov2Model, PreTrainedModel, TrainingArguments

from hf_ihb.config.augmentation import AugmentationArguments
from hf_ihb.config.data import DataArguments
from hf_ihb.config.model import ModelArguments
from hf_ihb.data import load_image_data
from hf_ihb.models.processing import PixelFormat, pixel_format
from hf_ihb.models.student import build_student
from hf_ihb.models.teacher import Teacher
from hf_ihb.runs.tables import markdown_table
from hf_ihb.trainer import LogitDistillationTrainer, StructuralDistillationTrainer, SupervisedTrainer
from hf_ihb.trainer.arguments import (
    LogitDistillationTrainingArguments,
    StructuralDistillationTrainingArguments,
    SupervisedTrainingArguments,
)

ROOT = Path(__file__).parents[1]
RECIPES = {"deit-tiny": "ce_only.json", "micro": "micro/ce_only.json"}
STUDENT_LAYERS = {"deit-tiny": [3, 6, 9, 11], "micro": [1, 2, 4, 5]}
TEACHER_LAYERS = [3, 6, 9, 11]
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
BOTH = {"cka_weight": 0.5, "token_weight": 0.5}


class Bench:
    """Makes the steps that are compared.

    Args:
        args: The command line.
        folder: For caches and whatever trainers write.
        train_images: Images to take batches from.
    """

    def __init__(self, args: argparse.Namespace, folder: str, train_images: int = 512) -> None:
        self.args, self.folder = args, folder
        self.data = load_image_data(
            DataArguments(dataset_name=args.dataset_name, max_train_samples=train_images, max_eval_samples=100)
        )
        self.statistics = self.data.train.statistics()
        self.augmentation = AugmentationArguments(random_crop_padding=4, horizontal_flip=0.5)
        recipe = json.loads((ROOT / "recipes" / RECIPES[args.size]).read_text("utf-8"))
        self.shape = {name: value for name, value in recipe.items() if name in ModelArguments.__dataclass_fields__}
        self.resnet, processor = self._model(ModelArguments(architecture="resnet18_cifar"))
        self.resnet_pixels = pixel_format(processor)
        torch.manual_seed(1)
        self.dino = Dinov2Model(
            Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, patch_size=14, image_size=518)
        )

    def _model(self, args: ModelArguments) -> tuple[PreTrainedModel, Any]:
        torch.manual_seed(0)
        return build_student(args, self.data.label_names, self.data.image_size, *self.statistics)

    def _arguments(self, arguments_class: type, **settings: Any) -> Any:
        fixed = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 10**6}
        fixed |= {"per_device_train_batch_size": self.args.batch_size, "max_steps": 10**6, "dataloader_drop_last": True}
        return arguments_class(output_dir=self.folder, **(fixed | settings))

    def ours(self, trainer_class: type, arguments_class: type, **settings: Any) -> Any:
        """A trainer of ours, its teacher ready."""
        student, processor = self._model(ModelArguments(**self.shape))
        teacher = settings.pop("teacher_model", None)
        more = {} if teacher is None else {"teacher_model": teacher}
        trainer = trainer_class(
            student,
            self._arguments(arguments_class, **settings),
            train_dataset=self.data.train,
            eval_dataset=self.data.validation,
            processing_class=processor,
            augmentation=self.augmentation,
            **more,
        )
        if teacher is not None:
            trainer.prepare_teacher()
        return trainer

    def structural(self, size_px: int, trainer_class: type = StructuralDistillationTrainer, **settings: Any) -> Any:
        """One of ours that learns from DINOv2 at a resolution."""
        return self.ours(
            trainer_class,
            StructuralDistillationTrainingArguments,
            student_layers=STUDENT_LAYERS[self.args.size],
            teacher_layers=TEACHER_LAYERS,
            teacher_norm=True,
            teacher_statistics_samples=64,
            teacher_cache_dir=f"{self.folder}/caches",
            teacher_model=Teacher(copy.deepcopy(self.dino), PixelFormat(*IMAGENET, (size_px, size_px))),
            **settings,
        )

    def logits(self, **settings: Any) -> LogitDistillationTrainer:
        """One of ours that learns from a ResNet-18's scores."""
        teacher = Teacher(copy.deepcopy(self.resnet), self.resnet_pixels, self.data.label_names)
        return self.ours(
            LogitDistillationTrainer, LogitDistillationTrainingArguments, teacher_model=teacher, **settings
        )

    def peer(self, trainer_class: type, **more: Any) -> Any:
        """A trainer on batches of ready pixels."""
        student, _ = self._model(ModelArguments(**self.shape))
        args = self._arguments(TrainingArguments, remove_unused_columns=False)
        trainer = trainer_class(model=student, args=args, train_dataset=self.data.train, **more)
        trainer.model_accepts_loss_kwargs = False
        return trainer

    def stored(self) -> dict[str, Tensor]:
        """A batch of stored images."""
        return self.data.train.__getitems__(list(range(self.args.batch_size)))

    def ready(self) -> dict[str, Tensor]:
        """The same batch as a data set's transform would hand it over."""
        batch = self.stored()
        return {"pixel_values": self.resnet_pixels.apply(batch["pixel_values"]), "labels": batch["labels"]}


def stepper(trainer: Any, batch: dict[str, Tensor], steps: int) -> Callable[[], None]:
    """Some whole optimizer steps of a trainer."""
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    model = trainer.model.to(trainer.args.device).train()
    if trainer.args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    batch = {k: v.to(trainer.args.device) if isinstance(v, Tensor) else v for k, v in batch.items()}

    def run() -> None:
        for _ in range(steps):
            trainer.training_step(model, dict(batch))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            trainer.optimizer.step()
            model.zero_grad()

    return run


def make_ways(bench: Bench, steps: int) -> dict[str, Callable[[], None]]:
    """Each way's work; the slow ones make one step, the others `steps`."""
    stored, ready, many = bench.stored(), bench.ready(), {}
    supervised = bench.ours(SupervisedTrainer, SupervisedTrainingArguments)
    many["CE only"] = stepper(supervised, stored, steps)
    many["CE only, stock Trainer"] = stepper(bench.peer(CrossEntropyTrainer), ready, steps)
    guide = bench.peer(GuideTrainer, teacher=copy.deepcopy(bench.resnet), temperature=2.0, weight=0.5)
    many["guide's logit KD"] = stepper(guide, ready, steps)
    logits = bench.logits()
    many["logit KD"] = stepper(logits, stored, steps)

    def ask() -> None:
        for _ in range(steps):
            logits.teacher_side.logits({"pixel_values": stored["pixel_values"].to(logits.args.device)})

    many["teacher's forward alone"] = ask
    many["published way, 224 px"] = stepper(bench.structural(224, PublishedWay, **KEYS), stored, 1)
    many["CKA live, 224 px"] = stepper(bench.structural(224, cka_weight=1.0, teacher_cache="off"), stored, 1)
    many["CKA live, 112 px"] = stepper(bench.structural(112, cka_weight=1.0, teacher_cache="off"), stored, 1)
    cached = {
        "token + CKA, cached tokens, published heads": {
            **BOTH,
            "teacher_cache": "tokens",
            "teacher_projector": "trainable",
        },
        "token + CKA, cached tokens, linear map": BOTH | {"teacher_cache": "tokens"},
        "token, cached tokens, linear map": {"token_weight": 1.0, "teacher_cache": "tokens"},
        "CKA, cached tokens": {"cka_weight": 1.0, "teacher_cache": "tokens"},
        "CKA, cached Gram": {"cka_weight": 1.0, "teacher_cache": "gram"},
        "Gram, cached Gram": {"gram_weight": 1.0, "teacher_cache": "gram"},
    }
    return many | {name: stepper(bench.structural(112, **keys), stored, steps) for name, keys in cached.items()}


SLOW = ("published way, 224 px", "CKA live, 224 px", "CKA live, 112 px")


def find_bars(size: str, seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """The bars that are set for a size of student."""

    def faster(number: int, slow: str, fast: str, wanted: str) -> dict[str, Any]:
        return bar(number, f"{slow} / {fast}", wanted, ratio(seconds[slow], seconds[fast]))

    apart = [a + b for a, b in zip(seconds["CE only"], seconds["teacher's forward alone"], strict=True)]
    live = ratio(seconds["logit KD"], apart)
    found = [
        faster(3, "CE only", "CKA, cached Gram", {"deit-tiny": ">= 0.90", "micro": ">= 0.80"}[size]),
        faster(3, "CE only", "token, cached tokens, linear map", {"deit-tiny": ">= 0.85", "micro": ">= 0.65"}[size]),
        bar(5, "logit KD / (CE only + teacher's forward alone)", "<= 1.1", live),
        faster(5, "guide's logit KD", "logit KD", ">= 1.0"),
    ]
    if size == "micro":
        heads, linear = (f"token + CKA, cached tokens, {way}" for way in ("published heads", "linear map"))
        found.append(faster(4, heads, linear, ">= 3"))
    else:
        way = "published way, 224 px"
        found.append(faster(2, way, "token + CKA, cached tokens, linear map", ">= 6"))
        found.append(faster(2, way, "CKA, cached Gram", ">= 10"))
        found.append(faster(2, way, "CKA live, 112 px", ">= 4"))
    return sorted(found, key=lambda entry: entry["bar"])


def table_of(seconds: dict[str, list[float]], batch_size: int) -> str:
    """All ways beside the CE-only step."""
    rows = [["way", "ms a step", "images/s", "speed of CE only = 1", "95 % interval"]]
    for name, values in seconds.items():
        found, middle = ratio(seconds["CE only"], values), statistics.median(values)
        interval = " to ".join(f"{bound:.2f}" for bound in found["interval"])
        rows.append([name, f"{1000 * middle:.1f}", f"{batch_size / middle:.0f}", f"{found['median']:.2f}", interval])
    return markdown_table(rows)


def top_operations(work: Callable[[], None]) -> str:
    """The operators that take most of a way's time, as torch.profiler prints them."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        work()
    return profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=48)


def main() -> None:
    """Times all ways of one size of student."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", required=True, help="Hub id or folder.")
    parser.add_argument("--size", choices=RECIPES, default="micro", help="Of the student.")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=2, help="Steps of a fast way in each round.")
    parser.add_argument("--batch_size", type=int, default=None, help="64 for micro, 16 for deit-tiny if not given.")
    parser.add_argument("--profile", nargs="*", default=[], help="Ways whose operators go into the results.")
    parser.add_argument("--output_dir", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.batch_size = args.batch_size or {"micro": 64, "deit-tiny": 16}[args.size]
    with tempfile.TemporaryDirectory() as folder:
        ways = make_ways(Bench(args, folder), args.steps)
        measured = interleave(ways, args.rounds)
        profiles = {name: top_operations(ways[name]) for name in args.profile}
    steps = {name: 1 if name in SLOW else args.steps for name in measured}
    seconds = {name: [value / steps[name] for value in values] for name, values in measured.items()}
    bars = find_bars(args.size, seconds)
    write_results(
        f"distillation-step-{args.size}",
        f"One optimizer step of each way of distilling a {args.size} student at batch {args.batch_size}; "
        f"`python benchmarks/distillation_step.py --size {args.size} --rounds {args.rounds}`.",
        {
            "size": args.size,
            "batch_size": args.batch_size,
            "rounds": args.rounds,
            "dataset": args.dataset_name.rstrip("/").rsplit("/", 1)[-1],
            "seconds_per_step": seconds,
            "bars": bars,
            "profiles": profiles,
        },
        [bars_table(bars), table_of(seconds, args.batch_size), *(f"{n}\n\n```\n{p}\n```" for n, p in profiles.items())],
        folder=args.output_dir,
    )


if __name__ == "__main__":
    main()
