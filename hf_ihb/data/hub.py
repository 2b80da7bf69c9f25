"""Any `datasets` image-classification set: its splits at one commit, and its columns."""

import contextlib
import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import data_files
from datasets.naming import camelcase_to_snakecase
from datasets.packaged_modules.cache.cache import Cache

from hf_ihb.access import HUB_ERRORS, explain, is_offline, resolve_commit
from hf_ihb.config.data import DataArguments
from hf_ihb.errors import DataError

# What reading a data set of any content makes libraries raise.
_UNREADABLE = (*HUB_ERRORS, RuntimeError, TypeError, LookupError, datasets.exceptions.DatasetsError)


def fetch(args: DataArguments) -> tuple[datasets.DatasetDict, str | None]:
    """Every split, and the commit of the Hub that all of it is of; None for a folder of this machine.

    Raises:
        DataError: If the data set cannot be found, reached or read.
    """
    name = args.dataset_name
    commit = resolve_commit(name, args.dataset_revision, repo_type="dataset", what="data set")
    try:
        if commit is None:
            with _name_as_it_stands(folder := Path(name).expanduser()):
                splits = datasets.load_dataset(str(folder), args.dataset_config_name)
        else:
            splits = _prepared(args, commit) if is_offline("dataset") else _downloaded(args, commit)
    except _UNREADABLE as error:
        if commit is None:
            # `datasets` says of whatever goes wrong in the middle that something did
            said = isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__
            reason = " ".join(str(said or error).split())[:300]
            raise DataError(f"folder '{name}' could not be loaded: {reason}") from error
        raise DataError(explain(error, "data set", name, commit)) from error
    if not isinstance(splits, datasets.DatasetDict):
        raise DataError(f"{name}: expected a data set with splits, found {type(splits).__name__}")
    return splits, commit


@contextlib.contextmanager
def _name_as_it_stands(folder: Path) -> Iterator[None]:
    """Brackets, stars and question marks in a folder's name, which `datasets` reads as a pattern, for that name alone.

    It puts the name before the patterns of its own or of a README, all in one function.
    """
    if not glob.has_magic(str(folder.resolve())):
        yield
        return
    resolve = data_files.resolve_pattern

    def resolve_in(pattern: str, base_path: str, *args: Any, **options: Any) -> list[str]:
        return resolve(pattern, glob.escape(base_path), *args, **options)

    data_files.resolve_pattern = resolve_in
    try:
        yield
    finally:
        data_files.resolve_pattern = resolve


def _downloaded(args: DataArguments, commit: str) -> datasets.DatasetDict:
    """The splits at a commit, from the repo's own files alone."""
    builder = datasets.load_dataset_builder(args.dataset_name, args.dataset_config_name, revision=commit)
    if isinstance(builder, Cache):  # the Hub fell silent, and `datasets` went on with whatever commit it has last seen
        return _prepared(args, commit)
    own = f"hf://datasets/{args.dataset_name}@{commit}/"
    files = builder.config.data_files or {}
    if foreign := [file for part in files.values() for file in part if not file.startswith(own)]:
        raise DataError(f"data set '{args.dataset_name}': expected files of its repo alone, found '{foreign[0]}'")
    builder.download_and_prepare()
    return builder.as_dataset()


def _prepared(args: DataArguments, commit: str) -> datasets.DatasetDict:
    """The splits that `datasets` has in its cache of a commit; by itself it would take the newest of any commit."""
    name = args.dataset_name
    namespace, _, short = name.rpartition("/")
    folder = "___".join(filter(None, (namespace, camelcase_to_snakecase(short))))
    ready = Path(datasets.config.HF_DATASETS_CACHE, folder).glob(f"*/*/{commit}/dataset_info.json")
    found = {path.parts[-4]: path.parts[-3] for path in ready}
    if args.dataset_config_name is not None:
        found = {config: version for config, version in found.items() if config == args.dataset_config_name}
    if not found:
        raise DataError(
            f"data set '{name}': commit {commit} is not in the cache, and the Hub cannot be asked; load it once online"
        )
    if len(found) > 1:
        raise DataError(f"data set '{name}': found {' and '.join(sorted(found))}; give 'dataset_config_name'")
    ((config, version),) = found.items()
    return Cache(dataset_name=short, repo_id=name, config_name=config, version=version, hash=commit).as_dataset()


def find_columns(args: DataArguments, features: datasets.Features) -> tuple[str, str]:
    """Columns of images and labels: those named, or the only ones of their type.

    Raises:
        DataError: If there is none, or more than one.
    """

    def find(key: str, given: str | None, fitting: list[str], kind: str) -> str:
        if given is not None:
            if given not in features:
                raise DataError(f"{args.dataset_name}: key '{key}': no column '{given}'; it has {', '.join(features)}")
            return given
        if len(fitting) != 1:
            found = "none" if not fitting else " and ".join(fitting)
            raise DataError(
                f"{args.dataset_name}: expected one {kind} column, found {found} among {', '.join(features)}; "
                f"give '{key}'"
            )
        return fitting[0]

    images = [n for n, f in features.items() if isinstance(f, datasets.Image)]
    labels = [n for n, f in features.items() if isinstance(f, datasets.ClassLabel)]
    if not labels:
        labels = [n for n in ("label", "labels") if n in features]
    return (
        find("image_column_name", args.image_column_name, images, "image"),
        find("label_column_name", args.label_column_name, labels, "label"),
    )


def undecoded(split: datasets.Dataset, column: str, where: str) -> datasets.Dataset:
    """A split's column of images alone, as the data set stores them.

    Raises:
        DataError: If it holds something else.
    """
    try:
        return split.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    except (pa.ArrowException, TypeError, ValueError, NotImplementedError) as error:
        found = getattr(split.features[column], "dtype", type(split.features[column]).__name__)
        raise DataError(
            f"{where}, column '{column}': expected images, found {found}; give 'image_column_name'"
        ) from error
