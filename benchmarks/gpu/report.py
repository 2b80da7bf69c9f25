"""The queue's results as tables and a figure."""

import datetime
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from scipy.stats import t as student_t
from side_by_side import bar, bars_table

from gpu.arms import ARMS, CONTROL, STUDENTS
from gpu.checks import TOLERANCES, differences
from gpu.job import Context, Journal
from gpu.throughput import WAYS
from hf_ihb.plots.curves import curve_panels
from hf_ihb.runs.files import write_json
from hf_ihb.runs.tables import markdown_table

FALLS_AFTER = 20  # steps; fewer are warm-up
BEST_FOLDER = "gpu-best"
Records = Mapping[str, Mapping[str, Any]]


def write_report(journal: Journal, results: Path, work: Path) -> Path:
    """Writes ``DATE-gpu*.{md,json,png}`` of every device and tier in a journal; returns the newest Markdown.

    Args:
        journal: The results.
        results: Folder to write to.
        work: Where run folders are, to keep the best student of.
    """
    day, path = datetime.date.today().isoformat(), results
    for device, tier in dict.fromkeys((r["device"], r["tier"]) for r in journal.records):
        records = journal.newest(device, tier)
        name = "gpu" if tier == "full" else f"gpu-{tier}"
        path = results / f"{day}-{name}.md"
        text = [f"# The queue ({tier}) on {device}, {day}", *_sections(records, path.with_suffix(".png"))]
        path.write_text("\n\n".join(text) + "\n", "utf-8")
        write_json(path.with_suffix(".json"), {"date": day, "device": device, "tier": tier, "records": records})
        if tier == "full":
            keep_best(records, work / tier, results / BEST_FOLDER)
        print(path.read_text("utf-8"))
    return path


def _sections(records: Records, figure: Path) -> list[str]:
    parts = [_machine(records), _checks(records), _throughput(records), _study(records, figure), _jobs(records)]
    return [line for part in parts for line in part]


def _result(records: Records, job: str) -> dict[str, Any]:
    return (records.get(job) or {}).get("result") or {}


# ---- Parts 0 and 1 ----


def _machine(records: Records) -> list[str]:
    found, data = _result(records, "machine"), _result(records, "data")
    if not found:
        return []
    environment = found["environment"]
    versions = ", ".join(f"{k} {v}" for k, v in environment["versions"].items() if v is not None)
    commits = ", ".join(sorted({str(r["commit"]) for r in records.values()}))
    lines = [
        f"{environment['device']}; {versions}; commits {commits}.",
        f"A copy moves {found['copy_bytes_per_second'] / 1e12:.3f} TB/s (read and written), a bfloat16 product runs at "
        f"{found['bf16_flops_per_second'] / 1e12:.1f} TFLOP/s.",
    ]
    if (roof := found["roof_images_per_second"]) is not None:
        lines[1] += (
            f" At that rate of copying, what a compiled step of a DeiT-Tiny moves at the least (39 MB an image) makes "
            f"{roof:,.0f} images a second: the roof."
        )
    if data:
        lines.append(
            f"Data: {data['train']:,} training, {data['validation']:,} validation and {data['test']:,} test images."
        )
    return lines


# ---- Part 2 ----


def check_rows(records: Records) -> list[tuple[str, str, str, bool | None]]:
    """What was checked, what was wanted, what was found, and whether that is right; None where it was not run."""
    rows: list[tuple[str, str, str, bool | None]] = []
    for job, record in records.items():
        if record["part"] != 2:
            continue
        result = record.get("result") or {}
        if record["status"] == "not run":
            rows.append((job, "", record["error"], None))
        elif not result:
            rows.append((job, "to run", _last_line(record["error"]), False))
        elif job.startswith("command"):
            rows.append(_command_row(job, result["losses"]))
        elif job == "resume":
            rows += [
                (f"resumed = uninterrupted: {name}", "0", f"{gap:.2g}", gap == 0)
                for name, gap in result["largest_difference"].items()
            ]
        elif job == "colours":
            rows += [
                (f"views here = on the CPU: {name}", "<= 1 level, 0.2 %", _levels(gap), _is_close(gap))
                for name, gap in result.items()
            ]
        else:
            rows += _curve_rows(records, job, result)
    return rows


def _command_row(job: str, losses: Sequence[float]) -> tuple[str, str, str, bool]:
    third = len(losses) // 3
    first, last = statistics.mean(losses[:third]), statistics.mean(losses[-third:])
    if len(losses) < FALLS_AFTER:
        return job, "to run", f"{len(losses)} steps", True
    return job, "the loss falls", f"{first:.3f} to {last:.3f} in {len(losses)} steps", last < first


def _levels(gap: Mapping[str, float]) -> str:
    return f"{gap['levels']:.2g} levels, {100 * gap['share']:.2g} %"


def _is_close(gap: Mapping[str, float]) -> bool:
    return gap["levels"] <= 1 + 1e-3 and gap["share"] <= 2e-3


def _curve_rows(records: Records, job: str, result: Mapping[str, Any]) -> list[tuple[str, str, str, bool | None]]:
    rows: list[tuple[str, str, str, bool | None]] = [
        (f"{job}: {name}", "to run", _last_line(error), False) for name, error in result["failed"].items()
    ]
    reference = next((r for r in ("curves-float32", "curves-cpu") if r != job and _result(records, r)), None)
    if job == "curves-float32":
        reference = "curves-cpu"
    if job != "curves-cpu" and reference is not None:
        limit = TOLERANCES[result["precision"]]
        gaps = differences(result["curves"], _result(records, reference).get("curves", {}))
        rows += [
            (f"{job} = {reference}: {name}", f"<= {limit:g}", f"{gap:.2g}", gap <= limit) for name, gap in gaps.items()
        ]
    else:
        rows.append((job, "to run", f"{len(result['curves'])} trainers and losses", not result["failed"]))
    for name, waits in result["waits"].items():
        if waits:
            rows.append((f"{job}: no wait in a step: {name}", "none", ", ".join(waits), False))
    return rows


def _last_line(error: str) -> str:
    return (error.strip().splitlines() or ["no message"])[-1][:160]


def _checks(records: Records) -> list[str]:
    rows = check_rows(records)
    if not rows:
        return []
    words = {True: "yes", False: "**no**", None: "not run"}
    table = [["check", "wanted", "found", "right"], *([a, b, c.replace("|", "\\|"), words[ok]] for a, b, c, ok in rows)]
    return ["## Is it right?", markdown_table(table)]


# ---- Part 3 ----


def _throughput(records: Records) -> list[str]:
    results = [_result(records, job) for job in records if job.startswith("throughput")]
    measured: dict[tuple[int, str], dict[str, Any]] = {}
    for result in filter(None, results):
        key = result["batch_size"], "compiled" if result["compiled"] else "eager"
        measured.setdefault(key, {"ways": {}})["ways"] |= result["ways"]
        measured[key]["augmentation"] = result["augmentation_images_per_second"]
    if not measured:
        return []
    roof = _result(records, "machine").get("roof_images_per_second")
    lines = [
        "## Images a second",
        "Whole trainings with the recipe's augmentation; medians over windows of steps.",
        markdown_table(_rate_rows(measured, roof)),
    ]
    if roof is not None:
        lines.append(bars_table(_bars(measured, roof)))
    if gain := _result(records, "two-at-once").get("gain"):
        lines.append(f"Two trainings at once do {gain:.2f} times the work of one.")
    return lines


def _rate_rows(measured: Mapping[tuple[int, str], Mapping[str, Any]], roof: float | None) -> list[list[str]]:
    header = ["batch", "", "way", "images/s", "of labels", "of the roof", "first window after", "peak memory"]
    rows = [[*header, "kernels a step", "copies", "idle"]]
    for (size, how), found in measured.items():
        labels = _median_rate(found, "labels")
        for way, one in found["ways"].items():
            rate, memory, profiled = _median_rate(found, way), one["peak_memory_bytes"], one["profile"]
            cells = [str(size), how, way, f"{rate:,.0f}", f"{rate / labels:.2f}" if labels else ""]
            cells += [f"{rate / roof:.2f}" if roof else "", f"{one['until_first_window_s']:.1f} s"]
            cells.append("" if memory is None else f"{memory / 1e9:.1f} GB")
            if "kernels_per_step" in profiled:
                cells.append(f"{profiled['kernels_per_step']:.0f}")
                cells += [f"{100 * profiled[share]:.1f} %" for share in ("copies_share", "idle_share")]
            rows.append(cells + [""] * (len(rows[0]) - len(cells)))
    return rows


def _median_rate(found: Mapping[str, Any], way: str) -> float | None:
    return statistics.median(found["ways"][way]["images_per_second"]) if way in found["ways"] else None


def _bars(measured: Mapping[tuple[int, str], Mapping[str, Any]], roof: float) -> list[dict[str, Any]]:
    bars = []
    for (size, how), found in measured.items():
        labels, cached = _median_rate(found, "labels"), _median_rate(found, WAYS[1])
        if labels is None:
            continue
        if how == "compiled":
            bars.append(bar(6, f"{size}, {how}: labels / roof", ">= 0.60", {"median": labels / roof}))
        if cached is not None:
            bars.append(bar(6, f"{size}, {how}: cached CKA / labels", ">= 0.92", {"median": cached / labels}))
        share = labels / found["augmentation"]
        bars.append(bar(6, f"{size}, {how}: augmentation / step", "<= 0.08", {"median": share}))
    return bars


# ---- Part 4 ----


def interval(values: Sequence[float]) -> str:
    """Mean, and half the width of its 95 % confidence interval by Student's t; no interval from one value."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:+.2f} (one seed)"
    half = student_t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:+.2f} ± {half:.2f}"


def study_rows(results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """One row for each arm and length: accuracies by seed, and the gain over the control that shares both."""
    accuracy = {(r["arm"], r["epochs"], r["seed"]): 100 * r["evaluation"]["test"]["accuracy"] for r in results}
    rows = [["arm", "epochs", "parameters", "test accuracy, % (seed)", "mean", "std", "gain over the control, 95 %",
             "mean attention distance, patches", "images/s", "minutes"]]  # fmt: skip
    for arm in ARMS:
        for epochs in sorted({e for a, e, _ in accuracy if a == arm}):
            runs = [r for r in results if (r["arm"], r["epochs"]) == (arm, epochs)]
            runs.sort(key=lambda r: r["seed"])
            values = [accuracy[arm, epochs, r["seed"]] for r in runs]
            paired = [
                accuracy[arm, epochs, r["seed"]] - accuracy[CONTROL, epochs, r["seed"]]
                for r in runs
                if (CONTROL, epochs, r["seed"]) in accuracy
            ]
            distances = [r["attention"]["mean_distance"] for r in runs if r["attention"]]
            rates = [r["images_per_second"] for r in runs if r["images_per_second"]]
            minutes = [r["evaluation"]["train_seconds"] / 60 for r in runs]
            rows.append([
                arm, f"{epochs:g}", f"{runs[0]['evaluation']['num_parameters']:,}",
                ", ".join(f"{v:.2f} ({r['seed']})" for v, r in zip(values, runs, strict=True)),
                f"{statistics.mean(values):.2f}", f"{statistics.stdev(values):.2f}" if len(values) > 1 else "",
                interval(paired) if arm in STUDENTS and arm != CONTROL and paired else "",
                f"{statistics.mean(distances):.3f}" if distances else "",
                f"{statistics.mean(rates):,.0f}" if rates else "", f"{statistics.mean(minutes):.1f}",
            ])  # fmt: skip
    return rows


def _study(records: Records, figure: Path) -> list[str]:
    results = [r["result"] for r in records.values() if r["part"] == 4 and r["status"] == "ok"]
    if not results:
        return []
    draw_curves(results, figure)
    uniform = next((r["attention"]["uniform_distance"] for r in results if r["attention"]), None)
    about = (
        "The test split is seen once, after training. Accuracies in per cent; std is over seeds (n - 1); the gain is "
        "paired by seed, and its interval is Student's t. Minutes are of training alone."
    )
    if uniform is not None:
        about += f" Attention without any preference has a mean distance of {uniform:.3f} patches."
    commands = [f"    {r['command']}" for r in results]
    return [
        "## The study",
        about,
        markdown_table(study_rows(results)),
        f"![Validation accuracy of every arm over training]({figure.name})",
        "Commands (WORK is the queue's working folder):",
        "\n".join(commands),
    ]


def draw_curves(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Validation accuracy over training, a panel for each length; a line is the mean over an arm's seeds."""
    panels: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for epochs in sorted({r["epochs"] for r in results}):
        lines = panels.setdefault("1 epoch" if epochs == 1 else f"{epochs:g} epochs", {})
        for arm in ARMS:
            points: dict[float, list[float]] = {}
            for r in results:
                if (r["arm"], r["epochs"]) == (arm, epochs):
                    for entry in r["history"]:
                        if "eval_accuracy" in entry:
                            points.setdefault(round(entry["epoch"], 2), []).append(100 * entry["eval_accuracy"])
            if points:
                x = sorted(points)
                lines[arm] = (x, [statistics.mean(points[e]) for e in x])
    curve_panels(panels, path, x_label="epoch", y_label="validation accuracy, %", columns=1 if len(panels) == 1 else 2)


def keep_best(records: Records, work: Path, folder: Path) -> None:
    """The student with the best validation accuracy whose weights are here, in bfloat16, with what `pipeline` needs."""
    found = []
    for job, record in records.items():
        run = Context("", "", "full", work).run_folder(job)
        if record["part"] == 4 and record["status"] == "ok" and record["result"]["arm"] in STUDENTS and run.is_dir():
            found.append((record["result"]["evaluation"]["validation"]["accuracy"], job, run))
    if not found:
        return
    _, job, run = max(found)
    folder.mkdir(parents=True, exist_ok=True)
    weights = load_file(run / "model.safetensors")
    half = {name: t.to(torch.bfloat16) if t.is_floating_point() else t for name, t in weights.items()}
    save_file(half, folder / "model.safetensors", {"format": "pt"})
    for name in ("config.json", "preprocessor_config.json"):
        (folder / name).write_text((run / name).read_text("utf-8"), "utf-8")
    write_json(folder / "job.json", {"job": job, **records[job]["result"]["evaluation"]})


# ---- All of it ----


def _jobs(records: Records) -> list[str]:
    rows = [["job", "part", "status", "seconds", "commit"]]
    rows += [
        [job, str(r["part"]), r["status"], f"{r['seconds']:.0f}", str(r["commit"])[:9]] for job, r in records.items()
    ]
    lines = ["## Jobs", markdown_table(rows)]
    for job, record in records.items():
        if record["status"] == "failed":
            errors = {job: record["error"]} if "error" in record else record["result"]["failed"]
            lines += [f"`{name}` failed:\n\n```\n{error.strip()[-3000:]}\n```" for name, error in errors.items()]
    return lines
