"""Images too many to keep decoded in memory: reading them in every way, and what a teacher's cache of them would take.

python benchmarks/large_images.py --dataset_name DATASET [--images 2000] [--rounds 5]

The set is made up: the training images of a real set (32 x 32 px of CIFAR-10, say), enlarged to 224 px, under noise
of several scales, as JPEG of quality 90 in parquet, so that a file has about the bytes of a photograph of that size.
Side by side, over every image once: decoding alone, by one thread and by two; an epoch of batches as a training step
wants them (normalised float pixels, cropped and flipped), from a stream without and with worker processes, from a
mapped file, and the way of the image-classification example of transformers, a `set_transform` of torchvision
transforms on PIL images; and an epoch of stored pixels, what is left to the host where an accelerator augments.
The example crops a random area and resizes it, which ours does not; its images are decoded and normalised all the same.
An epoch starts its worker processes anew, as a `DataLoader` does by default.
"""

import argparse
import io
import statistics
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from side_by_side import RESULTS, interleave, ratio, write_results
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms

from hf_ihb.augment import Augmenter
from hf_ihb.config.augmentation import AugmentationArguments
from hf_ihb.config.data import DataArguments
from hf_ihb.data import StoredSplit, collate_images, load_image_split
from hf_ihb.models.processing import PixelFormat
from hf_ihb.runs.tables import markdown_table
from hf_ihb.trainer.cache_rows import Layout

SIDE = 224
QUALITY = 90
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGENET_IMAGES = 1_281_167
# Of a ViT teacher of width 384 whose layers are matched: tokens of an image, matched layers.
TEACHERS = ((64, 4), (196, 4), (256, 4), (196, 12))
WIDTH = 384


def photograph(small: Tensor, generator: np.random.Generator) -> bytes:
    """A JPEG of an enlarged small image under noise of several scales."""
    pixels = Image.fromarray(small.permute(1, 2, 0).numpy()).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    total = np.asarray(pixels, dtype=np.float32)
    for side, strength in ((28, 16), (112, 20), (SIDE, 16)):
        noise = Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8))
        total += (np.asarray(noise.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32) / 128 - 1) * strength
    stream = io.BytesIO()
    Image.fromarray(total.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=QUALITY)
    return stream.getvalue()


def write_set(folder: Path, source: StoredSplit, count: int) -> int:
    """Parquet of `count` images; returns its bytes."""
    generator, rows = np.random.default_rng(0), torch.linspace(0, len(source) - 1, count).long()
    stored = source.__getitems__(rows)
    column = [{"bytes": photograph(image, generator), "path": None} for image in stored["pixel_values"]]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=source.label_names)})
    table = datasets.Dataset.from_dict({"image": column, "label": stored["labels"].tolist()}, features=features)
    folder.mkdir()
    path = folder / "train-00000-of-00001.parquet"
    table.to_parquet(path)
    return path.stat().st_size


def stored_epoch(split: StoredSplit, batch_size: int, num_workers: int) -> None:
    """Batches of a split as they are stored."""
    for batch in DataLoader(split, batch_size, shuffle=True, num_workers=num_workers, collate_fn=collate_images):
        consume(batch["pixel_values"])


def our_epoch(split: StoredSplit, batch_size: int, num_workers: int, augmenter: Augmenter, pixels: PixelFormat) -> None:
    """Batches of a split, augmented as a whole."""
    loader = DataLoader(split, batch_size, shuffle=True, num_workers=num_workers, collate_fn=collate_images)
    for batch in loader:
        views = augmenter(batch["pixel_values"], batch["index"], 0)
        consume(pixels.apply(views.seen))


def example_epoch(table: datasets.Dataset, batch_size: int, num_workers: int) -> None:
    """Batches of images that were transformed one by one, in the manner of the example script."""
    loader = DataLoader(table, batch_size, shuffle=True, num_workers=num_workers, collate_fn=example_collate)
    for batch in loader:
        consume(batch["pixel_values"])


def example_transform() -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What the example script does to a batch of rows."""
    steps = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIDE),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )

    def apply(rows: dict[str, Any]) -> dict[str, Any]:
        rows["pixel_values"] = [steps(image.convert("RGB")) for image in rows.pop("image")]
        return rows

    return apply


def example_collate(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """What the example script stacks."""
    pixels = torch.stack([example["pixel_values"] for example in examples])
    return {"pixel_values": pixels, "labels": torch.tensor([example["label"] for example in examples])}


def consume(pixels: Tensor) -> None:
    """Looks at every pixel, as a model would: what is not looked at may not have been made."""
    if pixels.dtype == torch.uint8:
        pixels = pixels.flatten(1).view(torch.int64)  # bytes are added up slowly
    if not torch.isfinite(pixels.sum()):
        raise ValueError("expected finite pixels")


def decode_all(split: StoredSplit, batch_size: int, num_workers: int) -> None:
    """Every image once, without a loader."""
    for positions in torch.arange(len(split)).split(batch_size):
        split.encoded.decode(positions, num_workers)


def bytes_under(folder: Path, names: Iterable[str]) -> int:
    """Of files by the ends of their names."""
    return sum(path.stat().st_size for name in names for path in folder.rglob(name))


def teacher_sizes() -> tuple[list[dict[str, Any]], str]:
    """Bytes of a teacher's cache of ImageNet, for several teachers; and the table with its arithmetic."""
    found, rows = [], [["tokens", "layers", "layout", "bytes an image", f"{IMAGENET_IMAGES:,} images"]]
    for tokens, layers in TEACHERS:
        sums = {
            "tokens": (layers * tokens * WIDTH * 2, f"{layers} x {tokens} x {WIDTH} x 2"),
            "gram": (
                layers * (tokens * (tokens + 1) // 2 + tokens + 1) * 2,
                f"{layers} x ({tokens} x {tokens + 1} / 2 + {tokens} + 1) x 2",
            ),
        }
        for kind, (image_bytes, arithmetic) in sums.items():
            layout = Layout(kind, ((tokens, WIDTH),) * layers)
            if layout.row_bytes != image_bytes:
                raise ValueError(f"{kind}: expected {image_bytes} bytes an image, found {layout.row_bytes}")
            total = image_bytes * IMAGENET_IMAGES
            found.append({"tokens": tokens, "layers": layers, "layout": kind, "bytes": total})
            rows.append([str(tokens), str(layers), kind, f"{arithmetic} = {image_bytes:,}", f"{total / 1e9:,.0f} GB"])
    return found, markdown_table(rows)


def measure(folder: Path, source: StoredSplit, args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Everything that is timed or weighed, and its tables."""
    parquet_bytes = write_set(folder / "set", source, args.images)
    datasets.config.HF_DATASETS_CACHE = folder / "arrow"
    name, decoded = str(folder / "set"), str(folder / "decoded")
    options = {"dataset_name": name, "test_split": "train", "selection_split": "test", "decoded_cache_dir": decoded}
    stream, _ = load_image_split(DataArguments(**options, decode="stream"), "test")
    mapped, _ = load_image_split(DataArguments(**options, decode="once", decoded_memory_fraction=0.0), "test")
    table = datasets.load_dataset(name, split="train")
    table.set_transform(example_transform())
    augmenter = Augmenter(AugmentationArguments(random_crop_padding=16, horizontal_flip=0.5), 0, MEAN, None, 0)
    ours = partial(
        our_epoch, batch_size=args.batch_size, augmenter=augmenter, pixels=PixelFormat(MEAN, STD, (SIDE, SIDE))
    )
    example = partial(example_epoch, table, args.batch_size)
    works = {
        "decoding, 1 thread": lambda: decode_all(stream, args.batch_size, 1),
        "decoding, 2 threads": lambda: decode_all(stream, args.batch_size, 2),
        "stream, no workers": lambda: ours(stream, num_workers=0),
        "stream, 2 workers": lambda: ours(stream, num_workers=2),
        "mapped file": lambda: ours(mapped, num_workers=0),
        "stream, 2 workers, as stored": lambda: stored_epoch(stream, args.batch_size, 2),
        "mapped file, as stored": lambda: stored_epoch(mapped, args.batch_size, 0),
        "example, no workers": lambda: example(0),
        "example, 2 workers": lambda: example(2),
    }
    seconds = interleave(works, args.rounds)
    sizes = {
        "JPEG in parquet": parquet_bytes,
        "arrow, prepared by datasets": bytes_under(folder / "arrow", ["*.arrow"]),
        "mapped file": bytes_under(folder / "decoded", ["*.bin"]),
    }
    rates = {work: args.images / statistics.median(found) for work, found in seconds.items()}
    ratios = {
        "decoding, 2 threads over 1": ratio(seconds["decoding, 1 thread"], seconds["decoding, 2 threads"]),
        "stream over example, no workers": ratio(seconds["example, no workers"], seconds["stream, no workers"]),
        "stream over example, 2 workers": ratio(seconds["example, 2 workers"], seconds["stream, 2 workers"]),
        "mapped file over example, no workers": ratio(seconds["example, no workers"], seconds["mapped file"]),
        "mapped file over example, 2 workers": ratio(seconds["example, 2 workers"], seconds["mapped file"]),
    }
    tables = [
        markdown_table(
            [["way", "images a second", "ms an image"]]
            + [[work, f"{rate:,.0f}", f"{1000 / rate:.2f}"] for work, rate in rates.items()]
        ),
        markdown_table(
            [["ratio of speeds", "median", "95 % interval"]]
            + [[n, f"{r['median']:.2f}", "{:.2f} to {:.2f}".format(*r["interval"])] for n, r in ratios.items()]
        ),
        markdown_table(
            [["on disk", "bytes an image", f"{IMAGENET_IMAGES:,} images"]]
            + [
                [n, f"{size / args.images:,.0f}", f"{size / args.images * IMAGENET_IMAGES / 1e9:,.0f} GB"]
                for n, size in sizes.items()
            ]
        ),
    ]
    content = {"seconds": seconds, "images_per_second": rates, "ratios": ratios, "bytes": sizes}
    return content, tables


def main() -> None:
    """Makes the set in a temporary folder, measures, and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", default="uoft-cs/cifar10", help="Hub id or folder of small real images.")
    parser.add_argument("--images", type=int, default=2000, help="Images of the made-up set.")
    parser.add_argument("--batch_size", type=int, default=64, help="Images in a batch.")
    parser.add_argument("--rounds", type=int, default=5, help="How often each way is timed.")
    parser.add_argument("--output_dir", type=Path, default=RESULTS, help="Folder of the results.")
    args = parser.parse_args()
    source, revision = load_image_split(DataArguments(args.dataset_name, max_train_samples=args.images), "train")
    sizes, table = teacher_sizes()
    with tempfile.TemporaryDirectory() as folder:
        content, tables = measure(Path(folder), source, args)
    about = (
        f"{args.images:,} images of {SIDE} x {SIDE} px (JPEG, quality {QUALITY}), made of training images of "
        f"`{Path(args.dataset_name).name if Path(args.dataset_name).exists() else args.dataset_name}` enlarged under "
        f"noise; batches of {args.batch_size}, {args.rounds} interleaved rounds, medians. An epoch ends in "
        "normalised float pixels, cropped and flipped: ours (zero padding of 16 px, on the batch) after a row was "
        "decoded, streamed, or mapped; the example's (`RandomResizedCrop`, PIL) one image at a time."
    )
    teacher = (
        f"A teacher's cache at that scale, by arithmetic (half precision, width {WIDTH}; `tokens`: layers x tokens x "
        "width x 2 B; `gram`: layers x (tokens (tokens + 1) / 2 + tokens + 1) x 2 B):"
    )
    settings = {"dataset": args.dataset_name, "revision": revision, "images": args.images}
    settings |= {"batch_size": args.batch_size, "side_px": SIDE, "jpeg_quality": QUALITY}
    write_results(
        "large-images",
        about,
        {"settings": settings, **content, "teacher_cache": sizes},
        [*tables, teacher, table],
        folder=args.output_dir,
    )


if __name__ == "__main__":
    main()
