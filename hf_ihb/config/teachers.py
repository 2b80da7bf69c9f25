"""Keys of several teachers in one run: each an entry, a fragment of a recipe that holds for one of them."""

import dataclasses
import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hf_ihb.config.fields import FRACTION_BELOW_ONE, key, shown
from hf_ihb.config.model import TeacherArguments

TEACHER_KEYS = frozenset(f.name for f in dataclasses.fields(TeacherArguments))


@dataclass
class SeveralTeachers:
    """Keys of a run with several teachers."""

    teacher_models: list[dict[str, Any]] | None = key(
        None,
        "Several teachers in the place of teacher_model: a list of objects, each with a teacher_model and any key of "
        "teacher and methods, which holds for that one; others are the run's. Method weights stand in the entries.",
        json=True,
    )
    teacher_dropping: float = key(
        0.0,
        "Several teachers: in each step the one with the largest weighted loss is kept, and each other one left out "
        "with this probability (teacher dropping of UNIC, per batch instead of per image).",
        within=FRACTION_BELOW_ONE,
    )


def called(number: int) -> str:
    """What errors call an entry, counted from 0."""
    return f"key 'teacher_models', entry {number + 1}"


@contextmanager
def naming(number: int) -> Iterator[None]:
    """Puts the entry, counted from 0, before what is said of a value inside.

    Raises:
        ValueError: Where one is raised inside.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{called(number)}: {error}") from error


def check_entries(entries: Sequence[Mapping[str, Any]], known: Collection[str], of_run: Collection[str]) -> None:
    """Sees that each entry holds known keys alone.

    Args:
        entries: Of `SeveralTeachers.teacher_models`.
        known: Keys that an entry may hold.
        of_run: Keys that the whole run has one value of.

    Raises:
        ValueError: If there is no entry, or one holds another key; it names both, and the nearest that is known.
    """
    if not entries:
        raise ValueError("key 'teacher_models': expected at least one teacher, found []")
    for number, entry in enumerate(entries):
        for name in sorted(entry.keys() - set(known)):
            if name in of_run:
                raise ValueError(
                    f"{called(number)}: key '{name}': expected beside 'teacher_models', as it holds for the whole run"
                )
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ValueError(f"{called(number)}: key '{name}': unknown; did you mean '{nearest}'?")


def teachers_of(base: TeacherArguments, entries: Sequence[Mapping[str, Any]] | None) -> list[TeacherArguments]:
    """What each teacher of a run is: the one of the run's own keys, or those of the entries.

    Args:
        base: The run's own keys, which hold where an entry has no other value.
        entries: Of `SeveralTeachers.teacher_models`; None for one teacher.

    Raises:
        ValueError: If no teacher is named, or one beside the entries, or a value is none its key takes.
    """
    if entries is None:
        base.check_named()
        return [base]
    for name in ("teacher_model", "teacher_revision"):
        if (value := getattr(base, name)) is not None:
            raise ValueError(
                f"keys '{name}' and 'teacher_models' contradict: expected every teacher among the latter, found "
                f"{shown(value)} beside them"
            )
    found = []
    for number, entry in enumerate(entries):
        with naming(number):
            found.append(dataclasses.replace(base, **{k: v for k, v in entry.items() if k in TEACHER_KEYS}))
            found[-1].check_named()
    return found
