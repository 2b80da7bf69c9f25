"""Plots of results that are already in JSON: numbers in, PNG out.

Every picture is a README wide; names are the user's, shortened and drawn as they are.
"""

from hf_ihb.plots.attention import attention_distance_plot, attention_map_plot, attention_statistics_plot
from hf_ihb.plots.curvature import eigenvalue_density_plot
from hf_ihb.plots.curves import curve_panels
from hf_ihb.plots.layers import layer_lines_plot
from hf_ihb.plots.matrices import cka_heatmaps, confusion_matrix_plot
from hf_ihb.plots.style import COLORS

__all__ = [
    "COLORS",
    "attention_distance_plot",
    "attention_map_plot",
    "attention_statistics_plot",
    "cka_heatmaps",
    "confusion_matrix_plot",
    "curve_panels",
    "eigenvalue_density_plot",
    "layer_lines_plot",
]
