"""Fields of a recipe: a help text, a unit, a range and a type for each key, checked wherever a value comes from."""

import copy
import json
import math
import os
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from functools import cache
from typing import Any, Literal, Self, Union, get_args, get_origin, get_type_hints

from transformers import TrainingArguments

_ARTICLES = {bool: "true or false", int: "an integer", float: "a number", str: "a string", dict: "an object"}


@dataclass(frozen=True)
class Range:
    """An interval of numbers; open bounds are excluded."""

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return (isinstance(value, int) or math.isfinite(value)) and above and below

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"{'>' if self.low_open else '>='} {self.low:g}"
        return f"in {'(' if self.low_open else '['}{self.low:g}, {self.high:g}{')' if self.high_open else ']'}"


POSITIVE = Range(0, low_open=True)
NON_NEGATIVE = Range(0)
AT_LEAST_ONE = Range(1)
FRACTION = Range(0, 1)
FRACTION_BELOW_ONE = Range(0, 1, high_open=True)
SEEDS = Range(0, 2**32 - 1)

# Ranges of keys that belong to `TrainingArguments`, which does not check them itself.
TRAINING_RANGES = {
    "per_device_train_batch_size": AT_LEAST_ONE,
    "per_device_eval_batch_size": AT_LEAST_ONE,
    "gradient_accumulation_steps": AT_LEAST_ONE,
    "num_train_epochs": POSITIVE,
    "learning_rate": NON_NEGATIVE,
    "weight_decay": NON_NEGATIVE,
    "max_grad_norm": NON_NEGATIVE,
    "warmup_steps": NON_NEGATIVE,
    "adam_beta1": FRACTION_BELOW_ONE,
    "adam_beta2": FRACTION_BELOW_ONE,
    "adam_epsilon": POSITIVE,
    "label_smoothing_factor": FRACTION_BELOW_ONE,
    "seed": SEEDS,
    "dataloader_num_workers": NON_NEGATIVE,
    "save_total_limit": AT_LEAST_ONE,
}


def key(
    default: Any,
    help: str,
    *,
    within: Range | None = None,
    unit: str | None = None,
    published: dict[Any, str] | None = None,
    words: dict[str, int] | None = None,
    json: bool = False,
) -> Any:
    """A dataclass field of a recipe.

    Args:
        default: Its default.
        help: What it does, for ``--help``.
        within: Range that is checked.
        unit: Unit, for ``--help``.
        published: Values that repeat a flaw of the published study, each with what is wrong; a run says so once.
        words: What may be written in the place of a number, and the number it stands for.
        json: Whether each word of the command line is JSON, not text.
    """
    notes = "; ".join(str(note) for note in (unit, within) if note)
    metadata: dict[str, Any] = {"key": True, "help": f"{help} ({notes})" if notes else help}
    if within is not None:
        metadata["range"] = within
    if published is not None:
        metadata["published"] = published
    if words is not None:
        metadata["words"] = words
    if json:
        metadata["json"] = True
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def range_of(dataclass_type: type, name: str) -> Range | None:
    """Range of a key of one of our dataclasses or of `TrainingArguments`."""
    own = {f.name: f.metadata.get("range") for f in fields(dataclass_type)}
    return own.get(name) or (TRAINING_RANGES.get(name) if issubclass(dataclass_type, TrainingArguments) else None)


def out_of_range(dataclass_type: type, name: str, value: Any) -> Range | None:
    """The range that a value, or an item of a list of values, falls out of; None if there is nothing to say."""
    allowed = range_of(dataclass_type, name)
    values = value if isinstance(value, (list, tuple)) else [value]
    numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
    return allowed if allowed is not None and any(v not in allowed for v in numbers) else None


def published_flaws(instances: Iterable[Any]) -> list[str]:
    """One line for each key whose value repeats a flaw of the published study."""
    return [
        f"{name}={value} repeats a flaw of the published study: {reason}"
        for instance in instances
        for name, value, reason in flaws_among(type(instance), vars(instance))
    ]


def flaws_among(dataclass_type: type, values: Mapping[str, Any]) -> list[tuple[str, Any, str]]:
    """Name, value and what is wrong, of each key of a dataclass that repeats a flaw of the published study."""
    return [
        (f.name, values[f.name], reason)
        for f in fields(dataclass_type)
        for flawed, reason in f.metadata.get("published", {}).items()
        if values.get(f.name) == flawed
    ]


class Checked:
    """Checks type, choices and range of every key of ours when a dataclass is made from Python.

    Tuples become lists, paths strings and numpy's numbers Python's: what JSON can hold.

    Raises:
        ValueError: If a value is none of those its key takes.
    """

    def __post_init__(self) -> None:
        hints = type_hints(type(self))
        for f in fields(self):
            value = getattr(self, f.name)
            if is_key(f):
                setattr(self, f.name, value := spelled_out(f, plain(value)))
                if not matches(value, hints[f.name]):
                    expected = expected_value(type(self), f.name)
                    raise ValueError(f"key '{f.name}': expected {expected}, found {shown(value)}")
            if (allowed := out_of_range(type(self), f.name, value)) is not None:
                raise ValueError(f"key '{f.name}': expected a number {allowed}, found {value}")


class Remade(Checked):
    """Checked arguments that can be made anew with other values: what was derived from others is derived again."""

    def _derive(self) -> None:
        """Fills in what follows from other keys, and refuses what contradicts."""

    def _settle(self) -> None:
        """What a subclass ends its ``__post_init__`` with."""
        self._given = self._values()
        self._derive()
        self._derived = self._values()

    def _values(self) -> dict[str, Any]:
        return {f.name: copy.copy(getattr(self, f.name)) for f in fields(self) if f.init}

    @property
    def is_as_made(self) -> bool:
        """Whether nothing was set since they were made."""
        return self._values() == self._derived

    def remade(self, **values: Any) -> Self:
        """A copy that takes what was set by hand since, and some other values; nothing beside the keys is set up anew.

        Raises:
            ValueError: As when they were made.
        """
        new, now = copy.copy(self), self._values()
        kept = {name: self._given[name] if value == self._derived[name] else value for name, value in now.items()}
        for name, value in (kept | values).items():
            is_name = isinstance(kept[name], Enum) and isinstance(value, str)
            setattr(new, name, type(kept[name])(value) if is_name else value)
        Checked.__post_init__(new)
        new._settle()
        return new

    def take(self, other: Self) -> None:
        """Becomes what others of the same kind are."""
        for name, value in other._values().items():
            setattr(self, name, value)
        self._given, self._derived = other._given, other._derived


def spelled_out(dataclass_field: Any, value: Any) -> Any:
    """A value, or each item of a list, as the number that its word stands for."""
    words = dataclass_field.metadata.get("words", {})
    if isinstance(value, list):
        return [spelled_out(dataclass_field, item) for item in value]
    return words.get(value, value) if isinstance(value, str) else value


def is_key(dataclass_field: Any) -> bool:
    """Whether a field was made by `key`."""
    return "key" in dataclass_field.metadata


@cache
def type_hints(dataclass_type: type) -> dict[str, Any]:
    """Resolved type of each field, looked up once a class."""
    return get_type_hints(dataclass_type)


def plain(value: Any) -> Any:
    """A value of Python as JSON would hold it, where it can."""
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    is_scalar = getattr(value, "shape", None) == () and hasattr(value, "item")
    return value.item() if is_scalar else value


def expected_value(dataclass_type: type, name: str) -> str:
    """Type, choices and range of a key, in words."""
    text, allowed = described(type_hints(dataclass_type)[name]), range_of(dataclass_type, name)
    return text if allowed is None else f"{text} {allowed}"


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


def matches(value: Any, hint: Any) -> bool:
    """Whether a JSON value has the type of a field, without any conversion."""
    if hint is Any:
        return True
    if _is_union(hint):
        enums = [h for h in get_args(hint) if isinstance(h, type) and issubclass(h, Enum)]
        if enums and isinstance(value, str):
            return any(matches(value, h) for h in enums)
        return any(matches(value, h) for h in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if hint is None or hint is type(None):
        return value is None
    origin = get_origin(hint) or hint
    if origin is list:
        items = get_args(hint) or (Any,)
        return isinstance(value, list) and all(matches(v, items[0]) for v in value)
    if isinstance(origin, type) and issubclass(origin, Enum):
        return value in [member.value for member in origin]
    if origin is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if origin is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(origin, type) and isinstance(value, origin)


def described(hint: Any) -> str:
    """A type in words."""
    if _is_union(hint):
        return " or ".join(described(h) for h in get_args(hint) if h is not type(None))
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    origin = get_origin(hint) or hint
    if origin is list:
        return f"a list, each item {described((get_args(hint) or (Any,))[0])}"
    if isinstance(origin, type) and issubclass(origin, Enum):
        return f"one of {', '.join(str(member.value) for member in origin)}"
    return _ARTICLES.get(origin, getattr(origin, "__name__", str(origin)))


def shown(value: Any) -> str:
    """A value as JSON, cut where it is long."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
