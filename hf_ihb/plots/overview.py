"""Every plot that analyses have the numbers for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_ihb.plots.attention import attention_distance_plot, attention_map_plot, attention_statistics_plot
from hf_ihb.plots.curvature import eigenvalue_density_plot
from hf_ihb.plots.matrices import cka_heatmaps


def draw_analyses(analyses: Mapping[str, Mapping[str, Any]], folder: str | Path) -> list[Path]:
    """Draws models side by side, each plot with those that have its section; attention maps of a single model alone.

    Args:
        analyses: Name of a model -> its analysis, as it stands in analysis.json.
        folder: Where the PNGs go; made if it is not there.

    Returns:
        Paths of what was drawn.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []

    def having(section: str) -> dict[str, Mapping[str, Any]]:
        return {name: analysis for name, analysis in analyses.items() if section in analysis}

    def path(name: str) -> Path:
        drawn.append(folder / f"{name}.png")
        return drawn[-1]

    if looking := having("attention"):
        attention_distance_plot(looking, path("attention_distance"))
        attention_statistics_plot(looking, path("attention_statistics"))
        single = next(iter(looking.values())) if len(analyses) == 1 else None
        if single is not None and single["attention"]["maps"]:
            attention_map_plot(single, path("attention_maps"))
    if similar := having("cka"):
        for kernel in ("linear", "rbf"):
            cka_heatmaps(similar, path(f"cka_{kernel}"), kernel)
    if curved := having("hessian"):
        eigenvalue_density_plot(curved, path("eigenvalue_density"))
    return drawn
