"""The micro tier: CNN teachers, the matched control, every distilled student and two controls, on two cores.

python benchmarks/micro.py --dataset_name DATASET [--seeds 0 1 2] [--arms resnet18 ce_only cka ...]

Finished runs are skipped and interrupted ones resumed, so the command can be given again; `--report_only` writes the
table of what there is.
"""

import argparse
import datetime
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import t as student_t

from hf_ihb.records import write_json
from hf_ihb.report import learned_from, read_run

ROOT = Path(__file__).parents[1]
CONTROL = "ce_only"


@dataclass(frozen=True)
class Arm:
    """One row of the table: a recipe, and what the command adds to it."""

    recipe: str
    teacher: str | None = None
    extra: tuple[str, ...] = ()


TEACHERS = {name: Arm(name) for name in ("adaptive_cnn", "resnet18", "convnextv2")}
STUDENTS = {
    CONTROL: Arm("ce_only"),
    **{f"kd_{name}": Arm(f"kd_{name}", teacher=name) for name in TEACHERS},
    "cka": Arm("cka", teacher="resnet18"),
    "gram": Arm("gram", teacher="resnet18"),
    "cka_untrained": Arm("cka", teacher="resnet18", extra=("--teacher_control", "untrained")),
    "cka_shuffled": Arm("cka", teacher="resnet18", extra=("--teacher_control", "shuffled")),
}
ARMS = TEACHERS | STUDENTS


def command(name: str, seed: int, dataset: str, outputs: Path) -> tuple[Path, list[str]]:
    """Folder and command line of one run."""
    arm, folder = ARMS[name], outputs / f"seed-{seed}" / name
    script = "train.py" if arm.teacher is None else "distill.py"
    words = ["python", f"scripts/{script}", f"recipes/micro/{arm.recipe}.json", "--dataset_name", dataset]
    words += ["--seed", str(seed), "--output_dir", str(folder)]
    if arm.teacher is not None:
        words += ["--teacher_model", str(folder.with_name(arm.teacher)), *arm.extra]
    return folder, words


def run(folder: Path, words: list[str]) -> None:
    """Trains one arm unless it is finished."""
    if (ROOT / folder / "evaluation.json").is_file():
        return
    if (ROOT / folder / "recipe.json").is_file():
        resumes = any((ROOT / folder).glob("checkpoint-*/trainer_state.json"))
        words = [*words, *(["--resume_from_checkpoint", "true"] if resumes else ["--overwrite_output_dir", "true"])]
    print(f"== {shlex.join(words)}", flush=True)
    subprocess.run([sys.executable, *words[1:]], cwd=ROOT, check=True)


def interval(values: list[float]) -> str:
    """Mean, and half the width of its 95 % confidence interval by Student's t; no interval from one value."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:+.2f} (one seed)"
    half = student_t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:+.2f} ± {half:.2f}"


def table(runs: dict[tuple[str, int], dict[str, Any]]) -> list[str]:
    """One row an arm: accuracies over seeds, and the gain over the control of the same seed."""
    lines = [
        "| arm | learned from | parameters | test accuracy by seed | mean | std | gain over control, 95 % interval |",
        "|---|---|---|---|---|---|---|",
    ]
    accuracy = {key: 100 * run["evaluation"]["test"]["accuracy"] for key, run in runs.items()}
    for name in ARMS:
        seeds = [seed for arm, seed in runs if arm == name]
        if not seeds:
            continue
        values = [accuracy[name, seed] for seed in seeds]
        paired = [accuracy[name, s] - accuracy[CONTROL, s] for s in seeds if (CONTROL, s) in accuracy]
        gain = interval(paired) if name not in {CONTROL, *TEACHERS} and paired else ""
        std = f"{statistics.stdev(values):.2f}" if len(values) > 1 else ""
        first = runs[name, seeds[0]]
        lines.append(
            f"| {name} | {learned_from(first['recipe'])} | {first['evaluation']['num_parameters']:,} | "
            f"{', '.join(f'{v:.2f}' for v in values)} | {statistics.mean(values):.2f} | {std} | {gain} |"
        )
    return lines


def main() -> None:
    """Runs what is missing, then writes the table under benchmarks/results/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", default="uoft-cs/cifar10", help="Hub id or folder of CIFAR-10.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="Of weights, data order and views.")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="Which runs.")
    parser.add_argument("--outputs", type=Path, default=Path("outputs/micro"), help="Where the runs go.")
    parser.add_argument("--report_only", action="store_true", help="Train nothing: the table of finished runs.")
    parser.add_argument("--note", help="A sentence for the results, such as what else the machine was doing.")
    args = parser.parse_args()

    runs, commands = {}, []
    for seed in args.seeds:
        for name in (arm for arm in ARMS if arm in args.arms):
            folder, words = command(name, seed, args.dataset_name, args.outputs)
            if not args.report_only:
                run(folder, words)
            if (ROOT / folder / "evaluation.json").is_file():
                runs[name, seed] = read_run(ROOT / folder)
                commands.append(shlex.join(words))
    if not runs:
        sys.exit(f"error: {args.outputs}: expected finished runs, found none")
    recipes = [run["recipe"] for run in runs.values()]
    environment, data = recipes[0]["environment"], recipes[0]["dataset"]
    commits = sorted({r["environment"]["commit"] for r in recipes})
    day = datetime.date.today().isoformat()
    steps = {run["evaluation"]["train_steps"] for (name, _), run in runs.items() if name in STUDENTS}
    text = [
        f"# Micro tier, {day}",
        "",
        f"{environment['device']}, {environment['cpu_threads']} thread(s) a run; commits {', '.join(commits)}. Data: "
        f"`{data['name']}`, {data['train']:,} training, {data['validation']:,} validation and {data['test']:,} test "
        f"images; the test split is seen once, after training. Every student: {', '.join(map(str, sorted(steps)))} "
        "steps of 64 images. Accuracies in per cent; std is over seeds (n - 1); the gain is paired by seed and its "
        "interval is Student's t.",
        "",
        *table(runs),
        "",
        *([args.note, ""] if args.note else []),
        "Commands:",
        "",
        *(f"    {line}" for line in commands),
    ]
    target = ROOT / "benchmarks" / "results" / f"{day}-micro"
    target.parent.mkdir(exist_ok=True)
    target.with_suffix(".md").write_text("\n".join(text) + "\n", "utf-8")
    results = [
        {"arm": name, "seed": seed, "commit": run["recipe"]["environment"]["commit"], "evaluation": run["evaluation"]}
        for (name, seed), run in runs.items()
    ]
    write_json(target.with_suffix(".json"), {"environment": environment, "dataset": data, "runs": results})
    print("\n".join(text))


if __name__ == "__main__":
    main()
