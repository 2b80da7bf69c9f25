"""The input pipeline of the image-classification example: transforms on PIL images, one by one, in `set_transform`."""

from collections.abc import Callable
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2

PIPELINES = {
    "basic": lambda size: [v2.RandomCrop(size, padding=4), v2.RandomHorizontalFlip()],
    "randaugment": lambda size: [v2.RandomCrop(size, padding=4), v2.RandomHorizontalFlip(), v2.RandAugment(2, 9)],
}


def example_loader(
    split: datasets.Dataset, columns: tuple[str, str], pipeline: str, size: int, batch_size: int, num_workers: int
) -> DataLoader:
    """A loader of float batches.

    Args:
        split: With a column of images, which are decoded when they are asked for.
        columns: Of images and labels.
        pipeline: One of `PIPELINES`.
        size: Side of the images, in px.
        batch_size: Images in a batch.
        num_workers: Processes; they stay between epochs.
    """
    image, label = columns
    to_tensor = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize((0.5,) * 3, (0.25,) * 3)]
    transform: Callable[[Any], Tensor] = v2.Compose([*PIPELINES[pipeline](size), *to_tensor])

    def apply(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {"pixel_values": [transform(picture.convert("RGB")) for picture in batch[image]], "labels": batch[label]}

    def collate(items: list[dict[str, Any]]) -> dict[str, Tensor]:
        pixels = torch.stack([item["pixel_values"] for item in items])
        return {"pixel_values": pixels, "labels": torch.tensor([item["labels"] for item in items])}

    return DataLoader(
        split.with_transform(apply),
        batch_size,
        shuffle=True,
        collate_fn=collate,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )
