"""The micro tier: a CNN teacher, the matched control and every distilled student, on two cores, into one table.

python benchmarks/micro.py --dataset_name DATASET [--seeds 0 1 2] [--arms teacher ce_only kd cka gram]

Finished runs are skipped and interrupted ones resumed, so the command can be given again.
"""

import argparse
import datetime
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

from hf_ihb.report import read_run, results_table
from hf_ihb.run import write_json

ROOT = Path(__file__).parents[1]
ARMS = {"teacher": "train.py", "ce_only": "train.py", "kd": "distill.py", "cka": "distill.py", "gram": "distill.py"}


def run_arm(arm: str, seed: int, dataset: str, outputs: Path) -> tuple[Path, str]:
    """Trains one arm unless it is finished; returns its folder and command."""
    folder = outputs / f"seed-{seed}" / arm
    command = ["python", f"scripts/{ARMS[arm]}", f"recipes/micro/{arm}.json", "--dataset_name", dataset]
    command += ["--seed", str(seed), "--output_dir", str(folder)]
    if ARMS[arm] == "distill.py":
        command += ["--teacher_model", str(folder.with_name("teacher"))]
    text = shlex.join(command)
    if (folder / "evaluation.json").is_file():
        return folder, text
    if (folder / "recipe.json").is_file():
        resumes = any(folder.glob("checkpoint-*/trainer_state.json"))
        command += ["--resume_from_checkpoint", "true"] if resumes else ["--overwrite_output_dir", "true"]
    print(f"== {text}", flush=True)
    subprocess.run([sys.executable, *command[1:]], cwd=ROOT, check=True)
    return folder, text


def gains(folders: list[Path]) -> list[str]:
    """Each student's test accuracy minus the control's of the same seed: mean, and standard deviation over seeds."""
    accuracy = {(f.parent.name, f.name): read_run(f)["evaluation"]["test"]["accuracy"] for f in folders}
    lines = []
    for arm in sorted({name for _, name in accuracy} - {"teacher", "ce_only"}):
        points = [
            100 * (value - accuracy[seed, "ce_only"])
            for (seed, name), value in accuracy.items()
            if name == arm and (seed, "ce_only") in accuracy
        ]
        spread = f", standard deviation {statistics.stdev(points):.2f}" if len(points) > 1 else ", one seed: no spread"
        lines.append(f"- {arm} - ce_only: {statistics.mean(points):+.2f} points over {len(points)} seed(s){spread}")
    return lines


def main() -> None:
    """Runs what is missing, then writes the table under benchmarks/results/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", default="uoft-cs/cifar10", help="Hub id or folder of CIFAR-10.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="Seeds of data order, weights and views.")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="Which runs.")
    parser.add_argument("--outputs", type=Path, default=Path("outputs/micro"), help="Where the runs go.")
    parser.add_argument("--note", help="A sentence for the results, such as what else the machine was doing.")
    args = parser.parse_args()

    runs = [run_arm(arm, seed, args.dataset_name, args.outputs) for seed in args.seeds for arm in args.arms]
    folders = [folder for folder, _ in runs]
    recipes = [json.loads((folder / "recipe.json").read_text("utf-8")) for folder in folders]
    environment = recipes[0]["environment"]
    day = datetime.date.today().isoformat()
    text = [
        f"# Micro tier, {day}",
        "",
        f"{environment['device']}, {environment['cpu_threads']} threads; commit {environment['commit']}; test split of "
        f"`{recipes[0]['dataset']['name']}` ({recipes[0]['dataset']['test']:,} images), seen once, after training.",
        "",
        results_table(folders),
        "",
        *([args.note, ""] if args.note else []),
        *gains(folders),
        "",
        "Commands:",
        "",
        *(f"    {command}" for _, command in runs),
    ]
    target = ROOT / "benchmarks" / "results" / f"{day}-micro"
    target.parent.mkdir(exist_ok=True)
    target.with_suffix(".md").write_text("\n".join(text) + "\n", "utf-8")
    results = [
        {"folder": str(folder), "command": command, "evaluation": read_run(folder)["evaluation"]}
        for folder, command in runs
    ]
    write_json(target.with_suffix(".json"), {"environment": environment, "runs": results})
    print("\n".join(text))


if __name__ == "__main__":
    main()
