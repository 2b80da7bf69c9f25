"""Part 4: the study's queue. Teachers, the matched control, and students of every method, best first."""

import json
import os
import runpy
import shlex
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpu.job import ROOT, TIERS, Context, Job
from gpu.machine import data_arguments
from hf_ihb.analysis import AnalysisArguments, analyze
from hf_ihb.data import load_image_split
from hf_ihb.models.pretrained import load_pretrained
from hf_ihb.runs.report import read_run

CONTROL = "ce_only"


@dataclass(frozen=True)
class Arm:
    """One row of the table: a recipe, whom it learns from, and what the command adds."""

    recipe: str
    teacher: str | None = None
    extra: tuple[str, ...] = ()


TEACHERS = {
    "resnet18": Arm("resnet18"),
    "adaptive_cnn": Arm("adaptive_cnn"),
    "convnextv2": Arm("convnextv2"),
}
STRUCTURAL = ("--teacher_layers", "1", "2", "3", "--teacher_norm", "false", "--teacher_image_size", "32")
STUDENTS = {
    CONTROL: Arm("ce_only"),
    "kd_resnet18": Arm("kd_resnet18", "resnet18"),
    "dkd": Arm("kd_resnet18", "resnet18", ("--alpha", "0", "--dkd_weight", "1")),
    "rsd": Arm("cka", "resnet18", ("--cka_weight", "0", "--rsd_weight", "1")),
    "cka": Arm("cka", "resnet18"),
    "kd_cka": Arm("cka", "resnet18", ("--alpha", "0.5", "--temperature", "2", "--distilled_heads", "both")),
    "gram": Arm("gram", "resnet18"),
    "cka_untrained": Arm("cka", "resnet18", ("--teacher_control", "untrained")),
    "cka_shuffled": Arm("cka", "resnet18", ("--teacher_control", "shuffled")),
    "kd_adaptive_cnn": Arm("kd_adaptive_cnn", "adaptive_cnn"),
    "kd_convnextv2": Arm("kd_convnextv2", "convnextv2"),
}
ARMS = TEACHERS | STUDENTS
FIRST = tuple(name for name, arm in STUDENTS.items() if arm.teacher in (None, "resnet18"))
OTHERS = tuple(name for name in STUDENTS if name not in FIRST)
# what the study without a GPU takes of them
WITHOUT_GPU = ("ce_only", "kd_resnet18", "cka", "cka_untrained", "cka_shuffled")
# the recipes of the real size learn from DINOv2
_FULL = {"cka": STRUCTURAL, "gram": STRUCTURAL}


def study(tier: str) -> list[Job]:
    """The queue, best first; later work adds a line."""
    epochs, seeds = TIERS[tier].epochs, TIERS[tier].seeds
    first = FIRST if tier == "full" else WITHOUT_GPU
    jobs = [train_job(tier, "resnet18", 0, epochs)]
    jobs += [train_job(tier, name, seed, epochs) for seed in seeds for name in first]
    if tier == "full":
        for teacher in ("adaptive_cnn", "convnextv2"):
            jobs.append(train_job(tier, teacher, 0, epochs))
            jobs += [train_job(tier, f"kd_{teacher}", seed, epochs) for seed in seeds]
        jobs += [train_job(tier, name, 0, length) for length in (100, 200) for name in first]
    return jobs


def job_id(name: str, seed: int, epochs: float) -> str:
    """Name of a training in the results, and of its run folder."""
    return f"{name}-s{seed}-e{epochs:g}"


def train_job(tier: str, name: str, seed: int, epochs: float) -> Job:
    """A training; it learns from the teacher of seed 0 that this machine trained."""
    arm = ARMS[name]
    needs = () if arm.teacher is None else (job_id(arm.teacher, 0, TIERS[tier].epochs),)
    return Job(
        job_id(name, seed, epochs),
        4,
        partial(train, name=name, seed=seed, epochs=epochs),
        limit_s=3600,
        needs=needs,
        images=int(epochs * TIERS[tier].train_images),
        rate_of=arm.recipe,
    )


def command(context: Context, name: str, seed: int, epochs: float) -> list[str]:
    """Script, recipe and overrides of a training."""
    arm, sizes = ARMS[name], context.sizes
    words = [f"scripts/{'train' if arm.teacher is None else 'distill'}.py", _recipe(context, arm.recipe)]
    words += [*context.data_arguments, *sizes.keys, *context.device_arguments]
    words += ["--seed", str(seed), "--num_train_epochs", f"{epochs:g}"]
    # an evaluation and a checkpoint after every epoch would take as long as the epoch
    words += ["--eval_strategy", "steps", "--eval_steps", "0.1", "--save_strategy", "steps", "--save_steps", "0.1"]
    words += ["--save_total_limit", "1", "--output_dir", str(context.run_folder(job_id(name, seed, epochs)))]
    # a CNN gains from bfloat16 on a CPU that multiplies in it; a student 64 wide does not
    if context.device == "cuda" or (name in TEACHERS and _cpu_has_bfloat16()):
        words += ["--bf16", "true"]
    if arm.recipe in context.compiled:
        words += ["--torch_compile", "true"]
    if context.tier == "full":
        words += _FULL.get(arm.recipe, ())
    if arm.teacher is not None:
        words += ["--teacher_model", str(context.run_folder(job_id(arm.teacher, 0, sizes.epochs)))]
        words += ["--teacher_cache_dir", str(context.folder / "teacher_caches"), *arm.extra]
    return words


def _cpu_has_bfloat16() -> bool:
    info = Path("/proc/cpuinfo")
    return info.is_file() and "avx512_bf16" in info.read_text()


def _recipe(context: Context, name: str) -> str:
    """A recipe's path; one that starts from the Hub's weights, which a bare machine does not reach, without them."""
    path = ROOT / context.sizes.recipes / f"{name}.json"
    keys = json.loads(path.read_text("utf-8"))
    if keys.pop("model_name_or_path", None) is None:
        return str(path.relative_to(ROOT))
    path = context.folder / "recipes" / f"{name}-from-scratch.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(keys, indent=2), "utf-8")
    return str(path)


def train(context: Context, name: str, seed: int, epochs: float) -> dict[str, Any]:
    """Trains one arm by its script, or goes on where it was interrupted, and looks at its attention.

    Returns:
        Command, evaluation, history, and the attention statistics of a student.
    """
    folder, words = context.run_folder(job_id(name, seed, epochs)), command(context, name, seed, epochs)
    if not (folder / "evaluation.json").is_file():
        if any(folder.glob("checkpoint-*/trainer_state.json")):
            how = ["--resume_from_checkpoint", "true"]
        else:
            how = ["--overwrite_output_dir", "true"]
        _run_script(words + how)
    run = read_run(folder)
    history = json.loads((folder / "training_history.json").read_text("utf-8"))
    rates = [entry["images_per_second"] for entry in history if "images_per_second" in entry]
    return {
        "arm": name,
        "seed": seed,
        "epochs": epochs,
        "command": shlex.join(["python", *words]),
        "evaluation": run["evaluation"],
        "environment": run["recipe"]["environment"],
        "images_per_second": sorted(rates)[len(rates) // 2] if rates else None,
        "history": history,
        "attention": _attention(context, folder) if name in STUDENTS else None,
    }


def _run_script(words: list[str]) -> None:
    """As ``python SCRIPT ...`` from the top of the checkout, in this process, which has loaded everything already."""
    os.chdir(ROOT)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def _attention(context: Context, folder: Path) -> dict[str, Any]:
    student = load_pretrained(str(folder)).to(torch.device(context.device))
    split, revision = load_image_split(data_arguments(context), "test")
    args = AnalysisArguments(metrics="attention", num_maps=0, max_images=200 if context.tier == "micro" else 2048)
    found = analyze(student, split, args, data={"name": context.dataset, "revision": revision})
    return found["attention"]
