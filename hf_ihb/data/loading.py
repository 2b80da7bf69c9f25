"""A data set by its name -> splits, with images in memory, in a file, or decoded when they are asked for."""

import io
import itertools
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import datasets
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from hf_ihb.access import is_local
from hf_ihb.config.data import DataArguments
from hf_ihb.data.decode import PIL_MODES, EncodedImages, Geometry, default_workers, size_of_first
from hf_ihb.data.decoded_cache import DecodedCache, decoded_root
from hf_ihb.data.hub import fetch, find_columns, undecoded
from hf_ihb.data.labels import classes_of
from hf_ihb.data.overlap import refuse_shared_images
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

    def through(self, geometry: Geometry) -> "_Part":
        return replace(self, encoded=self.encoded.through(geometry))


@dataclass(frozen=True)
class ImageSource:
    """A data set whose rows are known and whose images are not decoded yet.

    Attributes:
        args: Which data set, and how it is decoded.
        parts: Its splits.
        revision: The Hub commit, None for local sets.
    """

    args: DataArguments
    parts: Mapping[str, _Part]
    revision: str | None

    @property
    def label_names(self) -> list[str]:
        """Class names in label order."""
        return self.parts["train"].names

    @cached_property
    def train(self) -> StoredSplit:
        """The training images, whole ones of one size."""
        return _built(self.args, self.parts["train"], self._way)

    @cached_property
    def _way(self) -> Way:
        return _choose(self.args, self.parts)

    def decoded(self, geometry: Geometry | None = None) -> ImageData:
        """All splits.

        Args:
            geometry: Of the image processor of the model that is evaluated: validation and test images go through it
                once, from what is encoded, as `pipeline` would show them to the saved model. Whole images like those of
                the training split if None.

        Raises:
            DataError: If a row cannot be used.
            CacheError: If decoded images cannot be stored.
        """
        parts = dict(self.parts)
        for name in parts.keys() - {"train"} if geometry is not None else ():
            parts[name] = parts[name].through(geometry)
        train = self.train
        grows = sum(p.encoded.num_bytes for p in parts.values()) > sum(p.encoded.num_bytes for p in self.parts.values())
        way = _choose(self.args, parts) if grows else self._way
        splits = {name: _built(self.args, part, way) for name, part in parts.items() if name != "train"}
        validation = splits.get("validation", splits["test"])
        return ImageData(train, validation, splits["test"], self.args.dataset_name, self.revision)


def open_image_data(args: DataArguments) -> ImageSource:
    """Finds, checks and splits a data set; decodes nothing but its first image.

    Raises:
        RecipeError: If a validation split is asked for and left out by `selection_split`.
        DataError: If it cannot be found, a column or split is missing, or splits share images.
    """
    parts, revision = _all_parts(args)
    note = refuse_shared_images({name: part.encoded for name, part in parts.items()})
    if note is not None and _shows():
        print(note, flush=True)
    return ImageSource(args, parts, revision)


def load_image_data(args: DataArguments) -> ImageData:
    """Loads, checks and splits a data set; decodes it as `decode` says, to whole images of one size.

    Raises:
        RecipeError: If a validation split is asked for and left out by `selection_split`, or a split has two roles.
        DataError: If it cannot be found, a column or split is missing, splits share images, or a row cannot be used.
        CacheError: If decoded images cannot be stored.
    """
    return open_image_data(args).decoded()


def load_image_split(
    args: DataArguments, split: str, geometry: Geometry | None = None
) -> tuple[StoredSplit, str | None]:
    """One split, and the Hub commit; nothing else is decoded.

    Args:
        args: Which data set, and how it is split.
        split: ``train``, ``validation`` or ``test``.
        geometry: Of the image processor of the model that is shown it; whole images as `load_image_data` makes them if
            None.

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
    part = part if geometry is None else part.through(geometry)
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
    # in this order, whichever of them the set has of its own
    return {name: _limited(args, parts[name], limit, name) for name, limit in limits.items() if name in parts}, revision


def _limited(args: DataArguments, part: _Part, limit: int | None, name: str) -> _Part:
    return part.select(sample_of_labels(part.labels, limit, args.split_seed, f"{args.dataset_name} {name}"))


def _refuse_validation(args: DataArguments) -> None:
    for name, default in (("validation_split", None), ("validation_fraction", DataArguments.validation_fraction)):
        if (value := getattr(args, name)) != default:
            raise RecipeError(
                f"keys 'selection_split' and '{name}' contradict: 'test' holds no images out, found {name}={value!r}"
            )


def _stored_parts(args: DataArguments) -> tuple[dict[str, _Part], str | None]:
    _check_roles(args)
    tables, revision = fetch(args)
    wanted = {"train": args.train_split, "test": args.test_split}
    if args.selection_split != "test" and (name := args.validation_split or _validation_among(args, tables)):
        wanted["validation"] = name
    _require(args, tables, wanted)
    return _parts(args, tables, wanted, args.train_split, revision), revision


def _check_roles(args: DataArguments) -> None:
    """Refuses a split that is to be two things, before anything is loaded."""
    roles = {"train_split": args.train_split, "validation_split": args.validation_split, "test_split": args.test_split}
    for (one, name), (other, same) in itertools.combinations(roles.items(), 2):
        if name == same:
            remedy = "give them different splits"
            if "train_split" not in (one, other):
                remedy += ", or 'selection_split' test to select on the images that are reported"
            raise RecipeError(f"keys '{one}' and '{other}' contradict: both name split '{name}'; {remedy}")


def _validation_among(args: DataArguments, tables: datasets.DatasetDict) -> str | None:
    """A split that is called a validation split and is none of the others."""
    names = [name for name in _VALIDATION_NAMES if name in tables]
    free = [name for name in names if name not in (args.train_split, args.test_split)]
    if names and not free and _shows():
        share = f"{args.validation_fraction:g} of split '{args.train_split}' is held out for validation"
        print(f"split '{names[0]}' is taken for something else; {share}", flush=True)
    return free[0] if free else None


def _test_part(args: DataArguments) -> tuple[_Part, str | None]:
    tables, revision = fetch(args)
    wanted = {"test": args.test_split}
    _require(args, tables, wanted)
    # columns, classes and size are the training split's, so that images are those a run has evaluated
    reference = args.train_split if len(tables.get(args.train_split, ())) else args.test_split
    test = _parts(args, tables, wanted, reference, revision, complete=reference == args.train_split)["test"]
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
    *,
    complete: bool = True,
) -> dict[str, _Part]:
    """The wanted splits with columns, classes (all of them, if `complete`) and image size of a reference split."""
    image_column, label_column = find_columns(args, tables[reference].features)
    local, where = is_local(args.dataset_name), _where(args, reference)
    classes = classes_of(tables[reference], label_column, where, compact=args.compact_labels, complete=complete)
    images = {
        split: undecoded(tables[split], image_column, _where(args, split)) for split in {*wanted.values(), reference}
    }
    if args.image_size is None:
        size = size_of_first(images[reference], image_column, where, local)
    else:
        size = (args.image_size, args.image_size)
    parts = {}
    for part, split in wanted.items():
        # a commit of the Hub is the same everywhere; what a folder holds is known by the fingerprint of its files
        identity = (args.dataset_name, args.dataset_config_name or "", revision, split)
        if revision is None:
            identity = (tables[split]._fingerprint,)
        encoded = EncodedImages(
            table=images[split],
            column=image_column,
            rows=np.arange(len(images[split])),
            size=size,
            resizes=args.image_size is not None or split != reference,
            mode=PIL_MODES[args.color_mode],
            where=_where(args, split),
            local=local,
            identity=identity,
            stored_mode=getattr(tables[split].features[image_column], "mode", None),
        )
        labels = classes.labels(tables[split][label_column], encoded.where)
        parts[part] = _Part(encoded, labels, classes.names)
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
        return ImageSplit(images, part.labels, part.names, part.encoded)
    root = decoded_root(args.decoded_cache_dir)
    folder = Path(args.dataset_name).expanduser()
    if folder.is_dir() and root.resolve().is_relative_to(folder.resolve()):
        raise RecipeError(f"key 'decoded_cache_dir': expected a folder outside of the data set, found {root}")
    cache = DecodedCache(root, part.encoded)
    # the others of this machine wait meanwhile
    cache.open(workers or default_workers() * local_processes(), show=_shows())
    return MappedSplit(cache, part.labels, part.names)
