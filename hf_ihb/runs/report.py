"""Run folders -> one table, from their files alone."""

from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hf_ihb.errors import DataError
from hf_ihb.methods import methods_of
from hf_ihb.runs.folder import EVALUATION_FILE, RECIPE_FILE, RunFolder
from hf_ihb.runs.tables import markdown_table
from hf_ihb.trainer.arguments import MethodKeys, keys_today

_COLUMNS = (
    "run",
    "learned from",
    "parameters",
    "images x epochs",
    "seed",
    "validation",
    "test",
    "teacher agreement",
    "minutes",
)


def read_run(folder: Path) -> dict[str, Any]:
    """What the table needs of one run folder.

    Raises:
        DataError: If the run has not finished, or its files are not what their names say.
    """
    run = RunFolder(folder)
    return {"name": folder.name, "recipe": run.read(RECIPE_FILE), "evaluation": run.read(EVALUATION_FILE)}


def learned_from(recipe: dict[str, Any]) -> str:
    """What a run was taught by, in a few words."""
    keys = recipe["keys"]
    if recipe["teacher"] is None:
        return "labels"
    known = {f.name: f.default if f.default is not MISSING else f.default_factory() for f in fields(MethodKeys)}
    several = [(record, keys_today(keys) | record["keys"]) for record in recipe.get("teachers", ())]
    each = several or [(recipe["teacher"], keys_today(keys))]
    return "; ".join(_learned_from(record["name"], known | own) for record, own in each)


def _learned_from(name: str, keys: dict[str, Any]) -> str:
    teacher = Path(name).name
    if (control := keys.get("teacher_control", "none")) != "none":
        teacher = f"{control} {teacher}"
    return f"{teacher}: {' + '.join(method.summary() for method in methods_of(SimpleNamespace(**keys)))}"


def results_table(folders: Sequence[Path]) -> str:
    """A Markdown table, one row a run; accuracies in per cent.

    Raises:
        DataError: If a run has not finished, or its files are not what their names say.
    """
    rows = [_COLUMNS]
    for folder in folders:
        run = read_run(folder)
        try:
            rows.append(_row(run))
        except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise DataError(
                f"{folder}: expected {RECIPE_FILE} and {EVALUATION_FILE} of a finished run, found something else in "
                f"them ({reason})"
            ) from error
    return markdown_table(rows)


def _row(run: dict[str, Any]) -> tuple[str, ...]:
    keys, evaluation = run["recipe"]["keys"], run["evaluation"]
    agreements = [value for name, value in sorted(evaluation["test"].items()) if name.startswith("teacher_agreement")]
    batch = keys["per_device_train_batch_size"] * keys["gradient_accumulation_steps"]
    batch *= run["recipe"]["environment"]["num_processes"]
    epochs = evaluation["train_steps"] * batch / evaluation["num_train_images"]
    return (
        run["name"],
        learned_from(run["recipe"]),
        f"{evaluation['num_parameters']:,}",
        f"{evaluation['num_train_images']:,} x {epochs:.1f}",
        str(evaluation["seed"]),
        f"{100 * evaluation['validation']['accuracy']:.2f}",
        f"{100 * evaluation['test']['accuracy']:.2f}",
        " / ".join(f"{100 * agreement:.2f}" for agreement in agreements),
        f"{evaluation['train_seconds'] / 60:.1f}",
    )
