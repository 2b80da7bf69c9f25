"""A run folder from its opening to its results, and the way a script ends."""

import errno
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from transformers import TrainingArguments
from transformers.utils import logging

from hf_ihb.analysis import ANALYSES, AnalysisArguments, analyses_of, analyze, draw_analyses
from hf_ihb.checkpoint import checkpoints_of
from hf_ihb.config.fields import published_flaws
from hf_ihb.config.recipe import read_recipe
from hf_ihb.config.run import RunArguments
from hf_ihb.data import ImageData
from hf_ihb.errors import HfIhbError, RecipeError
from hf_ihb.evaluation import evaluate_model, heads_of
from hf_ihb.model_card import PLOTS
from hf_ihb.models.pretrained import Pretrained, load_pretrained
from hf_ihb.plots import confusion_matrix_plot
from hf_ihb.runs.files import write_json
from hf_ihb.runs.folder import (
    ANALYSIS_FILE,
    CONFUSION_PLOT,
    EVALUATION_FILE,
    HISTORY_FILE,
    METRICS_FILE,
    PLOTS_FOLDER,
    RECIPE_FILE,
    RunFolder,
)
from hf_ihb.storage import folder_lock
from hf_ihb.storage.lock import last_holder, launch
from hf_ihb.trainer import SupervisedTrainer
from hf_ihb.trainer.callbacks import earlier_seconds
from hf_ihb.trainer.preemption import together
from hf_ihb.trainer.publishing import resolved_recipe

logger = logging.get_logger(__name__)


def run_script(main: Callable[[list[str]], None]) -> None:
    """Runs a script's `main` on the command line; a user's mistake is one line and an exit code, no traceback."""
    try:
        main(sys.argv[1:])
    except HfIhbError as error:
        _leave(str(error), error.exit_code)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _leave(f"{error.filename or 'a file'}: {error.strerror}; what is there is kept: make room, and start again", 4)
    except KeyboardInterrupt:
        print("error: interrupted; what was saved is kept, --resume_from_checkpoint true goes on", file=sys.stderr)
        sys.stdout.flush()
        os._exit(130)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        if torch.distributed.get_backend() == "gloo" and torch.distributed.get_rank() > 0:
            # gloo's threads now and then abort a process that is done (SIGABRT), and the launcher then fails the run;
            # a process that is not the main one has nothing left to do
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
        torch.distributed.destroy_process_group()


def _leave(line: str, code: int) -> NoReturn:
    print(f"error: {line}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    if torch.distributed.is_initialized():  # others may wait in a collective: no clean-up that would wait for them
        os._exit(code)
    sys.exit(code)


def resume_argument(args: TrainingArguments) -> str | bool | None:
    """`--resume_from_checkpoint` as `train` takes it: ``true`` is the newest checkpoint, anything else a path."""
    value = args.resume_from_checkpoint
    return {"true": True, "false": None, "none": None}.get(str(value).lower(), value)


def goes_on_by_itself(args: TrainingArguments, run_args: RunArguments) -> bool:
    """Whether a launcher has started this run again, and it had left a checkpoint (``torchrun --max_restarts N``).

    Not where it replaces an earlier run, whose checkpoints may still be there. All processes get the same answer.
    """
    if launch() is None or run_args.overwrite_output_dir:
        return False
    # a launcher whose processes had to end because another machine's did counts no restart of its own
    is_again = any(gather_object([int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))]))
    ours = last_holder(Path(args.output_dir)).get("launch") == launch()
    return broadcast_object_list([is_again and ours and bool(checkpoints_of(args.output_dir))])[0]


def open_run(args: TrainingArguments, run_args: RunArguments, recipe: Path) -> None:
    """Checks that the run may write to its output folder, before anything is loaded.

    A run that its launcher started again goes on from its newest checkpoint. Says so where several processes make the
    batch another one than the recipe's.

    Raises:
        RecipeError: If the folder is a file, holds something that is not ours, or an earlier run that is neither
            resumed nor overwritten; or if the run asks for an analysis that there is none of.
    """
    chosen_analyses(run_args)
    if args.prediction_loss_only:
        raise RecipeError("key 'prediction_loss_only': expected false in a run, whose accuracy is measured, found true")
    if args.fp16_full_eval or args.bf16_full_eval:
        key = "fp16_full_eval" if args.fp16_full_eval else "bf16_full_eval"
        raise RecipeError(f"key '{key}': expected false in a run, which measures the weights that it saves, found true")
    if not resume_argument(args) and goes_on_by_itself(args, run_args):
        args.resume_from_checkpoint = "true"
        logger.warning(f"started again by its launcher: going on from the newest checkpoint in {args.output_dir}")
    goes_on = bool(resume_argument(args))
    RunFolder(args.output_dir).check_writable(goes_on=goes_on, replaces=run_args.overwrite_output_dir)
    if args.process_index == 0 and (note := batch_note(args, read_recipe(recipe), str(recipe))) is not None:
        print(note, flush=True)
    PartialState().wait_for_everyone()  # nobody writes before everybody has looked


def chosen_analyses(run_args: RunArguments) -> list[str]:
    """What is analysed after training, in the order it is made.

    Raises:
        RecipeError: If there is no such analysis.
    """
    if run_args.analyses_after_training == "none":
        return []
    try:
        return analyses_of("analyses_after_training", run_args.analyses_after_training)
    except ValueError as error:
        raise RecipeError(str(error)) from error


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


def run_training(trainer: SupervisedTrainer, data: ImageData, recipe: Path, arguments: tuple[Any, ...]) -> dict:
    """Trains, evaluates on validation and (once) test, measures, writes run folder and card, and pushes if asked to.

    Names published flaws that the run repeats.

    Args:
        trainer: Ready to train.
        data: The data set of the run.
        recipe: The recipe's path.
        arguments: Every dataclass the recipe was read into.

    Returns:
        The content of ``evaluation.json``.

    Raises:
        CheckpointError: If another run writes to the folder, or a checkpoint cannot be written or gone on from.
        HubPushError: If the push fails; the run is complete by then.
        ProcessLostError: If another process of the run ends.
    """
    with folder_lock(Path(trainer.args.output_dir), trainer.is_world_process_zero()), together(trainer):
        return _run(trainer, data, recipe, arguments)


def _run(trainer: SupervisedTrainer, data: ImageData, recipe: Path, arguments: tuple[Any, ...]) -> dict:
    folder = Path(trainer.args.output_dir)
    run_args = next((a for a in arguments if isinstance(a, RunArguments)), RunArguments())
    name = run_args.baseline_model
    baseline = None if name is None else load_pretrained(name, role="baseline")  # refused before training, not after
    if trainer.is_world_process_zero():
        for line in published_flaws(arguments):
            logger.warning(line)
        folder.mkdir(parents=True, exist_ok=True)
        if not resume_argument(trainer.args):
            RunFolder(folder).clear(PLOTS)
        dataset = {"name": data.name, "revision": data.revision, "label_names": data.label_names}
        dataset |= {split: len(getattr(data, split)) for split in ("train", "validation", "test")}
        record = resolved_recipe(trainer, arguments, recipe=recipe, dataset=dataset)
        write_json(folder / RECIPE_FILE, record)
    trainer.settings = [part for part in arguments if part is not trainer.args]
    result = trainer.train(resume_from_checkpoint=resume_argument(trainer.args))
    if trainer.is_world_process_zero() and trainer.checkpoints.history:
        write_json(folder / RECIPE_FILE, record | {"history": trainer.checkpoints.history})
    trainer.save_model(_internal_call=True)  # pushed below, with its evidence
    validation = _metrics(trainer, data.validation, "validation")
    with recorded_heads(trainer) as heads:
        test = _metrics(trainer, data.test, "test")
    seconds = earlier_seconds(trainer) + result.metrics["train_runtime"]
    results = {"validation": validation, "test": test} | _facts(trainer, data, seconds)
    if trainer.is_world_process_zero():
        write_json(folder / HISTORY_FILE, trainer.state.log_history)
        write_json(folder / EVALUATION_FILE, results)
        print(f"test accuracy {test['accuracy']:.4f}; the student and its results are in {folder}", flush=True)
        measure(trainer, data, heads, chosen_analyses(run_args), baseline)
    if not trainer.args.push_to_hub:
        trainer.create_model_card()
    elif (commit := trainer.push_to_hub()) is not None:
        print(f"pushed to {commit.commit_url}", flush=True)
    return results


def _facts(trainer: SupervisedTrainer, data: ImageData, train_seconds: float) -> dict[str, Any]:
    """What ``evaluation.json`` says beside the numbers of the splits."""
    facts: dict[str, Any] = {"num_parameters": sum(p.numel() for p in trainer.student.parameters())}
    facts |= {"num_train_images": len(data.train), "train_steps": trainer.state.global_step}
    facts |= {"train_seconds": train_seconds, "seed": trainer.args.seed}
    for lesson in getattr(trainer, "lessons", ()):
        if (accuracy := trainer.teacher_accuracies.get(lesson.named("teacher_accuracy"))) is not None:
            facts[lesson.named("teacher_validation_accuracy")] = accuracy
        if (cache := lesson.teacher_side.cache) is not None:
            facts[lesson.named("teacher_cache")] = cache.layout.kind
        if (views := lesson.teacher_side.views.cache) is not None:
            begun = views.begun_by and Path(views.begun_by).name
            facts[lesson.named("teacher_views")] = {"key": views.key[:32], "begun_by": begun}
    return facts


@contextmanager
def recorded_heads(trainer: SupervisedTrainer) -> Iterator[dict[str, list[np.ndarray]]]:
    """Keeps what each head of a trainer's student answers in an evaluation, batch by batch, of all processes.

    Yields:
        Head -> float32 logits of each batch, filled as the evaluation goes on.
    """
    found: dict[str, list[np.ndarray]] = {}

    def keep(module: Any, inputs: Any, outputs: Any) -> None:
        for head, logits in heads_of(outputs, trainer.student.config).items():
            whole = trainer.accelerator.gather_for_metrics(logits.detach().contiguous())
            found.setdefault(head, []).append(whole.float().cpu().numpy())

    handle = trainer.student.register_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


def measure(
    trainer: SupervisedTrainer,
    data: ImageData,
    heads: Mapping[str, Sequence[np.ndarray]],
    analyses: Sequence[str],
    baseline: Pretrained | None = None,
) -> None:
    """Writes ``metrics.json``, ``analysis.json`` and the plots of a finished run, as the scripts do by default.

    Args:
        trainer: Has trained and saved its student; gives the teacher, of several the first whose class scores, and for
            analyses the first whose layers, are learned from.
        data: The data set of the run; its test split is used.
        heads: What the student answered to the test split (see `recorded_heads`). It is asked again where that is not
            one answer for each image, as where a method shows it an image twice.
        analyses: Which ones; attention is left out where the student has none.
        baseline: The matched control.
    """
    folder, device = Path(trainer.args.output_dir), trainer.args.device
    student, lessons = load_pretrained(str(folder)).to(device), getattr(trainer, "lessons", ())
    about = {"name": data.name, "revision": data.revision}
    logits = {head: np.concatenate(batches) for head, batches in heads.items()}
    is_whole = bool(logits) and all(len(rows) == len(data.test) for rows in logits.values())
    results = evaluate_model(
        student,
        data.test,
        teacher=next((lesson.teacher for lesson in lessons if lesson.needs_logits), None),
        baseline=baseline,
        device=device,
        data=about | {"split": "test"},
        logits=logits if is_whole else None,
    )
    (folder / PLOTS_FOLDER).mkdir(exist_ok=True)
    write_json(folder / METRICS_FILE, results)
    confusion = next(iter(results["heads"].values()))["confusion_matrix"]
    confusion_matrix_plot(confusion, data.label_names, folder / CONFUSION_PLOT)
    pixels = _first_pixels(student, data)
    if analyses := [name for name in analyses if ANALYSES[name].applies_to(student.model, pixels)]:
        compared = sorted(lessons, key=lambda lesson: lesson.layers is None)  # by layers: one that was learned from so
        _analyze(student, data, analyses, compared[0].teacher if compared else None, folder)


def _analyze(student: Pretrained, data: ImageData, analyses: Sequence[str], teacher: Any, folder: Path) -> None:
    analysis = analyze(
        student,
        data.test,
        AnalysisArguments(metrics=",".join(analyses)),
        data={"name": data.name, "revision": data.revision},
        teacher=None if teacher is None else Pretrained(teacher.model, teacher.pixels, teacher.name, teacher.revision),
        keep=lambda found: write_json(folder / ANALYSIS_FILE, found),
    )
    write_json(folder / ANALYSIS_FILE, analysis)
    draw_analyses({folder.name: RunFolder(folder).read(ANALYSIS_FILE)}, folder / PLOTS_FOLDER)


def _first_pixels(model: Pretrained, data: ImageData) -> torch.Tensor:
    view = data.test.through(model.pixels.geometry)
    images = view.__getitems__([0])["pixel_values"]
    return model.pixels.apply(images.to(model.model.device), view.geometry)


def _metrics(trainer: SupervisedTrainer, split: Any, name: str) -> dict[str, float]:
    found = trainer.evaluate(split, metric_key_prefix=name)
    kept = {k.removeprefix(f"{name}_"): v for k, v in found.items() if k.startswith(f"{name}_")}
    return {k: v for k, v in kept.items() if not k.endswith(("_per_second", "runtime"))} | {"num_images": len(split)}
