"""Results of analyses as a whole: plots, and one table."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hf_ihb.analysis.base import Analysis, Results
from hf_ihb.analysis.registry import ANALYSES, analyses_in
from hf_ihb.runs.tables import markdown_table


def draw_analyses(results: Results, folder: str | Path) -> list[Path]:
    """Draws models side by side, each plot with those that have its section; attention maps of a single model alone.

    Args:
        results: Name of a model -> its analysis, as it stands in analysis.json.
        folder: Where the PNGs go; made if it is not there.

    Returns:
        Paths of what was drawn.

    Raises:
        DataError: If a result holds an analysis that there is none of.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for analysis, holders in _holders(results).items():

        def path_of(name: str, analysis: type[Analysis] = analysis) -> Path:
            if name not in analysis.plots:
                raise ValueError(f"{analysis.__name__}: expected a plot among {list(analysis.plots)}, found '{name}'")
            drawn.append(folder / f"{name}.png")
            return drawn[-1]

        if holders:
            analysis.plot(holders, path_of, is_single=len(results) == 1)
    return drawn


def analysis_table(results: Results) -> str:
    """A Markdown table, one row a model, of what the analyses they all share come to.

    Raises:
        DataError: If a result holds an analysis that there is none of.
    """
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {}
    for analysis, holders in _holders(results).items():
        if len(holders) == len(results):
            for title, show in analysis.columns().items():
                columns[title] = lambda result, name=analysis.name, show=show: show(result[name])
    rows = [("model", *columns)] + [(name, *(show(r) for show in columns.values())) for name, r in results.items()]
    return markdown_table(rows)


def _holders(results: Results) -> dict[type[Analysis], dict[str, Mapping[str, Any]]]:
    """For each analysis, the results that have the numbers of it."""
    held = {name: analyses_in(result) for name, result in results.items()}
    return {
        analysis: {name: result for name, result in results.items() if analysis in held[name]}
        for analysis in ANALYSES.values()
    }
