"""Curves of training."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from hf_ihb.plots.style import COLORS, STYLES

Curve = tuple[Sequence[float], Sequence[float]]


def curve_panels(
    panels: Mapping[str, Mapping[str, Curve]], path: str | Path, *, x_label: str, y_label: str, columns: int = 2
) -> None:
    """Line plots side by side, the same lines in each panel.

    Args:
        panels: Title -> name of a line -> its x and y values, of equal length.
        path: PNG to write; its folder exists.
        x_label: Quantity and unit of every x axis.
        y_label: Quantity and unit of every y axis.
        columns: Panels in a row.
    """
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.1 * rows + 0.5), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, sharex=True).flat)
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    for axis, (title, lines) in zip(axes, panels.items(), strict=False):
        for name, (x, y) in lines.items():
            i = names.index(name)
            axis.plot(x, y, STYLES[i % len(STYLES)], color=COLORS[i % len(COLORS)], label=name, linewidth=1.8)
        axis.set_title(title, fontsize=11)
        axis.set_ylim(bottom=0)
        axis.set_xlabel(x_label)
        axis.set_ylabel(y_label)
        axis.grid(alpha=0.25)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    handles = {line.get_label(): line for axis in figure.axes for line in axis.lines}
    ncols = min(len(handles), 3 * columns)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=ncols, frameon=False)
    figure.savefig(path, dpi=130)
