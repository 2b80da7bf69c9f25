"""Where decoded images go: how much memory there is, and how much of it they may take."""

import contextlib
import os
from pathlib import Path
from typing import Literal

import psutil
import torch
from torch import Tensor

DEVICE_SHARE = 0.25


def placement(
    num_bytes: int, device: torch.device | str, *, free_bytes: int | None = None
) -> Literal["device", "host"]:
    """Where rows that are read at random by every step are kept.

    Args:
        num_bytes: Of all rows.
        device: That reads them.
        free_bytes: Of the accelerator's memory; asked for if None. Up to `DEVICE_SHARE` of it may be taken, since the
            model, its optimizer and its activations come later.

    Returns:
        ``device``: on the accelerator, where a batch is one gather. ``host``: where they are, see `rows_onto`; always
        so without an accelerator.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return "host"
    return "device" if num_bytes <= DEVICE_SHARE * (_free_on(device) if free_bytes is None else free_bytes) else "host"


def onto(device: torch.device, tensor: Tensor) -> Tensor:
    """A tensor of the host's memory on a device, by way of page-locked memory, without a wait for the device."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def rows_onto(device: torch.device, rows: Tensor, index: Tensor) -> Tensor:
    """Some rows of the host's memory on a device, without a wait for it.

    They are gathered into page-locked memory: from any other a copy waits until the device is done with what it has,
    also where the rows themselves are page-locked and what was gathered of them is not.

    Args:
        device: Where to.
        rows: ``(N, ...)`` on the host.
        index: ``(B,)`` int64, on the host.
    """
    locked = device.type == "cuda"
    gathered = torch.empty((len(index), *rows.shape[1:]), dtype=rows.dtype, pin_memory=locked)
    torch.index_select(rows, 0, index, out=gathered)
    return gathered.to(device, non_blocking=locked)


def local_processes() -> int:
    """Processes of this launch on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def available_memory(*, whole: bool = False) -> int:
    """Bytes of memory that this process could still get: of the machine, or of its control group (Linux) if less.

    Args:
        whole: What there is rather than what is left of it, which all processes of a machine see alike.
    """
    memory = psutil.virtual_memory()
    found = memory.total if whole else memory.available
    for line in _lines(Path("/proc/self/cgroup")):
        number, _, name = line.split(":", 2)
        if number == "0":  # version 2, which has one tree
            group = Path("/sys/fs/cgroup", name.lstrip("/"))
            found = min(found, *(_limit_of(folder, whole) for folder in (group, *group.parents)))
    return int(found)


def _limit_of(group: Path, whole: bool) -> float:
    """What a control group may take, or may still take; pages of files that nobody uses can be had back."""
    with contextlib.suppress(OSError, ValueError):  # no file, as of the root, or 'max'
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        statistics = dict(line.split() for line in _lines(group / "memory.stat"))
        return limit if whole else max(0, limit - used + int(statistics.get("inactive_file", 0)))
    return float("inf")


def _lines(path: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return path.read_text().splitlines()
    return []


def _free_on(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return torch.accelerator.get_memory_info(device)[0]


def readable_bytes(num_bytes: float) -> str:
    """Gigabytes, or megabytes of what is small."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e7 else f"{num_bytes / 1e6:.2f} MB"


def readable_seconds(seconds: float) -> str:
    """Hours, minutes or seconds."""
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
