"""What do two teachers in one run teach: a CNN by logits and a ViT by structure, beside each alone and neither.

python benchmarks/several_teachers.py --dataset_name DATASET [--seeds 0 1 2]

At micro scale unless other recipes are named. Without --cnn and --vit the teachers are trained first, by the recipes of
the tier, on labels. All students have the seed, the steps and every key but those of their teachers in common. Finished
runs are skipped.
"""

import argparse
import datetime
import json
import re
import shlex
import statistics
from pathlib import Path
from typing import Any

from structural_signal import ROOT, launch

from hf_ihb.runs.files import write_json
from hf_ihb.runs.report import learned_from, read_run

LOGITS = {"alpha": 0.5, "temperature": 2.0}
STRUCTURE = {"cka_weight": 1.0}
# Student -> which teachers it learns from, and keys of the run beside them.
STUDENTS: dict[str, tuple[tuple[str, ...], list[str]]] = {
    "labels alone": ((), []),
    "CNN by logits": (("cnn",), []),
    "ViT by structure": (("vit",), []),
    "both": (("cnn", "vit"), []),
    "both, one left out by 0.5": (("cnn", "vit"), ["--teacher_dropping", "0.5"]),
}


def student_words(name: str, recipe: Path, entries: dict[str, dict[str, Any]]) -> list[str]:
    """The command of a student, as far as it is this student's."""
    teachers, keys = STUDENTS[name]
    if not teachers:
        return ["python", "scripts/train.py", str(recipe)]
    words = ["python", "scripts/distill.py", str(recipe), "--distilled_heads", "both", *keys]
    return [*words, "--teacher_models", *(json.dumps(entries[teacher]) for teacher in teachers)]


def summary(runs: dict[tuple[str, int], dict[str, Any]], seeds: list[int]) -> list[str]:
    """One row a student: test accuracy by seed, and its difference from the student of the CNN alone, pair by pair."""
    lines = [
        "| student | learned from | test accuracy by seed | mean | minus CNN alone, same seed | minutes |",
        "|---|---|---|---|---|---|",
    ]
    accuracy = {key: 100 * run["evaluation"]["test"]["accuracy"] for key, run in runs.items()}
    for name in STUDENTS:
        own = [accuracy[name, seed] for seed in seeds]
        gains = [accuracy[name, seed] - accuracy["CNN by logits", seed] for seed in seeds]
        by_seed, gained = ", ".join(f"{a:.2f}" for a in own), ", ".join(f"{g:+.2f}" for g in gains)
        minutes = statistics.mean(runs[name, seed]["evaluation"]["train_seconds"] / 60 for seed in seeds)
        taught = learned_from(runs[name, seeds[0]]["recipe"])
        lines.append(f"| {name} | {taught} | {by_seed} | {statistics.mean(own):.2f} | {gained} | {minutes:.1f} |")
    return lines


def main() -> None:
    """Runs what is missing, then writes table and JSON under benchmarks/results/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", default="uoft-cs/cifar10", help="Hub id or folder of CIFAR-10.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--recipe", type=Path, default=Path("recipes/micro/ce_only.json"), help="Of all students.")
    parser.add_argument("--cnn", help="Teacher of logits; recipes/micro/resnet18.json is trained if not given.")
    parser.add_argument("--vit", help="Teacher of structure; recipes/micro/deit.json is trained if not given.")
    parser.add_argument("--vit_keys", type=json.loads, default={}, help="Keys of its entry beside cka_weight, as JSON.")
    parser.add_argument("--max_steps", type=int, default=-1, help="Of each run; the recipe's epochs if not given.")
    parser.add_argument("--outputs", type=Path, default=Path("outputs/several_teachers"), help="Where the runs go.")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--note", help="A sentence for the results, such as what else the machine was doing.")
    args = parser.parse_args()

    common = ["--dataset_name", args.dataset_name, "--max_steps", str(args.max_steps), "--overwrite_output_dir", "true"]
    runs, commands = {}, []
    for seed in args.seeds:
        folder = args.outputs / f"seed-{seed}"
        places = {"cnn": args.cnn or str(folder / "resnet18"), "vit": args.vit or str(folder / "deit")}
        for kind, name in (("cnn", "resnet18"), ("vit", "deit")):
            if getattr(args, kind) is None:
                words = ["python", "scripts/train.py", f"recipes/micro/{name}.json", *common]
                launch([*words, "--seed", str(seed), "--output_dir", places[kind]], Path(places[kind]))
        layers = {"student_layers": [1, 3, 5]} | args.vit_keys
        entries = {
            "cnn": {"teacher_model": places["cnn"], **LOGITS},
            "vit": {"teacher_model": places["vit"], **STRUCTURE, **layers},
        }
        for name in STUDENTS:
            own = folder / name.replace(",", "").replace(" ", "-").lower()
            words = [*student_words(name, args.recipe, entries), *common]
            words += ["--seed", str(seed), "--output_dir", str(own)]
            launch(words, own)
            runs[name, seed] = read_run(ROOT / own)
            commands.append(shlex.join(words))

    write(args, runs, commands)


def write(args: argparse.Namespace, runs: dict[tuple[str, int], dict[str, Any]], commands: list[str]) -> None:
    """Table and JSON."""
    recipes = [run["recipe"] for run in runs.values()]
    environment, day = recipes[0]["environment"], datetime.date.today().isoformat()
    commits = sorted({str(recipe["environment"]["commit"]) for recipe in recipes})
    text = [
        f"# What do two teachers in one run teach? {day}",
        "",
        f"{environment['device']}, {environment['cpu_threads']} thread(s) a run; commits {', '.join(commits)}; "
        f"`{recipes[0]['dataset']['name']}`.",
        "",
        *summary(runs, args.seeds),
        "",
        *([args.note, ""] if args.note else []),
        "Commands:",
        "",
        *(f"    {line}" for line in commands),
    ]
    args.results.mkdir(parents=True, exist_ok=True)
    target = args.results / f"{day}-several-teachers"
    # where folders lie on this machine is nobody's business
    page = re.sub(r"(?<![\w.-])/(?:[\w.-]+/)+", "", "\n".join(text))
    target.with_suffix(".md").write_text(page + "\n", "utf-8")
    results = [{"student": name, "seed": s, "evaluation": run["evaluation"]} for (name, s), run in runs.items()]
    write_json(target.with_suffix(".json"), {"environment": environment, "runs": results})
    print("\n".join(text))


if __name__ == "__main__":
    main()
