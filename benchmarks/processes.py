"""Images a second of two processes against one, on the cores of one machine.

python benchmarks/processes.py --dataset_name DATASET [--rounds 5] [--steps 30]

Each launch trains a micro student for some steps after a few that are not timed, at the same batch in each process, by
`torchrun` on the CPU (gloo); one thread a process, and for one process two threads as well. `accelerate launch --cpu
--num_processes 2` would start one process and say nothing. Rounds take turns, ratios are taken within a round. The
teacher has random weights; its cache is built before anything is timed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from side_by_side import RESULTS, ratio, write_results
from tqdm.auto import tqdm
from transformers import TrainerCallback

from hf_ihb.config.augmentation import AugmentationArguments
from hf_ihb.config.data import DataArguments
from hf_ihb.config.model import ModelArguments
from hf_ihb.data import load_image_data
from hf_ihb.models.processing import pixel_format
from hf_ihb.models.student import build_student
from hf_ihb.models.teacher import Teacher
from hf_ihb.run import run_script
from hf_ihb.runs.tables import markdown_table
from hf_ihb.trainer import StructuralDistillationTrainer, SupervisedTrainer
from hf_ihb.trainer.arguments import StructuralDistillationTrainingArguments, SupervisedTrainingArguments

WARM_UP = 5
MICRO = {"architecture": "deit", "hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 2, "patch_size": 4}
WAYS = {
    "CE only": None,
    "CKA of tokens, live": {"teacher_cache": "off"},
    "CKA of tokens, cached Gram": {"teacher_cache": "gram"},
    "CKA of all processes' tokens, cached": {"teacher_cache": "tokens", "cka_scope": "pooled"},
}
# processes, threads of each
LAUNCHES = {"1 process, 1 thread": (1, 1), "1 process, 2 threads": (1, 2), "2 processes, 1 thread each": (2, 1)}


class Clock(TrainerCallback):
    """Seconds from the end of the warm-up to the last step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts, and stops."""
        if state.global_step == WARM_UP:
            self.start = time.perf_counter()
        self.seconds = time.perf_counter() - getattr(self, "start", time.perf_counter())


def train(args: argparse.Namespace) -> None:
    """What each process runs; the main one prints the images a second of all."""
    data = load_image_data(DataArguments(dataset_name=args.dataset_name, max_train_samples=1024, max_eval_samples=100))
    statistics_ = data.train.statistics()
    torch.manual_seed(0)
    student, processor = build_student(ModelArguments(**MICRO), data.label_names, data.image_size, *statistics_)
    fixed = {
        "output_dir": args.folder, "max_steps": WARM_UP + args.steps, "per_device_train_batch_size": args.batch_size,
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "logging_steps": 10**6,
    }  # fmt: skip
    common = {
        "train_dataset": data.train,
        "processing_class": processor,
        "augmentation": AugmentationArguments(random_crop_padding=4, horizontal_flip=0.5),
    }
    if (keys := WAYS[args.way]) is None:
        trainer = SupervisedTrainer(student, SupervisedTrainingArguments(**fixed), **common)
    else:
        shape = ModelArguments(architecture="resnet18_cifar_w16")
        teacher, of_teacher = build_student(shape, data.label_names, data.image_size, *statistics_)
        arguments = StructuralDistillationTrainingArguments(
            **fixed, **keys, cka_weight=1.0, student_layers=[2, 4], teacher_layers=[2, 3], teacher_cache_dir=args.folder
        )
        trainer = StructuralDistillationTrainer(
            student, arguments, teacher_model=Teacher(teacher, pixel_format(of_teacher)), **common
        )
    assert trainer.args.world_size == int(os.environ["WORLD_SIZE"])
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    if trainer.is_world_process_zero():
        rate = args.steps * args.batch_size * trainer.args.world_size / clock.seconds
        print("\n" + json.dumps({"images_per_second": rate}), flush=True)


def launch(args: argparse.Namespace, way: str, processes: int, threads: int, folder: str) -> float:
    """Images a second of one launch."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [__file__, "--worker", "--way", way, "--folder", folder, "--dataset_name", args.dataset_name]
    command += ["--steps", str(args.steps), "--batch_size", str(args.batch_size)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])["images_per_second"]


def main(argv: list[str]) -> None:
    """All launches in rounds, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", required=True, help="Hub id or folder.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30, help="Timed steps of a launch.")
    parser.add_argument("--batch_size", type=int, default=64, help="Of each process.")
    parser.add_argument("--output_dir", type=Path, default=RESULTS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        train(args)
        return
    rates: dict[str, dict[str, list[float]]] = {way: {name: [] for name in LAUNCHES} for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        for way in WAYS:
            launch(args, way, 1, 1, folder)  # builds the cache
        for _ in tqdm(range(args.rounds), unit="round"):
            for way in WAYS:
                for name, (processes, threads) in LAUNCHES.items():
                    rates[way][name].append(launch(args, way, processes, threads, folder))
    one, _, two = LAUNCHES
    rows, scaling = [["way", *LAUNCHES, "two / one process", "95 % interval"]], {}
    for way, found in rates.items():
        scaling[way] = ratio(found[two], found[one])
        low, high = scaling[way]["interval"]
        medians = [f"{statistics.median(values):.0f}" for values in found.values()]
        rows.append([way, *medians, f"{scaling[way]['median']:.2f}", f"{low:.2f} to {high:.2f}"])
    write_results(
        "processes",
        f"Images a second of a micro student, {args.batch_size} images a step in each process, {args.steps} steps a "
        f"launch, {args.rounds} rounds; `python benchmarks/processes.py --rounds {args.rounds}`.",
        {"steps": args.steps, "batch_size": args.batch_size, "images_per_second": rates, "scaling": scaling},
        [markdown_table(rows)],
        folder=args.output_dir,
    )


if __name__ == "__main__":
    run_script(main)
