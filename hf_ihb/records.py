"""The JSON files of a run folder: their names, how they are written, and where a result was made."""

import contextlib
import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from hf_ihb.errors import DataError, RecipeError

RECIPE_FILE, HISTORY_FILE, EVALUATION_FILE = "recipe.json", "training_history.json", "evaluation.json"
METRICS_FILE, ANALYSIS_FILE, PLOTS_FOLDER = "metrics.json", "analysis.json", "plots"
COMPARISON_FILE = "comparison.json"
# the model card, and where a dry run of publishing renders what would be pushed
CARD_FILE, STAGING_FOLDER = "README.md", "hub"
CONFUSION_PLOT = f"{PLOTS_FOLDER}/confusion_matrix.png"
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
    root = Path(__file__).parents[1]
    try:
        found = subprocess.run(
            ["git", "rev-parse", "--show-toplevel", "HEAD"], cwd=root, capture_output=True, text=True, check=False
        )
    except OSError:  # there is no git
        return None
    lines = found.stdout.splitlines()
    ours = found.returncode == 0 and len(lines) == 2 and Path(lines[0]).resolve() == root.resolve()
    return lines[1] if ours else None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        DataError: If there is no such file, or it holds something else.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected a JSON file, found {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def write_json(path: Path, content: Any) -> None:
    """Writes JSON so that a reader sees the old file or the new one, never a part of it; NaN and infinity as null."""
    staged = path.with_suffix(".tmp")
    staged.write_text(_dump(_finite(content)) + "\n", "utf-8")
    staged.replace(path)


def _finite(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, Sequence) and not isinstance(content, str):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _dump(content: Any, depth: int = 0) -> str:
    """Indented, but for what fits into a line and for rows of numbers or pixels."""
    line = json.dumps(content, default=str)
    if not content or not isinstance(content, (dict, list)) or _is_row(content) or (len(line) < 80 and depth > 0):
        return line
    pad = "  " * (depth + 1)
    if isinstance(content, dict):
        rows = [f"{pad}{json.dumps(str(name))}: {_dump(value, depth + 1)}" for name, value in content.items()]
        return "{\n" + ",\n".join(rows) + f"\n{pad[2:]}}}"
    return "[\n" + ",\n".join(pad + _dump(value, depth + 1) for value in content) + f"\n{pad[2:]}]"


def _is_row(content: Any) -> bool:
    return isinstance(content, list) and all(
        isinstance(value, (int, float)) or (isinstance(value, list) and len(value) <= 4 and _is_row(value))
        for value in content
    )


def default_device(name: str | None = None) -> torch.device:
    """A device by its name, or the machine's accelerator, or the CPU."""
    if name is not None:
        return torch.device(name)
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def output_folder(output_dir: str | None, model: str) -> Path:
    """Where results about a model go: `output_dir`, or the model's folder, or ``outputs/<name>`` for one of the Hub.

    Raises:
        RecipeError: If that is a file, or cannot be written to.
    """
    own = Path(model).expanduser()
    folder = Path(output_dir) if output_dir is not None else own if own.is_dir() else Path("outputs", Path(model).name)
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise RecipeError(f"key 'output_dir': expected a folder that can be written to, found {nearest}")
    return folder


def distinct_names(names: Sequence[str]) -> list[str]:
    """The shortest ends of paths that tell them apart: ``out/a/cka`` and ``out/b/cka`` are ``a/cka`` and ``b/cka``.

    Raises:
        DataError: If a name is there twice.
    """
    parts = [Path(name).parts for name in names]
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"expected different models, found {twice[0]} twice")
    for length in range(1, max(map(len, parts), default=0) + 1):
        ends = ["/".join(part[-length:]) for part in parts]
        if len(set(ends)) == len(ends):
            return ends
    return list(names)
