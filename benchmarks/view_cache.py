"""What a step of logit distillation costs when the teacher's scores of augmented images are read instead of asked for.

python benchmarks/view_cache.py --dataset_name DATASET [--rounds 15] [--before TREE]
python benchmarks/view_cache.py --disk

A step is crop, flip, MixUp and CutMix, forward, losses, backward, clipping and AdamW, on one batch that is at hand, for
a micro student (batch 64) and a DeiT-Tiny (batch 16) beside a ResNet-18 with a CIFAR stem and random weights. With
`--before`, the steps of labels alone and of cached Gram take turns with those of another checkout of this repository,
each in a process of its own. Beside that: what is rounded off, what the 16 largest scores of many classes leave out,
bytes on the disk, and what the turn of an epoch costs. With `--disk` these last two alone, of all rows that are small.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Container
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from distillation_step import Bench, stepper
from side_by_side import RESULTS, bar, bars_table, interleave, ratio, write_results

from hf_ihb.config.augmentation import AugmentationArguments
from hf_ihb.functional.logits import kd_divergence
from hf_ihb.runs.tables import markdown_table
from hf_ihb.trainer import SupervisedTrainer
from hf_ihb.trainer.arguments import SupervisedTrainingArguments
from hf_ihb.trainer.cache_rows import Code
from hf_ihb.trainer.score_rows import ScoreRow
from hf_ihb.trainer.view_cache import ViewCache
from hf_ihb.trainer.view_rows import ViewRow

BATCHES = {"micro": 64, "deit-tiny": 16}
WANTED = {"micro": ">= 0.90", "deit-tiny": ">= 0.95"}
VIEWS = {
    "random_crop_padding": 4, "horizontal_flip": 0.5, "mixup_alpha": 0.8, "cutmix_alpha": 1.0, "mix_probability": 0.5,
    "augmentation_seed": 0,
}  # fmt: skip
KD = {"alpha": 0.5, "temperature": 2.0, "distilled_heads": "both"}
WIDTH = 384  # of a small ViT's mean token
SETS = {"CIFAR-10 x 200 epochs": (50_000, 10, 200), "ImageNet x 300 epochs": (1_281_167, 1000, 300)}
WORKER = """
import sys, tempfile, time
from types import SimpleNamespace
from distillation_step import Bench, stepper
from hf_ihb.trainer import SupervisedTrainer
from hf_ihb.trainer.arguments import SupervisedTrainingArguments
with tempfile.TemporaryDirectory() as folder:
    bench = Bench(SimpleNamespace(dataset_name=sys.argv[1], size="micro", batch_size=64), folder)
    works = {
        "labels": stepper(bench.ours(SupervisedTrainer, SupervisedTrainingArguments), bench.stored(), 2),
        "cached Gram": stepper(bench.structural(112, gram_weight=1.0, teacher_cache="gram"), bench.stored(), 2),
    }
    print("ready", flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        works[line.strip()]()
        print(time.perf_counter() - start, flush=True)
"""


def make_ways(args: argparse.Namespace, size: str, folder: str) -> dict[str, Callable[[], None]]:
    """Steps on labels, and of logit distillation: live, while rows are written, and from rows, all of them or not."""
    bench = Bench(SimpleNamespace(dataset_name=args.dataset_name, size=size, batch_size=BATCHES[size]), folder)
    bench.augmentation, batch = AugmentationArguments(**VIEWS), bench.stored()

    def distil(name: str, cache: str) -> tuple[Any, Callable[[], None]]:
        trainer = bench.logits(teacher_cache=cache, teacher_cache_dir=f"{folder}/{size}-{name}", **KD)
        return trainer, stepper(trainer, batch, args.steps)

    def written(name: str, count: int) -> Callable[[], None]:
        trainer, _ = distil(name, "views")
        stepper(trainer, {key: value[:count] for key, value in batch.items() if key != "split"}, 1)()
        trainer.teacher_side.views.close()
        return distil(name, "views")[1]

    supervised = bench.ours(SupervisedTrainer, SupervisedTrainingArguments)
    return {
        "labels": stepper(supervised, batch, args.steps),
        "live logits": distil("live", "off")[1],
        "views, the run that writes": distil("first", "views")[1],
        "views, a later run": written("later", BATCHES[size]),
        "views, a later run that lacks one image a batch": written("part", BATCHES[size] - 1),
    }


def compare_trees(args: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Seconds of two steps, here and in another checkout, in turns."""
    trees = {"now": Path(__file__).parents[1], "before": args.before.absolute()}
    workers = {}
    for name, tree in trees.items():
        path = os.pathsep.join((str(tree), str(tree / "benchmarks")))
        workers[name] = subprocess.Popen(
            [sys.executable, "-c", WORKER, args.dataset_name], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": path}, cwd=tree, text=True,
        )  # fmt: skip
        while workers[name].stdout.readline() != "ready\n":
            pass

    def ask(name: str, work: str) -> float:
        workers[name].stdin.write(f"{work}\n")
        workers[name].stdin.flush()
        return float(workers[name].stdout.readline())

    found = {work: {name: [] for name in trees} for work in ("labels", "cached Gram")}
    for turn in range(-2, args.rounds):
        for work, seconds in found.items():
            for name in list(trees)[:: 1 if turn % 2 else -1]:
                value = ask(name, work)
                if turn >= 0:
                    seconds[name].append(value)
    for worker in workers.values():
        worker.communicate()
    return found


def kd_errors() -> list[dict[str, Any]]:
    """Relative errors of the distillation loss and of its gradient, rows against whole scores, in the mean of images.

    Scores are drawn: Gaussian, of a spread that leaves the largest class the probability that is named.
    """
    generator, found = torch.Generator().manual_seed(0), []
    for classes in (10, 1000):
        row = ScoreRow(classes)
        for spread in (2.0, 4.0, 6.0):
            teacher, student = (spread * torch.randn(512, classes, generator=generator) for _ in range(2))
            for temperature in (1.0, 2.0, 4.0):
                values = []
                for scores in (teacher, row.unpack(row.pack(teacher))):
                    leaf = student.clone().requires_grad_()
                    loss = kd_divergence(leaf, scores, temperature)
                    loss.backward()
                    values.append((loss.detach(), leaf.grad))
                (loss, gradient), (other, turned) = values
                found.append(
                    {
                        "classes": classes,
                        "largest": float(teacher.softmax(1).amax(1).mean()),
                        "rest": float(
                            1 - teacher.softmax(1).topk(16 if classes > 32 else classes).values.sum(1).mean()
                        ),
                        "temperature": temperature,
                        "loss": float((other - loss).abs() / loss),
                        "gradient": float((turned - gradient).norm() / gradient.norm()),
                    }
                )
    return found


def rows_of(classes: int) -> dict[str, ViewRow]:
    """Rows that are small, by what they hold."""
    code = Code(torch.zeros(1, WIDTH), torch.ones(WIDTH))
    return {
        "scores": ViewRow(ScoreRow(classes)),
        f"mean token of {WIDTH}": ViewRow(mean=WIDTH, code=code),
        f"scores and mean token of {WIDTH}": ViewRow(ScoreRow(classes), mean=WIDTH, code=code),
    }


def turn_of_an_epoch(images: int, classes: int, row: ViewRow) -> dict[str, float]:
    """Seconds to write the rows of an epoch, and to read them."""
    with tempfile.TemporaryDirectory() as folder:
        order = np.random.default_rng(0).permutation(images)
        cache = ViewCache(Path(folder), {}, row, images)
        cache.open(lambda epoch, rows: None, images, tolerance=1.0, show=False)
        add, seconds = cache.add, []

        def timed(*given: Any) -> None:  # rows are written whenever enough of them are held
            start = time.perf_counter()
            add(*given)
            seconds.append(time.perf_counter() - start)

        cache.add = timed
        for part in np.array_split(order, max(1, images // 8192)):
            rows = row.pack(torch.randn(len(part), classes), [], torch.randn(len(part), WIDTH))
            cache(0, part, lambda where, rows=rows: rows, torch.device("cpu"))
        cache.flush()
        cache._epoch, middle = None, time.perf_counter()
        cache._turn_to(0)
        done, known = time.perf_counter(), cache._known.all()
        size = sum(path.stat().st_size for path in cache.folder.iterdir())
        cache.close()
    assert known
    return {"bytes": size, "write_s": sum(seconds), "read_s": done - middle}


def turns_of(kinds: Container[str]) -> dict[str, dict[str, dict[str, float]]]:
    """What `turn_of_an_epoch` says of some kinds of rows, for each training."""
    return {
        name: {kind: turn_of_an_epoch(images, classes, row) for kind, row in rows_of(classes).items() if kind in kinds}
        for name, (images, classes, _) in SETS.items()
    }


def disk_table(turns: dict[str, dict[str, dict[str, float]]]) -> str:
    """Bytes of whole trainings, from what one epoch took."""
    rows = [["training", "row", "B a view", "GB in all", "write an epoch", "read an epoch"]]
    for name, (images, _, epochs) in SETS.items():
        for kind, turn in turns[name].items():
            each, whole = turn["bytes"] / images, turn["bytes"] * epochs / 1e9
            seconds = [f"{turn[part]:.3f} s" for part in ("write_s", "read_s")]
            rows.append([name, kind, f"{each:.2f}", f"{whole:.2f}", *seconds])
    return markdown_table(rows)


def write_disk(folder: Path) -> None:
    """All rows that are small, without any training."""
    turns = turns_of(rows_of(10))
    write_results(
        "view-cache-disk",
        "What rows of augmented images take, and what the turn of an epoch costs; `python benchmarks/view_cache.py "
        "--disk`. A view takes two bytes a number, and a bit of each file that says whether it holds the view.",
        {"turns": turns},
        [disk_table(turns)],
        folder=folder,
    )


def errors_table(found: list[dict[str, Any]]) -> str:
    """What rows leave out, in per cent."""
    rows = [["classes", "largest probability", "beyond the 16", "temperature", "error of the loss", "of its gradient"]]
    for entry in found:
        numbers = [f"{100 * entry[name]:.3g} %" for name in ("loss", "gradient")]
        shares = [f"{entry[name]:.2f}" for name in ("largest", "rest")]
        rows.append([str(entry["classes"]), *shares, f"{entry['temperature']:g}", *numbers])
    return markdown_table(rows)


def steps_table(seconds: dict[str, dict[str, list[float]]]) -> str:
    """All ways of each size beside its labels."""
    rows = [["student", "way", "ms a step", "speed of labels = 1", "95 % interval"]]
    for size, ways in seconds.items():
        for name, values in ways.items():
            found = ratio(ways["labels"], values)
            low, high = found["interval"]
            middle = 1000 * sorted(values)[len(values) // 2]
            rows.append([size, name, f"{middle:.1f}", f"{found['median']:.2f}", f"{low:.2f} to {high:.2f}"])
    return markdown_table(rows)


def main() -> None:
    """Times both students and writes all tables, or that of the disk."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", default=None, help="Hub id or folder.")
    parser.add_argument("--disk", action="store_true", help="Bytes and the turn of an epoch alone.")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=2, help="Steps of a way in each round.")
    parser.add_argument(
        "--before", type=Path, default=None, help="Another checkout, whose steps take turns with these."
    )
    parser.add_argument("--output_dir", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.disk:
        return write_disk(args.output_dir)
    if args.dataset_name is None:
        parser.error("--dataset_name: expected a Hub id or a folder, found none")
    seconds, bars = {}, []
    for size, wanted in WANTED.items():
        with tempfile.TemporaryDirectory() as folder:
            measured = interleave(make_ways(args, size, folder), args.rounds)
        seconds[size] = {name: [value / args.steps for value in values] for name, values in measured.items()}
        found = ratio(seconds[size]["labels"], seconds[size]["views, a later run"])
        bars.append(bar(4, f"{size}: labels / a later run from views", wanted, found))
    trees = {} if args.before is None else compare_trees(args)
    for work, values in trees.items():
        bars.append(bar(4, f"micro, {work}: before / now", ">= 0.98", ratio(values["before"], values["now"])))
    turns = turns_of({"scores"})
    errors = kd_errors()
    content = {"rounds": args.rounds, "seconds_per_step": seconds, "bars": bars, "trees": trees, "turns": turns}
    write_results(
        "view-cache",
        "Steps of logit distillation with crops, flips, MixUp and CutMix (on half of the images): the teacher asked, "
        "its scores written while it is asked, and read by a later run; "
        f"`python benchmarks/view_cache.py --rounds {args.rounds}`. Below: bytes on the disk with what the turn of an "
        "epoch costs, and the error of soft distillation from rows against whole scores, on drawn (Gaussian) scores.",
        content | {"errors": errors},
        [bars_table(bars), steps_table(seconds), disk_table(turns), errors_table(errors)],
        folder=args.output_dir,
    )


if __name__ == "__main__":
    main()
