"""A flat JSON recipe plus command-line overrides -> dataclasses, refused in one line where something is wrong."""

import copy
import difflib
import itertools
import json
import math
import re
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser

from hf_ihb.config.fields import expected_value, matches, out_of_range, shown, spelled_out, type_hints
from hf_ihb.config.names import REVISIONS
from hf_ihb.config.secrets import holds_secret, is_token_key, masked_key, refuse_secrets
from hf_ihb.errors import RecipeError

MAX_RECIPE_BYTES = 1 << 20
MAX_INTEGER = 1 << 63
_OURS = ("key", "range", "published", "words", "json")  # of a field's metadata, that argparse does not know


class _RecipeParser(HfArgumentParser):
    """Turns argparse's usage errors into one line and keeps what argparse does not know out of it."""

    def error(self, message: str) -> NoReturn:
        found = re.search(r"argument --(\w+)[^:]*: (?:invalid \w+(?: value)?: )?(.*)", message)
        if found is None:
            raise RecipeError(_one_line(f"command line: {message}"))
        name, value = found.groups()
        kind = re.search(r"invalid (\w+) value", message)
        reason = f"expected {kind[1]}, found {value}" if kind else value
        if choice := re.fullmatch(r"('.*') \(choose from (.*)\)", value):
            choices = choice[2].replace("'", "")
            reason = f"expected one of {choices}, found {choice[1]}"
        elif truth := re.match(r"Truthy value expected: got (.*?) but expected", value):
            reason = f"expected true or false, found {truth[1]}"
        raise RecipeError(_one_line(f"command line: key '{name}': {reason}"))

    @staticmethod
    def _parse_dataclass_field(parser: ArgumentParser, field: Field) -> None:
        plain = copy.copy(field)
        plain.metadata = {name: value for name, value in field.metadata.items() if name not in _OURS}
        HfArgumentParser._parse_dataclass_field(parser, plain)
        if words := field.metadata.get("words"):

            def integer(text: str) -> int:
                return words[text] if text in words else int(text)

            integer.__name__ = "int"  # what an error calls it
            parser._option_string_actions[f"--{field.name}"].type = integer
        if field.metadata.get("json"):
            parser._option_string_actions[f"--{field.name}"].type = _json_object


def _json_object(text: str) -> dict[str, Any]:
    """A word of the command line that is a JSON object.

    Raises:
        ValueError: If it is none; argparse asks for that.
    """
    if not isinstance(value := json.loads(text), dict):
        raise ValueError(text)
    return value


_json_object.__name__ = "object"  # what an error calls it


def parse_recipe(argv: Sequence[str], *dataclasses: type, description: str | None = None) -> tuple[Any, ...]:
    """Reads ``RECIPE.json [--key value ...]`` into dataclasses; the command line wins.

    Nothing is downloaded or written. ``--help`` prints every key and exits.

    Args:
        argv: Command line without the program's name; the recipe's path comes first.
        *dataclasses: Types whose fields are the known keys; no key may be in two of them.
        description: Text at the top of ``--help``.

    Returns:
        One instance for each type.

    Raises:
        RecipeError: If the file or the command line cannot be used: one line naming file, key, expected and found.
    """
    parser = _parser(argv, dataclasses, description, "RECIPE.json [--KEY VALUE ...]")
    path = recipe_path(argv)
    _refuse_twice(argv[1:])
    return _parse(parser, argv[1:], dataclasses, read_recipe(path), path)


def parse_models(
    argv: Sequence[str],
    *dataclasses: type,
    defaults: Callable[[str, str | None], dict[str, Any]],
    description: str | None = None,
) -> tuple[Any, ...]:
    """Reads ``MODEL [--key value ...]`` into the model's name and dataclasses.

    Args:
        argv: Command line without the program's name; the model's folder or Hub id comes first, unless a list of models
            is given as ``--compare A B``.
        *dataclasses: Types whose fields are the known keys; one of them has `model_revision`.
        defaults: Called with name and revision of the model (of the first compared one if there is no other); returns
            keys that stand in for what the command line leaves out, and `model_revision` where that names a commit now.
        description: Text at the top of ``--help``.

    Returns:
        The model's name, None with ``--compare`` alone, and one instance for each type.

    Raises:
        RecipeError: If the command line or a default cannot be used.
    """
    refuse_secrets(argv)
    compares = any(f.name == "compare" for dataclass in dataclasses for f in fields(dataclass))
    parser = _parser(argv, dataclasses, description, f"{'[MODEL]' if compares else 'MODEL'} [--KEY VALUE ...]")
    model, options = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else (None, argv)
    _refuse_twice(options)
    early = parser.parse_known_args(options)[0]
    others = early.compare if compares else []
    if model is None and not others:
        raise RecipeError("command line: expected a model first, its folder or Hub id, such as outputs/cka")
    source = model or others[0]
    values = dict(defaults(source, early.model_revision))
    if (commit := values.pop("model_revision", None)) is not None and model is not None:
        options = [*options, "--model_revision", commit]  # what is read later is of the commit that was asked
    return model, *_parse(parser, options, dataclasses, values, f"{source}: recipe.json")


def parse_run(argv: Sequence[str], *dataclasses: type, description: str | None = None) -> tuple[Any, ...]:
    """Reads ``RUN [--key value ...]`` into the run's folder and dataclasses.

    Args:
        argv: Command line without the program's name; the folder comes first.
        *dataclasses: Types whose fields are the known keys.
        description: Text at the top of ``--help``.

    Raises:
        RecipeError: If the command line cannot be used.
    """
    refuse_secrets(argv)
    parser = _parser(argv, dataclasses, description, "RUN [--KEY VALUE ...]")
    if not argv or argv[0].startswith("-"):
        raise RecipeError("command line: expected a run first, its folder, such as outputs/cka")
    _refuse_twice(argv[1:])
    return Path(argv[0]), *_parse(parser, argv[1:], dataclasses, {}, "command line")


def _parser(argv: Sequence[str], dataclasses: Sequence[type], description: str | None, usage: str) -> _RecipeParser:
    parser = _RecipeParser(
        dataclasses,
        description=description,
        allow_abbrev=False,
        formatter_class=ArgumentDefaultsHelpFormatter,
        conflict_handler="resolve",
        usage=f"%(prog)s {usage}",
    )
    if "-h" in argv or "--help" in argv:
        parser.print_help()
        raise SystemExit(0)
    return parser


def _parse(
    parser: _RecipeParser, options: Sequence[str], dataclasses: Sequence[type], values: dict[str, Any], path: Path | str
) -> tuple[Any, ...]:
    """Keys of a recipe, then of the command line, into dataclasses."""
    owners = {f.name: dataclass for dataclass in dataclasses for f in fields(dataclass) if f.init}
    kinds = {f.name: f for dataclass in dataclasses for f in fields(dataclass)}
    values = {name: spelled_out(kinds[name], value) if name in kinds else value for name, value in values.items()}
    for name, value in values.items():
        _check_key(f"{path}: key '{name}'", name, value, owners)

    parser.set_defaults(**values)
    namespace, unknown = parser.parse_known_args(options)
    if unknown and not unknown[0].startswith("--"):
        raise RecipeError(f"command line: expected --key value, found '{unknown[0]}'")
    if unknown:
        name = _key_of(unknown[0])
        _check_key(f"command line: key '{name}'", name, None, owners)
        raise RecipeError(f"command line: expected --key value, found '{unknown[0]}'")
    given = {_key_of(token) for token in options if token.startswith("--")}
    for name in given & REVISIONS.keys() & values.keys():
        if getattr(namespace, name) != values[name] and REVISIONS[name] not in given:
            setattr(namespace, REVISIONS[name], None)
    for name in given & owners.keys():
        _check_range(f"command line: key '{name}'", name, getattr(namespace, name), owners[name])
    if isinstance(path, Path) and "output_dir" in owners and "output_dir" not in given | values.keys():
        namespace.output_dir = str(_default_output_dir(path))

    instances = []
    for dataclass in dataclasses:
        names = [f.name for f in fields(dataclass) if f.init]
        try:
            instances.append(dataclass(**{name: getattr(namespace, name) for name in names}))
        except (OSError, TypeError, ValueError) as error:
            origin = "command line" if any(f"'{name}'" in str(error) for name in given) else path
            raise RecipeError(f"{origin}: {_one_line(error)}") from error
    for instance in instances:
        if hasattr(instance, "check_with"):
            try:
                instance.check_with(instances)
            except ValueError as error:
                raise RecipeError(f"{path}: {_one_line(error)}") from error
    return tuple(instances)


def _key_of(option: str) -> str:
    return option.lstrip("-").split("=")[0].replace("-", "_")


def _refuse_twice(options: Sequence[str]) -> None:
    """Refuses a key that is given twice, of which argparse takes the last; ``--no_KEY`` gives it, too."""
    values: dict[str, str] = {}
    for i, token in enumerate(options):
        if not token.startswith("--"):
            continue
        written, equals, value = token.partition("=")
        rest = itertools.takewhile(lambda following: not following.startswith("--"), options[i + 1 :])
        value = value if equals else " ".join(rest)
        name = _key_of(written)
        if (name := name.removeprefix("no_")) != _key_of(written):
            value = "false"
        if name in values:
            found = "two tokens" if is_token_key(name) else f"{values[name] or 'true'} and {value or 'true'}"
            raise RecipeError(_one_line(f"command line: key '{masked_key(name)}': expected once, found {found}"))
        values[name] = value


def recipe_path(argv: Sequence[str]) -> Path:
    """The recipe that a command line names.

    Raises:
        RecipeError: If the first argument is not the path of a file, or an argument is a secret.
    """
    refuse_secrets(argv)
    if not argv or argv[0].startswith("-"):
        raise RecipeError("command line: expected the path of a recipe first, such as recipes/cka.json")
    path = Path(argv[0])
    if not path.is_file():
        raise RecipeError(f"{path}: expected a recipe, found no such file")
    return path


def read_recipe(path: Path) -> dict[str, Any]:
    """A recipe file as a dictionary.

    Raises:
        RecipeError: If it is not a flat JSON object with unique keys and finite numbers, or holds a secret.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for name, value in pairs:
            if name in seen:
                raise RecipeError(f"{path}: key '{name}': expected once, found twice")
            seen[name] = value
        return seen

    def not_finite(literal: str) -> NoReturn:
        raise RecipeError(f"{path}: expected finite numbers, found {literal}")

    def finite(literal: str) -> float:
        return value if math.isfinite(value := float(literal)) else not_finite(literal)

    if (size := path.stat().st_size) > MAX_RECIPE_BYTES:
        raise RecipeError(f"{path}: expected a recipe below {MAX_RECIPE_BYTES} bytes, found {size}")
    try:
        values = json.loads(
            path.read_text("utf-8"), object_pairs_hook=unique, parse_constant=not_finite, parse_float=finite
        )
    except json.JSONDecodeError as error:
        raise RecipeError(f"{path}:{error.lineno}:{error.colno}: expected JSON, found {error.msg}") from error
    except (RecursionError, ValueError) as error:  # nested without end, not UTF-8, digits without end
        raise RecipeError(f"{path}: expected flat JSON in UTF-8, found {_one_line(error)}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: expected a JSON object, found {shown(values)}")
    for name, value in values.items():
        if is_token_key(name) or holds_secret(json.dumps(value, ensure_ascii=False)):
            raise RecipeError(
                f"{path}: key '{masked_key(name)}': expected no secret in a recipe; set the HF_TOKEN "
                "environment variable"
            )
    return values


def _check_key(origin: str, name: str, value: Any, owners: dict[str, type]) -> None:
    if name not in owners:
        nearest = difflib.get_close_matches(name, owners, n=1, cutoff=0.0)
        raise RecipeError(_one_line(f"{origin}: unknown; did you mean '{nearest[0]}'?"))
    if not matches(value, type_hints(owners[name])[name]):
        raise RecipeError(f"{origin}: expected {expected_value(owners[name], name)}, found {shown(value)}")
    _check_range(origin, name, value, owners[name])


def _check_range(origin: str, name: str, value: Any, owner: type) -> None:
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        raise RecipeError(f"{origin}: expected a number below 2^63, found {shown(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"{origin}: expected a finite number, found {value}")
    if out_of_range(owner, name, value) is not None:
        raise RecipeError(f"{origin}: expected {expected_value(owner, name)}, found {shown(value)}")


def _one_line(error: BaseException | str) -> str:
    return " ".join(str(error).split())


def _default_output_dir(path: Path) -> Path:
    parts = path.with_suffix("").parts
    below = parts[parts.index("recipes") + 1 :] if "recipes" in parts else parts[-1:]
    return Path("outputs", *below)
