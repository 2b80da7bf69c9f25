"""The list of analyses: the only place that names them all."""

from collections.abc import Mapping
from typing import Any

from hf_ihb.analysis.attention import AttentionAnalysis
from hf_ihb.analysis.base import Analysis
from hf_ihb.analysis.cka import CKAAnalysis
from hf_ihb.analysis.hessian import HessianAnalysis
from hf_ihb.analysis.rankme import RankMeAnalysis
from hf_ihb.errors import DataError

# In the order in which they are made, drawn and told.
ANALYSES: dict[str, type[Analysis]] = {
    analysis.name: analysis
    for analysis in (
        AttentionAnalysis,
        CKAAnalysis,
        HessianAnalysis,
        RankMeAnalysis,
    )
}


def analyses_of(key_name: str, text: str) -> list[str]:
    """The analyses that a key names, with commas between them, in the order they are made.

    Raises:
        ValueError: If there is no such analysis.
    """
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in ANALYSES]:
        raise ValueError(f"key '{key_name}': expected some of {','.join(ANALYSES)}, found '{unknown[0]}'")
    return sorted(names, key=list(ANALYSES).index)


def analyses_in(result: Mapping[str, Any]) -> list[type[Analysis]]:
    """The analyses that a result has the numbers of, in the order of `ANALYSES`.

    Args:
        result: A model's analysis, as it stands in analysis.json.

    Raises:
        DataError: If it holds, or was asked for, an analysis that is not on the list.
    """
    unknown = [name for name in result.get("settings") or {} if name not in ANALYSES]
    if unknown:
        model = (result.get("model") or {}).get("name")
        raise DataError(
            f"analysis of '{model}': expected some of {', '.join(ANALYSES)}, found '{unknown[0]}'; another version "
            "of hf_ihb wrote it: use that one, or move the file away"
        )
    return [analysis for name, analysis in ANALYSES.items() if result.get(name) is not None]
