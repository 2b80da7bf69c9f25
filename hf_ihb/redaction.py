"""What may not leave this machine: tokens, paths, and the names of local folders."""

import html
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hf_ihb.config.names import BUILT_IN_PREFIX, LOCAL_PREFIX, NAMES
from hf_ihb.config.secrets import MIN_SECRET, PASSWORD_IN_FILE, TOKEN_IN_FILE

# Keys of a recipe that say where a run happened, not how; those of the second line where they are a file's path.
_MACHINE_KEYS = re.compile(r"run_name|resume_from_checkpoint|local_rank|.*_(?:token|dir|file|folder)")
_MACHINE_FILES = ("deepspeed", "fsdp_config", "accelerator_config", "parallelism_config")
# Classes are called what they are called, in the student's config too.
_CLASS_NAMES = ("label_names", "id2label", "label2id", "label")
_PATH = re.compile(r"(?:/|~|\.{1,2}[\\/]|[A-Za-z]:[\\/]|\\\\|file:).+|~|\.{1,2}", re.DOTALL)

_PNG = b"\x89PNG\r\n\x1a\n"


def publishable(contents: Mapping[str, Any], *, repo_id: str | None = None) -> dict[str, Any]:
    """The records of a run without anything of this machine.

    A name that was a local folder (its revision is null) becomes ``local:<last component>`` wherever it stands, and so
    does any other path. Keys that say where a run happened are left out, and text that mentions a folder of this
    machine is too. Applying it twice changes nothing.

    Args:
        contents: What the JSON files of one run hold, by file name; nothing is changed in place.
        repo_id: What the run's own model is called, in its metrics and analysis; ``local:<folder>`` if None.

    Returns:
        The same files.
    """
    local, hub = _folders_and_ids(contents)
    own = set() if repo_id is None else _own_names(contents.values())
    folders = {path for path in machine_folders() if _is_folder(path)}

    def mentions_machine(value: Any) -> bool:
        """Whether a text that is no path itself holds one of this machine."""
        text = isinstance(value, str) and not _PATH.fullmatch(value)
        return text and any(folder in value for folder in folders)

    def clean(value: Any, key: str | None = None) -> Any:
        if key in _CLASS_NAMES:
            return value
        if isinstance(value, Mapping):
            gone = {name for name, item in value.items() if mentions_machine(item) and name not in _CLASS_NAMES}
            return {name: clean(item, name) for name, item in value.items() if name not in gone}
        if isinstance(value, list):
            return [clean(item, key) for item in value if not mentions_machine(item)]
        if key == "name" and value in own:
            return repo_id
        if not isinstance(value, str) or value.startswith((LOCAL_PREFIX, BUILT_IN_PREFIX)):
            return value
        named = key in NAMES or key == "name"
        if named and value in hub:
            return value
        # a local name without a separator, such as 'resnet18', may well stand elsewhere with another meaning
        if value in local and (named or (re.search(r"[\\/]", value) and key != "hub_model_id")):
            return _local_name(value)
        return _local_name(value) if _is_path(value, named) else value

    return {file: _without_machine_keys(clean(content), content) for file, content in contents.items()}


def find_leaks(data: bytes, *, secrets: Iterable[str], paths: Iterable[str | Path]) -> list[str]:
    """What a file holds that may not leave, in words that do not repeat it.

    Text is searched as it stands and as JSON, HTML and Markdown write it; a PNG's compressed text is unpacked.

    Args:
        data: A file's bytes.
        secrets: Tokens and passwords, at least 8 characters each; shorter ones are left alone.
        paths: Folders of this machine; the root and relative ones are left alone.

    Returns:
        A phrase for each kind of thing found; empty for a clean file.
    """
    known = [needle for secret in secrets if len(secret) >= MIN_SECRET for needle in _spellings(secret)]
    folders = [needle for path in paths if _is_folder(path) for needle in _spellings(str(path).rstrip("/\\"))]
    searches = {
        "a secret of this environment": [re.compile(re.escape(needle)) for needle in known],
        "what looks like a token": [TOKEN_IN_FILE],
        "a URL with a password": [PASSWORD_IN_FILE],
        # /home/x is in /home/x/y and in file:///home/x, not in /home/xy nor in https://host/home/x
        "the path of a folder of this machine": [
            re.compile(rb"(?<![\w.~-])" + re.escape(needle) + rb"(?![\w-])") for needle in folders
        ],
    }
    views = list(_views(data))
    return [
        what for what, patterns in searches.items() if any(pattern.search(v) for pattern in patterns for v in views)
    ]


def machine_folders(*more: Path) -> set[str]:
    """Home folder, working folder and those given, as they are called and as they resolve."""
    folders = (Path.home(), Path.cwd(), *(path.absolute() for path in more))
    return {str(path) for folder in folders for path in (folder, folder.resolve())}


def _folders_and_ids(contents: Mapping[str, Any]) -> tuple[set[str], set[str]]:
    """Names that were folders, and names that the Hub has resolved."""
    pairs = [pair for content in contents.values() for pair in _named(content)]
    hub = {name for name, revision in pairs if revision is not None and not _PATH.fullmatch(name)}
    built_in = (LOCAL_PREFIX, BUILT_IN_PREFIX)
    return {name for name, _ in pairs if name not in hub and not name.startswith(built_in)}, hub


def _own_names(contents: Iterable[Any]) -> set[str]:
    """What the run's own model is called in its metrics and analysis, unless they are of a model on the Hub."""
    records = [content.get("model") for content in contents if isinstance(content, Mapping) and "keys" not in content]
    own = [record for record in records if isinstance(record, Mapping) and record.get("revision") is None]
    return {record["name"] for record in own if isinstance(record.get("name"), str)}


def _named(content: Any) -> Iterator[tuple[str, Any]]:
    """Every name with its revision."""
    if isinstance(content, Mapping):
        for name, revision in (("name", "revision"), *((key, named.revision) for key, named in NAMES.items())):
            if revision in content and isinstance(content.get(name), str):
                yield content[name], content[revision]
    children = content.values() if isinstance(content, Mapping) else content if isinstance(content, list) else ()
    for child in children:
        yield from _named(child)


def _without_machine_keys(cleaned: Any, content: Any) -> Any:
    """A recipe's record without the keys that say where it ran, and with a path to its file that others can follow."""
    if not (isinstance(cleaned, dict) and isinstance(cleaned.get("keys"), dict)):
        return cleaned
    kept = {
        name: value
        for name, value in cleaned["keys"].items()
        if not (_MACHINE_KEYS.fullmatch(name) or (name in _MACHINE_FILES and isinstance(value, str)))
    }
    if isinstance(content.get("recipe"), str):
        parts = re.split(r"[\\/]", content["recipe"])
        below_recipes = parts[0] == "recipes" and ".." not in parts
        cleaned = cleaned | {"recipe": content["recipe"] if below_recipes else parts[-1]}
    return cleaned | {"keys": kept}


def _is_path(value: str, named: bool) -> bool:
    """Whether a string is a path; a name may be that of a folder here without looking like a path."""
    return bool(_PATH.fullmatch(value)) or (named and (value.count("/") > 1 or Path(value).is_dir()))


def _is_folder(path: str | Path) -> bool:
    return Path(path).is_absolute() and Path(path) != Path(Path(path).anchor)


def _local_name(name: str) -> str:
    """``local:`` and the last component, where that is a name at all and not the home folder's."""
    last = re.split(r"[\\/]+", name.rstrip("\\/"))[-1]
    nameless = re.fullmatch(r"\.*|~.*|[A-Za-z]:", last) or last == Path.home().name
    return LOCAL_PREFIX + ("unnamed" if nameless else last)


def _spellings(text: str) -> set[bytes]:
    """A text as it is and as JSON writes it."""
    return {text.encode(), json.dumps(text)[1:-1].encode(), json.dumps(text, ensure_ascii=False)[1:-1].encode()}


def _views(data: bytes) -> Iterator[bytes]:
    """A file's bytes, and its text once more without the escapes of HTML and Markdown."""
    yield data
    if data.startswith(_PNG):
        yield from _unpacked_text(data)
        return
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return
    yield html.unescape(re.sub(r"\\([^A-Za-z0-9\s])", r"\1", text)).encode()


def _unpacked_text(data: bytes) -> Iterator[bytes]:
    """The text chunks of a PNG, each by itself: a checksum follows it at once; compressed ones unpacked."""
    position = len(_PNG)
    while position + 12 <= len(data):
        length, kind = int.from_bytes(data[position : position + 4], "big"), data[position + 4 : position + 8]
        chunk = data[position + 8 : position + 8 + length]
        if kind in (b"tEXt", b"iTXt"):
            yield chunk
        if kind in (b"zTXt", b"iTXt"):
            for start in (m.start() for m in re.finditer(rb"\x78[\x01\x5e\x9c\xda]", chunk)):
                try:
                    yield zlib.decompress(chunk[start:])
                except zlib.error:  # no compressed text begins here
                    continue
        position += 12 + length
