"""The JSON files of a run folder, as they may be shown to anyone."""

import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from hf_ihb.analysis import ANALYSES
from hf_ihb.config.augmentation import AugmentationArguments
from hf_ihb.config.data import DataArguments
from hf_ihb.config.model import ModelArguments, TeacherArguments
from hf_ihb.config.run import RunArguments
from hf_ihb.errors import DataError
from hf_ihb.records import (
    ANALYSIS_FILE,
    CONFUSION_PLOT,
    EVALUATION_FILE,
    HISTORY_FILE,
    METRICS_FILE,
    PLOTS_FOLDER,
    RECIPE_FILE,
)
from hf_ihb.redaction import publishable
from hf_ihb.trainer.arguments import (
    LogitDistillationTrainingArguments,
    StructuralDistillationTrainingArguments,
    SupervisedTrainingArguments,
)

CONFIG_FILE, PROCESSOR_FILE, WEIGHTS_FILE = "config.json", "preprocessor_config.json", "model.safetensors"
# Every plot that a run folder may hold -> what it shows.
PLOTS = {
    f"{PLOTS_FOLDER}/{name}.png": text for analysis in ANALYSES.values() for name, text in analysis.plots.items()
} | {CONFUSION_PLOT: "which classes are taken for which"}
_OBJECTS = (RECIPE_FILE, CONFIG_FILE, PROCESSOR_FILE, EVALUATION_FILE, METRICS_FILE, ANALYSIS_FILE)
_METHODS = {"logits": LogitDistillationTrainingArguments, "structural": StructuralDistillationTrainingArguments}


@dataclass(frozen=True)
class RunFiles:
    """What the files of a run folder say.

    Attributes:
        name: Of the folder.
        listed: Files of the folder that a card may link to, in the order they are listed.
        contents: File name -> parsed JSON, without names of this machine.
    """

    name: str
    listed: tuple[str, ...]
    contents: Mapping[str, Any]

    @property
    def recipe(self) -> dict[str, Any]:
        """``recipe.json``."""
        return self.contents[RECIPE_FILE]

    @property
    def teacher(self) -> dict[str, Any] | None:
        """Name and revision of the teacher."""
        return self.recipe["teacher"]

    @property
    def dataset(self) -> dict[str, Any]:
        """Name, revision, class names and sizes of the training data."""
        return self.recipe["dataset"]

    @property
    def environment(self) -> dict[str, Any]:
        """Versions, commit and hardware of the training."""
        return self.recipe["environment"]

    @property
    def config(self) -> dict[str, Any]:
        """``config.json``; empty where the model is not saved yet."""
        return self.contents.get(CONFIG_FILE, {})

    @property
    def evaluation(self) -> dict[str, Any] | None:
        """``evaluation.json``; None while training goes on."""
        return self.contents.get(EVALUATION_FILE)

    @property
    def metrics(self) -> dict[str, Any] | None:
        """``metrics.json``."""
        return self.contents.get(METRICS_FILE)

    @property
    def analysis(self) -> dict[str, Any]:
        """``analysis.json``; empty where there is none."""
        return self.contents.get(ANALYSIS_FILE, {})

    @property
    def is_custom_code(self) -> bool:
        """Whether the model class is saved with the model."""
        return "auto_map" in self.config

    @property
    def needs_us(self) -> bool:
        """Whether `transformers` finds the network only after hf_ihb has registered it with timm."""
        return str(self.config.get("architecture")).startswith("resnet18_cifar")

    @cached_property
    def training_class(self) -> type:
        """The training arguments of the run."""
        return _METHODS.get(self.recipe["keys"].get("method"), SupervisedTrainingArguments)

    @cached_property
    def argument_classes(self) -> tuple[type, ...]:
        """The dataclasses whose keys the recipe holds."""
        taught = () if self.teacher is None else (TeacherArguments,)
        return (RunArguments, DataArguments, AugmentationArguments, ModelArguments, *taught, self.training_class)

    @cached_property
    def keys(self) -> dict[str, Any]:
        """Every key of those dataclasses; one that is younger than the run has its default."""
        saved, keys = self.recipe["keys"], {}
        for arguments in self.argument_classes:
            keys |= {name: saved.get(name, default) for name, default in defaults_of(arguments).items()}
        return keys


def defaults_of(dataclass_type: type) -> dict[str, Any]:
    """Default of each field that has one."""
    made = {f.name: f.default_factory() for f in fields(dataclass_type) if f.default_factory is not MISSING}
    return made | {f.name: f.default for f in fields(dataclass_type) if f.default is not MISSING}


def read_run(folder: Path) -> RunFiles:
    """Reads the JSON files of a run folder.

    Raises:
        DataError: If the recipe is missing, a file is not the JSON it should be, or results are of different weights.
    """
    contents = {}
    for name in (*_OBJECTS, HISTORY_FILE):
        if (folder / name).is_file() or name == RECIPE_FILE:
            contents[name] = _parsed(folder / name, dict if name in _OBJECTS else list)
    if absent := [name for name in ("keys", "dataset", "teacher", "environment") if name not in contents[RECIPE_FILE]]:
        raise DataError(f"{folder / RECIPE_FILE}: expected '{absent[0]}', found {', '.join(contents[RECIPE_FILE])}")
    models = [contents[name].get("model") or {} for name in (METRICS_FILE, ANALYSIS_FILE) if name in contents]
    digests = {model.get("weights_sha256") for model in models}
    if len(digests) > 1:
        raise DataError(
            f"{folder}: expected {METRICS_FILE} and {ANALYSIS_FILE} of the same weights, found different ones; make "
            "them again"
        )
    code = sorted(path.name for path in folder.glob("*.py"))
    records = (RECIPE_FILE, HISTORY_FILE, EVALUATION_FILE, METRICS_FILE, ANALYSIS_FILE)
    listed = (CONFIG_FILE, *code, WEIGHTS_FILE, PROCESSOR_FILE, *records, *PLOTS)
    return RunFiles(
        name=folder.resolve().name,
        listed=tuple(name for name in listed if (folder / name).is_file()),
        contents=publishable(contents),
    )


def _parsed(path: Path, kind: type) -> Any:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected a JSON file, found {' '.join(str(error).split())}") from error
    if not isinstance(content, kind):
        expected = "an object" if kind is dict else "a list"
        raise DataError(f"{path}: expected {expected} in JSON, found {type(content).__name__}")
    return content


def is_hub_id(name: str) -> bool:
    """Whether a repo of the Hub may have this name."""
    return re.fullmatch(r"[\w.-]+(?:/[\w.-]+)?", name, re.ASCII) is not None
