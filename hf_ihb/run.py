"""A run folder from its opening to its results, and the way a script ends."""

import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainingArguments
from transformers.utils import logging

from hf_ihb.analysis import ANALYSES, AnalysisArguments, analyze, draw_analyses
from hf_ihb.checkpoint import HEADS_FILE
from hf_ihb.config.fields import published_flaws
from hf_ihb.config.recipe import read_recipe
from hf_ihb.config.run import RunArguments
from hf_ihb.data import ImageData
from hf_ihb.errors import HfIhbError, RecipeError
from hf_ihb.evaluation import evaluate_model
from hf_ihb.model_card import PLOTS
from hf_ihb.models.pretrained import Pretrained, load_pretrained
from hf_ihb.plots import confusion_matrix_plot
from hf_ihb.records import (
    ANALYSIS_FILE,
    CARD_FILE,
    CONFUSION_PLOT,
    EVALUATION_FILE,
    HISTORY_FILE,
    METRICS_FILE,
    PLOTS_FOLDER,
    RECIPE_FILE,
    STAGING_FOLDER,
    read_json,
    write_json,
)
from hf_ihb.trainer import SupervisedTrainer
from hf_ihb.trainer.publishing import resolved_recipe

logger = logging.get_logger(__name__)


def run_script(main: Callable[[list[str]], None]) -> None:
    """Runs a script's `main` on the command line; a user's mistake is one line and an exit code, no traceback."""
    try:
        main(sys.argv[1:])
    except HfIhbError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        if torch.distributed.is_initialized():
            # other processes may wait in a collective: leave without a clean-up that would wait for them
            os._exit(error.exit_code)
        sys.exit(error.exit_code)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        if torch.distributed.get_backend() == "gloo" and torch.distributed.get_rank() > 0:
            # gloo's threads now and then abort a process that is done (SIGABRT), and the launcher then fails the run;
            # a process that is not the main one has nothing left to do
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
        torch.distributed.destroy_process_group()


def resume_argument(args: TrainingArguments) -> str | bool | None:
    """`--resume_from_checkpoint` as `train` takes it: ``true`` is the newest checkpoint, anything else a path."""
    value = args.resume_from_checkpoint
    return {"true": True, "false": None, "none": None}.get(str(value).lower(), value)


def open_run(args: TrainingArguments, run_args: RunArguments, recipe: Path) -> None:
    """Checks that the run may write to its output folder, before anything is loaded.

    Says so where several processes make the batch another one than the recipe's.

    Raises:
        RecipeError: If the folder is a file, holds something that is not ours, or an earlier run that is neither
            resumed nor overwritten.
    """
    folder = Path(args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"key 'output_dir': expected a folder, found the file {folder}")
    if folder.is_dir() and any(folder.iterdir()) and not _is_run(folder):
        raise RecipeError(f"key 'output_dir': expected an empty or new folder, found {folder} with other content")
    holds_weights = (folder / "model.safetensors").is_file() or any(folder.glob("checkpoint-*"))
    if holds_weights and not resume_argument(args) and not run_args.overwrite_output_dir:
        raise RecipeError(
            f"key 'output_dir': expected an empty or new folder, found an earlier run in {folder}; go on with it by "
            "--resume_from_checkpoint true, or replace it by --overwrite_output_dir true"
        )
    if not os.access(next(p for p in (folder, *folder.absolute().parents) if p.exists()), os.W_OK):
        raise RecipeError(f"key 'output_dir': expected a folder that can be written to, found {folder}")
    if args.process_index == 0 and (note := batch_note(args, read_recipe(recipe), str(recipe))) is not None:
        print(note, flush=True)
    PartialState().wait_for_everyone()  # nobody writes before everybody has looked


def batch_note(args: TrainingArguments, recipe: Mapping[str, Any], name: str) -> str | None:
    """One line where the images of an optimizer step are not those that a recipe means, because of several processes.

    Args:
        args: Of the run.
        recipe: The keys of the recipe file, written for one process.
        name: What to call it.
    """
    keys = ("per_device_train_batch_size", "gradient_accumulation_steps")
    intended = math.prod(recipe.get(key, type(args).__dataclass_fields__[key].default) for key in keys)
    per_device, steps, processes = *(getattr(args, key) for key in keys), args.world_size
    found = processes * per_device * steps
    if processes == 1 or found == intended:
        return None
    share, rest = divmod(intended, processes * steps)
    remedy = f"set --{keys[0]} {share}" if rest == 0 else f"start a number of processes that divides {intended}"
    return (
        f"{processes} processes x {per_device} images x {steps} accumulated make steps of {found} images, where "
        f"{name} means {intended}: {remedy} to keep its learning rate right"
    )


def _is_run(folder: Path) -> bool:
    """Whether a folder holds a run of ours, judged by what its recipe.json says."""
    try:
        content = json.loads((folder / RECIPE_FILE).read_text("utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        return False
    return isinstance(content, dict) and {"keys", "environment"} <= content.keys()


def _clear_run(folder: Path) -> None:
    """Removes what an earlier run of ours wrote, and nothing else."""
    for path in (*folder.glob("checkpoint-*"), folder / HEADS_FILE.parent, folder / STAGING_FOLDER):
        if path.exists():
            shutil.rmtree(path)
    results = (HISTORY_FILE, EVALUATION_FILE, METRICS_FILE, ANALYSIS_FILE, CARD_FILE)
    for name in (RECIPE_FILE, *results, *PLOTS, "model.safetensors"):
        (folder / name).unlink(missing_ok=True)


def run_training(trainer: SupervisedTrainer, data: ImageData, recipe: Path, arguments: tuple[Any, ...]) -> dict:
    """Trains, evaluates on validation and (once) test, writes the run folder and its card, and pushes it if asked to.

    Names published flaws that the run repeats. Before a push, the student that was saved is evaluated and analysed, so
    that its card carries the evidence.

    Args:
        trainer: Ready to train.
        data: The data set of the run.
        recipe: The recipe's path.
        arguments: Every dataclass the recipe was read into.

    Returns:
        The content of ``evaluation.json``.

    Raises:
        HubPushError: If the push fails; the run is complete by then.
    """
    folder, pushes = Path(trainer.args.output_dir), trainer.args.push_to_hub
    name = next((a.baseline_model for a in arguments if isinstance(a, RunArguments)), None)
    baseline = load_pretrained(name, role="baseline") if pushes and name is not None else None
    if trainer.is_world_process_zero():
        for line in published_flaws(arguments):
            logger.warning(line)
        folder.mkdir(parents=True, exist_ok=True)
        if not resume_argument(trainer.args):
            _clear_run(folder)
        dataset = {"name": data.name, "revision": data.revision, "label_names": data.label_names}
        dataset |= {split: len(getattr(data, split)) for split in ("train", "validation", "test")}
        write_json(folder / RECIPE_FILE, resolved_recipe(trainer, arguments, recipe=recipe, dataset=dataset))
    result = trainer.train(resume_from_checkpoint=resume_argument(trainer.args))
    trainer.save_model(_internal_call=True)  # pushed below, with its evidence
    results = {
        "validation": _metrics(trainer, data.validation, "validation"),
        "test": _metrics(trainer, data.test, "test"),
        "num_parameters": sum(p.numel() for p in trainer.student.parameters()),
        "num_train_images": len(data.train),
        "train_steps": trainer.state.global_step,
        "train_seconds": result.metrics["train_runtime"],
        "seed": trainer.args.seed,
    }
    if (accuracy := getattr(trainer, "teacher_accuracy", None)) is not None:
        results["teacher_validation_accuracy"] = accuracy
    if (cache := getattr(trainer, "teacher_cache", None)) is not None:
        results["teacher_cache"] = cache.layout.kind
    if trainer.is_world_process_zero():
        write_json(folder / HISTORY_FILE, trainer.state.log_history)
        write_json(folder / EVALUATION_FILE, results)
        print(
            f"test accuracy {results['test']['accuracy']:.4f}; the student and its results are in {folder}", flush=True
        )
        if pushes:
            measure(trainer, data, baseline)
    if not pushes:
        trainer.create_model_card()
    elif (commit := trainer.push_to_hub()) is not None:
        print(f"pushed to {commit.commit_url}", flush=True)
    return results


def measure(trainer: SupervisedTrainer, data: ImageData, baseline: Pretrained | None = None) -> None:
    """Evaluates and analyses the saved student of a finished run, with the scripts' defaults.

    Writes ``metrics.json``, ``analysis.json`` and the plots. Of the analyses, those are made that are cheap beside a
    training and that apply to the student; they see the teacher where there is one.

    Args:
        trainer: Has trained; gives the teacher.
        data: The data set of the run; its test split is used.
        baseline: The matched control.
    """
    folder, device = Path(trainer.args.output_dir), trainer.args.device
    student = load_pretrained(str(folder)).to(device)
    teacher = getattr(trainer, "teacher", None)
    about = {"name": data.name, "revision": data.revision}
    with_logits = teacher is not None and trainer.needs_logits
    results = evaluate_model(
        student,
        data.test,
        teacher=teacher if with_logits else None,
        baseline=baseline,
        device=device,
        data=about | {"split": "test"},
    )
    (folder / PLOTS_FOLDER).mkdir(exist_ok=True)
    write_json(folder / METRICS_FILE, results)
    confusion = next(iter(results["heads"].values()))["confusion_matrix"]
    confusion_matrix_plot(confusion, data.label_names, folder / CONFUSION_PLOT)
    pixels = _first_pixels(student, data)
    analyses = [name for name, a in ANALYSES.items() if a.after_training and a.applies_to(student.model, pixels)]
    analysis = analyze(
        student,
        data.test,
        AnalysisArguments(metrics=",".join(analyses)),
        data=about,
        teacher=None if teacher is None else Pretrained(teacher.model, teacher.pixels, teacher.name, teacher.revision),
        keep=lambda found: write_json(folder / ANALYSIS_FILE, found),
    )
    write_json(folder / ANALYSIS_FILE, analysis)
    draw_analyses({folder.name: read_json(folder / ANALYSIS_FILE)}, folder / PLOTS_FOLDER)


def _first_pixels(model: Pretrained, data: ImageData) -> torch.Tensor:
    images = data.test.__getitems__([0])["pixel_values"]
    return model.pixels.apply(images.to(model.model.device))


def _metrics(trainer: SupervisedTrainer, split: Any, name: str) -> dict[str, float]:
    found = trainer.evaluate(split, metric_key_prefix=name)
    kept = {k.removeprefix(f"{name}_"): v for k, v in found.items() if k.startswith(f"{name}_")}
    return {k: v for k, v in kept.items() if not k.endswith(("_per_second", "runtime"))} | {"num_images": len(split)}
