"""Heatmaps: CKA between layers, and the confusion matrix."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import Colormap, Normalize, PowerNorm
from matplotlib.image import AxesImage

from hf_ihb.plots.style import (
    NORMAL,
    SMALL,
    UNDEFINED_COLOR,
    WIDTH_INCHES,
    new_figure,
    numbers,
    save,
    sections,
    short_names,
)

# Values are written into the cells of matrices up to this many rows and columns.
_CKA_TEXT, _CONFUSION_TEXT = 6, 20
_MOST_LABELS = 30
# Width of a confusion matrix, and of a digit with a little space, in font sizes.
_CONFUSION_INCHES, _DIGIT_WIDTH = 6.1, 0.66


def cka_heatmaps(analyses: Mapping[str, Mapping[str, Any]], path: str | Path, kernel: str = "linear") -> None:
    """CKA of layers with layers: every matrix of every student, one colour scale; layer 0 is at the lower left.

    The scale runs from 0, or from the most negative value, to 1. Undefined cells are grey and crossed out.

    Args:
        analyses: Name of a student -> its analysis.
        path: PNG to write; its folder exists.
        kernel: ``linear`` or ``rbf``.

    Raises:
        ValueError: If there is no analysis, one without the section ``cka``, or a matrix without this kernel.
    """
    matrices = [
        (name, matrix, _cka_values(name, matrix, kernel))
        for name, section in sections(analyses, "cka").items()
        for matrix in section["matrices"]
    ]
    if not matrices:
        raise ValueError(f"nothing to plot: no CKA matrix in the analyses of {list(analyses)}")
    columns = _panel_columns(len(matrices), len(analyses))
    rows = math.ceil(len(matrices) / columns)
    panel = min((WIDTH_INCHES - 0.75) / columns - 0.5, 5.0)  # beside it a colour bar and labels
    figure = new_figure((panel + 0.55) * rows + 0.2, layout="compressed")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    sides = [(_side_name(name, matrix, "rows"), _side_name(name, matrix, "columns")) for name, matrix, _ in matrices]
    names = short_names(dict.fromkeys(name for pair in sides for name in pair), limit=math.floor(panel * 12))
    widest = max(values.shape[1] for *_, values in matrices)
    norm = Normalize(min(0.0, *(np.nanmin(values, initial=0.0) for *_, values in matrices)), 1.0)
    for axis, (_, matrix, values), (row_name, column_name) in zip(axes, matrices, sides, strict=False):
        image = _heatmap(axis, values, norm, "viridis", origin="lower")
        axis.set_box_aspect(1)
        _label_layers(axis.xaxis, matrix["columns"]["layers"], names[column_name], panel)
        _label_layers(axis.yaxis, matrix["rows"]["layers"], names[row_name], panel)
        if max(values.shape) <= _CKA_TEXT:
            cell = panel / min(widest, _CKA_TEXT)
            _write_cells(axis, image, values, lambda i, j, values=values: f"{values[i, j]:.2f}", cell)
    for axis in axes[len(matrices) :]:
        axis.set_visible(False)
    undefined = "; grey: undefined" if any(np.isnan(values).any() for *_, values in matrices) else ""
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02, aspect=40 if rows > 1 else 25)
    bar.set_label(f"debiased CKA, {kernel} kernel{undefined}", fontsize=NORMAL)
    bar.ax.tick_params(labelsize=SMALL)
    save(figure, path)


def _side_name(student: str, matrix: Mapping[str, Any], side: str) -> str:
    """A student is called what its analysis is called here, another model by the end of its path or Hub id."""
    name = matrix[side]["name"]
    return student if name == matrix["rows"]["name"] else name.rstrip("/").rpartition("/")[2]


def _label_layers(axis: Axis, layers: Sequence[int], name: str, panel_inches: float) -> None:
    step = math.ceil(len(layers) / (4.5 * panel_inches))
    axis.set_ticks(range(0, len(layers), step), layers[::step], fontsize=SMALL)
    axis.set_label_text(f"layer of {name}", fontsize=SMALL)


def _cka_values(name: str, matrix: Mapping[str, Any], kernel: str) -> np.ndarray:
    if kernel not in matrix:
        raise ValueError(f"a CKA matrix of {name!r} has no kernel {kernel!r}, found {sorted(matrix)}")
    return numbers(matrix[kernel])


def _panel_columns(matrices: int, students: int) -> int:
    """As few as fit on a page, and a student's matrices in one row."""
    if matrices <= 3:
        return matrices
    if matrices == 4:
        return 2
    return 4 if matrices == 2 * students else 3


def confusion_matrix_plot(confusion: Sequence[Sequence[int]], label_names: Sequence[str], path: str | Path) -> None:
    """Counts of predictions: true classes are rows, predicted ones columns, colours are shares of the true class.

    Args:
        confusion: ``[K][K]`` counts, rows are true classes.
        label_names: K names; some are left out beside a matrix of many classes.
        path: PNG to write; its folder exists.

    Raises:
        ValueError: If the matrix is not square or not of as many classes as there are names.
    """
    counts = numbers(confusion)
    classes = len(label_names)
    if counts.shape != (classes, classes) or not classes:
        raise ValueError(f"the confusion matrix must be {classes} x {classes}, one row a label, got {counts.shape}")
    support = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, support, out=np.full_like(counts, np.nan), where=support > 0)
    figure = new_figure(7.8, layout="compressed")
    axis = figure.subplots()
    image = _heatmap(axis, shares, PowerNorm(0.5, 0, 1), "Blues", origin="upper")
    axis.set_aspect("equal")
    texts = short_names(label_names, limit=20)
    names = [texts[name] for name in label_names]
    step = math.ceil(classes / _MOST_LABELS)
    size = NORMAL if classes <= 12 else SMALL
    axis.set_xticks(range(0, classes, step), names[::step], rotation=90, fontsize=size)
    axis.set_yticks(range(0, classes, step), names[::step], fontsize=size)
    axis.set_xlabel("predicted class", fontsize=NORMAL)
    axis.set_ylabel("true class", fontsize=NORMAL)
    if classes <= _CONFUSION_TEXT:
        _write_cells(axis, image, shares, lambda i, j: f"{counts[i, j]:.0f}", _CONFUSION_INCHES / classes)
    note = "" if np.isfinite(shares).all() else "; grey: no image of the class"
    bar = figure.colorbar(image, ax=axis, fraction=0.05, pad=0.02)
    bar.set_label(f"share of the true class, square-root scale{note}", fontsize=NORMAL)
    bar.ax.tick_params(labelsize=SMALL)
    save(figure, path)


def _heatmap(axis: Axes, values: np.ndarray, norm: Normalize, cmap: str, origin: str) -> AxesImage:
    """Cells that are NaN are grey and crossed out."""
    colors: Colormap = matplotlib.colormaps[cmap].with_extremes(bad=UNDEFINED_COLOR)
    image = axis.imshow(np.ma.masked_invalid(values), norm=norm, cmap=colors, origin=origin, aspect="auto")
    undefined = np.argwhere(np.isnan(values))
    axis.plot(undefined[:, 1], undefined[:, 0], "x", color="black", markersize=4, linewidth=0)
    return image


def _write_cells(
    axis: Axes, image: AxesImage, values: np.ndarray, text: Callable[[int, int], str], cell_inches: float
) -> None:
    """Text in black or white, whichever stands out from the cell, as large as fits."""
    cell_points = 72 * cell_inches
    for i, j in np.argwhere(np.isfinite(values)):
        red, green, blue, _ = image.cmap(image.norm(values[i, j]))
        color = "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black"
        size = min(cell_points / (_DIGIT_WIDTH * len(text(i, j))), NORMAL)
        axis.text(j, i, text(i, j), ha="center", va="center", fontsize=size, color=color)
