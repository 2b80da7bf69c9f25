"""Keys of analysing a finished model: those that all analyses share, and each one's own."""

from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields, make_dataclass
from typing import Any

from hf_ihb.analysis.base import SharedArguments
from hf_ihb.analysis.registry import ANALYSES, analyses_of
from hf_ihb.config.fields import key, type_hints


def _own_keys() -> Iterator[tuple[str, Any, Field]]:
    """Name, type and field of every analysis' settings."""
    for analysis in ANALYSES.values():
        for f in fields(analysis):
            default = {"default": f.default, "default_factory": f.default_factory}
            yield f.name, type_hints(analysis)[f.name], field(**default, metadata=f.metadata)


_METRICS = key(
    ",".join(name for name, analysis in ANALYSES.items() if analysis.in_default_metrics),
    f"Which analyses, with commas: {', '.join(analysis.summary for analysis in ANALYSES.values())}.",
)
_Keys = make_dataclass("_Keys", [("metrics", str, _METRICS), *_own_keys()], bases=(SharedArguments,))


@dataclass
class AnalysisArguments(_Keys):
    """What is measured of a model's inside: `SharedArguments`, `metrics`, and the fields of each of `ANALYSES`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        analyses_of("metrics", self.metrics)

    @property
    def analyses(self) -> list[str]:
        """Which analyses, in the order they are made."""
        return analyses_of("metrics", self.metrics)
