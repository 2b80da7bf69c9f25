"""A run folder from its opening to its results, and the way a script ends."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainingArguments
from transformers.utils import logging

from hf_ihb.arguments import RunArguments, published_flaws
from hf_ihb.checkpoint import HEADS_FILE
from hf_ihb.data import ImageData
from hf_ihb.errors import HfIhbError, RecipeError
from hf_ihb.records import (
    ANALYSIS_FILE,
    EVALUATION_FILE,
    HISTORY_FILE,
    METRICS_FILE,
    PLOTS,
    RECIPE_FILE,
    environment,
    write_json,
)
from hf_ihb.trainer import SupervisedTrainer

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


def open_run(args: TrainingArguments, run_args: RunArguments) -> None:
    """Checks that the run may write to its output folder, before anything is loaded.

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
    PartialState().wait_for_everyone()  # nobody writes before everybody has looked


def _is_run(folder: Path) -> bool:
    """Whether a folder holds a run of ours, judged by what its recipe.json says."""
    try:
        content = json.loads((folder / RECIPE_FILE).read_text("utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        return False
    return isinstance(content, dict) and {"keys", "environment"} <= content.keys()


def _clear_run(folder: Path) -> None:
    """Removes what an earlier run of ours wrote, and nothing else."""
    for path in (*folder.glob("checkpoint-*"), folder / HEADS_FILE.parent):
        if path.exists():
            shutil.rmtree(path)
    results = (HISTORY_FILE, EVALUATION_FILE, METRICS_FILE, ANALYSIS_FILE)
    for name in (RECIPE_FILE, *results, *PLOTS, "model.safetensors"):
        (folder / name).unlink(missing_ok=True)


def run_training(trainer: SupervisedTrainer, data: ImageData, recipe: Path, arguments: tuple[Any, ...]) -> dict:
    """Trains, evaluates on validation and (once) test, and writes the run folder; names published flaws it repeats.

    Args:
        trainer: Ready to train.
        data: The data set of the run.
        recipe: The recipe's path.
        arguments: Every dataclass the recipe was read into.

    Returns:
        The content of ``evaluation.json``.
    """
    folder = Path(trainer.args.output_dir)
    if trainer.is_world_process_zero():
        for line in published_flaws(arguments):
            logger.warning(line)
        folder.mkdir(parents=True, exist_ok=True)
        if not resume_argument(trainer.args):
            _clear_run(folder)
        write_json(folder / RECIPE_FILE, resolved_recipe(trainer, data, recipe, arguments))
    result = trainer.train(resume_from_checkpoint=resume_argument(trainer.args))
    trainer.save_model()
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
    if trainer.is_world_process_zero():
        write_json(folder / HISTORY_FILE, trainer.state.log_history)
        write_json(folder / EVALUATION_FILE, results)
        print(f"test accuracy {results['test']['accuracy']:.4f}; the student and its results are in {folder}")
    return results


def _metrics(trainer: SupervisedTrainer, split: Any, name: str) -> dict[str, float]:
    found = trainer.evaluate(split, metric_key_prefix=name)
    kept = {k.removeprefix(f"{name}_"): v for k, v in found.items() if k.startswith(f"{name}_")}
    return {k: v for k, v in kept.items() if not k.endswith(("_per_second", "runtime"))} | {"num_images": len(split)}


def resolved_recipe(
    trainer: SupervisedTrainer, data: ImageData, recipe: Path, arguments: tuple[Any, ...]
) -> dict[str, Any]:
    """Every key with its value, what names resolved to, and where the run happens."""
    keys: dict[str, Any] = {}
    for instance in arguments:
        own = instance.to_dict() if isinstance(instance, TrainingArguments) else vars(instance)
        keys |= {f.name: own.get(f.name) for f in fields(instance) if not f.name.endswith("_token")}
    teacher = getattr(trainer, "teacher", None)
    resolved: dict[str, Any] = {
        "recipe": str(recipe),
        "keys": keys,
        "dataset": {"name": data.name, "revision": data.revision, "label_names": data.label_names}
        | {split: len(getattr(data, split)) for split in ("train", "validation", "test")},
        "teacher": None if teacher is None else {"name": teacher.name, "revision": teacher.revision},
        "environment": environment(
            trainer.args.device,
            num_processes=trainer.args.world_size,
            mixed_precision=trainer.args.mixed_precision,
        ),
    }
    return resolved
