"""Curvature of the loss around a model's weights."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from hf_ihb.analysis.base import Analysis, Results, Section, SharedArguments, batches
from hf_ihb.config.fields import AT_LEAST_ONE, NON_NEGATIVE, Range, key
from hf_ihb.data import StoredSplit, stratified_sample
from hf_ihb.errors import ModelLoadError
from hf_ihb.functional.curvature import HessianOperator, hutchinson_trace, lanczos, smoothed_spectrum
from hf_ihb.markdown import Markdown, is_number
from hf_ihb.models.features import size_arguments
from hf_ihb.models.pretrained import Pretrained, label_permutation

_PROBES_AT_ONCE = 8  # they share the forward and the first backward of a micro-batch


@dataclass
class HessianAnalysis(Analysis):
    """Trace, ends and density of the spectrum of the Hessian of the cross-entropy (Yao et al., 2020).

    It is of all trainable parameters and of the logits the model answers with (the mean of a DeiT's two heads), without
    smoothing, in eval mode. Curvature depends on the scale of the weights; ``trace_times_squared_norm`` is the trace
    times the squared length of the parameter vector, which does not change where all weights of a normalised network
    are rescaled.

    References:
        Yao et al., 2020, https://arxiv.org/abs/1912.07145; Ghorbani et al., 2019, https://arxiv.org/abs/1901.10159.
    """

    hessian_images: int = key(1024, "Images the loss is a mean over, for the Hessian.", within=AT_LEAST_ONE)
    hessian_batch_size: int = key(
        64,
        "Images in one micro-batch of it, which bounds its memory; results do not depend on it.",
        within=AT_LEAST_ONE,
    )
    max_probes: int = key(100, "Probes of the Hessian's trace at most.", within=Range(2))
    trace_tolerance: float = key(
        0.05, "Stop when the trace's standard error is below this share of it.", within=NON_NEGATIVE
    )
    lanczos_steps: int = key(
        40, "Steps of Lanczos at most; each keeps one vector of the model's size.", within=Range(2)
    )
    lanczos_starts: int = key(2, "Random starts that the spectral density is the mean of.", within=AT_LEAST_ONE)
    hessian_dtype: Literal["float32", "float64"] = key("float32", "Precision of the Hessian.")

    name: ClassVar = "hessian"
    summary: ClassVar = "hessian"
    topic: ClassVar = "curvature"
    title: ClassVar = "Curvature"
    free_settings: ClassVar = ("hessian_batch_size",)
    plots: ClassVar = {"eigenvalue_density": "density of the Hessian's eigenvalues"}
    card_plot: ClassVar = ("eigenvalue_density", "Density of the Hessian's eigenvalues")

    def compute(
        self,
        subject: Pretrained,
        split: StoredSplit,
        rows: Tensor,
        args: SharedArguments,
        teacher: Pretrained | None = None,
    ) -> dict[str, Any]:
        """Trace, ends and density of the Hessian's spectrum, over images of its own, chosen like `rows`.

        Returns:
            There is an eigenvalue of H within ``*_residual`` of each end.

        Raises:
            ModelLoadError: If the model has no classifier.
            NumericsError: If the loss or a product is not finite.
        """
        if "ForImageClassification" not in type(subject.model).__name__:
            raise ModelLoadError(
                f"model '{subject.name}': expected a classifier for the Hessian of its loss, found "
                f"{type(subject.model).__name__}; leave hessian out of --metrics"
            )
        rows = stratified_sample(split, self.hessian_images, args.analysis_seed, f"key 'hessian_images', {args.split}")
        dtype = getattr(torch, self.hessian_dtype)
        model = copy.deepcopy(subject.model).to(dtype).requires_grad_(True).eval()
        losses = self._losses(subject._replace(model=model), split, rows, dtype)
        operator = HessianOperator(losses, list(model.parameters()))
        draw = {"device": model.device, "dtype": dtype, "seed": args.analysis_seed}
        trace, squared_norm = self._trace(operator, draw), _squared_norm(model)
        return {
            "loss": "cross-entropy of the logits",
            "num_images": len(rows),
            "num_parameters": operator.size,
            "dtype": self.hessian_dtype,
            "trace": trace.trace,
            "trace_standard_error": trace.standard_error,
            "num_probes": trace.num_probes,
            "converged": trace.converged,
            "trace_times_squared_norm": trace.trace * squared_norm,
        } | _spectrum(self._spectra(operator, draw))

    def _losses(
        self, subject: Pretrained, split: StoredSplit, rows: Tensor, dtype: torch.dtype
    ) -> Callable[[], Iterator[Tensor]]:
        """Micro-batch by micro-batch, the terms that the mean loss over `rows` is the sum of."""
        model = subject.model
        permutation = label_permutation(model.config, split.label_names, f"model '{subject.name}'")

        def losses() -> Iterator[Tensor]:
            for pixels, labels in batches(subject, split, rows, self.hessian_batch_size):
                pixels = pixels.to(dtype)
                logits = model(pixel_values=pixels, **size_arguments(model, pixels)).logits
                logits = logits if permutation is None else logits[:, permutation.to(logits.device)]
                yield F.cross_entropy(logits, labels, reduction="sum") / len(rows)

        return losses

    def _trace(self, operator: HessianOperator, draw: dict[str, Any]) -> Any:
        with _bar("Hessian, trace", self.max_probes, "probe") as progress:
            return hutchinson_trace(
                operator,
                operator.size,
                max_probes=self.max_probes,
                tolerance=self.trace_tolerance,
                block_size=_PROBES_AT_ONCE,
                progress=progress,
                **draw,
            )

    def _spectra(self, operator: HessianOperator, draw: dict[str, Any]) -> list[Any]:
        """Lanczos' answer from each start."""
        spectra, steps = [], self.lanczos_steps
        for start in range(self.lanczos_starts):
            with _bar(f"Hessian, spectrum {start + 1} of {self.lanczos_starts}", steps, "step") as progress:
                spectra.append(lanczos(operator, operator.size, steps, start=start, progress=progress, **draw))
        return spectra

    @classmethod
    def columns(cls) -> dict[str, Callable[[Section], str]]:
        """Trace and ends of the spectrum."""
        return {
            "Hessian trace": lambda section: (
                f"{section['trace']:.4g} ± {section['trace_standard_error']:.2g}"
                + ("" if section["converged"] else " (not converged)")
            ),
            "eigenvalues": lambda section: (
                f"{section['smallest_eigenvalue']:.4g} to {section['largest_eigenvalue']:.4g}"
            ),
        }

    @classmethod
    def plot(cls, results: Results, path_of: Callable[[str], Path], *, is_single: bool) -> None:
        """Density of the eigenvalues."""
        from hf_ihb.plots import eigenvalue_density_plot

        eigenvalue_density_plot(results, path_of("eigenvalue_density"))

    @classmethod
    def card_text(cls, result: Mapping[str, Any]) -> Markdown | None:
        """Trace and ends of the spectrum; None where the trace is not a number."""
        section = result["hessian"]
        if not all(is_number(section[name]) for name in ("trace", "trace_standard_error")):
            return None
        text = (
            "The Hessian of the cross-entropy over {num_images:,} images has the trace {trace:.4g} ± "
            "{trace_standard_error:.2g} (standard error over {num_probes} probes) and eigenvalues from "
            "{smallest_eigenvalue:.4g} to {largest_eigenvalue:.4g}. Curvature depends on the scale of the weights."
        )
        return Markdown(text).format(**section)


def _squared_norm(model: Any) -> float:
    return sum(p.detach().double().square().sum().item() for p in model.parameters())


def _spectrum(spectra: Sequence[Any]) -> dict[str, Any]:
    """Ends, density and quadrature of what Lanczos found from each start."""
    density = smoothed_spectrum(torch.cat([s.nodes for s in spectra]), torch.cat([s.weights for s in spectra]))
    largest, smallest = max(spectra, key=lambda s: s.largest), min(spectra, key=lambda s: s.smallest)
    return {
        "largest_eigenvalue": largest.largest,
        "largest_residual": largest.residuals[-1].item(),
        "smallest_eigenvalue": smallest.smallest,
        "smallest_residual": smallest.residuals[0].item(),
        "lanczos_steps": max(len(s.nodes) for s in spectra),
        "density": {
            "eigenvalues": density.points.tolist(),
            "density": density.density.tolist(),
            "sigma": density.sigma,
            "num_starts": len(spectra),
        },
        "nodes": [s.nodes.tolist() for s in spectra],
        "weights": [s.weights.tolist() for s in spectra],
    }


@contextmanager
def _bar(description: str, total: int, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar, as a function that is told how much is done."""
    with tqdm(total=total, desc=description, unit=unit) as bar:
        yield lambda done, _: bar.update(done - bar.n)
