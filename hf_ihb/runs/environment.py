"""Where a result is made: versions, commit and hardware."""

import contextlib
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = (
    "hf_ihb",
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "evaluate",
    "timm",
    "huggingface_hub",
    "safetensors",
)


def environment(device: torch.device, *, num_processes: int = 1, mixed_precision: str | None = None) -> dict[str, Any]:
    """Versions, commit and hardware; None for what cannot be known, such as the commit outside a checkout."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "versions": {"python": platform.python_version()} | library_versions(*_PACKAGES),
        "commit": _commit(),
        "device": gpu or _cpu_name(),
        "cpu_threads": torch.get_num_threads(),
        "num_processes": num_processes,
        "mixed_precision": mixed_precision,
    }


def library_versions(*names: str) -> dict[str, str | None]:
    """Versions of packages, None for one that is not installed (code can be run from where it lies)."""
    versions: dict[str, str | None] = dict.fromkeys(names)
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def _commit() -> str | None:
    """The commit of this code; not that of a checkout which merely has it somewhere in a folder of packages."""
    root = Path(__file__).parents[2]
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "--show-toplevel", "HEAD"], cwd=root, capture_output=True, text=True, check=False
        )
    except OSError:  # there is no git
        return None
    lines = answer.stdout.splitlines()
    ours = answer.returncode == 0 and len(lines) == 2 and Path(lines[0]).resolve() == root.resolve()
    return lines[1] if ours else None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def default_device(name: str | None = None) -> torch.device:
    """A device by its name, or the machine's accelerator, or the CPU."""
    if name is not None:
        return torch.device(name)
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
