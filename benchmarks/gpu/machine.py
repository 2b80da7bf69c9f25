"""Parts 0 and 1: the machine, and the data set decoded once."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from gpu.job import Context
from hf_ihb.config.data import DataArguments
from hf_ihb.data import load_image_data
from hf_ihb.runs.environment import environment

# What a compiled training step of a DeiT-Tiny moves for one image, at the least: 20.6 GB of products and attention and
# about 18 GB of fused pointwise work in a batch of 1024, from the operations' sizes.
STEP_BYTES_PER_IMAGE = 39e6


def measure_machine(context: Context) -> dict[str, Any]:
    """Versions, card, the rates of a copy and of a bf16 product, and the roof that follows.

    Returns:
        ``copy_bytes_per_second`` counts bytes read and written; ``roof_images_per_second`` is that over what a compiled
        step of a DeiT-Tiny moves at the least, None without CUDA.
    """
    device = torch.device(context.device)
    cuda = device.type == "cuda"
    elements, side = (2**30, 8192) if cuda else (2**25, 1024)
    source = torch.zeros(elements, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    copy = 8 * elements / _seconds(lambda: target.copy_(source), device)
    product = 2 * side**3 / _seconds(lambda: a @ b, device)
    found: dict[str, Any] = {
        "environment": environment(device),
        "copy_bytes_per_second": copy,
        "bf16_flops_per_second": product,
        "roof_images_per_second": copy / STEP_BYTES_PER_IMAGE if cuda else None,
    }
    if cuda:
        card = torch.cuda.get_device_properties(device)
        found |= {"memory_bytes": card.total_memory, "multiprocessors": card.multi_processor_count}
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return found


def _seconds(work: Callable[[], Any], device: torch.device, repeats: int = 10) -> float:
    """Median of one run, after two that are not timed."""
    times = []
    for turn in range(-2, repeats):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        if turn >= 0:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def data_arguments(context: Context, **more: Any) -> DataArguments:
    """The data set, from the file that part 1 makes."""
    return DataArguments(
        dataset_name=context.dataset,
        decode="once",
        decoded_memory_fraction=0.0,
        decoded_cache_dir=str(context.folder / "decoded"),
        **more,
    )


def decode_data(context: Context) -> dict[str, Any]:
    """Every image of the data set decoded into a file."""
    start = time.perf_counter()
    data = load_image_data(data_arguments(context))
    sizes = {split: len(getattr(data, split)) for split in ("train", "validation", "test")}
    return sizes | {"image_size": list(data.image_size), "decode_s": round(time.perf_counter() - start, 2)}
