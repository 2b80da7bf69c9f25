"""What analyses saw of a model, as its card shows it; each analysis tells its own part."""

from typing import NamedTuple

from hf_ihb.analysis import ANALYSES, Analysis, analyses_in
from hf_ihb.markdown import EMPTY, Markdown
from hf_ihb.model_card.files import RunFiles
from hf_ihb.runs.folder import PLOTS_FOLDER


class AnalysisSection(NamedTuple):
    """A section of the card.

    Attributes:
        analysis: What it is of.
        title: Its heading.
        text: Below the heading.
        image: The plot that belongs to it; empty where it was not drawn.
    """

    analysis: type[Analysis]
    title: Markdown
    text: Markdown
    image: Markdown


def analysis_sections(run: RunFiles) -> list[AnalysisSection]:
    """A section for each analysis that has something to say.

    Raises:
        DataError: If the run holds an analysis that there is none of.
    """
    texts = {analysis: analysis.card_text(run.analysis) for analysis in analyses_in(run.analysis)}
    return [
        AnalysisSection(analysis, Markdown(analysis.title), text, _image(analysis, run))
        for analysis, text in texts.items()
        if text is not None
    ]


def _image(analysis: type[Analysis], run: RunFiles) -> Markdown:
    if analysis.card_plot is None:
        return EMPTY
    name, text = analysis.card_plot
    path = f"{PLOTS_FOLDER}/{name}.png"
    return Markdown(f"![{text}]({path})") if path in run.listed else EMPTY


def analysis_topics(run: RunFiles) -> str:
    """What analysis.json is about: what it holds, or would by default."""
    topics = [a.topic for a in ANALYSES.values() if a.in_default_metrics or a.name in run.analysis]
    return f"{', '.join(topics[:-1])} and {topics[-1]}, as far as they were measured"
