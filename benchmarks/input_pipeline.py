"""Images a second up to the model's door: batches on the device against transforms of one image at a time.

python benchmarks/input_pipeline.py --dataset_name DATASET [--rounds 15] [--images 2000] [--batch_size 256]

Ours is what training runs: a shuffled `DataLoader` over the decoded split, the `Augmenter` and the normalisation. The
peer is the Hub's example script: `set_transform` with torchvision on PIL images, in 0 and in 2 worker processes, which
are running before the clock does. Both are given torch's threads. torchvision's operations on a whole batch, which draw
one set of parameters for all of its images, are there for reference. Rates are compared within each round.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
from peers.example import PIPELINES, example_loader
from side_by_side import RESULTS, bar, bars_table, interleave, ratio, write_results
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from hf_ihb.augment import Augmenter
from hf_ihb.config.augmentation import AugmentationArguments
from hf_ihb.config.data import DataArguments
from hf_ihb.data import ImageSplit, collate_images, load_image_split
from hf_ihb.models.processing import PixelFormat
from hf_ihb.runs.tables import markdown_table

BASIC = {"random_crop_padding": 4, "horizontal_flip": 0.5}
OURS = {
    "basic": BASIC,
    "randaugment": BASIC | {"auto_augment": "randaugment"},
    "autoaugment": BASIC | {"auto_augment": "autoaugment_cifar10"},
    "trivialaugment": BASIC | {"auto_augment": "trivialaugment_wide"},
    "colour jitter": BASIC | {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1},
    "mixup and cutmix": BASIC | {"mixup_alpha": 0.8, "cutmix_alpha": 1.0},
}


def our_epoch(split: ImageSplit, settings: dict[str, Any], batch_size: int) -> Callable[[], None]:
    """One epoch of ours."""
    size = split.image_size
    augmenter = Augmenter(
        AugmentationArguments(**settings),
        0,
        (0.5,) * 3,
        lambda rows: (split.images.index_select(0, rows), split.labels[rows]),
        len(split),
    )
    pixels = PixelFormat((0.5,) * 3, (0.25,) * 3, size)
    loader = DataLoader(split, batch_size, shuffle=True, collate_fn=collate_images)

    def run() -> None:
        for batch in loader:
            pixels.apply(augmenter(batch["pixel_values"], batch["index"], 0).seen)

    return run


def batched_epoch(split: ImageSplit, pipeline: str, batch_size: int) -> Callable[[], None]:
    """Operations of torchvision on a batch: every image of it gets the same crop, flip and operations."""
    normalise = [v2.ToDtype(torch.float32, scale=True), v2.Normalize((0.5,) * 3, (0.25,) * 3)]
    transform = v2.Compose([*PIPELINES[pipeline](split.image_size[0]), *normalise])
    loader = DataLoader(split, batch_size, shuffle=True, collate_fn=collate_images)

    def run() -> None:
        for batch in loader:
            transform(batch["pixel_values"])

    return run


def main() -> None:
    """Times all pipelines and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", required=True, help="Hub id or folder; its test split is used.")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--images", type=int, default=2000, help="That a peer goes over in each round.")
    parser.add_argument("--repeats", type=int, default=5, help="Epochs of ours for one of a peer.")
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--output_dir", type=Path, default=RESULTS)
    args = parser.parse_args()
    split, _ = load_image_split(DataArguments(dataset_name=args.dataset_name), "test")
    split = split.select(torch.arange(args.images))
    raw = datasets.load_dataset(args.dataset_name, split="test").select(range(args.images))
    image = next(name for name, feature in raw.features.items() if isinstance(feature, datasets.Image))
    label = next(name for name, feature in raw.features.items() if isinstance(feature, datasets.ClassLabel))
    # the same work in each piece; those that are ten times as fast go over it several times
    repeats, works = {}, {}

    def add(name: str, epoch: Callable[[], None], times: int) -> None:
        repeats[name] = times
        works[name] = lambda: [epoch() for _ in range(times)]

    for name, settings in OURS.items():
        add(name, our_epoch(split, settings, args.batch_size), args.repeats)
    for name in PIPELINES:
        add(f"{name}, torchvision on batches", batched_epoch(split, name, args.batch_size), args.repeats)
        for workers in (0, 2):
            loader = example_loader(raw, (image, label), name, split.image_size[0], args.batch_size, workers)
            add(f"{name}, example, {workers} workers", lambda loader=loader: [None for _ in loader], 1)
    measured = interleave(works, args.rounds, warmups=2)
    seconds = {name: [value / repeats[name] / args.images for value in values] for name, values in measured.items()}

    def faster(name: str, workers: int, wanted: str) -> dict[str, Any]:
        peer = f"{name}, example, {workers} workers"
        return bar(1, f"{name}: ours / example script, {workers} workers", wanted, ratio(seconds[peer], seconds[name]))

    bars = [faster("randaugment", 0, ">= 10"), faster("randaugment", 2, ">= 6"), faster("basic", 0, ">= 30")]
    rows = [["pipeline", "images/s"]]
    rows += [[name, f"{1 / statistics.median(values):,.0f}"] for name, values in seconds.items()]
    write_results(
        "input-pipeline",
        f"{args.images} images of {split.image_size[0]} px at batch {args.batch_size}; "
        f"`python benchmarks/input_pipeline.py --rounds {args.rounds} --images {args.images}`.",
        {"images": args.images, "batch_size": args.batch_size, "seconds_per_image": seconds, "bars": bars},
        [bars_table(bars), markdown_table(rows)],
        folder=args.output_dir,
    )


if __name__ == "__main__":
    main()
