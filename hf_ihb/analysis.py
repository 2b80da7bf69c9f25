"""What happens inside a model: attention distance, similarity of layers, curvature of the loss -> plain numbers."""

import copy
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from hf_ihb.config.measure import ANALYSES, AnalysisArguments
from hf_ihb.data import StoredSplit, stratified_sample
from hf_ihb.errors import ModelLoadError
from hf_ihb.functional.attention import uniform_attention_distance
from hf_ihb.functional.curvature import HessianOperator, hutchinson_trace, lanczos, smoothed_spectrum
from hf_ihb.functional.minibatch_cka import MinibatchCKA
from hf_ihb.models.attention import (
    AttentionAccumulator,
    attention_geometry,
    capture_attention,
    cls_attention_maps,
)
from hf_ihb.models.features import extract_features, size_arguments
from hf_ihb.models.pretrained import Pretrained, label_permutation, untrained_twin
from hf_ihb.runs.environment import environment
from hf_ihb.runs.tables import markdown_table

_THUMBNAIL_PX = 64
_MAP_LAYERS = 4
_PROBES_AT_ONCE = 8  # they share the forward and the first backward of a micro-batch

# What the numbers of each analysis depend on beside the model and the images.
_SETTINGS = {
    "attention": ("untrained_reference", "num_maps"),
    "cka": ("rows_per_batch", "teacher_image_size"),
    "hessian": (
        "hessian_images",
        "max_probes",
        "trace_tolerance",
        "lanczos_steps",
        "lanczos_starts",
        "hessian_dtype",
    ),
}


def analyze(
    subject: Pretrained,
    split: StoredSplit,
    args: AnalysisArguments,
    *,
    data: dict[str, Any],
    teacher: Pretrained | None = None,
    previous: dict[str, Any] | None = None,
    keep: Callable[[dict[str, Any]], None] = lambda analysis: None,
) -> dict[str, Any]:
    """Makes every analysis that `args` names.

    Args:
        subject: The model, on the device to work on.
        split: Images to take `max_images` of.
        args: What is measured, and how.
        data: ``name`` and ``revision`` of the data set.
        teacher: A second model, on the same device, for CKA between the two.
        previous: An earlier result. Where it is of the same weights and images, its parts stand as they are: those that
            are not asked for, and with `compare` those that are, if their settings are the same too.
        keep: Called with all there is after each analysis, and before an error leaves; the place to write a file.

    Returns:
        ``model``, ``teacher``, ``data``, ``settings``, ``environment``, ``seconds``, and ``attention``, ``cka``,
        ``hessian`` as far as they were asked for or stand: dictionaries of plain numbers. The environment is that of
        what was made last.

    Raises:
        ModelLoadError: If an analysis does not apply to the model, such as attention to a CNN.
        DataError: If the images are too few to hold every class.
        NumericsError: If a loss or a product with its Hessian is not finite.
    """
    rows = stratified_sample(split, args.max_images, args.analysis_seed, f"key 'max_images', {args.split}")
    result: dict[str, Any] = {
        "model": subject.summary(),
        "teacher": None if teacher is None else teacher.summary(),
        "data": {**data, "split": args.split, "num_images": len(rows), "seed": args.analysis_seed}
        | {"indices": rows.tolist()},
        "settings": {part: {name: getattr(args, name) for name in _SETTINGS[part]} for part in args.analyses},
        "environment": environment(subject.model.device),
        "seconds": {},
    }
    standing = _standing(previous or {}, result, args)
    for part in standing:
        for section in ("settings", "seconds"):
            result[section][part] = previous[section][part]
        result[part] = previous[part]
    if "cka" in standing:
        result["teacher"] = previous["teacher"]
    is_whole = standing == set(ANALYSES) & set(previous or {}) and "failed" not in (previous or {})
    if is_whole and standing >= set(args.analyses):
        return previous  # with the environment that it was made in
    parts = {
        "attention": lambda: analyze_attention(subject, split, rows, args),
        "cka": lambda: analyze_cka(subject, split, rows, args, teacher),
        "hessian": lambda: analyze_hessian(subject, split, args),
    }
    for name in (name for name in args.analyses if name not in standing):
        start = time.perf_counter()
        try:
            result[name] = parts[name]()
        except Exception as error:
            result["failed"] = {name: " ".join(str(error).split())}
            keep(result)
            raise
        result["seconds"][name] = round(time.perf_counter() - start, 2)
        keep(result)
    return result


def _standing(previous: dict[str, Any], wanted: dict[str, Any], args: AnalysisArguments) -> set[str]:
    """Parts of an earlier result that are still true and are not to be made again."""

    def digest(result: dict[str, Any], role: str) -> str | None:
        return (result.get(role) or {}).get("weights_sha256")

    if digest(previous, "model") != digest(wanted, "model") or previous.get("data") != wanted["data"]:
        return set()
    made = {part for part in ANALYSES if all(part in previous.get(s, {}) for s in ("settings", "seconds"))}
    kept = made - set(args.analyses)
    if args.compare:
        kept |= {part for part in made if previous["settings"][part] == wanted["settings"].get(part)}
    # CKA is of two models: another teacher ends it, none leaves it alone unless it is asked for
    others = digest(previous, "teacher"), digest(wanted, "teacher")
    if others[0] != others[1] and (others[1] is not None or "cka" in args.analyses):
        kept.discard("cka")
    return kept


def _batches(
    subject: Pretrained, split: StoredSplit, rows: Tensor, batch_size: int, description: str = ""
) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised pixels and labels on the model's device; with a progress bar where there is a description."""
    device = subject.model.device
    with tqdm(total=len(rows), desc=description, unit="img", disable=not description) as bar:
        for some in rows.split(batch_size):
            batch = split.__getitems__(some)
            images = batch["pixel_values"].to(device)
            yield subject.pixels.apply(images), batch["labels"].to(device)
            bar.update(len(some))


# ---- Attention ----


def analyze_attention(subject: Pretrained, split: StoredSplit, rows: Tensor, args: AnalysisArguments) -> dict[str, Any]:
    """How far patches look in each layer, for the model and for the same architecture without training.

    Returns:
        Grid, patch size and prefix tokens; ``uniform_distance`` of attention without preference; ``layers`` as
        `AttentionAccumulator.layers` has them; ``untrained`` likewise; ``maps`` of a few images. Distances in patches.

    Raises:
        ModelLoadError: If the model has no self-attention over all patches.
    """
    measured = _attention_distance(subject, split, rows, args.batch_size, "Attention")
    geometry = measured.geometry
    layers = measured.layers()
    untrained = None
    if args.untrained_reference:
        twin = subject._replace(model=untrained_twin(subject.model, args.analysis_seed))
        reference = _attention_distance(twin, split, rows, args.batch_size, "Attention, untrained")
        untrained = {
            "seed": args.analysis_seed,
            "mean_distance": reference.mean_distance,
            "layers": reference.layers(),
        }
    return {
        "grid": list(geometry.grid),
        "patch_size_px": [geometry.patch_size, geometry.patch_size],
        "num_prefix_tokens": geometry.num_prefix_tokens,
        "num_images": measured.num_images,
        "uniform_distance": uniform_attention_distance(geometry.grid),
        "mean_distance": measured.mean_distance,
        "layers": layers,
        "untrained": untrained,
        "maps": _attention_maps(subject, split, rows, args, len(layers), geometry.has_cls),
    }


def _attention_distance(
    subject: Pretrained, split: StoredSplit, rows: Tensor, batch_size: int, description: str
) -> AttentionAccumulator:
    model, accumulator = subject.model, None
    for pixels, _ in _batches(subject, split, rows, batch_size, description):
        accumulator = accumulator or AttentionAccumulator(attention_geometry(model, pixels))
        _add_batch(model, pixels, accumulator)
    return accumulator


def _add_batch(model: Any, pixels: Tensor, accumulator: AttentionAccumulator) -> None:
    capture_attention(
        model,
        pixels,
        lambda layer, attention: accumulator.update(layer, accumulator.geometry.statistics(attention)),
        **size_arguments(model, pixels),
    )


def _attention_maps(
    subject: Pretrained, split: StoredSplit, rows: Tensor, args: AnalysisArguments, num_layers: int, has_cls: bool
) -> list[dict[str, Any]]:
    """Where images of different classes are looked at, in layers spread over the depth."""
    count = min(args.num_maps, len(rows))
    if count == 0:
        return []
    some = rows[_one_of_each_class(split.labels[rows])[:count]]
    chosen = sorted({round(i) for i in torch.linspace(0, num_layers - 1, min(_MAP_LAYERS, num_layers)).tolist()})
    pixels, labels = next(_batches(subject, split, some, count))
    maps = cls_attention_maps(subject.model, pixels, **size_arguments(subject.model, pixels))
    images = split.__getitems__(some)["pixel_values"].float()
    if max(images.shape[-2:]) > _THUMBNAIL_PX:
        scale = _THUMBNAIL_PX / max(images.shape[-2:])
        images = F.interpolate(images, scale_factor=scale, mode="area")
    images = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).round().to(torch.uint8)
    return [
        {
            "index": int(some[i]),
            "label": split.label_names[int(labels[i])],
            "image": images[i].tolist(),
            "prefix_token": "cls" if has_cls else None,
            "layers": chosen,
            "weights": [[[round(w, 6) for w in row] for row in maps[layer][i].tolist()] for layer in chosen],
        }
        for i in range(count)
    ]


def _one_of_each_class(labels: Tensor) -> list[int]:
    """Positions of the first image of every class, then of the second of every class, and so on."""
    seen: Counter[int] = Counter()
    turns = []
    for label in labels.tolist():
        turns.append((seen[label], label))
        seen[label] += 1
    return sorted(range(len(turns)), key=turns.__getitem__)


# ---- CKA ----


def analyze_cka(
    subject: Pretrained,
    split: StoredSplit,
    rows: Tensor,
    args: AnalysisArguments,
    teacher: Pretrained | None = None,
) -> dict[str, Any]:
    """Similarity of every pair of layers, of the model with itself and with a teacher.

    Features are block outputs averaged over patch tokens (over positions for a CNN); the teacher sees the same images
    in its own size and normalisation.

    Returns:
        ``matrices``: names and layers of rows and columns, and debiased minibatch CKA, with a linear and an RBF kernel.
    """
    chunk = min(args.rows_per_batch, len(rows))
    own = MinibatchCKA(chunk, kernels=("linear", "rbf"))
    cross = MinibatchCKA(chunk, kernels=("linear", "rbf"))
    batches = _batches(subject, split, rows, args.batch_size, "CKA")
    others = None if teacher is None else _batches(teacher, split, rows, args.batch_size)
    for pixels, _ in batches:
        x = _pooled_features(subject, pixels)
        own.update(x)
        if others is not None:
            cross.update(x, _pooled_features(teacher, next(others)[0]))
    matrices = [_matrix(own, subject.name, subject.name)]
    if teacher is not None:
        matrices.append(_matrix(cross, subject.name, teacher.name))
    return {
        "num_images": len(rows),
        "rows_per_batch": chunk,
        "features": "mean over patch tokens",
        "matrices": matrices,
    }


@torch.no_grad()
def _pooled_features(subject: Pretrained, pixels: Tensor) -> list[Tensor]:
    _, maps = extract_features(subject.model, pixels, None, **size_arguments(subject.model, pixels))
    return [feature_map.patch_tokens.mean(dim=1) for feature_map in maps]


def _matrix(cka: MinibatchCKA, rows: str, columns: str) -> dict[str, Any]:
    linear, rbf = cka.compute("linear"), cka.compute("rbf")
    return {
        "rows": {"name": rows, "layers": list(range(linear.shape[0]))},
        "columns": {"name": columns, "layers": list(range(linear.shape[1]))},
        "linear": linear.tolist(),
        "rbf": rbf.tolist(),
    }


# ---- Hessian ----


def analyze_hessian(subject: Pretrained, split: StoredSplit, args: AnalysisArguments) -> dict[str, Any]:
    """Trace, ends and density of the spectrum of the Hessian of the cross-entropy, over all trainable parameters.

    The loss is that of the logits the model answers with (the mean of a DeiT's two heads), without smoothing, in eval
    mode. There is an eigenvalue of H within ``*_residual`` of each end. Curvature depends on the scale of the weights;
    ``trace_times_squared_norm`` is the trace times the squared length of the parameter vector, which does not change
    where all weights of a normalised network are rescaled.

    Raises:
        ModelLoadError: If the model has no classifier.
        NumericsError: If the loss or a product is not finite.
    """
    if "ForImageClassification" not in type(subject.model).__name__:
        raise ModelLoadError(
            f"model '{subject.name}': expected a classifier for the Hessian of its loss, found "
            f"{type(subject.model).__name__}; leave hessian out of --metrics"
        )
    rows = stratified_sample(split, args.hessian_images, args.analysis_seed, f"key 'hessian_images', {args.split}")
    dtype = getattr(torch, args.hessian_dtype)
    model = copy.deepcopy(subject.model).to(dtype).requires_grad_(True).eval()
    permutation = label_permutation(model.config, split.label_names, f"model '{subject.name}'")

    def losses() -> Iterator[Tensor]:
        for pixels, labels in _batches(subject._replace(model=model), split, rows, args.hessian_batch_size):
            pixels = pixels.to(dtype)
            logits = model(pixel_values=pixels, **size_arguments(model, pixels)).logits
            logits = logits if permutation is None else logits[:, permutation.to(logits.device)]
            yield F.cross_entropy(logits, labels, reduction="sum") / len(rows)

    operator = HessianOperator(losses, list(model.parameters()))
    draw = {"device": model.device, "dtype": dtype, "seed": args.analysis_seed}
    with _bar("Hessian, trace", args.max_probes, "probe") as progress:
        trace = hutchinson_trace(
            operator,
            operator.size,
            max_probes=args.max_probes,
            tolerance=args.trace_tolerance,
            block_size=_PROBES_AT_ONCE,
            progress=progress,
            **draw,
        )
    spectra = []
    for start in range(args.lanczos_starts):
        with _bar(f"Hessian, spectrum {start + 1} of {args.lanczos_starts}", args.lanczos_steps, "step") as progress:
            spectra.append(lanczos(operator, operator.size, args.lanczos_steps, start=start, progress=progress, **draw))
    density = smoothed_spectrum(torch.cat([s.nodes for s in spectra]), torch.cat([s.weights for s in spectra]))
    largest, smallest = max(spectra, key=lambda s: s.largest), min(spectra, key=lambda s: s.smallest)
    squared_norm = sum(p.detach().double().square().sum().item() for p in model.parameters())
    return {
        "loss": "cross-entropy of the logits",
        "num_images": len(rows),
        "num_parameters": operator.size,
        "dtype": args.hessian_dtype,
        "trace": trace.trace,
        "trace_standard_error": trace.standard_error,
        "num_probes": trace.num_probes,
        "converged": trace.converged,
        "trace_times_squared_norm": trace.trace * squared_norm,
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


# ---- Results ----


def analysis_table(analyses: dict[str, dict[str, Any]]) -> str:
    """A Markdown table, one row a model, of what the analyses they all share come to."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {}
    if all("attention" in a for a in analyses.values()):
        columns |= {
            "mean distance, patches": lambda a: f"{a['attention']['mean_distance']:.3f}",
            "of uniform": lambda a: f"{a['attention']['mean_distance'] / a['attention']['uniform_distance']:.3f}",
            "untrained": lambda a: (
                "" if a["attention"]["untrained"] is None else f"{a['attention']['untrained']['mean_distance']:.3f}"
            ),
            "entropy, nats": lambda a: f"{_mean(a, 'entropy'):.3f}",
            "special tokens": lambda a: f"{_mean(a, 'special_token_mass'):.3f}",
        }
    if all("hessian" in a for a in analyses.values()):
        columns |= {
            "Hessian trace": lambda a: (
                f"{a['hessian']['trace']:.4g} ± {a['hessian']['trace_standard_error']:.2g}"
                + ("" if a["hessian"]["converged"] else " (not converged)")
            ),
            "eigenvalues": lambda a: (
                f"{a['hessian']['smallest_eigenvalue']:.4g} to {a['hessian']['largest_eigenvalue']:.4g}"
            ),
        }
    rows = [("model", *columns)] + [(name, *(show(a) for show in columns.values())) for name, a in analyses.items()]
    return markdown_table(rows)


def _mean(analysis: dict[str, Any], name: str) -> float:
    layers = analysis["attention"]["layers"]
    return sum(layer[name] for layer in layers) / len(layers)
