"""Run folders -> one table, from their files alone."""

import json
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hf_ihb.errors import DataError
from hf_ihb.methods import methods_of
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
        DataError: If the run has not finished.
    """
    try:
        recipe = json.loads((folder / "recipe.json").read_text("utf-8"))
        evaluation = json.loads((folder / "evaluation.json").read_text("utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise DataError(f"{folder}: expected a finished run with recipe.json and evaluation.json ({error})") from error
    return {"name": folder.name, "recipe": recipe, "evaluation": evaluation}


def learned_from(recipe: dict[str, Any]) -> str:
    """What a run was taught by, in a few words."""
    keys = recipe["keys"]
    if recipe["teacher"] is None:
        return "labels"
    teacher = Path(recipe["teacher"]["name"]).name
    if (control := keys.get("teacher_control", "none")) != "none":
        teacher = f"{control} {teacher}"
    known = {f.name: f.default if f.default is not MISSING else f.default_factory() for f in fields(MethodKeys)}
    methods = methods_of(SimpleNamespace(**known | keys_today(keys)))
    return f"{teacher}: {' + '.join(method.summary() for method in methods)}"


def results_table(folders: Sequence[Path]) -> str:
    """A Markdown table, one row a run; accuracies in per cent.

    Raises:
        DataError: If a run has not finished.
    """
    rows = [_COLUMNS]
    for run in map(read_run, folders):
        keys, evaluation = run["recipe"]["keys"], run["evaluation"]
        agreement = evaluation["test"].get("teacher_agreement")
        batch = keys["per_device_train_batch_size"] * keys["gradient_accumulation_steps"]
        batch *= run["recipe"]["environment"]["num_processes"]
        epochs = evaluation["train_steps"] * batch / evaluation["num_train_images"]
        rows.append(
            (
                run["name"],
                learned_from(run["recipe"]),
                f"{evaluation['num_parameters']:,}",
                f"{evaluation['num_train_images']:,} x {epochs:.1f}",
                str(evaluation["seed"]),
                f"{100 * evaluation['validation']['accuracy']:.2f}",
                f"{100 * evaluation['test']['accuracy']:.2f}",
                "" if agreement is None else f"{100 * agreement:.2f}",
                f"{evaluation['train_seconds'] / 60:.1f}",
            )
        )
    return markdown_table(rows)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the first one the header, as a Markdown table with aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
