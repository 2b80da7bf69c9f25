"""Every top-level recipe for a few steps, by the commands a user types: does everything run, and how fast?

python benchmarks/full_size.py --dataset_name CIFAR10 --mnist MNIST [--max_steps 50] [--recipes cka gram ...]

`mnist` is trained to its end. Finished runs are skipped. Weights that come from the Hub, or from a long training, are
replaced by random ones of the same architecture, made here: a step costs the same, and what they teach means nothing.
"""

import argparse
import datetime
import json
import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

from transformers import (
    BitImageProcessor,
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    Dinov2Config,
    Dinov2Model,
    PreTrainedModel,
    set_seed,
)

from hf_ihb.runs.files import write_json

ROOT = Path(__file__).parents[1]
OUTPUTS = Path("outputs/full_size")
TEACHERS = ("adaptive_cnn", "resnet18", "convnextv2")
STUDENTS = ("ce_only", "deit", *(f"kd_{name}" for name in TEACHERS), "cka", "gram")
RECIPES = (*TEACHERS, "mnist", *STUDENTS)


def stand_in(name: str) -> str:
    """Folder of a model of the real architecture with random weights."""
    folder = OUTPUTS / f"{name}-random"
    if not (ROOT / folder / "preprocessor_config.json").is_file():
        set_seed(0)
        model: PreTrainedModel
        if name == "dinov2-small":
            model = Dinov2Model(Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518))
        else:  # convnextv2-tiny, as it comes: patches of 4 px, 1,000 classes
            model = ConvNextV2ForImageClassification(ConvNextV2Config(depths=[3, 3, 9, 3], num_labels=1000))
        model.save_pretrained(ROOT / folder)
        BitImageProcessor(
            size={"shortest_edge": 256},
            crop_size={"height": 224, "width": 224},
            image_mean=[0.485, 0.456, 0.406],
            image_std=[0.229, 0.224, 0.225],
        ).save_pretrained(ROOT / folder)
    return str(folder)


def command(name: str, args: argparse.Namespace) -> list[str]:
    """The command line of one recipe."""
    script = "distill.py" if name.startswith(("kd_", "cka", "gram")) else "train.py"
    words = ["accelerate", "launch", f"scripts/{script}", f"recipes/{name}.json"]
    if name == "mnist":
        return [*words, "--dataset_name", args.mnist]
    words += ["--dataset_name", args.dataset_name, "--max_steps", str(args.max_steps), "--logging_steps", "10"]
    words += ["--per_device_train_batch_size", str(args.per_device_train_batch_size)]
    words += ["--max_eval_samples", str(args.max_eval_samples)]
    if name == "convnextv2":
        words += ["--model_name_or_path", stand_in("convnextv2-tiny")]
    if name.startswith("kd_"):  # the teacher's few steps leave it at chance, where it would be refused
        teacher = OUTPUTS / name.removeprefix("kd_")
        words += ["--teacher_model", str(teacher), "--teacher_control", "untrained"]
    if name in ("cka", "gram"):
        words += ["--teacher_model", stand_in("dinov2-small")]
    return words


def measure(name: str, words: list[str]) -> dict:
    """Runs a command unless its run is finished, and reads its run folder."""
    folder = OUTPUTS / name
    words = [*words, "--output_dir", str(folder), "--overwrite_output_dir", "true"]
    if not (ROOT / folder / "evaluation.json").is_file():
        print(f"== {shlex.join(words)}", flush=True)
        bin_folder = str(Path(sys.executable).parent)
        environment = {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}"}
        subprocess.run(words, cwd=ROOT, check=True, env=environment)
    history = json.loads((ROOT / folder / "training_history.json").read_text("utf-8"))
    recipe = json.loads((ROOT / folder / "recipe.json").read_text("utf-8"))
    evaluation = json.loads((ROOT / folder / "evaluation.json").read_text("utf-8"))
    logs = [entry for entry in history if "loss" in entry]
    return {
        "name": name,
        "command": shlex.join(words),
        "seed": recipe["keys"]["seed"],
        "steps": evaluation["train_steps"],
        "loss": {"first": logs[0]["loss"], "last": logs[-1]["loss"]},
        "parts_last": {k: v for k, v in logs[-1].items() if k.endswith("_loss")},
        "images_per_second_median": statistics.median(entry["images_per_second"] for entry in logs),
        "evaluation": evaluation,
        "dataset": recipe["dataset"],
        "environment": recipe["environment"],
    }


def row(run: dict) -> str:
    """One row of the table."""
    loss, evaluation, test = run["loss"], run["evaluation"], run["dataset"]["test"]
    return (
        f"| {run['name']} | {evaluation['num_parameters']:,} | {run['steps']} | {loss['first']:.3f} -> "
        f"{loss['last']:.3f} | {run['images_per_second_median']:.0f} | {run['environment']['cpu_threads']} | "
        f"{100 * evaluation['test']['accuracy']:.2f} on {test:,} |"
    )


def main() -> None:
    """Runs what is missing and writes benchmarks/results/DATE-full-size.{md,json}."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", default="uoft-cs/cifar10", help="Hub id or folder of CIFAR-10.")
    parser.add_argument("--mnist", default="ylecun/mnist", help="Hub id or folder of MNIST.")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), help="Which ones.")
    parser.add_argument("--max_steps", type=int, default=50, help="Optimizer steps.")
    parser.add_argument("--per_device_train_batch_size", type=int, default=16, help="Images a step.")
    parser.add_argument("--max_eval_samples", type=int, default=500, help="Validation and test images.")
    parser.add_argument("--note", help="A sentence for the results, such as what else the machine was doing.")
    args = parser.parse_args()

    runs = [measure(name, command(name, args)) for name in RECIPES if name in args.recipes]
    day, environment = datetime.date.today().isoformat(), runs[0]["environment"]
    commits = sorted({str(run["environment"]["commit"]) for run in runs})
    text = [
        f"# Every top-level recipe, {day}",
        "",
        f"{environment['device']}; commits {', '.join(commits)}; seed {runs[0]['seed']}; "
        f"{args.per_device_train_batch_size} images a step but for `mnist`, which is trained to its end. The accuracy "
        "after so few steps only shows that evaluation runs. Images a second are the median over logging windows.",
        "",
        "| recipe | parameters | steps | training loss, first -> last log | images / s | threads | test accuracy, % |",
        "|---|---|---|---|---|---|---|",
        *map(row, runs),
        "",
        *([args.note, ""] if args.note else []),
        "Commands:",
        "",
        *(f"    {run['command']}" for run in runs),
    ]
    target = ROOT / "benchmarks" / "results" / f"{day}-full-size"
    target.parent.mkdir(exist_ok=True)
    target.with_suffix(".md").write_text("\n".join(text) + "\n", "utf-8")
    write_json(target.with_suffix(".json"), runs)
    print("\n".join(text))


if __name__ == "__main__":
    main()
