"""A data set by its name -> splits, with images in memory, in a file, or decoded when they are asked for."""

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import datasets
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from hf_ihb.access import is_local
from hf_ihb.config.data import DataArguments
from hf_ihb.data.decode import PIL_MODES, EncodedImages, default_workers, size_of_first
from hf_ihb.data.decoded_cache import DecodedCache, decoded_root
from hf_ihb.data.hub import class_names, fetch, find_columns, read_labels
from hf_ihb.data.placement import available_memory, local_processes, readable_bytes
from hf_ihb.data.splits import (
    ImageData,
    ImageSplit,
    MappedSplit,
    StoredSplit,
    StreamedSplit,
    sample_of_labels,
    split_by_class,
)
from hf_ihb.errors import DataError, RecipeError

DIGITS = "sklearn:digits"
DISK_SHARE = 0.8
_VALIDATION_NAMES = ("validation", "valid", "val", "dev")
Way = Literal["memory", "file", "stream"]
_WAYS = {"file": "once, into a file that is mapped into memory", "stream": "in every epoch, when images are asked for"}


@dataclass(frozen=True)
class _Part:
    """A split before any of its images is decoded."""

    encoded: EncodedImages
    labels: Tensor
    names: list[str]

    def select(self, rows: Tensor) -> "_Part":
        return replace(self, encoded=self.encoded.select(rows), labels=self.labels[rows])


def load_image_data(args: DataArguments) -> ImageData:
    """Loads, checks and splits a data set; decodes it as `decode` says.

    Raises:
        RecipeError: If a validation split is asked for and left out by `selection_split`.
        DataError: If it cannot be found, a column or split is missing, or a row cannot be used.
        CacheError: If decoded images cannot be stored.
    """
    parts, revision = _all_parts(args)
    way = _choose(args, parts)
    splits = {name: _built(args, part, way) for name, part in parts.items()}
    validation = splits.get("validation", splits["test"])
    return ImageData(splits["train"], validation, splits["test"], args.dataset_name, revision)


def load_image_split(args: DataArguments, split: str) -> tuple[StoredSplit, str | None]:
    """One split as `load_image_data` makes it, and the Hub commit; nothing else is decoded.

    Args:
        args: Which data set, and how it is split.
        split: ``train``, ``validation`` or ``test``.

    Raises:
        RecipeError: If a validation split is asked for and left out by `selection_split`.
        DataError: If it cannot be found, a column or split is missing, or a row cannot be used.
        CacheError: If decoded images cannot be stored.
    """
    if split == "test" and args.dataset_name != DIGITS:
        part, revision = _test_part(args)
    else:
        parts, revision = _all_parts(args)
        part = parts.get(split, parts["test"])
    return _built(args, part, _choose(args, {split: part})), revision


# ---- Which rows ----


def _all_parts(args: DataArguments) -> tuple[dict[str, _Part], str | None]:
    """Training, validation (unless epochs are selected on the test split) and test part."""
    selects_on_test = args.selection_split == "test"
    if selects_on_test:
        _refuse_validation(args)
    parts, revision = _digits_parts(args) if args.dataset_name == DIGITS else _stored_parts(args)
    if "validation" not in parts and not selects_on_test:
        train, where = parts["train"], f"{args.dataset_name} train"
        rest, held_out = split_by_class(train.labels, args.validation_fraction, args.split_seed, where)
        parts |= {"train": train.select(rest), "validation": train.select(held_out)}
    limits = {"train": args.max_train_samples, "validation": args.max_eval_samples, "test": args.max_eval_samples}
    return {name: _limited(args, part, limits[name], name) for name, part in parts.items()}, revision


def _limited(args: DataArguments, part: _Part, limit: int | None, name: str) -> _Part:
    return part.select(sample_of_labels(part.labels, limit, args.split_seed, f"{args.dataset_name} {name}"))


def _refuse_validation(args: DataArguments) -> None:
    for name, default in (("validation_split", None), ("validation_fraction", DataArguments.validation_fraction)):
        if (value := getattr(args, name)) != default:
            raise RecipeError(
                f"keys 'selection_split' and '{name}' contradict: 'test' holds no images out, found {name}={value!r}"
            )


def _stored_parts(args: DataArguments) -> tuple[dict[str, _Part], str | None]:
    tables, revision = fetch(args)
    name = args.validation_split or next((n for n in _VALIDATION_NAMES if n in tables), None)
    wanted = {"train": args.train_split, "test": args.test_split}
    if name is not None and args.selection_split != "test":
        wanted["validation"] = name
    _require(args, tables, wanted)
    return _parts(args, tables, wanted, args.train_split, revision), revision


def _test_part(args: DataArguments) -> tuple[_Part, str | None]:
    tables, revision = fetch(args)
    wanted = {"test": args.test_split}
    _require(args, tables, wanted)
    # columns, classes and size are the training split's, so that images are those a run has evaluated
    reference = args.train_split if len(tables.get(args.train_split, ())) else args.test_split
    test = _parts(args, tables, wanted, reference, revision)["test"]
    return _limited(args, test, args.max_eval_samples, "test"), revision


def _require(args: DataArguments, tables: datasets.DatasetDict, wanted: Mapping[str, str]) -> None:
    for part, split in wanted.items():
        if split not in tables:
            raise DataError(f"{args.dataset_name}: key '{part}_split': no split '{split}'; it has {', '.join(tables)}")
        if len(tables[split]) == 0:
            raise DataError(f"{args.dataset_name}: split '{split}' is empty")


def _digits_parts(args: DataArguments) -> tuple[dict[str, _Part], None]:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels; every fifth of each class is the test split."""
    bunch = load_digits()
    encoded = []
    for pixels in np.rint(bunch.images * (255 / 16)).astype(np.uint8):
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        encoded.append({"bytes": stream.getvalue(), "path": None})
    names = [str(n) for n in bunch.target_names]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    table = datasets.Dataset.from_dict({"image": encoded, "label": bunch.target}, features=features)
    (everything,) = _parts(args, {"all": table}, {"all": "all"}, "all", None).values()
    train, test = split_by_class(everything.labels, 0.2, 0, DIGITS)
    return {"train": everything.select(train), "test": everything.select(test)}, None


def _parts(
    args: DataArguments,
    tables: Mapping[str, datasets.Dataset],
    wanted: Mapping[str, str],
    reference: str,
    revision: str | None,
) -> dict[str, _Part]:
    """The wanted splits with columns, classes and image size of a reference split."""
    image_column, label_column = find_columns(args, tables[reference].features)
    names, local = class_names(tables[reference], label_column), is_local(args.dataset_name)
    undecoded = {
        split: tables[split].select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
        for split in {*wanted.values(), reference}
    }
    if args.image_size is None:
        size = size_of_first(undecoded[reference], image_column, _where(args, reference), local)
    else:
        size = (args.image_size, args.image_size)
    parts = {}
    for part, split in wanted.items():
        # a commit of the Hub is the same everywhere; what a folder holds is known by the fingerprint of its files
        identity = (args.dataset_name, args.dataset_config_name or "", revision, split)
        if revision is None:
            identity = (tables[split]._fingerprint,)
        encoded = EncodedImages(
            table=undecoded[split],
            column=image_column,
            rows=np.arange(len(undecoded[split])),
            size=size,
            resizes=args.image_size is not None or split != reference,
            mode=PIL_MODES[args.color_mode],
            where=_where(args, split),
            local=local,
            identity=identity,
        )
        labels = read_labels(tables[split][label_column], names, _where(args, split))
        parts[part] = _Part(encoded, labels, names)
    return parts


def _where(args: DataArguments, split: str) -> str:
    return DIGITS if args.dataset_name == DIGITS else f"{args.dataset_name}, split '{split}'"


# ---- Where their images go ----


def _choose(args: DataArguments, parts: Mapping[str, _Part]) -> Way:
    """How images are decoded; says why where they are not simply kept in memory."""
    if args.decode == "stream":
        return "stream"
    num_bytes, processes = sum(part.encoded.num_bytes for part in parts.values()), local_processes()
    # of what is left, several processes would see more or less as the others fill it, and go different ways
    room = args.decoded_memory_fraction * available_memory(whole=processes > 1) / processes
    if num_bytes <= room:
        return "memory"
    why = f"{readable_bytes(num_bytes)} of pixels, {readable_bytes(room)} of memory for them"
    way: Way = "file"
    if args.decode == "auto":
        caches = [DecodedCache(decoded_root(args.decoded_cache_dir), part.encoded) for part in parts.values()]
        needed, free = sum(cache.bytes_to_write() for cache in caches), DISK_SHARE * caches[0].bytes_free()
        if needed > free:
            way, why = "stream", f"{why}, {readable_bytes(free)} of disk"
    if _shows():
        print(f"decode {args.decode}: images are decoded {_WAYS[way]} ({why})", flush=True)
    return way


def _shows() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"  # one progress bar a machine


def _built(args: DataArguments, part: _Part, way: Way) -> StoredSplit:
    workers = args.preprocessing_num_workers
    if way == "stream":
        return StreamedSplit(part.encoded, part.labels, part.names, workers)
    if way == "memory":
        images = part.encoded.decode_all(workers or default_workers(), show=_shows())
        return ImageSplit(images, part.labels, part.names)
    root = decoded_root(args.decoded_cache_dir)
    folder = Path(args.dataset_name).expanduser()
    if folder.is_dir() and root.resolve().is_relative_to(folder.resolve()):
        raise RecipeError(f"key 'decoded_cache_dir': expected a folder outside of the data set, found {root}")
    cache = DecodedCache(root, part.encoded)
    # the others of this machine wait meanwhile
    cache.open(workers or default_workers() * local_processes(), show=_shows())
    return MappedSplit(cache, part.labels, part.names)
