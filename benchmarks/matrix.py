"""Any teacher, any student: every family of `families.py` against everything that is promised of it, as one table.

python benchmarks/matrix.py [--only NAME ...] [--quick] [--results benchmarks/results]

Each model is tiny and random, saved to a folder and read as from the Hub. `--quick` leaves the trainings out,
`--only` other families; what a table of the same day says of these is kept.
"""

import argparse
import datetime
import json
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks import matrix_training as training
from benchmarks.families import FAMILIES, STUDENTS
from benchmarks.matrix_checks import CHECKS, Case
from hf_ihb.runs.environment import environment, library_versions
from hf_ihb.runs.files import write_json

STUDENT_CHECKS = ("structural_student", "gradients", "reload", "resume")


def outcome(check: Callable[[], None]) -> str:
    """``ok``, ``-`` where there is nothing to check, or what is wrong, in one line."""
    try:
        return check() or "ok"
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def teacher_row(name: str, quick: bool) -> dict[str, Any]:
    """All checks of a family as a teacher."""
    started, row = time.perf_counter(), {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            case = Case(FAMILIES[name], Path(folder))
        except Exception as error:
            return {"loads": f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"}
        row["loads"] = "ok"
        for check_name, check in CHECKS.items():
            row[check_name] = outcome(lambda check=check: check(case))
        if not quick:
            row["steps"] = outcome(lambda: training.structural_teacher(case.teacher, Path(folder)))
        width = max(block.width for block in case.layout.blocks)
    return row | {"blocks": len(FAMILIES[name].sides), "width": width, "seconds": time.perf_counter() - started}


def student_row(name: str) -> dict[str, Any]:
    """All checks of a family as a student of a small DINOv2."""
    started, row = time.perf_counter(), {}
    with tempfile.TemporaryDirectory() as of_teacher:
        teacher = Case(FAMILIES["transformers/dinov2"], Path(of_teacher)).teacher
        for check in STUDENT_CHECKS:
            with tempfile.TemporaryDirectory() as folder:
                row[check] = outcome(lambda: getattr(training, check)(FAMILIES[name], teacher, Path(folder)))  # noqa: B023
    return row | {"seconds": time.perf_counter() - started}


def two_processes(names: list[str]) -> dict[str, str]:
    """Of each student, whether two processes train it alike."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29617"]
        command += [str(Path(__file__).with_name("matrix_processes.py")), str(out), *names]
        subprocess.run(command, check=False, capture_output=True)
        found = json.loads(out.read_text("utf-8")) if out.is_file() else {}
    return {name: found.get(name, "did not end") for name in names}


def table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Markdown of rows, one a family."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [f"| family | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for name, row in rows.items():
        cells = [row.get(column, "") for column in columns]
        cells = [f"{cell:.1f}" if isinstance(cell, float) else str(cell).replace("|", "/") for cell in cells]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def is_right(row: dict[str, Any]) -> bool:
    """Whether nothing is wrong with a family."""
    return all(value in ("ok", "-") for value in row.values() if isinstance(value, str))


def merged(before: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """A row with the columns that another call made of it; the seconds are those of both."""
    return before | row | {"seconds": before.get("seconds", 0.0) + row.get("seconds", 0.0)}


def main() -> None:
    """Runs what is asked for and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[""], help="families whose names hold one of these")
    parser.add_argument("--quick", action="store_true", help="without trainings")
    parser.add_argument("--results", type=Path, help="folder to write the table into")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    started = time.perf_counter()
    teachers, students = {}, {}
    for name in (n for n in FAMILIES if any(part in n for part in args.only)):
        teachers[name] = teacher_row(name, args.quick)
        print(name, json.dumps(teachers[name]), flush=True)
    for name in (n for n in STUDENTS if not args.quick and any(part in n for part in args.only)):
        students[name] = student_row(name)
        print(name, json.dumps(students[name]), flush=True)
    for name, found in (two_processes(list(students)) if students else {}).items():
        students[name] = {"two_processes": found} | students[name]
    minutes, commits = (time.perf_counter() - started) / 60, [environment(torch.device("cpu"))["commit"] or "unknown"]
    stem = None if args.results is None else args.results / f"{datetime.date.today()}-matrix"
    if stem is not None and (args.quick or args.only != [""]) and stem.with_suffix(".json").is_file():
        before = json.loads(stem.with_suffix(".json").read_text("utf-8"))
        teachers = before["teachers"] | {n: merged(before["teachers"].get(n, {}), row) for n, row in teachers.items()}
        students = before["students"] | students
        minutes, commits = minutes + before["minutes"], sorted({*commits, *before.get("commits", [])})
    counts = {
        f"{library} teachers": f"{sum(map(is_right, found))} of {len(found)}"
        for library in ("transformers", "timm")
        if (found := [row for name, row in teachers.items() if name.startswith(library)])
    } | ({"students": f"{sum(map(is_right, students.values()))} of {len(students)}"} if students else {})
    summary = "; ".join(f"{name}: {count} right in every column" for name, count in counts.items())
    print(f"{summary}; {minutes:.1f} minutes")
    if stem is not None:
        versions = library_versions("torch", "transformers", "timm")
        record = {
            "counts": counts, "minutes": minutes, "versions": versions, "threads": torch.get_num_threads(),
            "machine": platform.machine(), "commits": commits, "teachers": teachers, "students": students,
        }  # fmt: skip
        write_json(stem.with_suffix(".json"), record)
        lines = [
            "# Any teacher, any student",
            "",
            f"{summary}. {minutes:.1f} minutes on a CPU, {versions}, {', '.join(commits)}.",
            "",
        ]
        lines += ["Columns are the checks of `benchmarks/matrix_checks.py` and `benchmarks/matrix_training.py`.", ""]
        lines += ["## Teachers", "", *table(teachers), "", "## Students", "", *table(students), ""]
        stem.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
