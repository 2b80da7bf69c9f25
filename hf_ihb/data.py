"""Any `datasets` image-classification set -> uint8 splits, decoded once."""

import io
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets.naming import camelcase_to_snakecase
from datasets.packaged_modules.cache.cache import Cache
from huggingface_hub import constants
from PIL import Image, UnidentifiedImageError
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from tqdm.auto import tqdm
from transformers import default_data_collator

from hf_ihb.access import HUB_ERRORS, explain, is_local, is_offline, resolve_commit
from hf_ihb.arguments import DataArguments
from hf_ihb.errors import DataError, RecipeError

DIGITS = "sklearn:digits"
MAX_PIXELS = 1 << 26
_IS_WORKER = os.environ.get("LOCAL_RANK", "0") != "0"  # one progress bar a machine
_PIL_MODES = {"rgb": "RGB", "grayscale": "L"}
# What reading a data set of any content makes libraries raise.
_UNREADABLE = (*HUB_ERRORS, RuntimeError, TypeError, LookupError, datasets.exceptions.DatasetsError)
_VALIDATION_NAMES = ("validation", "valid", "val", "dev")


class ImageSplit(torch.utils.data.Dataset):
    """Decoded images of one split; a batch is one gather.

    An item is ``{"pixel_values": uint8 (C, H, W), "labels": int, "index": int}``. A `DataLoader` asks for a whole batch
    at once and gets the stacked dictionary; `collate_images` passes it on.

    Args:
        images: ``(N, C, H, W)`` uint8.
        labels: ``(N,)`` int64 in [0, len(label_names)).
        label_names: Name of each class, in label order.
    """

    def __init__(self, images: Tensor, labels: Tensor, label_names: Sequence[str]) -> None:
        self.images, self.labels, self.label_names = images, labels, list(label_names)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.images[index], "labels": int(self.labels[index]), "index": index}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        index = torch.as_tensor(indices)
        return {"pixel_values": self.images[index], "labels": self.labels[index], "index": index}

    def select(self, indices: Tensor | np.ndarray) -> "ImageSplit":
        """The rows at `indices`, renumbered from 0."""
        index = torch.as_tensor(indices)
        return ImageSplit(self.images[index], self.labels[index], self.label_names)

    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel over all pixels, in [0, 1], to four decimals."""
        levels = torch.arange(256, dtype=torch.float64) / 255
        # counting levels is exact and needs no float copy of the images
        counts = torch.stack([torch.bincount(c.flatten(), minlength=256) for c in self.images.unbind(1)]).double()
        share = counts / counts.sum(dim=1, keepdim=True)
        mean = share @ levels
        std = (share @ levels.square() - mean.square()).clamp_min(0).sqrt()
        return [round(v, 4) for v in mean.tolist()], [max(round(v, 4), 1e-4) for v in std.tolist()]


@dataclass
class ImageData:
    """The splits of a data set; `revision` is the Hub commit, None for local sets.

    Where epochs are selected on the test split, `validation` is `test`.
    """

    train: ImageSplit
    validation: ImageSplit
    test: ImageSplit
    name: str
    revision: str | None

    @property
    def label_names(self) -> list[str]:
        """Class names in label order."""
        return self.train.label_names

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the stored images."""
        return tuple(self.train.images.shape[-2:])


def collate_images(batch: dict[str, Tensor] | list[dict[str, Any]]) -> dict[str, Tensor]:
    """Passes on a batch that `ImageSplit` made; stacks items of any data set as `default_data_collator` does."""
    return batch if isinstance(batch, dict) else default_data_collator(batch)


def load_image_data(args: DataArguments) -> ImageData:
    """Loads, checks, decodes and splits a data set.

    Raises:
        RecipeError: If a validation split is asked for and left out by `selection_split`.
        DataError: If it cannot be found, a column or split is missing, or a row cannot be used.
    """
    selects_on_test = args.selection_split == "test"
    if selects_on_test:
        _refuse_validation(args)
    train, validation, test, revision = _load_digits(args) if args.dataset_name == DIGITS else _load_hub(args)
    if validation is None and not selects_on_test:
        rest, held_out = _stratified(train, args.validation_fraction, args.split_seed, f"{args.dataset_name} train")
        train, validation = train.select(rest), train.select(held_out)
    train = _limit(train, args.max_train_samples, args.split_seed, f"{args.dataset_name} train")
    test = _limit(test, args.max_eval_samples, args.split_seed, f"{args.dataset_name} test")
    if selects_on_test:
        validation = test
    else:
        validation = _limit(validation, args.max_eval_samples, args.split_seed, f"{args.dataset_name} validation")
    return ImageData(train, validation, test, args.dataset_name, revision)


def load_image_split(args: DataArguments, split: str) -> tuple[ImageSplit, str | None]:
    """One split as `load_image_data` makes it, and the Hub commit; nothing else is decoded unless it is split off.

    Args:
        args: Which data set, and how it is split.
        split: ``train``, ``validation`` or ``test``.

    Raises:
        RecipeError: If a validation split is asked for and left out by `selection_split`.
        DataError: If it cannot be found, a column or split is missing, or a row cannot be used.
    """
    if split == "test" and args.dataset_name != DIGITS:
        images, revision = _load_test(args)
        return _limit(images, args.max_eval_samples, args.split_seed, f"{args.dataset_name} test"), revision
    data = load_image_data(args)
    return getattr(data, split), data.revision


def _refuse_validation(args: DataArguments) -> None:
    for name, default in (("validation_split", None), ("validation_fraction", DataArguments.validation_fraction)):
        if (value := getattr(args, name)) != default:
            raise RecipeError(
                f"keys 'selection_split' and '{name}' contradict: 'test' holds no images out, found {name}={value!r}"
            )


def stratified_sample(split: ImageSplit, count: int, seed: int, where: str) -> Tensor:
    """Sorted row numbers of `count` images, every class in proportion; of all images where there are no more.

    Raises:
        DataError: If `count` does not hold every class.
    """
    if count >= len(split):
        return torch.arange(len(split))
    return torch.from_numpy(_stratified(split, count, seed, where)[1])


def _stratified(split: ImageSplit, share: float | int, seed: int, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Sorted row numbers of (the rest, a stratified part)."""
    try:
        rest, part = train_test_split(
            np.arange(len(split)), test_size=share, stratify=split.labels.numpy(), random_state=seed
        )
    except ValueError as error:
        raise DataError(
            f"{where}: cannot be split by class ({error}); give 'validation_split' or more images"
        ) from error
    return np.sort(rest), np.sort(part)


def _limit(split: ImageSplit, limit: int | None, seed: int, where: str) -> ImageSplit:
    if limit is None or limit >= len(split):
        return split
    return split.select(stratified_sample(split, limit, seed, where))


def _load_digits(args: DataArguments) -> tuple[ImageSplit, None, ImageSplit, None]:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels; every fifth of each class is the test split."""
    bunch = load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    images = [Image.fromarray(p).convert(_PIL_MODES[args.color_mode]) for p in pixels]
    size = args.image_size or pixels.shape[-1]
    decoded = torch.stack([_to_tensor(image, (size, size)) for image in images])
    everything = ImageSplit(decoded, torch.from_numpy(bunch.target).long(), [str(n) for n in bunch.target_names])
    train, test = _stratified(everything, 0.2, 0, DIGITS)
    return everything.select(train), None, everything.select(test), None


def _load_hub(args: DataArguments) -> tuple[ImageSplit, ImageSplit | None, ImageSplit, str | None]:
    splits, revision = _fetch(args)
    name = args.validation_split or next((n for n in _VALIDATION_NAMES if n in splits), None)
    wanted = {"train_split": args.train_split, "test_split": args.test_split}
    if name is not None and args.selection_split != "test":
        wanted["validation_split"] = name
    _require(args, splits, wanted)
    decoded = _decode_splits(args, splits, wanted, args.train_split)
    return decoded["train_split"], decoded.get("validation_split"), decoded["test_split"], revision


def _load_test(args: DataArguments) -> tuple[ImageSplit, str | None]:
    splits, revision = _fetch(args)
    wanted = {"test_split": args.test_split}
    _require(args, splits, wanted)
    # columns, classes and size are the training split's, so that images are those a run has evaluated
    reference = args.train_split if len(splits.get(args.train_split, ())) else args.test_split
    return _decode_splits(args, splits, wanted, reference)["test_split"], revision


def _require(args: DataArguments, splits: datasets.DatasetDict, wanted: dict[str, str]) -> None:
    for key, split in wanted.items():
        if split not in splits:
            raise DataError(f"{args.dataset_name}: key '{key}': no split '{split}'; it has {', '.join(splits)}")
        if len(splits[split]) == 0:
            raise DataError(f"{args.dataset_name}: split '{split}' is empty")


def _decode_splits(
    args: DataArguments, splits: datasets.DatasetDict, wanted: dict[str, str], reference: str
) -> dict[str, ImageSplit]:
    image_column, label_column = _columns(args, splits[reference].features)
    names = _label_names(splits[reference], label_column)
    size = (args.image_size, args.image_size) if args.image_size else None
    if size is None and reference not in wanted.values():  # every split gets the size of the first image of `reference`
        first = splits[reference].select([0]).cast_column(image_column, datasets.Image(decode=False))[0]
        where = f"{args.dataset_name}, split '{reference}', row 0"
        image = _open(first[image_column], _PIL_MODES[args.color_mode], where, is_local(args.dataset_name))
        size = (image.height, image.width)
    decoded = {}
    for key, split in wanted.items():
        where = f"{args.dataset_name}, split '{split}'"
        labels = _labels(splits[split][label_column], names, where)
        mode, local = _PIL_MODES[args.color_mode], is_local(args.dataset_name)
        images = _decode(splits[split], image_column, size, mode, where, local)
        size = tuple(images.shape[-2:])
        decoded[key] = ImageSplit(images, labels, names)
    return decoded


def _fetch(args: DataArguments) -> tuple[datasets.DatasetDict, str | None]:
    """Every split, and the commit of the Hub that all of it is of."""
    name = args.dataset_name
    commit = resolve_commit(name, args.dataset_revision, repo_type="dataset", what="data set")
    try:
        if commit is None:
            splits = datasets.load_dataset(str(Path(name).expanduser()), args.dataset_config_name)
        else:
            splits = _prepared(args, commit) if is_offline("dataset") else _downloaded(args, commit)
    except _UNREADABLE as error:
        if commit is None:
            reason = " ".join(str(error).split())[:300]
            raise DataError(f"folder '{name}' could not be loaded: {reason}") from error
        raise DataError(explain(error, "data set", name, commit)) from error
    if not isinstance(splits, datasets.DatasetDict):
        raise DataError(f"{name}: expected a data set with splits, found {type(splits).__name__}")
    return splits, commit


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


def _in_cache(path: str | None) -> bool:
    """Whether a path lies in a folder that data sets of the Hub are downloaded to."""
    folders = (constants.HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE)
    return path is not None and any(Path(os.path.abspath(path)).is_relative_to(os.path.abspath(f)) for f in folders)


def _columns(args: DataArguments, features: datasets.Features) -> tuple[str, str]:
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


def _label_names(split: datasets.Dataset, column: str) -> list[str]:
    feature = split.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names)
    values = [v for v in split[column] if v is not None]
    if not all(isinstance(v, int) for v in values):
        raise DataError(f"column '{column}': expected class labels or integers, found {type(values[0]).__name__}")
    return [str(n) for n in range(max(values, default=-1) + 1)]


def _labels(column: Sequence[int | None], names: list[str], where: str) -> Tensor:
    values = list(column)
    for row, value in enumerate(values):
        if value is None or not 0 <= value < len(names):
            raise DataError(f"{where}, row {row}: expected a label in [0, {len(names)}), found {value}")
    return torch.tensor(values)


def _decode(
    split: datasets.Dataset, column: str, size: tuple[int, int] | None, mode: str, where: str, local: bool
) -> Tensor:
    """``(N, C, H, W)`` uint8 in one of PIL's modes; the first image fixes the size if `size` is None."""
    raw = split.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    images: Tensor | None = None
    for row, record in enumerate(tqdm(raw, desc=f"Decoding {where}", unit="img", mininterval=1.0, disable=_IS_WORKER)):
        image = _open(record[column], mode, f"{where}, row {row}", local)
        if images is None:
            fixed = size is not None
            size = size or (image.height, image.width)
            images = torch.empty((len(raw), len(image.getbands()), *size), dtype=torch.uint8)
        if not fixed and (image.height, image.width) != size:
            raise DataError(
                f"{where}, row {row}: expected {size[0]} x {size[1]} px like row 0, found {image.height} x "
                f"{image.width}; give 'image_size' to resize"
            )
        images[row] = _to_tensor(image, size)
    return images


def _open(record: dict[str, Any], mode: str, where: str, local: bool) -> Image.Image:
    """An image in one of PIL's modes; a data set of the Hub brings its images or has them in the cache."""
    try:
        if record["bytes"] is None and not local and not _in_cache(record["path"]):
            raise DataError(f"{where}: expected an image of the data set, found the path {record['path']!r}")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            source = io.BytesIO(record["bytes"]) if record["bytes"] is not None else record["path"]
            with Image.open(source) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise DataError(f"{where}: expected at most {MAX_PIXELS} px, found {image.width} x {image.height}")
                return image.convert(mode)
    except (
        OSError,
        SyntaxError,
        ValueError,
        TypeError,
        Image.DecompressionBombWarning,
        Image.DecompressionBombError,
        UnidentifiedImageError,
    ) as error:
        raise DataError(f"{where}: the image cannot be decoded ({' '.join(str(error).split())[:120]})") from error


def _to_tensor(image: Image.Image, size: tuple[int, int]) -> Tensor:
    if (image.height, image.width) != size:
        image = image.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    pixels = np.array(image).reshape(*size, -1)  # a grey image has no axis for its channel
    return torch.from_numpy(pixels).permute(2, 0, 1)
