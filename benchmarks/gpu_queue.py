"""Turns whatever minutes of a GPU there are into results.

python benchmarks/gpu_queue.py --dataset_name DATASET --minutes 9 --results DIR
python benchmarks/gpu_queue.py --dataset_name DATASET --device cpu --tier small --minutes 600    # without a GPU
python benchmarks/gpu_queue.py --results DIR --report_only

Parts: 0 the machine, and the roof that ratios use; 1 the data set, decoded once; 2 is it right; 3 images a second; 4
the study's trainings, best first (benchmarks/gpu/arms.py holds the list). Each job is a process of its own with a time
limit. Its result is a line in DIR/gpu-queue.jsonl, on the disk before the next one starts; what is there is not done
again, so the command can be killed at any moment and given any number of times. A job that fails leaves its traceback
there, and the next one runs. benchmarks/README.md says how to run it on a bare machine.
"""

import argparse
import json
import os
import signal
import sys
import threading
import traceback
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT)]

from gpu.job import TIERS, Context, Job, Journal  # noqa: E402

REPORT_S = 15


def queue(tier: str) -> list[Job]:
    """Every job of a tier, in order."""
    from gpu import arms, checks, machine

    curves = partial(partial, checks.loss_curves)
    first, later = _rates(tier)
    study = arms.study(tier)
    begun = 1 + len(arms.FIRST if tier == "full" else arms.WITHOUT_GPU)
    return [
        Job("machine", 0, machine.measure_machine, 60),
        Job("data", 1, machine.decode_data, 180),
        # those that take longest first: some run at once
        Job("curves-compiled", 2, curves(precision="compiled"), 240),
        Job("command-bf16", 2, partial(checks.main_command, precision="bf16"), 180),
        Job("curves-cpu", 2, curves(precision="float32", on="cpu"), 180),
        Job("curves-float32", 2, curves(precision="float32"), 180, needs_cuda=True),
        Job("curves-bf16", 2, curves(precision="bf16"), 180),
        Job("command-fp16", 2, partial(checks.main_command, precision="fp16"), 180, needs_cuda=True),
        Job("resume", 2, checks.resume, 90),
        Job("colours", 2, checks.colours, 60, needs_cuda=True),
        *first,
        *study[:begun],  # a teacher and a first student of each arm come before what is only nice to know
        *later,
        *study[begun:],
    ]


def _rates(tier: str) -> tuple[list[Job], list[Job]]:
    """Throughput: first uncompiled, and compiled what the bars are set for; later the rest.

    Each way is compiled in a process of its own, since that takes most of a minute.
    """
    from gpu import throughput

    def job(size: int, compiled: bool, name: str, **ways: Any) -> Job:
        return Job(name, 3, partial(throughput.throughput, batch_size=size, compiled=compiled, **ways), 240)

    sizes = TIERS[tier].batch_sizes
    compiled = [
        job(size, True, f"throughput-{size}-compiled-{number}", ways=(way,))
        for size in sizes
        for number, way in enumerate(throughput.WAYS)
    ]
    eager = [job(size, False, f"throughput-{size}-eager") for size in sizes]
    return [*eager, Job("two-at-once", 3, throughput.at_once, 120), *compiled[:2]], compiled[2:]


def work_on(job_id: str, told: str, result: str) -> None:
    """Does one job in this process and writes what it returned; ends with the process that started it."""

    def watch() -> None:
        sys.stdin.buffer.read()  # until the queue ends, however it ends
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    fields = json.loads(told)
    context = Context(**fields | {"folder": Path(fields["folder"]), "compiled": tuple(fields["compiled"])})
    job = next(job for job in queue(context.tier) if job.id == job_id)
    outcome: dict[str, Any]
    try:
        found = job.work(context)
        outcome = {"status": "failed" if found.get("failed") else "ok", "result": found}
    except BaseException:  # a script ends by SystemExit; whatever it is, it is written down and is the job's outcome
        outcome = {"status": "failed", "error": traceback.format_exc()}
    staged = Path(result).with_suffix(".part")
    staged.write_text(json.dumps(outcome, default=str), "utf-8")
    staged.replace(result)


def main() -> None:
    """Reads the command line, runs what is missing, writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", default="uoft-cs/cifar10", help="Hub id or folder of CIFAR-10.")
    parser.add_argument("--minutes", type=float, default=9, help="Until the report is written.")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="Where results are kept.")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "gpu", help="For run folders, caches and logs.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--tier", choices=TIERS, default="full", help="How large everything is; see benchmarks/README.md."
    )
    parser.add_argument("--parts", type=int, nargs="+", choices=range(5), default=list(range(5)), help="Which ones.")
    parser.add_argument("--commit", help="Of the code, where it is not in a git checkout.")
    parser.add_argument("--retry_failed", action="store_true", help="Do again what has failed.")
    parser.add_argument("--report_only", action="store_true", help="Run nothing: the report of what there is.")
    parser.add_argument("--work_on", nargs=3, metavar=("JOB", "CONTEXT", "RESULT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work_on:
        work_on(*args.work_on)
        return

    from gpu.report import write_report
    from gpu.runner import Runner

    from hf_ihb.runs.environment import environment

    journal = Journal(args.results / "gpu-queue.jsonl")
    if not args.report_only:
        import torch

        if args.device == "cuda" and not torch.cuda.is_available():
            parser.error("expected a CUDA GPU, found none; --device cpu --tier small is the study without one")
        here = environment(torch.device(args.device))
        dataset = Path(args.dataset_name).expanduser()
        context = Context(
            str(dataset.absolute()) if dataset.exists() else args.dataset_name,
            args.device,
            args.tier,
            (args.work / args.tier).absolute(),
        )
        Runner(
            [job for job in queue(args.tier) if job.part in args.parts],
            context,
            journal,
            {"commit": args.commit or here["commit"], "device": here["device"], "tier": args.tier},
            minutes=args.minutes - REPORT_S / 60,
            script=Path(__file__),
            retry_failed=args.retry_failed,
            say=partial(print, flush=True),
        ).run()
    if not journal.records:
        parser.error(f"{journal.path}: expected results, found none")
    write_report(journal, args.results, args.work)


if __name__ == "__main__":
    main()
