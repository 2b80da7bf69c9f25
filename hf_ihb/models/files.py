"""The files of a model, from a folder or one commit of the Hub: safetensors and JSON that point nowhere else."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import CONFIG_MAPPING

from hf_ihb.access import fetch_file, resolve_commit
from hf_ihb.config.data import MAX_CLASSES
from hf_ihb.errors import ModelLoadError

CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE = "config.json", "model.safetensors", "model.safetensors.index.json"
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
_OUTSIDE = re.compile(r"[/\\~]|[A-Za-z]:[/\\]|(file|local[-_]dir|hf[-_]hub):|(.*[/\\])?\.\.([/\\]|$)")
# Where any text may stand: nothing is opened by it.
_FREE_TEXT = ("_name_or_path", "name_or_path", "id2label", "label2id", "label_names", "label_descriptions")
# What of timm's `create_model` reads files or fetches weights.
_TIMM_SOURCES = ("checkpoint_path", "cache_dir", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay")
# What configs and weights of any content make libraries raise.
UNREADABLE = (
    OSError,
    ValueError,
    ImportError,
    SafetensorError,
    RuntimeError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    StrictDataclassError,
)


def one_line(error: BaseException, most: int = 300) -> str:
    """What an error of a library says, on one line."""
    return " ".join(str(error).split())[:most] or type(error).__name__


class ModelFiles(NamedTuple):
    """Where the files of a model are.

    Attributes:
        folder: The folder, or that of the commit in the cache.
        revision: Commit on the Hub; None for a folder.
    """

    folder: str
    revision: str | None


def model_files(name: str, revision: str | None = None, *, role: str = "model", weights: bool = True) -> ModelFiles:
    """Fetches what a model is loaded from, and refuses what is more than data.

    Everything comes from the one commit that the name stands for at the beginning. Only safetensors and JSON are
    fetched; what they say is checked before any of it is used.

    Args:
        name: Hub id or folder.
        revision: Branch, tag or commit on the Hub.
        role: What errors call it.
        weights: Whether its weights are wanted.

    Raises:
        ModelLoadError: If a file cannot be found or read, points outside, or code would have to be run.
    """
    commit = resolve_commit(name, revision, what=role)
    who = f"{role} '{name}'"
    folder = Path(name).expanduser()

    def find(filename: str, required: bool = False) -> Path | None:
        if commit is not None:
            return fetch_file(name, filename, commit, what=role, required=required)
        path = folder / filename
        if path.is_file():
            return _inside(path, who)
        if required:
            raise ModelLoadError(f"{who}: expected {filename} in the folder, found none")
        return None

    config = find(CONFIG_FILE, required=True)
    _check_config(_read(config, who), who)
    for path in filter(None, map(find, _PROCESSOR_FILES)):
        _check_processor(_read(path, who), path.name, who)
    if weights and find(WEIGHTS_FILE) is None:
        index = find(INDEX_FILE)
        if index is None:
            raise ModelLoadError(f"{who}: expected {WEIGHTS_FILE}, found none (pickled weights are never read)")
        for shard in _shards(_read(index, who), who):
            find(shard, required=True)
    return ModelFiles(str(config.parent), commit)


def _inside(path: Path, who: str) -> Path:
    """A file of a folder that is no link to somewhere else; the Hub's cache links to a folder beside."""
    target, folder = path.resolve(), path.parent.resolve()
    blobs = folder.parents[1] / "blobs" if folder.parent.name == "snapshots" else folder
    if not target.is_relative_to(folder) and not target.is_relative_to(blobs):
        raise ModelLoadError(f"{who}: expected {path.name} in the folder, found a link to {target}")
    return path


def _read(path: Path, who: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelLoadError(f"{who}: {path.name} could not be read: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(content, dict):
        raise ModelLoadError(f"{who}: {path.name}: expected a JSON object, found {type(content).__name__}")
    return content


def _check_config(config: dict[str, Any], who: str) -> None:
    kind = str(config.get("model_type"))
    _check_code(config, kind, kind in CONFIG_MAPPING, CONFIG_FILE, who)
    model_args = config.get("model_args")
    for key in _TIMM_SOURCES:
        if isinstance(model_args, dict) and key in model_args:
            raise ModelLoadError(
                f"{who}: {CONFIG_FILE}, key 'model_args.{key}': expected none, found {model_args[key]!r}"
            )
    _check_values(config, CONFIG_FILE, who)
    for keys, count in _leaves(config):
        # libraries make a name and a row of weights for each
        if keys[-1] in ("num_labels", "num_classes") and isinstance(count, (int, float)) and count > MAX_CLASSES:
            raise ModelLoadError(
                f"{who}: {CONFIG_FILE}, key '{'.'.join(keys)}': expected at most {MAX_CLASSES} classes, found {count}"
            )


def _check_processor(content: dict[str, Any], filename: str, who: str) -> None:
    nested = content.get("image_processor")
    for part in (content, nested if isinstance(nested, dict) else {}):
        kind = str(part.get("image_processor_type"))
        _check_code(part, kind, hasattr(transformers, kind.removesuffix("Fast")), filename, who)
    _check_values(content, filename, who)


def _check_code(content: dict[str, Any], kind: str, is_known: bool, filename: str, who: str) -> None:
    """Refuses what only code of the repo can make; a known class is used whatever the repo brings along."""
    if "auto_map" in content and not is_known:
        raise ModelLoadError(
            f"{who}: {filename}, key 'auto_map': expected a class known here, found '{kind}', which needs code of its "
            "repo; that is never run"
        )


def _check_values(content: dict[str, Any], filename: str, who: str) -> None:
    """Refuses values that make a library look outside the model's own files."""
    for keys, text in _leaves(content):
        if not isinstance(text, str):
            continue
        kernel = any("kernel" in key or key.endswith("_implementation") for key in keys) and "/" in text
        if kernel or _OUTSIDE.match(text):
            found = "code of another repo" if kernel else "a path"
            raise ModelLoadError(
                f"{who}: {filename}, key '{'.'.join(keys)}': expected nothing from outside the repo, found {found} "
                f"{text[:80]!r}"
            )


def _leaves(content: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every text and number of a JSON value with the keys that lead to it, but those that nothing is made of."""
    if isinstance(content, dict):
        for key, value in content.items():
            if key not in _FREE_TEXT:
                yield from _leaves(value, (*keys, key))
    elif isinstance(content, list):
        for value in content:
            yield from _leaves(value, keys)
    else:
        yield keys, content


def _shards(index: dict[str, Any], who: str) -> list[str]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelLoadError(f"{who}: {INDEX_FILE}, key 'weight_map': expected a file for each weight, found none")
    for shard in weight_map.values():
        if not isinstance(shard, str) or not re.fullmatch(r"[\w.-]+\.safetensors", shard):
            raise ModelLoadError(
                f"{who}: {INDEX_FILE}, key 'weight_map': expected names of safetensors files, found {shard!r}"
            )
    return sorted(set(weight_map.values()))
