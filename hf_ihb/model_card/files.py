"""What the files of a run folder say, as a card needs it."""

import re
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from hf_ihb.analysis import ANALYSES
from hf_ihb.config.augmentation import AugmentationArguments
from hf_ihb.config.data import DataArguments
from hf_ihb.config.model import ModelArguments, TeacherArguments
from hf_ihb.config.run import RunArguments
from hf_ihb.errors import DataError
from hf_ihb.methods import Method, methods_of
from hf_ihb.runs.folder import (
    ANALYSIS_FILE,
    CONFIG_FILE,
    CONFUSION_PLOT,
    EVALUATION_FILE,
    METRICS_FILE,
    PLOTS_FOLDER,
    PROCESSOR_FILE,
    RECIPE_FILE,
    RECORDS,
    WEIGHTS_FILE,
)
from hf_ihb.trainer.arguments import DistillationTrainingArguments, SupervisedTrainingArguments, keys_today

# Every plot that a run folder may hold -> what it shows.
PLOTS = {
    f"{PLOTS_FOLDER}/{name}.png": text for analysis in ANALYSES.values() for name, text in analysis.plots.items()
} | {CONFUSION_PLOT: "which classes are taken for which"}


class Taught(NamedTuple):
    """What a run learned from one teacher.

    Attributes:
        number: From 1, where there are several; None for the only one.
        teacher: Name and revision.
        keys: Of the run, as they hold for this teacher.
        methods: What it was learned by.
    """

    number: int | None
    teacher: dict[str, Any]
    keys: dict[str, Any]
    methods: list[Method]

    def of(self, name: str) -> str:
        """A key of logs and results that is this teacher's."""
        return name if self.number is None else f"{name}_{self.number}"


@dataclass(frozen=True)
class RunFiles:
    """What the files of a run folder say.

    Attributes:
        folder: Of the run.
        listed: Files of the folder that a card may link to, in the order they are listed.
        contents: File name -> parsed JSON, without names of this machine.
    """

    folder: Path
    listed: tuple[str, ...]
    contents: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Of the folder."""
        return self.folder.resolve().name

    @property
    def recipe(self) -> dict[str, Any]:
        """``recipe.json``."""
        return self.contents[RECIPE_FILE]

    @property
    def teacher(self) -> dict[str, Any] | None:
        """Name and revision of the teacher, the first of several."""
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
        return SupervisedTrainingArguments if self.teacher is None else DistillationTrainingArguments

    @cached_property
    def methods(self) -> list[Method]:
        """What it learned by from its teachers."""
        return [method for taught in self.taught for method in taught.methods]

    @cached_property
    def taught(self) -> list[Taught]:
        """What it learned from each teacher; empty where there was none."""
        if self.teacher is None:
            return []
        return taught_by(self.recipe, self.keys)

    @cached_property
    def argument_classes(self) -> tuple[type, ...]:
        """The dataclasses whose keys the recipe holds."""
        taught = () if self.teacher is None else (TeacherArguments,)
        return (RunArguments, DataArguments, AugmentationArguments, ModelArguments, *taught, self.training_class)

    @cached_property
    def keys(self) -> dict[str, Any]:
        """Every key of those dataclasses; one that is younger than the run has its default."""
        saved, keys = keys_today(self.recipe["keys"]), {}
        for arguments in self.argument_classes:
            keys |= {name: saved.get(name, default) for name, default in defaults_of(arguments).items()}
        return keys


def taught_by(recipe: Mapping[str, Any], keys: dict[str, Any]) -> list[Taught]:
    """What a run learned from each of its teachers.

    Args:
        recipe: Its ``recipe.json``.
        keys: Every key of methods, and others, as they hold for the run.
    """
    if "teachers" not in recipe:
        return [Taught(None, recipe["teacher"], keys, methods_of(SimpleNamespace(**keys)))]
    each = [keys | teacher["keys"] for teacher in recipe["teachers"]]
    numbers = range(1, len(each) + 1) if len(each) > 1 else [None]
    return [
        Taught(number, teacher, own, methods_of(SimpleNamespace(**own)))
        for number, teacher, own in zip(numbers, recipe["teachers"], each, strict=True)
    ]


def defaults_of(dataclass_type: type) -> dict[str, Any]:
    """Default of each field that has one."""
    made = {f.name: f.default_factory() for f in fields(dataclass_type) if f.default_factory is not MISSING}
    return made | {f.name: f.default for f in fields(dataclass_type) if f.default is not MISSING}


def run_files(folder: Path, names: Collection[str], contents: Mapping[str, Any]) -> RunFiles:
    """What a card says of a run.

    Args:
        folder: Of the run.
        names: Files of it that go with the card.
        contents: What the JSON files among them hold, as it may be shown to anyone.

    Raises:
        DataError: If results are of different weights.
    """
    models = [contents[name]["model"] for name in (METRICS_FILE, ANALYSIS_FILE) if name in contents]
    if len({model.get("weights_sha256") for model in models}) > 1:
        raise DataError(
            f"{folder}: expected {METRICS_FILE} and {ANALYSIS_FILE} of the same weights, found different ones; make "
            "them again"
        )
    code = sorted(name for name in names if name.endswith(".py"))
    order = (CONFIG_FILE, *code, WEIGHTS_FILE, PROCESSOR_FILE, *RECORDS, *PLOTS)
    return RunFiles(folder, tuple(name for name in order if name in names), contents)


def is_hub_id(name: str) -> bool:
    """Whether a repo of the Hub may have this name."""
    return re.fullmatch(r"[\w.-]+(?:/[\w.-]+)?", name, re.ASCII) is not None
