"""How many directions the features of a model spread over, layer by layer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_ihb.analysis.base import Analysis, Results, Section, SharedArguments, batches, mean_patch_tokens
from hf_ihb.data import StoredSplit
from hf_ihb.errors import NumericsError
from hf_ihb.markdown import Markdown, is_number, measured_on, value_or_nothing
from hf_ihb.models.pretrained import Pretrained

EPSILON = 1e-7  # the paper's, for features in float32


class StreamedMatrix:
    """Singular values of a matrix whose rows come in batches, in memory that does not grow with them.

    What is kept is R of a QR decomposition of all rows so far: it has the singular values of the matrix to the
    precision of float64, where the eigenvalues of a Gram matrix have half of the digits.

    Attributes:
        num_rows: Rows so far.
    """

    def __init__(self) -> None:
        self.num_rows = 0
        self._triangle: Tensor | None = None

    def update(self, rows: Tensor) -> None:
        """Appends rows ``(B, D)``, of any dtype and device."""
        rows = rows.detach().cpu().double()  # not every accelerator has float64
        stacked = rows if self._triangle is None else torch.cat([self._triangle, rows])
        self._triangle = torch.linalg.qr(stacked, mode="r").R
        self.num_rows += len(rows)

    def singular_values(self) -> Tensor:
        """``(min(num_rows, D),)``, float64, falling."""
        return torch.linalg.svdvals(self._triangle)


def effective_rank(singular_values: Tensor, epsilon: float = EPSILON) -> float:
    r"""RankMe: ``exp(-sum_k p_k log p_k)`` with ``p_k = sigma_k / ||sigma||_1 + epsilon``.

    Args:
        singular_values: ``(K,)``, of a matrix of features, not centred.
        epsilon: Keeps the logarithm finite; it raises the rank by a little.

    Returns:
        From 1, where all features are multiples of one, to K, where all directions are as long; NaN where all values
        are 0.

    References:
        Garrido et al., 2023, https://arxiv.org/abs/2210.02885, equations 1 and 2.
    """
    shares = singular_values / singular_values.sum() + epsilon
    return torch.exp(-(shares * shares.log()).sum()).item()


@dataclass
class RankMeAnalysis(Analysis):
    """Effective rank of each layer's features: a measure of collapse that needs no labels.

    It is at most the smaller one of the number of images and the width, so it compares where both are the same; the
    paper takes 25,600 images.

    References:
        Garrido et al., 2023, https://arxiv.org/abs/2210.02885.
    """

    name: ClassVar = "rankme"
    summary: ClassVar = "rankme (effective rank)"
    topic: ClassVar = "rank of features"
    title: ClassVar = "Rank of features"
    in_default_metrics: ClassVar = False
    plots: ClassVar = {"effective_rank": "effective rank of each layer's features"}
    card_plot: ClassVar = ("effective_rank", "Effective rank of the features of each layer")
    references: ClassVar = (("RankMe: Garrido et al., 2023", "2210.02885"),)

    def compute(
        self,
        subject: Pretrained,
        split: StoredSplit,
        rows: Tensor,
        args: SharedArguments,
        teacher: Pretrained | None = None,
    ) -> dict[str, Any]:
        """Effective rank of the ``(N, D)`` matrix of mean patch tokens of each layer (of positions for a CNN).

        Returns:
            ``layers``: of each, ``rank``, ``width`` D, ``largest_rank`` min(N, D), and ``rank_relative`` to that.

        Raises:
            NumericsError: If a feature is not finite.
        """
        matrices: dict[int, StreamedMatrix] = {}
        widths: dict[int, int] = {}
        for pixels, _ in batches(subject, split, rows, args.batch_size, "RankMe"):
            for layer, features in enumerate(mean_patch_tokens(subject, pixels)):
                if not features.isfinite().all():
                    raise NumericsError(f"model '{subject.name}', layer {layer}: expected finite features")
                matrices.setdefault(layer, StreamedMatrix()).update(features)
                widths[layer] = features.shape[1]
        return {
            "num_images": len(rows),
            "features": "mean over patch tokens",
            "epsilon": EPSILON,
            "layers": [_layer(layer, matrix, widths[layer]) for layer, matrix in matrices.items()],
        }

    @classmethod
    def columns(cls) -> dict[str, Callable[[Section], str]]:
        """The last layer's rank, and the largest there could be."""
        return {
            "rank, last layer": lambda section: _shown(section["layers"][-1]["rank"]),
            "at most": lambda section: f"{section['layers'][-1]['largest_rank']}",
        }

    @classmethod
    def plot(cls, results: Results, path_of: Callable[[str], Path], *, is_single: bool) -> None:
        """Effective rank by layer."""
        from hf_ihb.plots import layer_lines_plot

        lines = {name: _series(result["rankme"]) for name, result in results.items()}
        title = "Effective rank of the mean patch tokens (RankMe)"
        layer_lines_plot(lines, path_of("effective_rank"), title=title, y_label="directions")

    @classmethod
    def card_text(cls, result: Mapping[str, Any]) -> Markdown:
        """Rank of the first and the last layer, and how it is to be read."""
        layers = result["rankme"]["layers"]
        text = (
            "The effective rank (RankMe) of the mean patch tokens is {first} in layer {i} and {last} in layer {j}, of "
            "at most {most:,}, on {on}. It says how many directions the features spread over, depends on the number "
            "of images and on the width, and is no measure of how good they are."
        )
        return Markdown(text).format(
            first=value_or_nothing(layers[0]["rank"], "{:.1f}"),
            i=layers[0]["layer"],
            last=value_or_nothing(layers[-1]["rank"], "{:.1f}"),
            j=layers[-1]["layer"],
            most=layers[-1]["largest_rank"],
            on=measured_on(result["data"]),
        )


def _layer(layer: int, matrix: StreamedMatrix, width: int) -> dict[str, Any]:
    rank, largest = effective_rank(matrix.singular_values()), min(matrix.num_rows, width)
    return {"layer": layer, "rank": rank, "width": width, "largest_rank": largest, "rank_relative": rank / largest}


def _series(section: Section) -> tuple[list[int], list[float | None]]:
    return [layer["layer"] for layer in section["layers"]], [layer["rank"] for layer in section["layers"]]


def _shown(rank: float | None) -> str:
    return f"{rank:.1f}" if is_number(rank) else ""
