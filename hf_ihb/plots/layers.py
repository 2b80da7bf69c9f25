"""A number of each layer, a line a student."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from hf_ihb.plots.style import (
    NORMAL,
    layer_axis,
    legend_below,
    line_looks,
    new_figure,
    numbers,
    save,
    share_height,
    short_names,
)

LayerValues = tuple[Sequence[int], Sequence[float | None]]


def layer_lines_plot(lines: Mapping[str, LayerValues], path: str | Path, *, title: str, y_label: str) -> None:
    """Draws one quantity over the depth of students.

    Args:
        lines: Name of a student -> its layers and the value of each; None where it is not defined.
        path: PNG to write; its folder exists.
        title: What is drawn.
        y_label: Its unit.

    Raises:
        ValueError: If there is no student.
    """
    if not lines:
        raise ValueError("nothing to plot: no analysis was given")
    names, looks = short_names(lines), line_looks(lines)
    figure = new_figure(4.2)
    axis = figure.subplots()
    entries = []
    for name, (layers, values) in lines.items():
        (line,) = axis.plot(layers, numbers(values), **looks[name])
        entries.append((line, names[name]))
    axis.set_title(title)
    axis.set_ylabel(y_label, fontsize=NORMAL)
    layer_axis(axis, most_ticks=24)
    share_height([axis])
    legend_below(figure, entries)
    save(figure, path)
