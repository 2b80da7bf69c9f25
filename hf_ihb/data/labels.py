"""Labels of a data set and of a batch: one class an image, by its number, or class probabilities."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NoReturn

import datasets
import torch
from torch import Tensor

from hf_ihb.config.data import MAX_CLASSES
from hf_ihb.data.decode import RowError
from hf_ihb.errors import DataError

_SUM_TOLERANCE = 0.01  # of a row of probabilities: those in bfloat16 are off by up to 0.004
_SHOWN_IDS = 5
_SEVERAL = "several classes of one image (multi-label) are not learned here"


@dataclass(frozen=True)
class Classes:
    """The classes of a data set.

    Attributes:
        names: Name of each, in label order.
        numbers: What stands in the data set for each of them -> its label; None where that is the label itself.
    """

    names: list[str]
    numbers: dict[int, int] | None = None

    def labels(self, column: Sequence[int | None], where: str) -> Tensor:
        """``(N,)`` int64 of a column.

        Raises:
            DataError: If a label is missing or none of the classes; the first of them.
        """
        values, count = list(column), len(self.names)
        known, expected = range(count), f"a label in [0, {count})"
        if self.numbers is not None:
            known, expected = self.numbers, f"one of the {count} labels of the training split"
        for row, value in enumerate(values):
            if type(value) is not int or value not in known:
                raise DataError(f"{where}, row {row}: expected {expected}, found {value}")
        return torch.tensor(values if self.numbers is None else [self.numbers[value] for value in values])


def classes_of(split: datasets.Dataset, column: str, where: str, *, compact: bool, complete: bool = True) -> Classes:
    """The classes of a split; integers without names are named by their digits.

    Args:
        split: With every class, unless it is not `complete`.
        column: Of the labels.
        where: Data set and split, for errors.
        compact: Whether integers that leave some out are numbered anew, in their order.
        complete: Whether a class without an image is a fault; in a split that is evaluated on it is none.

    Raises:
        DataError: If the column holds no classes, leaves some out, or has more than `MAX_CLASSES`.
    """
    feature, found = split.features[column], f"{where}, column '{column}'"
    if isinstance(feature, datasets.ClassLabel):
        _check_count(feature.num_classes, found)
        return Classes(list(feature.names))
    if not (isinstance(feature, datasets.Value) and feature.dtype.lstrip("u").startswith("int")):
        _refuse(feature, column, where)
    numbers = sorted({value for value in split[column] if value is not None and value >= 0})
    count, known = (numbers[-1] + 1 if numbers else 0), set(numbers)
    if len(known) < count and compact:
        _check_count(len(numbers), found)
        return Classes([str(n) for n in numbers], {number: label for label, number in enumerate(numbers)})
    if len(known) < count and complete:
        missing = list(islice((n for n in range(count) if n not in known), _SHOWN_IDS))
        rest = count - len(known) - len(missing)
        listed = ", ".join(map(str, missing)) + (f" and {rest} more" if rest else "")
        raise DataError(
            f"{found}: expected every integer from 0 to {count - 1}, found {len(known)} of them, without {listed}; "
            "give --compact_labels true to number the classes anew"
        )
    _check_count(count, found)
    return Classes([str(n) for n in range(count)])


def _check_count(count: int, found: str) -> None:
    if count > MAX_CLASSES:
        raise DataError(f"{found}: expected at most {MAX_CLASSES} classes, found {count}; is it the column of labels?")


def _refuse(feature: Any, column: str, where: str) -> NoReturn:
    kind, remedy = getattr(feature, "dtype", type(feature).__name__), "give 'label_column_name', or cast it to integers"
    if isinstance(feature, (datasets.List, datasets.LargeList, list)):
        kind, remedy = "lists", _SEVERAL
    if "string" in kind:
        remedy = f"dataset.class_encode_column('{column}') makes class labels of it: save the data set that it returns"
    raise DataError(f"{where}, column '{column}': expected class labels or integers, found {kind}; {remedy}")


# ---- Of batches ----


class CheckedLabels:
    """A collator whose batches have labels that can be learned from; they are looked at on the host alone.

    Args:
        collate: Makes the batch.
        num_classes: K.
    """

    def __init__(self, collate: Callable, num_classes: int) -> None:
        self.collate, self.num_classes = collate, num_classes

    def __call__(self, items: Any) -> Any:
        """The batch of some items.

        Raises:
            DataError: If a label is not one of the classes, or its row not class probabilities.
        """
        batch = self.collate(items)
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        # those of a split of ours were looked at when it was made
        if isinstance(labels, Tensor) and "split" not in batch:
            check_labels(labels, self.num_classes, batch.get("index"))
        return batch


def check_labels(labels: Tensor, num_classes: int, index: Tensor | None = None) -> None:
    """Refuses labels that are neither classes ``(B,)`` nor class probabilities ``(B, K)``.

    Values on an accelerator are not asked for.

    Args:
        labels: Of a batch or a split.
        num_classes: K.
        index: ``(B,)`` position of each image in its data set, for errors; that in the batch if None.

    Raises:
        DataError: The first row that is neither.
    """
    is_integer = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    shape = tuple(labels.shape)
    if not (labels.ndim == 1 and is_integer) and not (labels.ndim == 2 and shape[1] == num_classes):
        raise RowError(
            f"labels: expected integers (B,) or class probabilities (B, {num_classes}), found {labels.dtype} {shape}"
        )
    if labels.device.type != "cpu":
        return
    if labels.ndim == 1:
        wrong = (labels < 0) | (labels >= num_classes)
        expected = f"a label in [0, {num_classes})"
    else:
        sums = labels.double().sum(1)
        wrong = (labels < 0).any(1) | ~((sums - 1).abs() <= _SUM_TOLERANCE)  # NaN is wrong, too
        expected = "class probabilities, none negative, that sum to 1"
    if wrong.any():
        row = int(wrong.int().argmax())
        number = row if index is None or len(index) != len(labels) else int(index[row])
        found = labels[row].item() if labels.ndim == 1 else f"{_listed(labels[row])}; {_SEVERAL}"
        raise RowError(f"labels, {'row' if index is None else 'image'} {number}: expected {expected}, found {found}")


def _listed(row: Tensor) -> str:
    values = ", ".join(f"{value:.4g}" for value in row[:8].tolist())
    return f"[{values}{', ...' if len(row) > 8 else ''}], which sum to {row.double().sum():.4g}"
