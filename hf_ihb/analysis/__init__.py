"""What happens inside a model -> plain numbers, their table, their plots and their sections of the card.

One file is one analysis: `hf_ihb.analysis.registry` lists them, and everything that deals with an analysis by its name
asks that list.
"""

from hf_ihb.analysis.arguments import AnalysisArguments
from hf_ihb.analysis.base import Analysis
from hf_ihb.analysis.measuring import analyze
from hf_ihb.analysis.overview import analysis_table, draw_analyses
from hf_ihb.analysis.registry import ANALYSES, analyses_in, analyses_of

__all__ = [
    "ANALYSES",
    "Analysis",
    "AnalysisArguments",
    "analyses_in",
    "analyses_of",
    "analysis_table",
    "analyze",
    "draw_analyses",
]
