"""What the plots have in common: size, colours, names, legends, and reading a section of an analysis."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's palette: told apart with every common colour vision.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
REFERENCE_COLOR, UNDEFINED_COLOR = "0.55", "0.8"

# At this width 1 pt is 1.25 px of a README 830 px wide: the smallest text, 8 pt, is 10 px high there.
WIDTH_INCHES, DPI = 9.2, 130
SMALL, NORMAL = 8, 9.5


def new_figure(height_inches: float, layout: str = "constrained") -> Figure:
    """Of the common width; ``compressed`` suits panels of a fixed shape."""
    return Figure(figsize=(WIDTH_INCHES, height_inches), layout=layout)


def save(figure: Figure, path: str | Path) -> None:
    """As PNG; the same numbers give the same bytes with the same matplotlib."""
    figure.savefig(path, dpi=DPI, format="png")


def line_looks(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour, line style and marker of each name, by its position, no two the same up to 28 names."""
    return {
        name: {
            "color": COLORS[i % len(COLORS)],
            "linestyle": STYLES[i % len(STYLES)],
            "marker": MARKERS[i % len(MARKERS)],
            "markersize": 4.5,
            "linewidth": 1.6,
        }
        for i, name in enumerate(names)
    }


def short_names(names: Iterable[str], limit: int = 34) -> dict[str, str]:
    """Text for each name: at most `limit` characters, its middle left out, but more where two would read the same."""
    texts = {name: " ".join(str(name).split()) for name in names}
    longest = max(map(len, texts.values()), default=0)
    for length in range(limit, max(limit, longest) + 1):
        cut = [_cut(text, length) for text in texts.values()]
        if len(set(cut)) == len(cut):
            break
    return {name: literal(text) for name, text in zip(texts, cut, strict=True)} if texts else {}


def literal(text: str) -> str:
    """Text that matplotlib draws as it is: no mathematics, and no name that a legend would leave out."""
    hidden = text.startswith("_")
    return ("\u200b" if hidden else "") + text.replace("$", r"\$")


def _cut(text: str, length: int) -> str:
    if len(text) <= length:
        return text
    tail = (length - 1) // 2
    return f"{text[: length - 1 - tail]}…{text[-tail:]}"


def sections(analyses: Mapping[str, Mapping[str, Any]], key: str) -> dict[str, Any]:
    """One section of each analysis.

    Raises:
        ValueError: If there is no analysis, or one that lacks the section.
    """
    if not analyses:
        raise ValueError("nothing to plot: no analysis was given")
    for name, analysis in analyses.items():
        if analysis.get(key) is None:
            found = sorted(k for k, v in analysis.items() if v is not None)
            raise ValueError(f"analysis of {name!r} has no section {key!r}, found {found}")
    return {name: analysis[key] for name, analysis in analyses.items()}


def numbers(values: Any) -> np.ndarray:
    """Float64 array; null becomes NaN, which is not drawn."""
    return np.asarray(values, dtype=np.float64)


def layer_axis(axis: Axes, label: bool = True, most_ticks: int = 8) -> None:
    """Whole layer numbers along x."""
    axis.xaxis.set_major_locator(MaxNLocator(most_ticks, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axis.tick_params(labelsize=SMALL)
    axis.grid(alpha=0.25)
    if label:
        axis.set_xlabel("layer (0 = first block)", fontsize=NORMAL)


def share_height(axes: Sequence[Axes]) -> None:
    """One y range that fits what all of them show, at least a tenth of its top: noise should not look like much."""
    limits = [axis.get_ylim() for axis in axes]
    low, top = min(bottom for bottom, _ in limits), max(top for _, top in limits)
    middle, half = (low + top) / 2, max(top - low, 0.1 * top) / 2
    for axis in axes:
        axis.set_ylim(middle - 1.04 * half, middle + 1.04 * half)  # no reference line on the frame


def legend_below(figure: Figure, entries: Sequence[tuple[Artist, str]]) -> None:
    """One legend for the figure, in as many columns as its width holds."""
    handles, labels = zip(*entries, strict=True)
    look = {"loc": "outside lower center", "frameon": False, "fontsize": NORMAL, "columnspacing": 1.5}
    for columns in range(min(len(entries), 4), 0, -1):
        legend = figure.legend(handles, labels, ncols=columns, **look)
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            break
        legend.remove()
