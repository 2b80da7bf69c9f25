"""Every method beside the matched control, from one teacher, on CIFAR-10 in minutes; broken teachers beside the best.

python benchmarks/method_table.py --dataset_name uoft-cs/cifar10 --name 2026-11-27-methods [--work outputs/methods]

Each run is a process of the user's own command, 350 steps of the micro tier. What has been run is read from its folder,
or from results of that name, so that the command can be killed and given again, and a new method is one more run:
teachers that are trained anew must be as good as those of the results. The five best methods that learn from features
are run with a second seed, and with an untrained and a shuffled teacher. 350 steps are a test of the machinery and of
the sign of a difference, and no CIFAR-10 result.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
STEPS = 350
TEST_IMAGES = 10_000
BROKEN = ("untrained", "shuffled")
SHORT = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": "false", "disable_tqdm": "true"}
# two stages of the CNN, and the student's blocks of about their depth
FEATURES = {"cka_weight": 0, "student_layers": "2 4", "teacher_layers": "2 3"}


@dataclass(frozen=True)
class Row:
    """One way to learn.

    Attributes:
        recipe: In recipes/micro.
        keys: That are added to it.
        teacher: ``cnn``, ``vit``, or None for the control.
        features: Whether it learns from features, so that it is among those that broken teachers are tried with.
    """

    recipe: str
    keys: dict[str, Any]
    teacher: str | None = "cnn"
    features: bool = False


def _logits(**keys: Any) -> Row:
    return Row("kd_resnet18", keys)


def _features(**keys: Any) -> Row:
    return Row("cka", FEATURES | keys, features=True)


# Weights and temperatures as published, for CIFAR where a paper has several; PKT: 30,000 per pair in batches of 64.
ROWS = {
    "labels": Row("ce_only", {}, None),
    "KD": _logits(),
    "KD, standardised": _logits(logit_standardization="true", temperature=2.0),
    "DKD": _logits(alpha=0, dkd_weight=1.0),
    "NKD": _logits(alpha=0, nkd_weight=1.0),
    "DIST": _logits(alpha=0, dist_weight=1.0),
    "OFA": _logits(alpha=0, ofa_weight=1.0, student_layers="0 2 3 5"),
    "CKA": _features(cka_weight=1.0),
    "Gram": _features(gram_weight=1.0),
    "patch similarity": _features(patch_similarity_weight=1.0),
    "token": _features(token_weight=1.0),
    "relation": _features(relation_weight=1.0),
    "RSD": _features(rsd_weight=1.0),
    "SP": _features(sp_weight=3000),
    "RKD": _features(rkd_weight=25),
    "PKT": _features(pkt_weight=30000 // 64),  # there over the pairs of a batch of 64, here over its images
    "feature MSE": _features(feature_mse_weight=1.0),
    "feature smooth L1": _features(feature_mse_weight=1.0, feature_mse_type="smooth_l1"),
    "Procrustes": _features(procrustes_weight=1.0),
    "attention": Row(
        "cka", FEATURES | {"attention_weight": 1.0, "student_layers": "3 5", "teacher_layers": "3 5"}, "vit", True
    ),
    "KD + CKA": Row("cka", FEATURES | {"cka_weight": 1.0, "alpha": 0.7, "temperature": 2.0}, features=True),
}
TEACHERS = {"cnn": ("resnet18", {}), "vit": ("deit", {"num_train_epochs": 2})}


def command(row: Row, seed: int, control: str, args: argparse.Namespace, folder: Path) -> list[str]:
    """Script, recipe and overrides of a run."""
    keys: dict[str, Any] = {
        "dataset_name": args.dataset_name,
        "max_steps": args.steps,
        "seed": seed,
        **SHORT,
        **row.keys,
    }
    keys |= {"output_dir": folder, "analyses_after_training": "none"}
    if row.teacher is not None:
        keys |= {"teacher_model": args.work / f"teacher-{row.teacher}", "teacher_control": control}
        keys |= {"teacher_cache_dir": args.work / "teacher_caches"}
    if row.recipe == "kd_resnet18":
        keys["teacher_cache"] = "views"  # all of them show the teacher the same augmented images
    return _command("train" if row.teacher is None else "distill", row.recipe, keys)


def _command(script: str, recipe: str, keys: dict[str, Any]) -> list[str]:
    words = [sys.executable, f"scripts/{script}.py", f"recipes/micro/{recipe}.json"]
    for key, value in keys.items():
        words += [f"--{key}", *str(value).split()]
    return words


def run(words: list[str], folder: Path) -> dict[str, Any]:
    """What a run measured, now or before; `failed` instead where it ended with an error."""
    record = folder / "method_table.json"
    if record.is_file():
        return json.loads(record.read_text("utf-8"))
    started = time.perf_counter()
    done = subprocess.run(
        [*words, "--overwrite_output_dir", "true"], cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    said = (done.stderr or done.stdout).strip().splitlines()
    if done.returncode != 0:
        return {"failed": said[-1][:200] if said else f"exit code {done.returncode}"}
    found, recipe = (json.loads((folder / f"{name}.json").read_text("utf-8")) for name in ("evaluation", "recipe"))
    result = {
        "commit": recipe["environment"]["commit"],
        "accuracy": found["test"]["accuracy"],
        "validation_accuracy": found["validation"]["accuracy"],
        "train_seconds": found["train_seconds"],
        "seconds": time.perf_counter() - started,
        "command": shown(words[1:]),
    }
    record.write_text(json.dumps(result, indent=1), "utf-8")
    return result


def shown(words: list[str]) -> str:
    """A command without the folders of this machine."""
    return " ".join(Path(word).name if word.startswith("/") else word for word in words)


def standard_error(accuracy: float) -> float:
    """Of the difference of two accuracies on the test images, from their sampling alone."""
    return math.sqrt(2 * accuracy * (1 - accuracy) / TEST_IMAGES)


def best(runs: dict[str, dict[str, Any]], count: int) -> list[str]:
    """The methods from features with the highest accuracy of the first seed."""
    done = [n for n, row in ROWS.items() if row.features and "accuracy" in runs.get(f"{n}|0|none", {})]
    return sorted(done, key=lambda n: -runs[f"{n}|0|none"]["accuracy"])[:count]


def verdict(runs: dict[str, dict[str, Any]], name: str) -> str:
    """Whether a teacher that knows nothing helps as much, in words."""
    own, untrained, control = (
        runs.get(key, {}).get("accuracy") for key in (f"{name}|0|none", f"{name}|0|untrained", "labels|0|none")
    )
    if None in (own, untrained, control):
        return ""
    error = standard_error(own)
    if abs(own - control) < 2 * error:
        return "no difference to labels alone"
    if own < control:
        return "worse than labels alone"
    return "the untrained teacher helps as much" if own - untrained < 2 * error else "more than an untrained teacher"


def table(runs: dict[str, dict[str, Any]]) -> list[str]:
    """Markdown, the best first."""
    control = {seed: runs.get(f"labels|{seed}|none", {}).get("accuracy") for seed in (0, 1)}

    def cell(name: str, seed: int, broken: str) -> str:
        found = runs.get(f"{name}|{seed}|{broken}")
        if found is None:
            return ""
        if "failed" in found:
            return "failed"
        gain = "" if control[seed] is None else f" ({100 * (found['accuracy'] - control[seed]):+.2f})"
        return f"{100 * found['accuracy']:.2f}{gain}"

    names = sorted(ROWS, key=lambda n: -runs.get(f"{n}|0|none", {}).get("accuracy", 0))
    lines = ["| method | keys | seed 0 | seed 1 | untrained teacher | shuffled teacher | s, seed 0 | |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for name in names:
        keys = ", ".join(f"{k} {v}" for k, v in ROWS[name].keys.items() if k not in FEATURES or FEATURES[k] != v)
        cells = [cell(name, 0, "none"), cell(name, 1, "none"), *(cell(name, 0, b) for b in BROKEN)]
        seconds = runs.get(f"{name}|0|none", {}).get("train_seconds")
        lines.append(
            f"| {name} | {keys} | {' | '.join(cells)} | {'' if seconds is None else f'{seconds:.0f}'} | "
            f"{verdict(runs, name)} |"
        )
    return lines


def write(args: argparse.Namespace, runs: dict[str, dict[str, Any]], teachers: dict[str, Any]) -> None:
    """Results as JSON and as a table."""
    import torch

    from hf_ihb.runs.environment import environment

    about = {
        "command": f"python {shown(sys.argv)}",
        "environment": environment(torch.device("cpu")),
        "steps": args.steps,
    }
    minutes = sum(r.get("seconds", 0) for r in (*runs.values(), *teachers.values())) / 60
    record = about | {"minutes": minutes, "teachers": teachers, "runs": runs}
    (RESULTS / f"{args.name}.json").write_text(json.dumps(record, indent=1), "utf-8")
    control = runs.get("labels|0|none", {}).get("accuracy", 0.5)
    said = ", ".join(f"{n} {100 * t['accuracy']:.2f} %" for n, t in teachers.items() if "accuracy" in t)
    lines = [
        f"# Every method, {args.steps} steps", "", f"`{about['command']}`", "",
        f"Accuracy in % of {TEST_IMAGES:,} test images of CIFAR-10, in brackets the gain over labels alone of the same "
        f"seed. Micro student, batches of 64, {args.steps} steps, teachers: {said}. {minutes:.0f} minutes in all, "
        f"wall time{args.note and f' ({args.note})'}. The "
        f"standard error of a difference by the sampling of test images is {100 * standard_error(control):.2f}; "
        "one seed says no more than the sign of a large one. The commit of each run is in the JSON.", "",
        *table(runs), "",
    ]  # fmt: skip
    (RESULTS / f"{args.name}.md").write_text("\n".join(lines), "utf-8")


def main() -> None:
    """Runs what is missing, and writes after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", default="uoft-cs/cifar10", help="Hub id or folder of CIFAR-10.")
    parser.add_argument("--name", required=True, help="Of the results, without ending.")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "methods", help="For run folders and caches.")
    parser.add_argument("--note", default="", help="What else the machine was doing, for the results.")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--best", type=int, default=5, help="With how many methods broken teachers are tried.")
    args = parser.parse_args()
    args.work = args.work.absolute()
    path = RESULTS / f"{args.name}.json"
    before = json.loads(path.read_text("utf-8")) if path.is_file() else {"steps": args.steps}
    if before["steps"] != args.steps:
        parser.error(f"{path.name} is of {before['steps']} steps; give another --name")
    runs: dict[str, dict[str, Any]] = before.get("runs", {})
    teachers: dict[str, Any] = before.get("teachers", {})
    taught = set()

    def teach(kind: str) -> None:
        taught.add(kind)
        recipe, keys = TEACHERS[kind]
        keys = {"dataset_name": args.dataset_name, "disable_tqdm": "true", "analyses_after_training": "none", **keys}
        folder = args.work / f"teacher-{kind}"
        found = run(_command("train", recipe, keys | {"output_dir": folder}), folder)
        known = teachers.setdefault(kind, found)
        if found.get("accuracy") != known.get("accuracy"):
            parser.error(
                f"teacher-{kind} is {found.get('accuracy', found)}, that of the results {known.get('accuracy', known)}"
            )

    def do(name: str, seed: int = 0, control: str = "none") -> None:
        row = ROWS[name]
        if "accuracy" in runs.get(f"{name}|{seed}|{control}", {}):
            return
        if row.teacher is not None and row.teacher not in taught:
            teach(row.teacher)
        folder = args.work / f"{re.sub(r'[^A-Za-z0-9+]', '', name)}-{seed}-{control}"
        found = runs[f"{name}|{seed}|{control}"] = run(command(row, seed, control, args, folder), folder)
        print(name, seed, control, found.get("accuracy", found.get("failed")), flush=True)
        write(args, runs, teachers)

    for name in ROWS:
        do(name)
    do("labels", 1)
    for name in best(runs, args.best):
        do(name, 1)
        for control in BROKEN:
            do(name, 0, control)


if __name__ == "__main__":
    main()
