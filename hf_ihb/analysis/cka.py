"""How alike the layers of a model are, to each other and to a teacher's."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from hf_ihb.analysis.base import Analysis, Results, SharedArguments, batches, mean_patch_tokens
from hf_ihb.config.fields import Range, key
from hf_ihb.data import StoredSplit
from hf_ihb.functional.minibatch_cka import MinibatchCKA
from hf_ihb.markdown import EMPTY, Markdown, called, is_number, measured_on
from hf_ihb.models.pretrained import Pretrained

_KERNELS = ("linear", "rbf")


@dataclass
class CKAAnalysis(Analysis):
    """Debiased minibatch CKA of every pair of layers (Kornblith et al., 2019; Nguyen, Raghu and Kornblith, 2021).

    References:
        Kornblith et al., 2019, https://arxiv.org/abs/1905.00414; Nguyen et al., 2021, https://arxiv.org/abs/2010.15327.
    """

    rows_per_batch: int = key(
        256, "Images that one term of the minibatch CKA is computed of, whatever batch_size is.", within=Range(8)
    )

    name: ClassVar = "cka"
    summary: ClassVar = "cka"
    topic: ClassVar = "similarity of layers"
    title: ClassVar = "Similarity of layers"
    shared_settings: ClassVar = ("teacher_image_size",)
    compares_teacher: ClassVar = True
    shows_teaching: ClassVar = True
    plots: ClassVar = {
        "cka_linear": "CKA of layers with a linear kernel",
        "cka_rbf": "CKA of layers with an RBF kernel",
    }
    card_plot: ClassVar = ("cka_linear", "Linear CKA of every pair of layers")
    references: ClassVar = (("CKA: Kornblith et al., 2019", "1905.00414"),)

    def compute(
        self,
        subject: Pretrained,
        split: StoredSplit,
        rows: Tensor,
        args: SharedArguments,
        teacher: Pretrained | None = None,
    ) -> dict[str, Any]:
        """Similarity of every pair of layers, of the model with itself and with a teacher.

        Features are block outputs averaged over patch tokens (over positions for a CNN); the teacher sees the same
        images in its own size and normalisation.

        Returns:
            ``matrices``: names and layers of rows and columns, and debiased minibatch CKA, with a linear and an RBF
            kernel.
        """
        chunk = min(self.rows_per_batch, len(rows))
        own = MinibatchCKA(chunk, kernels=_KERNELS)
        cross = MinibatchCKA(chunk, kernels=_KERNELS)
        others = None if teacher is None else batches(teacher, split, rows, args.batch_size)
        for pixels, _ in batches(subject, split, rows, args.batch_size, "CKA"):
            x = mean_patch_tokens(subject, pixels)
            own.update(x)
            if others is not None:
                cross.update(x, mean_patch_tokens(teacher, next(others)[0]))
        matrices = [_matrix(own, subject.name, subject.name)]
        if teacher is not None:
            matrices.append(_matrix(cross, subject.name, teacher.name))
        return {
            "num_images": len(rows),
            "rows_per_batch": chunk,
            "features": "mean over patch tokens",
            "matrices": matrices,
        }

    @classmethod
    def plot(cls, results: Results, path_of: Callable[[str], Path], *, is_single: bool) -> None:
        """Every matrix of every model, a picture a kernel."""
        from hf_ihb.plots import cka_heatmaps

        for kernel in _KERNELS:
            cka_heatmaps(results, path_of(f"cka_{kernel}"), kernel)

    @classmethod
    def card_text(cls, result: Mapping[str, Any]) -> Markdown:
        """How alike the layers of the model and of a teacher are, or its own."""
        section = result["cka"]
        matrix = section["matrices"][-1]  # with the teacher, where there is one
        rows, columns, values = matrix["rows"]["layers"], matrix["columns"]["layers"], matrix["linear"]
        if len(section["matrices"]) > 1:
            teacher = called(result["teacher"]["name"])
            of = Markdown("Debiased linear CKA of each layer with each of {}").format(teacher)
            sentence = _most_alike(rows, columns, values, teacher)
        else:
            of = Markdown("Debiased linear CKA of each layer with each other")
            sentence = Markdown("The first and the last layer have {:.3f}.") if is_number(values[0][-1]) else EMPTY
            sentence = sentence.format(values[0][-1])
        method = Markdown("from mean patch tokens in batches of {:,} of the ").format(section["rows_per_batch"])
        return Markdown("{of}, {method}: 1 means alike up to rotation and scale, 0 unrelated. {sentence}").format(
            of=of, method=method + measured_on(result["data"]), sentence=sentence
        )


def _matrix(cka: MinibatchCKA, rows: str, columns: str) -> dict[str, Any]:
    linear, rbf = cka.compute("linear"), cka.compute("rbf")
    return {
        "rows": {"name": rows, "layers": list(range(linear.shape[0]))},
        "columns": {"name": columns, "layers": list(range(linear.shape[1]))},
        "linear": linear.tolist(),
        "rbf": rbf.tolist(),
    }


def _most_alike(rows: list[int], columns: list[int], values: list[list[float | None]], other: str) -> Markdown:
    """The most similar pair of layers, and the last ones."""
    pairs = [(values[i][j], rows[i], columns[j]) for i in range(len(rows)) for j in range(len(columns))]
    pairs = [pair for pair in pairs if is_number(pair[0])]
    if not pairs:
        return EMPTY
    text = Markdown("Layer {1} and layer {2} of {other} are the most alike, with {0:.3f}").format(
        *max(pairs), other=other
    )
    if is_number(last := values[-1][-1]):
        text += Markdown("; the last layers of both, {} and {}, have {:.3f}").format(rows[-1], columns[-1], last)
    return text + Markdown(".")
