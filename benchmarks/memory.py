"""Memory over training steps and over images: does anything grow?

python benchmarks/memory.py --dataset_name DATASET [--steps 1000] [--images 1000 10000]

Training: a micro student on labels, with an average of its weights, and distilled from a ResNet-18 that is asked in
every step or whose answers are cached; resident memory after a garbage collection at step 20 and every 100 steps, and
the slope of a line through it from step 100 on. Images: decoding, evaluation and every analysis of the student, on few
and on many images; the peak above what the process held before. Weights are random. A process a row; Linux only.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from process_memory import MIB, in_process, measured, resident, settle
from scipy import stats
from side_by_side import RESULTS, write_results
from transformers import TrainerCallback, set_seed

from hf_ihb.analysis import Analysis, AnalysisArguments
from hf_ihb.analysis.attention import AttentionAnalysis
from hf_ihb.analysis.cka import CKAAnalysis
from hf_ihb.analysis.hessian import HessianAnalysis
from hf_ihb.config.augmentation import AugmentationArguments
from hf_ihb.config.data import DataArguments
from hf_ihb.config.model import ModelArguments, TeacherArguments
from hf_ihb.config.recipe import parse_recipe
from hf_ihb.config.run import RunArguments
from hf_ihb.data import ImageData, StoredSplit, load_image_data, load_image_split
from hf_ihb.evaluation import evaluate_model
from hf_ihb.models.pretrained import Pretrained
from hf_ihb.models.processing import pixel_format
from hf_ihb.models.student import build_student
from hf_ihb.models.teacher import load_teacher
from hf_ihb.runs.tables import markdown_table
from hf_ihb.trainer import LogitDistillationTrainer, StructuralDistillationTrainer, SupervisedTrainer
from hf_ihb.trainer.arguments import (
    LogitDistillationTrainingArguments,
    StructuralDistillationTrainingArguments,
    SupervisedTrainingArguments,
)

RECIPES = Path(__file__).parents[1] / "recipes" / "micro"
TEACHER = "resnet18_cifar_w16"
BATCH = 16  # images in a step: what grows does so with steps
EVERY = 100  # steps between two readings

_ON_LABELS = (SupervisedTrainingArguments, SupervisedTrainer)
_ON_LOGITS = (LogitDistillationTrainingArguments, LogitDistillationTrainer)
_ON_STRUCTURE = (StructuralDistillationTrainingArguments, StructuralDistillationTrainer)
# recipe, what the command adds to it, and the classes they are of
TRAINING: dict[str, tuple[str, list[str], tuple[type, type]]] = {
    "labels": ("ce_only", [], _ON_LABELS),
    "labels, average of weights": ("ce_only", ["--ema_decay", "0.999"], _ON_LABELS),
    "logits": ("kd_resnet18", ["--teacher_control", "untrained"], _ON_LOGITS),
    "CKA, live": ("cka", ["--teacher_cache", "off"], _ON_STRUCTURE),
    "CKA, cached tokens": ("cka", ["--teacher_cache", "tokens"], _ON_STRUCTURE),
    "CKA, cached Gram matrices": ("cka", ["--teacher_cache", "gram"], _ON_STRUCTURE),
}


class Readings(TrainerCallback):
    """Resident bytes after some steps, as ``(step, bytes)``."""

    def __init__(self) -> None:
        self.found: list[tuple[int, int]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Reads at step 20, then every 100 steps."""
        if state.global_step == 20 or state.global_step % EVERY == 0:
            settle()
            self.found.append((state.global_step, resident()))


def save_teacher(data: ImageData, folder: str) -> None:
    """A teacher with random weights, as a folder."""
    args = ModelArguments(architecture=TEACHER)
    model, processor = build_student(args, data.label_names, data.image_size, *data.train.statistics())
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def train(name: str, args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Readings of a training run."""
    recipe, extra, (arguments_class, trainer_class) = TRAINING[name]
    distils = trainer_class is not SupervisedTrainer
    words = [str(RECIPES / f"{recipe}.json"), "--dataset_name", args.dataset_name, *extra]
    words += ["--max_train_samples", "4096", "--max_eval_samples", "256", "--max_steps", str(args.steps)]
    words += ["--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "False"]
    words += [
        "--per_device_train_batch_size",
        str(BATCH),
        "--output_dir",
        f"{folder}/run",
        "--disable_tqdm",
        "True",
        "--seed",
        str(args.seed),
    ]
    words += ["--teacher_model", f"{folder}/teacher", "--teacher_cache_dir", f"{folder}/cache"] if distils else []
    common = (RunArguments, DataArguments, AugmentationArguments, ModelArguments)
    parsed = parse_recipe(words, *common, *([TeacherArguments] if distils else []), arguments_class)
    _, data_args, augmentation, model_args, *_, training = parsed
    set_seed(training.seed)
    data, teacher = load_image_data(data_args), {}
    statistics = data.train.statistics()
    if distils:
        save_teacher(data, f"{folder}/teacher")
        found = load_teacher(parsed[4], data.label_names, trainer_class.needs_logits, dataset_statistics=statistics)
        teacher = {"teacher_model": found}
    student, processor = build_student(model_args, data.label_names, data.image_size, *statistics)
    readings = Readings()
    trainer = trainer_class(
        student,
        training,
        train_dataset=data.train,
        eval_dataset=data.validation,
        processing_class=processor,
        augmentation=augmentation,
        callbacks=[readings],
        **teacher,
    )
    before = resident()
    found = measured(trainer.train)
    steps, held = zip(*[reading for reading in readings.found if reading[0] >= EVERY], strict=True)
    fit = stats.linregress(steps, held)
    half = stats.t.ppf(0.975, len(steps) - 2) * fit.stderr if len(set(held)) > 1 else 0.0
    return {
        "seconds": found["seconds"],
        "peak_bytes": found["peak_bytes"],
        "readings": [(step, held - before) for step, held in readings.found],
        "bytes_per_step": fit.slope,
        "interval": [fit.slope - half, fit.slope + half],
    }


# ---- Images ----


def _subject(split: StoredSplit, seed: int) -> Pretrained:
    recipe = json.loads((RECIPES / "ce_only.json").read_text("utf-8"))
    shape = {name: value for name, value in recipe.items() if name in ModelArguments.__dataclass_fields__}
    torch.manual_seed(seed)
    model, processor = build_student(
        ModelArguments(**shape), split.label_names, split.image_size, [0.5] * 3, [0.25] * 3
    )
    return Pretrained(model.eval(), pixel_format(processor), "micro", None)


def _analysis(analysis: type[Analysis], subject: Pretrained, split: StoredSplit) -> Any:
    args = AnalysisArguments(untrained_reference=False, num_maps=0)
    return analysis.of(args).compute(subject, split, torch.arange(len(split)), args)


def _hessian(subject: Pretrained, split: StoredSplit) -> Any:
    count = max(len(split) // 10, 64)
    args = AnalysisArguments(
        hessian_images=count, hessian_batch_size=64, max_probes=2, lanczos_steps=2, lanczos_starts=1
    )
    return HessianAnalysis.of(args).compute(subject, split, torch.arange(len(split)), args)


IMAGES: dict[str, Callable[[Pretrained, StoredSplit], Any]] = {
    "decoding": lambda subject, split: None,
    "evaluation": lambda subject, split: evaluate_model(subject, split, device="cpu"),
    "attention": partial(_analysis, AttentionAnalysis),
    "CKA": partial(_analysis, CKAAnalysis),
    "Hessian, of a tenth of the images": _hessian,
}


def process(name: str, count: int, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds and peak of a piece of work on so many test images."""

    def decode(images: int) -> StoredSplit:
        given = DataArguments(dataset_name=args.dataset_name, max_eval_samples=images, decode="once")
        return load_image_split(given, "test")[0]

    few = decode(300)  # threads, allocator and kernels are there before
    subject = _subject(few, args.seed)
    IMAGES[name](subject, few)
    if name == "decoding":
        found = measured(lambda: decode(count))
    else:
        split = decode(count)
        found = measured(lambda: IMAGES[name](subject, split))
    return {"seconds": found["seconds"], "peak_bytes": found["peak_bytes"]}


# ---- All of it ----


def tables(runs: dict[str, dict[str, Any]], work: dict[str, dict[int, dict[str, Any]]]) -> list[str]:
    """One for steps, one for images."""
    steps = [["training", "held at step 20, MiB", "at the end, MiB", "peak, MiB", "growth, kB a step", "95 % interval"]]
    for name, run in runs.items():
        slope, low, high = (value / 1000 for value in (run["bytes_per_step"], *run["interval"]))
        held = [f"{run['readings'][i][1] / MIB:.1f}" for i in (0, -1)]
        steps.append([name, *held, f"{run['peak_bytes'] / MIB:.1f}", f"{slope:+.2f}", f"{low:+.2f} to {high:+.2f}"])
    counts = list(next(iter(work.values()))) if work else []
    images = [["work", *(f"{count:,} images, {unit}" for count in counts for unit in ("s", "peak MiB"))]]
    for name, rows in work.items():
        values = ((f"{row['seconds']:.1f}", f"{row['peak_bytes'] / MIB:.1f}") for row in rows.values())
        images.append([name, *(value for pair in values for value in pair)])
    return [markdown_table(table) for table in (steps, images) if len(table) > 1]


def main() -> None:
    """One process a row, then the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", default="uoft-cs/cifar10", help="Hub id or folder of an image set.")
    parser.add_argument("--rows", nargs="+", choices=[*TRAINING, *IMAGES], default=[*TRAINING, *IMAGES], help="Which.")
    parser.add_argument("--steps", type=int, default=1000, help="Training steps, >= 300.")
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 10000], help="Numbers of test images.")
    parser.add_argument("--seed", type=int, default=0, help="Of weights, views and order.")
    parser.add_argument("--output_dir", type=Path, default=RESULTS, help="Where the results go.")
    parser.add_argument("--worker", nargs=2, metavar=("ROW", "IMAGES"), help="Measure this here and print JSON.")
    args = parser.parse_args()
    if args.steps < 3 * EVERY:
        parser.error(f"argument --steps: expected at least {3 * EVERY}, found {args.steps}")
    if args.worker is not None:
        print(json.dumps(_work(args)))
        return

    def row(name: str, count: int = 0) -> dict[str, Any]:
        words = ["--dataset_name", args.dataset_name, "--steps", args.steps, "--seed", args.seed]
        found = in_process(__file__, [*words, "--worker", name, count])
        print(name, count or "", found, flush=True)
        return found

    runs = {name: row(name) for name in args.rows if name in TRAINING}
    work = {name: {count: row(name, count) for count in args.images} for name in args.rows if name in IMAGES}
    about = (
        f"A micro student with random weights, images of `{Path(args.dataset_name).name}`; {args.steps} steps of "
        f"{BATCH} images. Held and peak are above what the process held when training, or the work, began."
    )
    write_results("memory", about, {"training": runs, "work": work}, tables(runs, work), folder=args.output_dir)


def _work(args: argparse.Namespace) -> dict[str, Any]:
    name, count = args.worker
    if name in IMAGES:
        return process(name, int(count), args)
    with tempfile.TemporaryDirectory() as folder:
        return train(name, args, folder)


if __name__ == "__main__":
    main()
