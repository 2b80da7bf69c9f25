"""Run folders -> one table, from their files alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_ihb.errors import DataError
from hf_ihb.runs.folder import EVALUATION_FILE, RECIPE_FILE, RunFolder

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
    teacher = Path(recipe["teacher"]["name"]).name
    if (control := keys.get("teacher_control", "none")) != "none":
        teacher = f"{control} {teacher}"
    if keys["method"] == "logits":
        return f"{teacher}: {keys['distillation_type']} logits"
    losses = [name for name in ("cka", "gram", "token", "relation") if keys.get(f"{name}_weight", 0) > 0]
    return f"{teacher}: {' + '.join(losses)}"


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
    agreement = evaluation["test"].get("teacher_agreement")
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
        "" if agreement is None else f"{100 * agreement:.2f}",
        f"{evaluation['train_seconds'] / 60:.1f}",
    )


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the first one the header, as a Markdown table with aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
