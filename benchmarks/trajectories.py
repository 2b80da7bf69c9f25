"""Whether training is what it was: the trajectory of every recipe, recorded on two trees of the program and compared.

python benchmarks/trajectories.py record --tree PATH --output before.json [--only SUBSTRING]
python benchmarks/trajectories.py compare before.json after.json [--name trajectories]

Recorded is what cannot move when modules do: a recipe goes in through the scripts of a tree, and losses, components,
gradient norms and the hash of every tensor are read from the run folder that comes out. Students are shrunk, teachers
tiny and of fixed weights, images made up or scikit-learn's; 12 steps of 8 images in one thread, and every second recipe
on two processes as well. Two recordings of one tree are identical; those of two trees are, where nothing changed.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
CLASSES = ["a", "b", "c", "d"]
SIDE = 16
VIT = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "patch_size": 4}
RUN = {
    "use_cpu": True, "report_to": "none", "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1,
    "max_steps": 12, "logging_steps": 1, "save_strategy": "no", "eval_strategy": "no", "load_best_model_at_end": False,
    "max_train_samples": 96, "max_eval_samples": 16, "teacher_statistics_samples": 32, "disable_tqdm": True,
    "early_stopping_patience": None, "dataloader_num_workers": 0,
}  # fmt: skip
TIMES = ("runtime", "per_second", "seconds")


def make_images(folder: Path) -> None:
    """A folder of made-up images in colour, a class a brighter channel."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 32), ("validation", 8), ("test", 8)):
        for label, name in enumerate(CLASSES):
            place = folder / split / name
            place.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 160, (SIDE, SIDE, 3))
                pixels[..., :3] += 80 * (np.arange(3) == label)
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(place / f"{number}.png")


def make_teachers(folder: Path) -> None:
    """A classifier and a self-supervised ViT, both of random weights."""
    import torch
    from transformers import (
        BitImageProcessor,
        ConvNextV2Config,
        ConvNextV2ForImageClassification,
        Dinov2Config,
        Dinov2Model,
    )

    names = dict(enumerate(CLASSES))
    torch.manual_seed(0)
    cnn = ConvNextV2ForImageClassification(
        ConvNextV2Config(
            hidden_sizes=[8, 12, 16, 20],
            depths=[1, 1, 1, 1],
            patch_size=1,
            image_size=SIDE,
            id2label=names,
            label2id={n: i for i, n in names.items()},
            initializer_range=0.5,
        )
    )
    vit = Dinov2Model(
        Dinov2Config(
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            patch_size=4,
            image_size=SIDE,
            initializer_range=0.3,
        )
    )
    size = {"height": SIDE, "width": SIDE}
    processor = BitImageProcessor(
        size=size, do_center_crop=False, image_mean=[0.4] * 3, image_std=[0.3] * 3, do_convert_rgb=True
    )
    for name, model in (("cnn", cnn), ("vit", vit)):
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)


def shrunk(recipe: dict[str, Any], script: str) -> dict[str, Any]:
    """A recipe with a small student, made-up images and a tiny teacher; all else as it is."""
    keys = recipe | RUN | {"dataset_name": "images", "image_size": SIDE, "color_mode": "rgb"}
    for name in ("dataset_config_name", "dataset_revision", "validation_split", "teacher_revision", "model_revision",
                 "image_column_name", "label_column_name", "teacher_image_size", "mlp_ratio", "model_name_or_path",
                 "baseline_model", "metric_for_best_model", "greater_is_better"):  # fmt: skip
        keys.pop(name, None)
    architecture = keys.get("architecture", "deit")
    if architecture in ("adaptive_cnn", "convnextv2"):
        depth = 4 if architecture == "convnextv2" else 3
        keys |= {"hidden_sizes": [8, 12, 16, 20][:depth], "depths": [1] * depth}
    elif str(architecture).startswith("resnet"):
        keys["architecture"] = "resnet18_cifar_w16"
    else:
        keys |= VIT
    if script == "train.py":
        for name in ("teacher_statistics_samples",):
            keys.pop(name)
        return keys
    if keys["method"] == "logits":  # one key for both trees
        keys["teacher_view"] = keys.pop("teacher_logits_view", keys.get("teacher_view", "identical"))
    structural = keys["method"] == "structural"
    keys |= {"teacher_model": "vit" if structural else "cnn", "teacher_control": "untrained"}
    if structural:
        keys |= {"student_layers": [0, 2], "teacher_layers": [0, 2]}
    else:
        keys.pop("teacher_statistics_samples")
    return keys


def runs(tree: Path, only: str) -> list[tuple[str, str, dict[str, Any]]]:
    """Name, script and keys of every run: each recipe, with a cache by name where its view allows one, and without."""
    found = []
    for path in sorted((tree / "recipes").rglob("*.json")):
        recipe = json.loads(path.read_text("utf-8"))
        folder = path.parent.name
        if folder not in ("quickstart", "micro", "paper") or only not in f"{folder}/{path.stem}":
            continue
        script = "distill.py" if "method" in recipe else "train.py"
        keys = shrunk(recipe, script)
        if script == "train.py":
            found.append((f"{folder}/{path.stem}", script, keys))
            continue
        found.append((f"{folder}/{path.stem}, live", script, keys | {"teacher_cache": "off"}))
        default = "identical" if keys["method"] == "logits" else "shared"
        if keys["method"] == "logits" and not keys.get("mixup_alpha") and not keys.get("cutmix_alpha"):
            cached = {"teacher_view": "clean", "teacher_cache": "logits"}
            found.append((f"{folder}/{path.stem}, cached", script, keys | cached))
        elif keys["method"] == "structural" and keys.get("teacher_view", default) != "identical":
            found.append((f"{folder}/{path.stem}, cached", script, keys | {"teacher_cache": "tokens"}))
    return found


def read_run(folder: Path) -> dict[str, Any]:
    """What a run folder says, exactly."""
    from safetensors.numpy import load_file

    history = json.loads((folder / "training_history.json").read_text("utf-8"))
    steps = [
        {k: float(v).hex() if isinstance(v, float) else v for k, v in entry.items() if not any(t in k for t in TIMES)}
        for entry in history
    ]
    weights = {}
    for file in ("model.safetensors", "distillation/heads.safetensors"):
        if (folder / file).is_file():
            tensors = load_file(folder / file)
            # heads by their shapes: where they are kept in the file may move
            weights[file] = sorted(
                hashlib.sha256(f"{x.dtype} {x.shape}".encode() + x.tobytes()).hexdigest()[:16] for x in tensors.values()
            )
    return {"steps": steps, "weights": weights}


def record(tree: Path, output: Path, only: str) -> None:
    """Runs everything on a tree, each in a process of its own."""
    from tqdm.auto import tqdm

    tree, results, start = tree.resolve(), {}, time.perf_counter()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tree, capture_output=True, text=True, check=False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_images(folder / "images")
        make_teachers(folder)
        one = list(enumerate(runs(tree, only)))
        two = [(number, run) for number, run in one if number % 2 == 0]
        for count, number, (title, script, keys) in tqdm(
            [(c, n, r) for c, some in ((1, one), (2, two)) for n, r in some], unit="run"
        ):
            out = f"out/{count}-{number}"
            caches = {} if script == "train.py" else {"teacher_cache_dir": f"caches/{count}-{number}"}
            (folder / "recipe.json").write_text(json.dumps(keys | caches | {"output_dir": out}))
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if count == 2 else []
            done = subprocess.run(
                [sys.executable, *launcher, str(tree / "scripts" / script), "recipe.json"], cwd=folder,
                capture_output=True, text=True, check=False,
                env={**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            )  # fmt: skip
            key = f"{title}, {count} process{'es' * (count > 1)}"
            results[key] = (
                read_run(folder / out)
                if done.returncode == 0
                else {"error": " ".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-1:])[-300:]}
            )
    about = {"commit": commit.stdout.strip() or None, "seconds": round(time.perf_counter() - start)}
    output.write_text(json.dumps(about | {"runs": results}, separators=(",", ":")) + "\n", "utf-8")
    failed = [key for key, result in results.items() if "error" in result]
    print(f"{len(results)} runs in {about['seconds']} s, {len(failed)} failed: {output}")
    for key in failed:
        print(f"  {key}: {results[key]['error']}")


def difference(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Where two recordings of a run part, in words; nothing where they do not."""
    if "error" in before or "error" in after:
        return "" if before == after else f"error: {before.get('error', 'none')} / {after.get('error', 'none')}"
    for number, (old, new) in enumerate(zip(before["steps"], after["steps"], strict=False)):
        if parts := [name for name in {**old, **new} if old.get(name) != new.get(name)]:
            return f"log {number}: {', '.join(sorted(parts))}"
    if len(before["steps"]) != len(after["steps"]):
        return "length of the log"
    return "" if before["weights"] == after["weights"] else "final weights"


def compare(before: Path, after: Path, name: str | None) -> int:
    """A table of two recordings; the number of runs that differ."""
    old, new = (json.loads(path.read_text("utf-8")) for path in (before, after))
    rows = [["run", "difference"]]
    for key in sorted({*old["runs"], *new["runs"]}):
        missing = [which for which, side in (("before", old), ("after", new)) if key not in side["runs"]]
        rows.append([key, f"only one has it: not {missing[0]}" if missing else
                     difference(old["runs"][key], new["runs"][key]) or "none, bit for bit"])  # fmt: skip
    differ = [row for row in rows[1:] if not row[1].startswith("none")]
    summary = (
        f"{len(rows) - 1} runs, {len(differ)} differ; before {old['commit']} ({old['seconds']} s), after "
        f"{new['commit']} ({new['seconds']} s)"
    )
    from hf_ihb.runs.tables import markdown_table

    table = markdown_table(rows)
    print(f"{table}\n\n{summary}")
    if name is not None:
        (ROOT / "benchmarks" / "results" / f"{name}.md").write_text(
            f"# {name}\n\n`python benchmarks/trajectories.py compare`: {summary}.\n\n{table}\n", "utf-8"
        )
    return len(differ)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("record", help="run everything on a tree")
    one.add_argument("--tree", type=Path, default=ROOT, help="checkout of the program")
    one.add_argument("--output", type=Path, required=True, help="file to write")
    one.add_argument("--only", default="", help="part of a recipe's name")
    two = commands.add_parser("compare", help="two recordings")
    two.add_argument("before", type=Path)
    two.add_argument("after", type=Path)
    two.add_argument("--name", help="of a file in benchmarks/results")
    args = parser.parse_args()
    if args.command == "compare":
        sys.exit(1 if compare(args.before, args.after, args.name) else 0)
    if not (args.tree / "scripts" / "distill.py").is_file():
        sys.exit(f"error: --tree: expected a checkout with scripts/distill.py, found {args.tree}")
    record(args.tree, args.output, args.only)


if __name__ == "__main__":
    main()
