"""A run folder -> a folder of what is pushed: named files and nothing else, without anything of this machine."""

import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_ihb.config.secrets import secrets_in_effect
from hf_ihb.errors import DataError, HubPushError, RecipeError
from hf_ihb.model_card import PLOTS, RunFiles, render_card, run_files
from hf_ihb.redaction import find_leaks, machine_folders, publishable
from hf_ihb.runs.files import read_json, write_json
from hf_ihb.runs.folder import CARD_FILE, HISTORY_FILE, RECIPE_FILE, RECORDS, RunFolder, read_record

_REDACTED = (*RECORDS, CONFIG_NAME, IMAGE_PROCESSOR_NAME)
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_CODE = re.compile(r"([A-Za-z_]\w*)\.[A-Za-z_]\w*")


def stage_run(
    run: Path,
    target: Path,
    *,
    repo_id: str | None,
    license: str | None = None,
    weights: Path | None = None,
    card: Mapping[str, Any] | None = None,
    token: str | None = None,
) -> list[str]:
    """Copies what may leave of a run into a folder, redacted, and renders its card there.

    That is the student (config, safetensors, image processor, code that the config names), the records, the plots of
    `PLOTS` and the card. Everything else stays, whatever it is called.

    Args:
        run: A run folder; it needs its student and ``recipe.json``.
        target: A new or empty folder.
        repo_id: Where it goes; None leaves the model ``local:<folder>``.
        license: Of the model; the run's if None.
        weights: Folder to take the student from instead, such as a checkpoint of the run. Evaluation, metrics, analysis
            and plots are of the run's own weights, and are then left out.
        card: More arguments of `render_card`.
        token: One that the clients will send, beside those of the environment; it is looked for.

    Returns:
        Paths below `target`, sorted.

    Raises:
        HubPushError: If a file is missing, unreadable or a link, or holds what may not leave.
    """
    try:
        sources = _student(run, weights) | _evidence(run, weights)
        recorded = _recorded(sources)
        published = publishable(recorded, repo_id=repo_id)
        options = {**(card or {}), **({"license": license} if license else {})}
        text = render_card(run_files(run, sources, published), repo_id=repo_id, **options)
    except DataError as error:
        raise HubPushError(str(error)) from error
    for name, path in sources.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / name)
    for name, content in published.items():
        if content != recorded[name]:
            write_json(target / name, content)
    (target / CARD_FILE).write_text(text, "utf-8")

    names = sorted([*sources, CARD_FILE])
    _refuse_leaks(run, target, names, secrets_in_effect(token), machine_folders(run, *filter(None, [weights])))
    return names


def card_files(run: Path, *, repo_id: str | None = None) -> RunFiles:
    """What a card says of a run as it stands, without anything of this machine; the student may not be saved yet.

    Args:
        run: A run folder; it needs its ``recipe.json``.
        repo_id: Where it goes; None leaves the model ``local:<folder>``.

    Raises:
        DataError: If a file is not what its name says, or results are of different weights.
    """
    names = (CONFIG_NAME, SAFE_WEIGHTS_NAME, IMAGE_PROCESSOR_NAME, *RECORDS, *PLOTS)
    files = {name: run / name for name in names if (run / name).is_file() or name == RECIPE_FILE}
    recorded = _recorded(files)
    code = [name for name in _code_files(recorded.get(CONFIG_NAME), str(run)) if (run / name).is_file()]
    return run_files(run, [*files, *code], publishable(recorded, repo_id=repo_id))


def run_card(run: Path, *, repo_id: str | None = None, **options: Any) -> str:
    """The text of a run's ``README.md``; `stage_run` writes the same of the same files.

    Args:
        run: A run folder; it needs its ``recipe.json``.
        repo_id: Where it goes; None leaves the model ``local:<folder>``.
        **options: More arguments of `render_card`.

    Raises:
        DataError: If a file is not what its name says, results are of different weights, or an option is not the Hub id
            it should be.
    """
    return render_card(card_files(run, repo_id=repo_id), repo_id=repo_id, **options)


def render_folder(run: Path, target: Path, **options: Any) -> list[str]:
    """`stage_run` into a folder that may hold an earlier rendering, which is replaced when the new one is whole.

    Args:
        run: A run folder.
        target: Where to; its parents are made.
        **options: Those of `stage_run`.

    Returns:
        Paths below `target`, sorted.

    Raises:
        RecipeError: If `target` holds anything else, or cannot be written to.
        HubPushError: If a file is missing, unreadable or a link, or holds what may not leave.
    """
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise RecipeError(f"key 'output_dir': expected a folder, found {target}, which is none")
    if target.is_dir() and any(target.iterdir()) and not _is_rendering(target):
        raise RecipeError(f"key 'output_dir': expected an empty or new folder, found {target} with other content")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as parent:
            staged = Path(parent, "new")
            names = stage_run(run, staged, **options)
            if target.is_dir():
                target.rename(Path(parent, "old"))
            staged.rename(target)
    except OSError as error:
        raise RecipeError(f"key 'output_dir': {target} could not be written ({error.strerror or error})") from error
    return names


def owned_names(names: Iterable[str], config: Any = None) -> set[str]:
    """Those of a repo's files that a push of ours writes, apart from the card.

    Args:
        names: Paths in the repo.
        config: The ``config.json`` among them, which may name code.
    """
    code = set(_code_files(config, "config")) if isinstance(config, dict) else set()
    plain = {*RECORDS, *PLOTS, IMAGE_PROCESSOR_NAME, CONFIG_NAME, *code}
    return {name for name in names if name in plain or is_weights(name)}


def is_weights(name: str) -> bool:
    """Whether a file holds weights that `from_pretrained` would read."""
    return name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME) or bool(_SHARD.fullmatch(name))


def _is_rendering(folder: Path) -> bool:
    """Whether all of a folder was written by `stage_run`; unlike a published record, a run's own names its folder."""
    if not RunFolder(folder).is_ours or "output_dir" in read_json(folder / RECIPE_FILE)["keys"]:
        return False
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()}
    return all(name.endswith(".py") for name in names - owned_names(names) - {CARD_FILE})


def _student(run: Path, weights: Path | None) -> dict[str, Path]:
    """The files that `from_pretrained` needs, by name."""
    folder = weights or run
    # a checkpoint's average has no image processor of its own: it is one folder up
    around = [folder, *(parent for parent in folder.parents if parent.is_relative_to(run))]
    files = {CONFIG_NAME: _required(folder, CONFIG_NAME)}
    if index := _own_file(folder, SAFE_WEIGHTS_INDEX_NAME):
        shards = read_json(index).get("weight_map")
        names = sorted(set(map(str, shards.values()))) if isinstance(shards, dict) else []
        if not names or not all(map(_SHARD.fullmatch, names)):
            raise HubPushError(f"{index}: expected shards such as model-00001-of-00002.safetensors, found {names[:3]}")
        files |= {SAFE_WEIGHTS_INDEX_NAME: index} | {name: _required(folder, name) for name in names}
    else:
        files[SAFE_WEIGHTS_NAME] = _required(folder, SAFE_WEIGHTS_NAME)
    for path in files.values():
        if path.suffix == ".safetensors":
            _check_safetensors(path)
    for name in _code_files(read_json(files[CONFIG_NAME]), str(files[CONFIG_NAME])):
        found = (path for place in around if (path := _own_file(place, name)))
        files[name] = next(found, None) or _required(folder, name)
    processors = (path for place in around if (path := _own_file(place, IMAGE_PROCESSOR_NAME)))
    if processor := next(processors, None):
        files[IMAGE_PROCESSOR_NAME] = processor
    return files


def _evidence(run: Path, weights: Path | None) -> dict[str, Path]:
    """Records and plots, as far as there are any and they are of the weights."""
    names = (*RECORDS, *PLOTS) if weights is None else (RECIPE_FILE, HISTORY_FILE)
    found = {name: path for name in names if (path := _own_file(run, name))}
    return found | {RECIPE_FILE: _required(run, RECIPE_FILE)}


def _code_files(config: Any, where: str) -> Iterator[str]:
    """Modules beside a config that its ``auto_map`` names."""
    auto_map = config.get("auto_map") if isinstance(config, dict) else None
    if auto_map is None:
        return
    if not isinstance(auto_map, dict):
        raise HubPushError(f"{where}: key 'auto_map': expected an object, found {type(auto_map).__name__}")
    for reference in auto_map.values():
        for name in filter(None, reference if isinstance(reference, list) else [reference]):
            if not (found := _CODE.fullmatch(str(name))):
                raise HubPushError(f"{where}: key 'auto_map': expected module.Class, found '{name}'")
            yield f"{found[1]}.py"


def _own_file(folder: Path, name: str) -> Path | None:
    """A regular file of a folder itself; None if there is none.

    Raises:
        HubPushError: If it is a link, or no file: what a link shows may be anything.
    """
    path = folder / name
    if not path.exists() and not path.is_symlink():
        return None
    if path.resolve() != folder.resolve() / name or not path.is_file():
        raise HubPushError(f"{path}: expected a file of the run itself, found a link or no regular file")
    return path


def _required(folder: Path, name: str) -> Path:
    if (path := _own_file(folder, name)) is None:
        raise HubPushError(f"{folder}: expected a run with its student, found no {name}")
    return path


def _recorded(files: Mapping[str, Path]) -> dict[str, Any]:
    """What the JSON files among some of a run hold."""
    return {name: read_record(path) for name, path in files.items() if name in _REDACTED}


def _check_safetensors(path: Path) -> None:
    """Refuses what is cut short, and anything else under the name of weights."""
    try:
        with safe_open(path, "pt") as file:
            file.keys()
    except (OSError, SafetensorError) as error:
        raise HubPushError(f"{path}: expected whole safetensors, found {' '.join(str(error).split())[:200]}") from error


def _refuse_leaks(run: Path, target: Path, names: list[str], secrets: set[str], folders: set[str]) -> None:
    for name in names:
        with (target / name).open("rb") as file:
            # of safetensors the header alone: the rest is numbers
            size = int.from_bytes(file.read(8), "little") if name.endswith(".safetensors") else -1
            file.seek(0)
            data = file.read(8 + size if size >= 0 else -1)
        if found := find_leaks(data, secrets=secrets, paths=folders):
            raise HubPushError(f"{run}: {name}: expected nothing of this machine, found {' and '.join(found)}")
