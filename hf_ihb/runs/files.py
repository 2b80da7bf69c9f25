"""JSON files: read strictly, and written whole or not at all."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_ihb.errors import DataError

_KINDS = {dict: "an object", list: "a list"}


def read_json(path: Path, kind: type = dict) -> Any:
    """What a JSON file holds.

    Args:
        path: Of the file.
        kind: `dict` or `list`, which it must be.

    Raises:
        DataError: If there is no such file, or it holds something else.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: expected a JSON file, found {' '.join(str(error).split())}") from error
    if not isinstance(content, kind):
        raise DataError(f"{path}: expected {_KINDS[kind]} in JSON, found {type(content).__name__}")
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
