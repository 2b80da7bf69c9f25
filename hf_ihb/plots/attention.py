"""Plots of the section "attention" of analyses."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.lines import Line2D

from hf_ihb.plots.style import (
    NORMAL,
    REFERENCE_COLOR,
    SMALL,
    layer_axis,
    legend_below,
    line_looks,
    literal,
    new_figure,
    numbers,
    save,
    sections,
    share_height,
    short_names,
)

# The bands of more students than this hide each other; then each has a panel of its own as well.
_BANDS_IN_ONE_PANEL = 2
_UNTRAINED_DASHES = ((0, (5, 3)), (0, (2, 2)), (0, (7, 2, 1, 2)), (0, (1, 1)))

Analyses = Mapping[str, Mapping[str, Any]]
Section = Mapping[str, Any]


def attention_distance_plot(analyses: Analyses, path: str | Path) -> None:
    """Mean attention distance of each layer, a line a student and a band from its lowest to its highest head.

    Beside them uniform attention and the same architectures untrained; the bands of more than two students are drawn in
    a panel each. Students of one grid are drawn in patches, and in pixels where their patches are squares of one size;
    students of different grids in units of uniform attention.

    Args:
        analyses: Name of a student -> its analysis.
        path: PNG to write; its folder exists.

    Raises:
        ValueError: If there is no analysis, or one without the section ``attention``.
    """
    students = sections(analyses, "attention")
    relative = len({tuple(student["grid"]) for student in students.values()}) > 1
    names, looks, untrained = short_names(students), line_looks(students), _distinct_untrained(students)
    together = len(students) <= _BANDS_IN_ONE_PANEL
    columns = 2 if len(students) == 4 else 3
    rows = 0 if together else math.ceil(len(students) / columns)
    figure = new_figure(4.8 + 1.8 * rows)
    grid = figure.add_gridspec(1 + rows, columns, height_ratios=[3.7] + [1.8] * rows)

    main = figure.add_subplot(grid[0, :])
    uniform = _uniform_line(main, students, relative)
    dashed = [(_untrained_line(main, entry, i, relative), entry.label(names)) for i, entry in enumerate(untrained)]
    lines = [
        (_distance_line(main, student, relative, looks[name], band=together), names[name])
        for name, student in students.items()
    ]
    main.set_title("Mean attention distance" + (" (band: lowest to highest head)" if together else ""))
    main.set_ylabel("relative to uniform attention" if relative else "patches", fontsize=NORMAL)
    layer_axis(main, most_ticks=24)
    if not relative:
        _pixel_axis(main, students.values())

    panels = []
    for i, (name, student) in enumerate(() if together else students.items()):
        panel = figure.add_subplot(grid[1 + i // columns, i % columns])
        _uniform_line(panel, students, relative)
        for j, entry in enumerate(untrained):
            if name in entry.students:
                _untrained_line(panel, entry, j, relative)
        line = _distance_line(panel, student, relative, {**looks[name], "markersize": 2.5, "linewidth": 1.3}, band=True)
        panel.set_title(names[name], fontsize=SMALL, color=line.get_color())
        layer_axis(panel, label=i + columns >= len(students))
        panel.set_xlim(main.get_xlim())
        panel.tick_params(labelleft=i % columns == 0)
        panels.append(panel)
    if panels:
        panels[0].set_ylabel("lowest to\nhighest head", fontsize=SMALL)
    share_height([main, *panels])
    legend_below(figure, [*lines, *dashed, (uniform, uniform.get_label())])
    save(figure, path)


class _Untrained(NamedTuple):
    """One untrained network and the students it is the start of."""

    section: Section
    students: list[str]
    alone: bool

    def label(self, names: Mapping[str, str]) -> str:
        if self.alone:
            return "untrained"
        return f"untrained: {names[self.students[0]] if len(self.students) == 1 else f'{len(self.students)} students'}"


def _distinct_untrained(students: Mapping[str, Section]) -> list[_Untrained]:
    """Students that start from the same weights share an entry."""
    found: list[tuple[Section, list[str]]] = []
    for name, student in students.items():
        if (section := student["untrained"]) is None:
            continue
        for other, members in found:
            if _same_layers(section, other):
                members.append(name)
                break
        else:
            found.append((section, [name]))
    return [_Untrained(section, members, alone=len(found) == 1) for section, members in found]


def _same_layers(a: Section, b: Section) -> bool:
    a, b = ([layer["distance"] for layer in section["layers"]] for section in (a, b))
    return len(a) == len(b) and np.allclose(numbers(a), numbers(b), rtol=1e-4, equal_nan=True)


def _distance_line(axis: Axes, student: Section, relative: bool, look: Mapping[str, Any], *, band: bool) -> Line2D:
    layers, distances = _series(student, "distance_relative" if relative else "distance")
    (line,) = axis.plot(layers, distances, **look)
    if band:
        unit = student["uniform_distance"] if relative else 1.0
        heads = [numbers(layer["distance_per_head"]) / unit for layer in student["layers"]]
        low, high = [h.min() for h in heads], [h.max() for h in heads]
        axis.fill_between(layers, low, high, color=line.get_color(), alpha=0.18, linewidth=0)
    return line


def _untrained_line(axis: Axes, entry: _Untrained, index: int, relative: bool) -> Line2D:
    layers, distances = _series(entry.section, "distance_relative" if relative else "distance")
    dashes = _UNTRAINED_DASHES[index % len(_UNTRAINED_DASHES)]
    (line,) = axis.plot(layers, distances, color=REFERENCE_COLOR, linestyle=dashes, linewidth=1.2)
    return line


def _uniform_line(axis: Axes, students: Mapping[str, Section], relative: bool) -> Line2D:
    if relative:
        return axis.axhline(1.0, color="black", linewidth=0.9, label="uniform attention")
    distance = next(iter(students.values()))["uniform_distance"]
    return axis.axhline(distance, color="black", linewidth=0.9, label=f"uniform attention ({distance:.2f} patches)")


def _pixel_axis(axis: Axes, students: Iterable[Section]) -> None:
    """Pixels on the right, where one factor does for all students."""
    sizes = {size for student in students for size in student["patch_size_px"]}
    if len(sizes) == 1:
        (size,) = sizes
        pixels = axis.secondary_yaxis("right", functions=(lambda patches: patches * size, lambda px: px / size))
        pixels.set_ylabel("pixels", fontsize=NORMAL)
        pixels.tick_params(labelsize=SMALL)


def _series(section: Section, key: str) -> tuple[list[int], np.ndarray]:
    return [layer["layer"] for layer in section["layers"]], numbers([layer[key] for layer in section["layers"]])


class _Statistic(NamedTuple):
    key: str
    title: str
    unit: str
    uniform: Callable[[Section], float]


def _patches(student: Section) -> int:
    rows, columns = student["grid"]
    return rows * columns


_STATISTICS = (
    _Statistic("distance_relative", "Attention distance", "relative to uniform", lambda student: 1.0),
    _Statistic("entropy", "Entropy of a query's attention", "nats", lambda student: math.log(_patches(student))),
    _Statistic(
        "special_token_mass",
        "Attention to special tokens",
        "share",
        lambda student: student["num_prefix_tokens"] / (student["num_prefix_tokens"] + _patches(student)),
    ),
    _Statistic(
        "cls_dispersion",
        "Spread of the cls token's attention",
        "patches²",
        lambda student: sum(side**2 - 1 for side in student["grid"]) / 12,
    ),
)


def attention_statistics_plot(analyses: Analyses, path: str | Path) -> None:
    """Attention distance, entropy, special-token mass and cls dispersion of each layer, a line a student.

    A thin line shows uniform attention wherever it is the same for all students. A student without a cls token has no
    line in the last panel; without any such token there are three panels.

    Args:
        analyses: Name of a student -> its analysis.
        path: PNG to write; its folder exists.

    Raises:
        ValueError: If there is no analysis, or one without the section ``attention``.
    """
    students = sections(analyses, "attention")
    names, looks = short_names(students), line_looks(students)
    shown = [s for s in _STATISTICS if any(np.isfinite(_series(v, s.key)[1]).any() for v in students.values())]
    figure = new_figure(6.4)
    axes = list(figure.subplots(2, 2, sharex=True).flat)
    entries = {}
    for axis, statistic in zip(axes, shown, strict=False):
        for name, student in students.items():
            layers, values = _series(student, statistic.key)
            if np.isfinite(values).any():
                (entries[name],) = axis.plot(layers, values, **looks[name])
        levels = {round(statistic.uniform(student), 9) for student in students.values()}
        if len(levels) == 1:
            entries[None] = axis.axhline(levels.pop(), color="black", linewidth=0.9)
        axis.set_title(statistic.title, fontsize=NORMAL + 1)
        axis.set_ylabel(statistic.unit, fontsize=NORMAL)
        share_height([axis])
        layer_axis(axis)
        axis.tick_params(labelbottom=True)
    for axis in axes[len(shown) :]:
        axis.set_visible(False)
    legend_below(figure, [(line, names.get(name, "uniform attention")) for name, line in _last(entries, None)])
    save(figure, path)


def _last(entries: Mapping[Any, Any], key: Any) -> list[tuple[Any, Any]]:
    return sorted(entries.items(), key=lambda entry: entry[0] == key)


def attention_map_plot(analysis: Mapping[str, Any], path: str | Path, layers: Sequence[int] | None = None) -> None:
    """What the cls token attends to: a row an image, the image itself and its map at some layers, one colour scale.

    Args:
        analysis: Of one student.
        path: PNG to write; its folder exists.
        layers: Which of the layers that the maps hold, in this order; None for all of them.

    Raises:
        ValueError: If the analysis has no section ``attention`` or no maps, or a map lacks one of the layers.
    """
    section = sections({analysis["model"]["name"]: analysis}, "attention")[analysis["model"]["name"]]
    if not (maps := section["maps"]):
        raise ValueError(f"analysis of {analysis['model']['name']!r} has no attention maps")
    layers = list(maps[0]["layers"] if layers is None else layers)
    weights = [_weights(entry, layers) for entry in maps]
    norm = PowerNorm(0.5, vmin=0, vmax=np.nanmax(weights))
    side = 8.6 / (1 + len(layers))
    figure = new_figure(min(side, 1.8) * len(maps) + 1.2, layout="compressed")
    axes = figure.subplots(len(maps), 1 + len(layers), squeeze=False)
    labels = short_names([entry["label"] for entry in maps], limit=18)
    for row, entry, images in zip(axes, maps, weights, strict=True):
        row[0].imshow(np.asarray(entry["image"], dtype=np.uint8))
        row[0].set_ylabel(f"{labels[entry['label']]}\n#{entry['index']}", fontsize=SMALL)
        for axis, image in zip(row[1:], images, strict=True):
            drawn = axis.imshow(image, norm=norm, cmap="viridis")
        for axis in row:
            axis.set(xticks=[], yticks=[])
    for axis, title in zip(axes[0], ["image", *(f"layer {layer}" for layer in layers)], strict=True):
        axis.set_title(title, fontsize=SMALL)
    bar = figure.colorbar(drawn, ax=axes, location="bottom", fraction=0.05, aspect=50)
    token = maps[0]["prefix_token"]
    source = f"of the {literal(token)} token" if token else "of all patches, mean"
    share = 1 / _patches(section)
    scale = f"share, square-root scale; white line: uniform, {share:.3g}"
    bar.set_label(f"attention {source}, mean over heads ({scale})", fontsize=NORMAL)
    bar.ax.axvline(share, color="white", linewidth=1.5)
    bar.ax.tick_params(labelsize=SMALL)
    save(figure, path)


def _weights(entry: Mapping[str, Any], layers: Sequence[int]) -> list[np.ndarray]:
    """The map of each layer asked for."""
    held = dict(zip(entry["layers"], entry["weights"], strict=True))
    if missing := [layer for layer in layers if layer not in held]:
        raise ValueError(f"the map of image {entry['index']} has no layer {missing[0]}, found {list(held)}")
    return [numbers(held[layer]) for layer in layers]
