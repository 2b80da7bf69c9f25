"""What the teachers did to the micro students: the runs of the queue's tier `small` evaluated and analysed.

python benchmarks/gpu_queue.py --device cpu --tier small --dataset_name DATASET --minutes 600    # makes them
python benchmarks/micro_analysis.py --dataset_name DATASET [--seeds 0 1 2] [--hessian_seeds 0]

Every model is evaluated on the whole test split by scripts/evaluate_model.py; the students of a seed are put side by
side by scripts/analyze.py, each beside the ResNet-18. Finished parts are not made again.
"""

import argparse
import datetime
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gpu.arms import ARMS, CONTROL, STUDENTS, WITHOUT_GPU, job_id
from gpu.job import ROOT, TIERS

from hf_ihb.analysis import draw_analyses
from hf_ihb.plots import attention_map_plot, confusion_matrix_plot
from hf_ihb.runs.files import read_json, write_json
from hf_ihb.runs.folder import COMPARISON_FILE, METRICS_FILE
from hf_ihb.runs.tables import markdown_table

EPOCHS = TIERS["small"].epochs
REFERENCE = job_id("resnet18", 0, EPOCHS)


def run(words: Sequence[str], done: Path) -> str:
    """Runs a script unless its result is there; returns its command line."""
    if not done.is_file():
        print(f"== {shlex.join(words)}", flush=True)
        subprocess.run([sys.executable, *words[1:]], cwd=ROOT, check=True)
    return shlex.join(words)


def evaluate(runs: Path, name: str, seed: int, dataset: str) -> str:
    """metrics.json of one model, a student beside its teacher and the control of its seed."""
    folder = runs / job_id(name, seed, EPOCHS)
    words = ["python", "scripts/evaluate_model.py", str(folder), "--dataset_name", dataset]
    if (teacher := ARMS[name].teacher) is not None:
        words += ["--teacher_model", str(runs / job_id(teacher, 0, EPOCHS))]
        words += ["--baseline_model", str(runs / job_id(CONTROL, seed, EPOCHS))]
    return run(words, ROOT / folder / METRICS_FILE)


def spread(values: Sequence[float], digits: int) -> str:
    """Mean, and standard deviation (n - 1) where there are several."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def evaluation_table(metrics: dict[tuple[str, int], dict[str, Any]]) -> str:
    """One row a model: accuracy, calibration, and what it has of its teacher, over seeds."""
    rows = [("model", "accuracy", "macro F1", "AUC", "NLL", "ECE", "agreement", "KL", "gap closed")]
    for name in dict.fromkeys(arm for arm, _ in metrics):
        runs = [run for (arm, _), run in metrics.items() if arm == name]
        heads = [next(iter(run["heads"].values())) for run in runs]  # the one the saved model answers with
        cells = [spread([100 * head["accuracy"] for head in heads], 2), spread([100 * head["f1"] for head in heads], 2)]
        cells += [spread([head[key] for head in heads], 3) for key in ("auc", "nll", "ece")]
        for part, key, scale, digits in (
            ("fidelity", "agreement", 100, 2),
            ("fidelity", "kl_divergence", 1, 3),
            ("transfer", "gap_closed", 1, 3),
        ):
            values = [run[part][key] for run in runs if run.get(part)]
            cells.append(spread([scale * v for v in values], digits) if values and None not in values else "")
        rows.append((name, *cells))
    return markdown_table(rows)


def analysis_table(analyses: dict[tuple[str, int], dict[str, Any]]) -> str:
    """One row a student: how far it looks, how like the ResNet-18 it is, how curved its loss is, over seeds."""
    columns: dict[str, tuple[Callable[[dict[str, Any]], float], int]] = {
        "mean distance, patches": (lambda a: a["attention"]["mean_distance"], 3),
        "of uniform": (lambda a: a["attention"]["mean_distance"] / a["attention"]["uniform_distance"], 3),
        "first layer": (lambda a: a["attention"]["layers"][0]["distance"], 3),
        "last layer": (lambda a: a["attention"]["layers"][-1]["distance"], 3),
        "entropy, nats": (lambda a: statistics.mean(layer["entropy"] for layer in a["attention"]["layers"]), 3),
        "highest CKA to the ResNet-18": (lambda a: max(map(max, a["cka"]["matrices"][1]["linear"])), 3),
        "last layers' CKA": (lambda a: a["cka"]["matrices"][1]["linear"][-1][-1], 3),
    }
    rows = [("student", *columns, "Hessian trace", "eigenvalues")]
    for name in (arm for arm in STUDENTS if any(arm == found for found, _ in analyses)):
        runs = [run for (arm, _), run in analyses.items() if arm == name]
        cells = [spread([read(run) for run in runs], digits) for read, digits in columns.values()]
        curved = [run["hessian"] for run in runs if "hessian" in run]
        traces = [f"{h['trace']:.0f} ± {h['trace_standard_error']:.0f}" for h in curved]
        ends = [f"{h['smallest_eigenvalue']:.1f} to {h['largest_eigenvalue']:.1f}" for h in curved]
        rows.append((name, *cells, ", ".join(traces), ", ".join(ends)))
    first = next(iter(analyses.values()))["attention"]["untrained"]
    blanks = [""] * (len(rows[0]) - 2)
    rows.append(("untrained", f"{first['mean_distance']:.3f}", *blanks))
    return markdown_table(rows)


def main() -> None:
    """Makes what is missing, then writes tables, numbers and plots under benchmarks/results/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", default="uoft-cs/cifar10", help="Hub id or folder of CIFAR-10.")
    parser.add_argument("--outputs", type=Path, default=Path("outputs/gpu/small/runs"), help="Where they are.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="Of the runs.")
    parser.add_argument("--hessian_seeds", type=int, nargs="*", default=[0], help="Those whose curvature is measured.")
    parser.add_argument("--max_images", type=int, default=10000, help="Test images for attention and CKA.")
    parser.add_argument("--hessian_images", type=int, default=256, help="Test images for the Hessian.")
    parser.add_argument("--max_probes", type=int, default=40, help="Of the Hessian's trace.")
    parser.add_argument("--lanczos_steps", type=int, default=30, help="Of the Hessian's spectrum.")
    args = parser.parse_args()

    commands, metrics, analyses, side_by_side = [], {}, {}, {}
    commands.append(evaluate(args.outputs, "resnet18", 0, args.dataset_name))
    metrics["resnet18", 0] = read_json(ROOT / args.outputs / REFERENCE / METRICS_FILE)
    for seed in args.seeds:
        commands += [evaluate(args.outputs, name, seed, args.dataset_name) for name in WITHOUT_GPU]
        folders = {name: args.outputs / job_id(name, seed, EPOCHS) for name in WITHOUT_GPU}
        folder = args.outputs.parent / "comparisons" / f"seed-{seed}"
        words = ["python", "scripts/analyze.py", "--compare", *map(str, folders.values())]
        words += ["--dataset_name", args.dataset_name, "--teacher_model", str(args.outputs / REFERENCE)]
        words += ["--max_images", str(args.max_images), "--output_dir", str(folder)]
        words += ["--metrics", "attention,cka,hessian" if seed in args.hessian_seeds else "attention,cka"]
        words += ["--hessian_images", str(args.hessian_images), "--max_probes", str(args.max_probes)]
        words += ["--lanczos_steps", str(args.lanczos_steps), "--lanczos_starts", "1"]
        commands.append(run(words, ROOT / folder / COMPARISON_FILE))
        metrics |= {(name, seed): read_json(ROOT / path / METRICS_FILE) for name, path in folders.items()}
        compared = read_json(ROOT / folder / COMPARISON_FILE)
        side_by_side[seed] = {name: compared[path.name] for name, path in folders.items()}
        analyses |= {(name, seed): found for name, found in side_by_side[seed].items()}

    day = datetime.date.today().isoformat()
    target = ROOT / "benchmarks" / "results" / f"{day}-micro-analysis"
    target.mkdir(parents=True, exist_ok=True)
    shown = args.hessian_seeds[0] if args.hessian_seeds else args.seeds[0]
    draw_analyses(side_by_side[shown], target)
    for name in ("cka", CONTROL):
        attention_map_plot(side_by_side[shown][name], target / f"attention_maps_{name}.png")
        head = next(iter(metrics[name, shown]["heads"].values()))
        names = metrics[name, shown]["data"]["label_names"]
        confusion_matrix_plot(head["confusion_matrix"], names, target / f"confusion_matrix_{name}.png")
    first = analyses[CONTROL, shown]
    where, seeds = first["environment"], ", ".join(map(str, args.seeds))
    made = sorted({str(run["environment"]["commit"]) for run in (*metrics.values(), *analyses.values())})
    text = [
        f"# What the teachers did to the micro students, {day}",
        "",
        f"{where['device']}, {where['cpu_threads']} thread(s); commits {', '.join(made)} (the students: see the "
        f"micro results). Data: `{first['data']['name']}`, test split. Mean and standard deviation over seeds {seeds}.",
        "",
        "## Evaluation",
        "",
        f"{metrics[CONTROL, shown]['data']['num_images']:,} images. Accuracy, F1 and agreement in per cent, NLL and KL "
        "in nats. Agreement and KL are with the model's own teacher; the gap closed is that between the control of the "
        "seed and that teacher.",
        "",
        evaluation_table(metrics),
        "",
        "## Analysis",
        "",
        f"Attention and CKA over {first['data']['num_images']:,} images; CKA is debiased, of block outputs averaged "
        f"over patches, in batches of {first['cka']['rows_per_batch']}; every student beside the ResNet-18, whatever "
        f"it learned from. Hessian: {args.hessian_images} images, seed(s) "
        f"{', '.join(map(str, args.hessian_seeds)) or 'none'}, trace with its standard error, both ends by Lanczos.",
        "",
        analysis_table(analyses),
        "",
        "Plots are of one seed, " + str(shown) + ".",
        "",
        *(f"![{plot.stem.replace('_', ' ')}]({target.name}/{plot.name})\n" for plot in sorted(target.glob("*.png"))),
        "Commands:",
        "",
        *(f"    {line}" for line in commands),
        "",
    ]
    target.with_suffix(".md").write_text("\n".join(text), "utf-8")
    results = [
        {
            "arm": name,
            "seed": seed,
            "metrics": metrics[name, seed],
            "analysis": _without_pictures(analyses[name, seed]) if (name, seed) in analyses else None,
        }
        for name, seed in metrics
    ]
    write_json(target.with_suffix(".json"), {"runs": results})
    print("\n".join(text))


def _without_pictures(analysis: dict[str, Any]) -> dict[str, Any]:
    """An analysis without what is large: images, maps and indices, the untrained twin, the drawn density."""
    large = {"attention": ("maps", "untrained"), "data": ("indices",), "hessian": ("density",)}
    return analysis | {
        section: {key: value for key, value in analysis[section].items() if key not in left_out}
        for section, left_out in large.items()
        if section in analysis
    }


if __name__ == "__main__":
    main()
