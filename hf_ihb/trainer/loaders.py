"""Loaders of images: where the images are decides how they are loaded, and evaluation leaves none out."""

from collections.abc import Callable
from functools import partial
from typing import Any

import datasets
from torch.utils.data import DataLoader, IterableDataset, Sampler
from transformers import Trainer
from transformers.trainer_utils import seed_worker

from hf_ihb.data import CheckedLabels, ImageSplit, StoredSplit
from hf_ihb.errors import DataError


def image_loader(
    trainer: Trainer,
    dataset: Any,
    description: str,
    batch_size: int,
    sampler_fn: Callable[[Any], Sampler | None] | None = None,
    is_training: bool = False,
    dataloader_key: str | None = None,
) -> DataLoader:
    """A loader as `Trainer` makes it, with four differences.

    Images on an accelerator are gathered there, by this process, and need no pinning. `dataloader_drop_last` is about
    training; stock `Trainer` drops evaluation images by it as well. With persistent workers stock `Trainer` keeps one
    loader under a key that all data sets share, and gives it out for each of them. Labels are looked at where a batch
    is made, on the host.

    Args:
        trainer: Gives arguments, collator and accelerator.
        dataset: The images.
        description: What it is for.
        batch_size: On each device.
        sampler_fn: Order of a data set with a length; in sequence if None.
        is_training: Whether it is trained on.
        dataloader_key: Not used.

    Raises:
        DataError: If there are fewer training images than one batch.
    """
    args, dataset = trainer.args, trainer.batches.place(dataset)
    if isinstance(dataset, StoredSplit):  # it makes batches, of what a step reads
        collate = trainer.data_collator
    elif isinstance(dataset, datasets.Dataset):
        dataset, collate = trainer._remove_unused_columns(dataset, description), trainer.data_collator
    else:
        collate = trainer._get_collator_with_removed_columns(trainer.data_collator, description)
    collate = CheckedLabels(collate, trainer.batches.num_labels)
    how: dict[str, Any] = {"batch_size": batch_size, "collate_fn": collate}
    if isinstance(dataset, ImageSplit) and dataset.images.device.type != "cpu":
        how |= {"num_workers": 0, "pin_memory": False}
    else:
        how |= {
            "num_workers": args.dataloader_num_workers,
            "pin_memory": args.dataloader_pin_memory,
            "persistent_workers": args.dataloader_persistent_workers,
            "multiprocessing_context": args.dataloader_multiprocessing_context,
            "prefetch_factor": args.dataloader_prefetch_factor,
            "in_order": args.dataloader_in_order,
        }
    if not isinstance(dataset, IterableDataset):
        how["sampler"] = None if sampler_fn is None else sampler_fn(dataset)
        how["drop_last"] = is_training and args.dataloader_drop_last
        if is_training:
            how["worker_init_fn"] = partial(seed_worker, num_workers=how["num_workers"], rank=args.process_index)
    loader = trainer.accelerator.prepare(DataLoader(dataset, **how))
    if is_training and hasattr(dataset, "__len__") and len(loader) == 0:
        raise DataError(
            f"0 steps: {len(dataset)} training images do not fill one batch of {batch_size * args.world_size}"
        )
    return loader
