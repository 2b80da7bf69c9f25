"""Is the structural signal real? The published structural loss and the corrected one, each with three teachers.

python benchmarks/structural_signal.py --dataset_name DATASET [--seeds 0]

Both losses are a token and a CKA term of weight 0.5 each at micro scale. The teachers are the trained micro ResNet-18,
the same network untrained, and the trained one shown another image than the student. A loss that carries what the
teacher saw in the image must tell the three apart. Finished runs are skipped.
"""

import argparse
import datetime
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from hf_ihb.plots import curve_panels
from hf_ihb.runs.files import write_json
from hf_ihb.runs.report import read_run

ROOT = Path(__file__).parents[1]
TERMS = ["--token_weight", "0.5", "--cka_weight", "0.5"]
LOSSES = {
    "published": [
        *("--teacher_projector", "trainable", "--teacher_view", "clean", "--cka_estimator", "published"),
        *("--center_positions", "false", "--task_heads", "cls"),
    ],
    "corrected": [],
}
TEACHERS = {
    "trained": [],
    "untrained": ["--teacher_control", "untrained"],
    "shuffled": ["--teacher_control", "shuffled"],
}
PARTS = {"token_loss": "token term", "cka_loss": "CKA term"}


def launch(words: list[str], folder: Path) -> None:
    """Runs a command from the repository's root unless its run folder is finished."""
    if not (ROOT / folder / "evaluation.json").is_file():
        print(f"== {shlex.join(words)}", flush=True)
        subprocess.run([sys.executable, *words[1:]], cwd=ROOT, check=True)


def summary(runs: dict[tuple[str, str, int], dict[str, Any]]) -> list[str]:
    """One row a loss and teacher: first and last logged terms of the first seed, and the test accuracy."""
    lines = [
        "| loss | teacher | token term, first -> last | CKA term, first -> last | test accuracy by seed | mean |",
        "|---|---|---|---|---|---|",
    ]
    for loss in LOSSES:
        for teacher in TEACHERS:
            found = {seed: run for (a, b, seed), run in runs.items() if (a, b) == (loss, teacher)}
            curves = next(iter(found.values()))["curves"]
            terms = [f"{curves[part][0]:.3f} -> {curves[part][-1]:.3f}" for part in PARTS]
            accuracy = [100 * run["evaluation"]["test"]["accuracy"] for run in found.values()]
            by_seed = ", ".join(f"{a:.2f}" for a in accuracy)
            lines.append(f"| {loss} | {teacher} | {' | '.join(terms)} | {by_seed} | {statistics.mean(accuracy):.2f} |")
    return lines


def main() -> None:
    """Runs what is missing, then writes table, JSON and plot under benchmarks/results/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", default="uoft-cs/cifar10", help="Hub id or folder of CIFAR-10.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="The plot shows the first.")
    parser.add_argument("--max_steps", type=int, default=400, help="Optimizer steps of 64 images.")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="Where the runs go.")
    parser.add_argument("--note", help="A sentence for the results, such as what else the machine was doing.")
    args = parser.parse_args()

    runs, commands = {}, []
    for seed in args.seeds:
        micro = args.outputs / "micro" / f"seed-{seed}"
        words = ["python", "scripts/train.py", "recipes/micro/resnet18.json", "--seed", str(seed)]
        words += ["--dataset_name", args.dataset_name, "--output_dir", str(micro / "resnet18")]
        launch([*words, "--overwrite_output_dir", "true"], micro / "resnet18")
        for loss, loss_keys in LOSSES.items():
            for teacher, teacher_keys in TEACHERS.items():
                folder = args.outputs / "structural_signal" / f"seed-{seed}" / f"{loss}-{teacher}"
                words = ["python", "scripts/distill.py", "recipes/micro/cka.json", *TERMS, *loss_keys, *teacher_keys]
                words += ["--teacher_model", str(micro / "resnet18"), "--seed", str(seed)]
                words += ["--max_steps", str(args.max_steps)]
                words += ["--dataset_name", args.dataset_name, "--output_dir", str(folder)]
                launch([*words, "--overwrite_output_dir", "true"], folder)
                history = json.loads((ROOT / folder / "training_history.json").read_text("utf-8"))
                logs = [entry for entry in history if "task_loss" in entry]
                run = read_run(ROOT / folder)
                run["curves"] = {key: [entry[key] for entry in logs] for key in ("step", "task_loss", *PARTS)}
                runs[loss, teacher, seed] = run
                commands.append(shlex.join(words))

    seed, day = args.seeds[0], datetime.date.today().isoformat()
    panels = {
        f"{loss}: {title}": {
            f"{teacher} teacher": (
                runs[loss, teacher, seed]["curves"]["step"],
                runs[loss, teacher, seed]["curves"][part],
            )
            for teacher in TEACHERS
        }
        for loss in LOSSES
        for part, title in PARTS.items()
    }
    target = ROOT / "benchmarks" / "results" / f"{day}-structural-signal"
    target.parent.mkdir(exist_ok=True)
    curve_panels(panels, target.with_suffix(".png"), x_label="optimizer step (64 images)", y_label="loss, unweighted")

    recipes = [run["recipe"] for run in runs.values()]
    environment = recipes[0]["environment"]
    commits = sorted({str(r["environment"]["commit"]) for r in recipes})
    text = [
        f"# Is the structural signal real? {day}",
        "",
        f"{environment['device']}, {environment['cpu_threads']} thread(s) a run; commits {', '.join(commits)}; "
        f"`{recipes[0]['dataset']['name']}`; plot: seed {seed}.",
        "",
        *summary(runs),
        "",
        f"![loss curves]({target.name}.png)",
        "",
        *([args.note, ""] if args.note else []),
        "Commands:",
        "",
        *(f"    {line}" for line in commands),
    ]
    target.with_suffix(".md").write_text("\n".join(text) + "\n", "utf-8")
    results = [
        {"loss": a, "teacher": b, "seed": s, "curves": run["curves"], "evaluation": run["evaluation"]}
        for (a, b, s), run in runs.items()
    ]
    write_json(target.with_suffix(".json"), {"environment": environment, "runs": results})
    print("\n".join(text))


if __name__ == "__main__":
    main()
