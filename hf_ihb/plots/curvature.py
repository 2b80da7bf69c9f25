"""Plot of the section "hessian" of analyses."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hf_ihb.plots.style import (
    NORMAL,
    SMALL,
    legend_below,
    line_looks,
    literal,
    new_figure,
    numbers,
    save,
    sections,
    short_names,
)

# Students whose spectra reach this many times as far as another's leave it a single spike on a linear axis.
_WIDEST_RATIO = 8.0


def eigenvalue_density_plot(analyses: Mapping[str, Mapping[str, Any]], path: str | Path) -> None:
    """Density of the Hessian's eigenvalues, a line a student, over the range from its smallest to its largest.

    The density is cut off at a tenth of what a single eigenvalue would show as; below, it says nothing. Where students'
    spectra differ much in extent, the axis is linear up to the extent of the narrowest and logarithmic beyond.

    Args:
        analyses: Name of a student -> its analysis.
        path: PNG to write; its folder exists.

    Raises:
        ValueError: If there is no analysis, or one without the section ``hessian``.
    """
    students = sections(analyses, "hessian")
    names, looks = short_names(students, limit=30), line_looks(students)
    figure = new_figure(4.3 + 0.22 * len(students))
    density, extent = figure.subplots(2, 1, sharex=True, height_ratios=[3.4, 0.3 + 0.2 * len(students)])
    entries, ticks = [], {"marker": "|", "markersize": 9, "markeredgewidth": 1.8}
    losses = {student["loss"] for student in students.values()}
    for i, (name, student) in enumerate(students.items()):
        values = numbers(student["density"]["density"])
        values[~(values > 0)] = np.nan  # has no logarithm
        (line,) = density.plot(student["density"]["eigenvalues"], values, **{**looks[name], "marker": ""})
        entries.append((line, names[name] + _summary(student, with_loss=len(losses) > 1)))
        ends = numbers([student["smallest_eigenvalue"], student["largest_eigenvalue"]])
        extent.plot(ends, [i, i], **{**looks[name], **ticks})
        extent.annotate(
            f"{ends[1]:.3g}", (ends[1], i), xytext=(5, 0), textcoords="offset points", va="center", fontsize=SMALL
        )
    density.set_yscale("log")
    highest = max(np.max(numbers(student["density"]["density"])) for student in students.values())
    density.set_ylim(min(map(_single_eigenvalue, students.values())) / 10, highest * 3)
    _eigenvalue_scale(density, students)
    density.margins(x=0.07)  # room for the numbers
    loss = f" of the {literal(losses.pop())}" if len(losses) == 1 else ""
    density.set_title(f"Eigenvalues of the Hessian{loss}", fontsize=NORMAL + 1.5)
    density.set_ylabel("density (per unit of eigenvalue)", fontsize=NORMAL)
    extent.set(yticks=[], ylim=(len(students) - 0.4, -0.6))
    extent.set_ylabel("range", fontsize=NORMAL)
    extent.set_xlabel("eigenvalue; bars end at the smallest and the largest", fontsize=NORMAL)
    for axis in (density, extent):
        axis.tick_params(labelsize=SMALL)
        axis.grid(alpha=0.25)
    legend_below(figure, entries)
    save(figure, path)


def _summary(student: Mapping[str, Any], with_loss: bool) -> str:
    loss = f", {literal(student['loss'])}" if with_loss else ""
    doubt = "" if student["converged"] else " (not converged)"
    return f": trace {_with_error(student['trace'], student['trace_standard_error'])}{doubt}{loss}"


def _with_error(value: float | None, error: float | None) -> str:
    """Both to the second digit of the error."""
    value, error = (math.nan if x is None else x for x in (value, error))
    decimals = 1 - math.floor(math.log10(error)) if error > 0 else math.inf
    if -5 < decimals < 6:
        return f"{value:.{max(decimals, 0)}f} ± {error:.{max(decimals, 0)}f}"
    return f"{value:.5g} ± {error:.2g}"


def _single_eigenvalue(student: Mapping[str, Any]) -> float:
    """Height of the Gaussian that one eigenvalue of all is drawn as."""
    return 1 / (student["num_parameters"] * student["density"]["sigma"] * math.sqrt(2 * math.pi))


def _eigenvalue_scale(axis: Any, students: Mapping[str, Mapping[str, Any]]) -> None:
    ends = [numbers([s["smallest_eigenvalue"], s["largest_eigenvalue"]]) for s in students.values()]
    extents = [float(np.abs(e).max()) for e in ends]
    if max(extents) > _WIDEST_RATIO * min(extents) > 0:
        axis.set_xscale("symlog", linthresh=min(extents))
