"""Memory and time of the analysis of a full-size DeiT-Tiny against the number of images.

python benchmarks/analysis_memory.py --dataset_name DATASET [--images 1000 10000] [--batch_size 256]

Every row is a process of its own that decodes the whole test split and then analyses a part of it; the peak is that of
the analysis alone, over what the process held before. Linux only: the peak is read from, and reset in, /proc. Blocks of
a megabyte and more go back to the system when they are freed (glibc's fixed mmap threshold): the peak is then what is
held at once, and not how the heap happens to be cut up.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from hf_ihb.analysis import analyze_attention, analyze_cka
from hf_ihb.arguments import AnalysisArguments, DataArguments, ModelArguments
from hf_ihb.data import load_image_split, stratified_sample
from hf_ihb.models.pretrained import Pretrained
from hf_ihb.models.processing import pixel_format
from hf_ihb.models.student import build_student
from hf_ihb.records import default_device, environment, write_json
from hf_ihb.report import markdown_table

ROOT = Path(__file__).parents[1]
_MIB = 1 << 20


def _memory(name: str) -> int:
    """Bytes of this process, by the name /proc gives them: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{name}:"))) * 1024


def _measured(work: Any) -> tuple[float, int, Any]:
    """Seconds, bytes of the peak above the start, and the result."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before, start = _memory("VmRSS"), time.perf_counter()
    result = work()
    return time.perf_counter() - start, _memory("VmHWM") - before, result


def measure(dataset: str, num_images: int, batch_size: int, seed: int) -> dict[str, Any]:
    """Attention distance and 12 x 12 CKA of an untrained DeiT-Tiny over some test images."""
    device = default_device()
    split, revision = load_image_split(DataArguments(dataset_name=dataset), "test")
    recipe = json.loads((ROOT / "recipes" / "ce_only.json").read_text("utf-8"))
    shape = {name: value for name, value in recipe.items() if name in ModelArguments.__dataclass_fields__}
    torch.manual_seed(seed)
    size = tuple(split.images.shape[-2:])
    model, processor = build_student(ModelArguments(**shape), split.label_names, size, [0.5] * 3, [0.25] * 3)
    subject = Pretrained(model.eval().to(device), pixel_format(processor), "deit-tiny", None)
    args = AnalysisArguments(max_images=num_images, batch_size=batch_size, untrained_reference=False, num_maps=0)
    rows = stratified_sample(split, num_images, seed, "test")
    warm_up = rows[: 2 * batch_size]  # threads, allocator and kernels are there before anything is measured
    analyze_attention(subject, split, warm_up, args)
    analyze_cka(subject, split, warm_up, args)
    attention_s, attention_bytes, attention = _measured(lambda: analyze_attention(subject, split, rows, args))
    cka_s, cka_bytes, cka = _measured(lambda: analyze_cka(subject, split, rows, args))
    return {
        "dataset": {"name": dataset, "revision": revision},
        "num_images": len(rows),
        "batch_size": batch_size,
        "num_parameters": subject.summary()["num_parameters"],
        "attention": {"seconds": attention_s, "peak_bytes": attention_bytes, "mean": attention["mean_distance"]},
        "cka": {"seconds": cka_s, "peak_bytes": cka_bytes, "corner": cka["matrices"][0]["linear"][0][-1]},
        "environment": environment(device),
    }


def main() -> None:
    """One process a row, then the table under benchmarks/results/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", default="uoft-cs/cifar10", help="Hub id or folder of an image set.")
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 10000], help="Numbers of test images.")
    parser.add_argument("--batch_size", type=int, default=256, help="Images in one forward.")
    parser.add_argument("--repeats", type=int, default=3, help="Processes a row; the table shows the median.")
    parser.add_argument("--seed", type=int, default=0, help="Of weights and of the choice of images.")
    parser.add_argument("--worker", type=int, metavar="N", help="Measure N images here and print JSON.")
    args = parser.parse_args()
    if args.worker is not None:
        print(json.dumps(measure(args.dataset_name, args.worker, args.batch_size, args.seed)))
        return
    command = [sys.executable, __file__, "--dataset_name", args.dataset_name, "--batch_size", str(args.batch_size)]
    runs: list[dict[str, Any]] = []
    for _ in range(args.repeats):
        for count in args.images:
            words = [*command, "--seed", str(args.seed), "--worker", str(count)]
            environ = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(_MIB)}
            output = subprocess.run(words, cwd=ROOT, env=environ, check=True, stdout=subprocess.PIPE, text=True).stdout
            runs.append(json.loads(output.splitlines()[-1]))
            print(f"{count} images: {runs[-1]['attention']} {runs[-1]['cka']}", flush=True)

    def median(count: int, part: str, value: str) -> float:
        found = sorted(run[part][value] for run in runs if run["num_images"] == count)
        return found[len(found) // 2]

    rows = [("images", "attention, s", "attention, peak MiB", "CKA 12 x 12, s", "CKA 12 x 12, peak MiB")]
    rows += [
        (
            f"{count:,}",
            *(
                f"{median(count, part, value) / scale:.{digits}f}"
                for part in ("attention", "cka")
                for value, scale, digits in (("seconds", 1, 1), ("peak_bytes", _MIB, 0))
            ),
        )
        for count in args.images
    ]
    where = runs[0]["environment"]
    day = datetime.date.today().isoformat()
    table = markdown_table(rows)
    text = [
        f"# Memory and time of the analysis, {day}",
        "",
        f"{where['device']}, {where['cpu_threads']} thread(s); commit {where['commit']}. A DeiT-Tiny of "
        f"{runs[0]['num_parameters']:,} parameters with random weights (seed {args.seed}), test images of "
        f"`{args.dataset_name}`, batches of {args.batch_size}; CKA with a linear and an RBF kernel. Median of "
        f"{args.repeats} processes a row; peaks are those of the analysis over what the process held before.",
        "",
        table,
        "",
        f"    python benchmarks/analysis_memory.py --dataset_name {args.dataset_name} --repeats {args.repeats}",
        "",
    ]
    target = ROOT / "benchmarks" / "results" / f"{day}-analysis-memory"
    target.with_suffix(".md").write_text("\n".join(text), "utf-8")
    write_json(target.with_suffix(".json"), {"runs": runs})
    print(table)


if __name__ == "__main__":
    main()
