"""Any recipe and command line: parsed, or refused in one line, and no file is written.

python benchmarks/reliability/recipes.py [--examples 5000] [--name NAME]

Recipes and options are made by Hypothesis (`pip install hypothesis`), which makes what fails smaller; the same law as
`tests/config/test_recipe.py::test_any_recipe_is_parsed_or_refused_in_one_line` has, without it. Half of the recipes
hold values of their keys' types and ranges alone, so that many of them parse; a parsed one has the values it was given.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from small_runs import begin_with, write

from hf_ihb.config.augmentation import AugmentationArguments
from hf_ihb.config.data import DataArguments
from hf_ihb.config.fields import range_of
from hf_ihb.config.model import ModelArguments, TeacherArguments
from hf_ihb.config.recipe import parse_recipe
from hf_ihb.config.run import RunArguments
from hf_ihb.errors import RecipeError
from hf_ihb.trainer.arguments import DistillationTrainingArguments, SupervisedTrainingArguments

COMMON = (RunArguments, DataArguments, AugmentationArguments, ModelArguments)
SCRIPTS = {
    "train": (*COMMON, SupervisedTrainingArguments),
    "distill": (*COMMON, TeacherArguments, DistillationTrainingArguments),
}
# they reach outside of the process, or print and end it
LEFT_OUT = {"deepspeed", "fsdp", "fsdp_config", "parallelism_config", "help"}
# what becomes of them is decided: nothing is pinned without an accelerator, and transformers has a word for a bool
RESOLVED = {"dataloader_pin_memory", "include_num_input_tokens_seen"}
WORDS = ["deit", "linear", "no", "epoch", "structural", "none", "", "nan", "1", "true", "last", "~", "..", "resnet18"]


def values() -> st.SearchStrategy:
    """Whatever JSON holds."""
    numbers = st.integers(-3, 300) | st.sampled_from([2**31, 2**63, -(2**64), 10**400]) | st.floats()
    plain = st.none() | st.booleans() | numbers | st.sampled_from(WORDS) | st.text(max_size=12)
    return st.recursive(
        plain, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=2), max_leaves=6
    )


def fitting(cls: type, name: str) -> st.SearchStrategy | None:
    """Values of a key's type, in its range; None for types that few keys have."""
    hint = get_type_hints(cls)[name]
    kinds = [x for x in get_args(hint) if x is not NoneType] if get_origin(hint) in (Union, UnionType) else [hint]
    within = range_of(cls, name)
    for kind in kinds:
        if get_origin(kind) is Literal:
            return st.sampled_from(get_args(kind))
        if kind is bool:
            return st.booleans()
        if kind is int:
            return st.integers(*(int(max(-4, min(64, x))) for x in (within.low, within.high))) if within else None
        if kind is float and within:
            edges = [max(0.0, within.low), min(8.0, within.high)]
            return st.floats(*edges, exclude_min=within.low_open, exclude_max=within.high_open).map(
                lambda x: round(x, 3)
            )
    return None


def sources(classes: tuple[type, ...]) -> st.SearchStrategy:
    """A recipe's bytes and options, and the values of its keys where it was made to be parsed."""
    names = sorted({f.name for cls in classes for f in fields(cls) if f.init} - LEFT_OUT)
    fit = {f.name: fitting(cls, f.name) for cls in classes for f in fields(cls) if f.init and f.name not in LEFT_OUT}
    fit = {name: values for name, values in fit.items() if values is not None}
    pairs = st.sampled_from(sorted(fit)).flatmap(lambda name: st.tuples(st.just(name), fit[name]))
    needed = st.just({"teacher_model": "somewhere", "cka_weight": 1.0} if TeacherArguments in classes else {})
    sound = st.builds(lambda a, b: a | dict(b), needed, st.lists(pairs, max_size=4))
    option = st.tuples(st.sampled_from(names), st.sampled_from(WORDS) | st.integers().map(str) | st.text(max_size=8))
    some = st.dictionaries(st.sampled_from(names) | st.text(max_size=6), values(), max_size=4)
    whole = st.builds(lambda a, b: json.dumps(a | b).encode(), st.just({}) | needed, some)
    broken = whole | st.binary(max_size=40) | st.text(max_size=40).map(str.encode)
    as_given = sound.map(lambda values: (json.dumps(values).encode(), [], values))
    return as_given | st.tuples(broken, st.lists(option, max_size=2), st.just({}))


def law_of(script: str, examples: int, found: Counter[str]) -> Callable[[], None]:
    """What holds for any recipe of a script; counts what became of each."""
    classes, path = SCRIPTS[script], Path("recipe.json")

    def becomes(made: tuple[bytes, list, dict[str, Any]]) -> str:
        content, options, sound = made
        path.write_bytes(content)
        try:
            parsed = parse_recipe([str(path), *(x for name, value in options for x in (f"--{name}", value))], *classes)
        except RecipeError as error:
            return "refused" if len(str(error).splitlines()) == 1 else f"refused in lines: {error}"
        if [type(part) for part in parsed] != list(classes):
            return "something else"
        held = {name: getattr(part, name) for part in reversed(parsed) for name in vars(part)}
        other = {n: held[n] for n, value in sound.items() if held[n] != value and n not in RESOLVED}
        return f"{sound}: other values {other}" if other else "parsed"

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True, phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(sources(classes))
    def law(made: tuple[bytes, list, dict[str, Any]]) -> None:
        kept = dict(os.environ)
        became = becomes(made)
        os.environ.clear()
        os.environ.update(kept)
        assert became in ("parsed", "refused"), became
        assert [p.name for p in Path().iterdir()] == ["recipe.json"]
        found[f"{script}: {became}"] += 1

    return law


def main() -> None:
    """Writes what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=5000, help="Of each script.")
    parser.add_argument("--name", default=None, help="Of the results, without ending; printed alone if not given.")
    args = parser.parse_args()
    begin_with()
    started, found = time.monotonic(), Counter()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for script in SCRIPTS:
            law_of(script, args.examples, found)()
    text = ", ".join(f"{what} {count}" for what, count in sorted(found.items()))
    text = f"{text}; nothing else, and no file was written (Hypothesis {importlib.metadata.version('hypothesis')})."
    write(args.name, "Any recipe", text, dict(found), started)


if __name__ == "__main__":
    main()
