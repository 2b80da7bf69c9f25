"""Full-size models for a few hundred steps, by the commands a user types: does everything run, and how fast?

python benchmarks/full_size.py --dataset_name DATASET [--max_steps 200] [--per_device_train_batch_size 16]

Finished runs are skipped. The DINOv2 teacher is a stand-in of the real size with random weights, made here: its step
costs the same, and what it teaches means nothing.
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

from transformers import BitImageProcessor, Dinov2Config, Dinov2Model, set_seed

from hf_ihb.run import write_json

ROOT = Path(__file__).parents[1]
STAND_IN = Path("outputs/full_size/dinov2-small-random")


def make_stand_in() -> None:
    """DINOv2-small (ViT-S/14, 12 blocks of width 384) with random weights."""
    set_seed(0)
    config = Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14)
    Dinov2Model(config).save_pretrained(ROOT / STAND_IN)
    BitImageProcessor(
        size={"shortest_edge": 256},
        crop_size={"height": 224, "width": 224},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(ROOT / STAND_IN)


def measure(name: str, command: list[str]) -> dict:
    """Runs a command unless its run is finished, and reads its run folder."""
    folder = Path("outputs/full_size") / name
    command = [*command, "--output_dir", str(folder), "--overwrite_output_dir", "true"]
    if not (ROOT / folder / "evaluation.json").is_file():
        print(f"== {shlex.join(command)}", flush=True)
        bin_folder = str(Path(sys.executable).parent)
        environment = {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}"}
        subprocess.run(command, cwd=ROOT, check=True, env=environment)
    history = json.loads((ROOT / folder / "training_history.json").read_text("utf-8"))
    logs = [entry for entry in history if "loss" in entry]
    return {
        "name": name,
        "command": shlex.join(command),
        "steps": logs[-1]["step"],
        "loss": {"first": logs[0]["loss"], "last": logs[-1]["loss"]},
        "parts_last": {k: v for k, v in logs[-1].items() if k.endswith("_loss")},
        "images_per_second_median": statistics.median(entry["images_per_second"] for entry in logs),
        "evaluation": json.loads((ROOT / folder / "evaluation.json").read_text("utf-8")),
        "environment": json.loads((ROOT / folder / "recipe.json").read_text("utf-8"))["environment"],
    }


def main() -> None:
    """Runs both and writes benchmarks/results/DATE-full-size.{md,json}."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", default="uoft-cs/cifar10", help="Hub id or folder of CIFAR-10.")
    parser.add_argument("--max_steps", type=int, default=200, help="Optimizer steps.")
    parser.add_argument("--per_device_train_batch_size", type=int, default=16, help="Images a step.")
    args = parser.parse_args()

    make_stand_in()
    common = ["--dataset_name", args.dataset_name, "--max_steps", str(args.max_steps), "--logging_steps", "20"]
    common += ["--per_device_train_batch_size", str(args.per_device_train_batch_size)]
    distill = ["accelerate", "launch", "scripts/distill.py"]
    runs = [
        measure("resnet18", ["python", "scripts/train.py", "recipes/resnet18.json", *common]),
        measure("cka", [*distill, "recipes/cka.json", "--teacher_model", str(STAND_IN), *common]),
    ]
    day, environment = datetime.date.today().isoformat(), runs[0]["environment"]
    rows = []
    for r in runs:
        speed, threads = r["images_per_second_median"], r["environment"]["cpu_threads"]
        losses, accuracy = r["loss"], 100 * r["evaluation"]["test"]["accuracy"]
        rows.append(
            f"| {r['name']} | {r['steps']} | {losses['first']:.3f} -> {losses['last']:.3f} | {speed:.0f} | {threads} | "
            f"{accuracy:.2f} |"
        )
    text = [
        f"# Full-size models, a few steps, {day}",
        "",
        f"{environment['device']}; commit {environment['commit']}; seed 42. The accuracy after so few steps only shows "
        "that evaluation runs. `accelerate launch` gives a CPU process one thread unless OMP_NUM_THREADS is set.",
        "",
        "| recipe | steps | training loss, first -> last log | images / s, median | threads | test accuracy |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        "Commands:",
        "",
        *(f"    {r['command']}" for r in runs),
    ]
    target = ROOT / "benchmarks" / "results" / f"{day}-full-size"
    target.parent.mkdir(exist_ok=True)
    target.with_suffix(".md").write_text("\n".join(text) + "\n", "utf-8")
    write_json(target.with_suffix(".json"), runs)
    print("\n".join(text))


if __name__ == "__main__":
    main()
