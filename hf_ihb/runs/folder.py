"""The folder of a run: names of its files, one strict way to read them, and what may be written over."""

import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

from hf_ihb.checkpoint import HEADS_FILE
from hf_ihb.checkpoint import STAGING_FOLDER as STAGED_CHECKPOINTS
from hf_ihb.errors import DataError, RecipeError
from hf_ihb.runs.files import read_json
from hf_ihb.storage.lock import HOLDER_FILE, LOCK_FILE

CONFIG_FILE, PROCESSOR_FILE, WEIGHTS_FILE = "config.json", "preprocessor_config.json", "model.safetensors"
RECIPE_FILE, HISTORY_FILE, EVALUATION_FILE = "recipe.json", "training_history.json", "evaluation.json"
METRICS_FILE, ANALYSIS_FILE, PLOTS_FOLDER = "metrics.json", "analysis.json", "plots"
COMPARISON_FILE = "comparison.json"
# the model card, and where a dry run of publishing renders what would be pushed
CARD_FILE, STAGING_FOLDER = "README.md", "hub"
CONFUSION_PLOT = f"{PLOTS_FOLDER}/confusion_matrix.png"
# What a run records of itself, in the order it is listed; comparisons lie in folders of their own.
RECORDS = (RECIPE_FILE, HISTORY_FILE, EVALUATION_FILE, METRICS_FILE, ANALYSIS_FILE)
_NUMBER, _OBJECT_OR_NULL = (int, float), (dict, NoneType)
# Parts without which a file is not the one that its name says.
_PARTS: dict[str, dict[str, type | tuple[type, ...]]] = {
    RECIPE_FILE: {"keys": dict, "dataset": dict, "teacher": _OBJECT_OR_NULL, "environment": dict},
    EVALUATION_FILE: {"validation": dict, "test": dict, "num_parameters": int, "num_train_images": int}
    | {"train_steps": int, "train_seconds": _NUMBER, "seed": int},
    METRICS_FILE: {"model": dict, "data": dict, "heads": dict},
    ANALYSIS_FILE: {"model": dict, "data": dict},
}
# Files whose other parts, such as those of analyses, are objects as well.
_OF_OBJECTS = (ANALYSIS_FILE,)


class RunFolder:
    """A run's folder, of which nothing is read before it is asked for.

    Args:
        path: Of the folder; it need not be there.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def holds(self, name: str) -> bool:
        """Whether there is such a file."""
        return (self.path / name).is_file()

    def read(self, name: str) -> Any:
        """What one of the JSON files holds.

        Raises:
            DataError: If there is no such file, or it is not what its name says.
        """
        return read_record(self.path / name)

    @property
    def is_ours(self) -> bool:
        """Whether it holds a run of ours, judged by what its ``recipe.json`` says."""
        try:
            return is_record(read_json(self.path / RECIPE_FILE))
        except DataError:
            return False

    def check_writable(self, *, goes_on: bool, replaces: bool) -> None:
        """Refuses to train into what must not be written to.

        Args:
            goes_on: An earlier run there is resumed.
            replaces: An earlier run there is replaced.

        Raises:
            RecipeError: If the folder is a file, holds something that is not ours, or an earlier run that is neither
                resumed nor replaced.
        """
        folder = self.path
        if folder.exists() and not folder.is_dir():
            raise RecipeError(f"key 'output_dir': expected a folder, found the file {folder}")
        hidden = {LOCK_FILE, HOLDER_FILE, STAGED_CHECKPOINTS}  # left by a run that had not begun
        if folder.is_dir() and {path.name for path in folder.iterdir()} - hidden and not self.is_ours:
            raise RecipeError(f"key 'output_dir': expected an empty or new folder, found {folder} with other content")
        holds_weights = self.holds(WEIGHTS_FILE) or any(folder.glob("checkpoint-*"))
        if holds_weights and not goes_on and not replaces:
            raise RecipeError(
                f"key 'output_dir': expected an empty or new folder, found an earlier run in {folder}; go on with it "
                "by --resume_from_checkpoint true, or replace it by --overwrite_output_dir true"
            )
        if not os.access(_nearest(folder), os.W_OK):
            raise RecipeError(f"key 'output_dir': expected a folder that can be written to, found {folder}")

    def clear(self, plots: Iterable[str]) -> None:
        """Removes what an earlier run of ours wrote, and nothing else.

        Args:
            plots: Names of those that a run may have drawn.
        """
        for path in (*self.path.glob("checkpoint-*"), self.path / HEADS_FILE.parent, self.path / STAGING_FOLDER):
            if path.exists():
                shutil.rmtree(path)
        for name in (*RECORDS, CARD_FILE, *plots, WEIGHTS_FILE):
            (self.path / name).unlink(missing_ok=True)


def is_record(content: Any) -> bool:
    """Whether a parsed ``recipe.json`` was written by a run of ours."""
    return isinstance(content, dict) and all(isinstance(content.get(part), dict) for part in ("keys", "environment"))


def read_record(path: Path) -> Any:
    """What a JSON file of a run folder, or a comparison of several, holds; which one it is, its name says.

    Raises:
        DataError: If there is no such file, or it is not what its name says.
    """
    content = read_json(path, list if path.name == HISTORY_FILE else dict)
    if path.name == HISTORY_FILE and (other := next((row for row in content if not isinstance(row, dict)), None)):
        raise DataError(f"{path}: expected a list of objects in JSON, found {type(other).__name__} in it")
    if path.name == COMPARISON_FILE:
        for name, analysis in content.items():
            if not isinstance(analysis, dict):
                raise DataError(f"{path}: key '{name}': expected an object, found {type(analysis).__name__}")
            _check_parts(analysis, ANALYSIS_FILE, f"{path}: key '{name}'")
    else:
        _check_parts(content, path.name, str(path))
    return content


def _check_parts(content: Any, file: str, where: str) -> None:
    needed = _PARTS.get(file, {})
    if absent := [name for name in needed if name not in content]:
        raise DataError(f"{where}: expected '{absent[0]}', found {', '.join(content) or 'nothing'}")
    others = dict.fromkeys(content, _OBJECT_OR_NULL) if file in _OF_OBJECTS else {}
    for name, kind in (others | needed).items():
        if not isinstance(content[name], kind):
            expected = {dict: "an object", _OBJECT_OR_NULL: "an object or null"}.get(kind, "a number")
            raise DataError(f"{where}: key '{name}': expected {expected}, found {type(content[name]).__name__}")


def _nearest(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def output_folder(output_dir: str | None, model: str) -> Path:
    """Where results about a model go: `output_dir`, or the model's folder, or ``outputs/<name>`` for one of the Hub.

    Raises:
        RecipeError: If that is a file, or cannot be written to.
    """
    own = Path(model).expanduser()
    folder = Path(output_dir) if output_dir is not None else own if own.is_dir() else Path("outputs", Path(model).name)
    nearest = _nearest(folder)
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
