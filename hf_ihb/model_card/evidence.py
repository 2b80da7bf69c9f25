"""What was measured of a model, in the words of its card; percentages with two decimals."""

from collections.abc import Mapping
from typing import Any

from hf_ihb.model_card.files import RunFiles, is_number
from hf_ihb.model_card.header import answering_accuracy
from hf_ihb.model_card.markdown import EMPTY, Markdown, percent, table
from hf_ihb.model_card.training import called, named

# Key of a head's results -> title of the column, format, factor.
_METRICS = {
    "accuracy": ("accuracy %", "{:.2f}", 100),
    "top_5_accuracy": ("top-5 %", "{:.2f}", 100),
    "nll": ("NLL (nats)", "{:.4f}", 1),
    "ece": ("ECE %", "{:.2f}", 100),
}
# Key of a layer's statistics -> title of the column, format.
_ATTENTION = {
    "distance": ("distance (patches)", "{:.3f}"),
    "distance_relative": ("relative to uniform", "{:.3f}"),
    "distance_px": ("distance (px)", "{:.2f}"),
    "entropy": ("entropy (nats)", "{:.3f}"),
    "special_token_mass": ("special-token mass", "{:.3f}"),
}
_TITLES = [title for title, _ in _ATTENTION.values()]


def _value(number: Any, text: str, factor: float = 1) -> Markdown:
    """A number, or nothing where it is not defined."""
    return Markdown(text).format(factor * number) if is_number(number) else EMPTY


def measured_on(data: Mapping[str, Any]) -> Markdown:
    """The images that something was measured on."""
    return Markdown("{:,} images of the {} split of {}").format(data["num_images"], data["split"], called(data["name"]))


def results(run: RunFiles) -> dict[str, Any] | None:
    """Accuracy beside the control's and the teacher's, and what compares them; None before there is any."""
    if (answer := answering_accuracy(run)) is None:
        return None
    accuracy, data = answer
    return {
        "on": measured_on(data),
        "accuracy": _value(accuracy, "{:.2f}", 100),
        "table": _results_table(run),
        "remarks": [*_transfer(run), *_fidelity(run), *_validation(run)],
    }


def _results_table(run: RunFiles) -> Markdown:
    titles = [title for title, _, _ in _METRICS.values()]
    rows: list[list[Any]] = [[EMPTY, *map(Markdown, titles), Markdown("parameters")]]
    this = Markdown("**this model**" if run.teacher is None else "**this student**")
    metrics = run.metrics
    if metrics is None:
        rows.append([this, *_row(run.evaluation["test"]), _count(run.evaluation["num_parameters"])])
        single = [name for name in ("cls", "distillation") if f"{name}_accuracy" in run.evaluation["test"]]
        rows += [
            [_head(name), *_row({"accuracy": run.evaluation["test"][f"{name}_accuracy"]}), EMPTY] for name in single
        ]
        return table(rows)
    for i, (name, head) in enumerate(metrics["heads"].items()):
        parameters = EMPTY if i else _count(metrics["model"]["num_parameters"])
        rows.append([_head(name) if i else this, *_row(head), parameters])
    transfer = metrics["transfer"] or {}
    titles = {"baseline": "matched control, no teacher: ", "teacher": _teacher_title(run)}
    for role, title in titles.items():
        if is_number(accuracy := transfer.get(f"{role}_accuracy")):
            other = metrics[role]
            name = Markdown(title) + named(other["name"], other["revision"])
            rows.append([name, *_row({"accuracy": accuracy}), _count(other["num_parameters"])])
    return table(rows)


def _teacher_title(run: RunFiles) -> str:
    """What the model that `metrics.json` calls the teacher was to this one."""
    if run.teacher is None or run.metrics["teacher"] is None or run.teacher["name"] != run.metrics["teacher"]["name"]:
        return "compared with: "
    return "teacher, with its trained weights: " if run.keys["teacher_control"] == "untrained" else "teacher: "


def _count(number: int) -> Markdown:
    return Markdown("{:,}").format(number)


def _head(name: str) -> Markdown:
    return Markdown("its {} head alone").format(name)


def _row(head: Mapping[str, Any]) -> list[Markdown]:
    return [_value(head.get(key), text, factor) for key, (_, text, factor) in _METRICS.items()]


def _transfer(run: RunFiles) -> list[Markdown]:
    if run.metrics is None or (transfer := run.metrics["transfer"]) is None:
        return []
    text = "Gain over the matched control: {:+.2f} points, {} interval [{:.2f}, {:.2f}] over the drawing of test images"
    points = [100 * transfer[name] for name in ("gain", "gain_ci_low", "gain_ci_high")]
    level = percent(transfer["confidence_level"], 0)
    found = [Markdown(text).format(points[0], level, *points[1:]) + Markdown(", not of training seeds.")]
    if is_number(closed := transfer["gap_closed"]):
        found.append(Markdown("Of the gap between the control and the teacher, {} is closed.").format(percent(closed)))
    return found


def _fidelity(run: RunFiles) -> list[Markdown]:
    if run.metrics is None:
        agreement = run.evaluation["test"].get("teacher_agreement")
        text = Markdown("It decides as its teacher on {} of the images.")
        return [text.format(percent(agreement))] if is_number(agreement) else []
    if (fidelity := run.metrics["fidelity"]) is None:
        return []
    text = "It decides as {name} on {agreement} of the images; KL({name} || this) is {divergence:.4f} nats."
    agreement, divergence = percent(fidelity["agreement"]), fidelity["kl_divergence"]
    name = called(run.metrics["teacher"]["name"])
    return [Markdown(text).format(name=name, agreement=agreement, divergence=divergence)]


def _validation(run: RunFiles) -> list[Markdown]:
    if run.evaluation is None:
        return []
    own = percent(run.evaluation["validation"]["accuracy"])
    teacher = run.evaluation.get("teacher_validation_accuracy")
    other = Markdown("; its teacher's: {}").format(percent(teacher)) if is_number(teacher) else EMPTY
    return [Markdown("Accuracy on the validation split: {}").format(own) + other + Markdown(".")]


def attention(run: RunFiles) -> dict[str, Any] | None:
    """How far patches look, layer by layer; None where it was not measured."""
    if (found := run.analysis.get("attention")) is None:
        return None
    untrained = found["untrained"] or {}
    rows: list[list[Any]] = [[Markdown(title) for title in ("layer", *_TITLES, "untrained twin")]]
    for row, twin in zip(found["layers"], untrained.get("layers", [{}] * len(found["layers"])), strict=True):
        values = [_value(row[key], text) for key, (_, text) in _ATTENTION.items()]
        rows.append([row["layer"], *values, _value(twin.get("distance"), "{:.3f}")])
    means = Markdown("The mean over layers is {} patches").format(_value(found["mean_distance"], "{:.3f}"))
    if untrained:
        mean = _value(untrained["mean_distance"], "{:.3f}")
        means += Markdown("; of the untrained twin, the same architecture with random weights, {}").format(mean)
    return {
        "on": measured_on(run.analysis["data"]),
        "grid": Markdown("{} x {}").format(*found["grid"]),
        "patch": Markdown("{} x {} px").format(*found["patch_size_px"]),
        "uniform": _value(found["uniform_distance"], "{:.3f}"),
        "means": means + Markdown("."),
        "table": table(rows),
    }


def cka(run: RunFiles) -> dict[str, Any] | None:
    """How alike the layers of the model and of a teacher are, or its own; None where it was not measured."""
    if (found := run.analysis.get("cka")) is None:
        return None
    matrix = found["matrices"][-1]  # with the teacher, where there is one
    rows, columns, values = matrix["rows"]["layers"], matrix["columns"]["layers"], matrix["linear"]
    if len(found["matrices"]) > 1:
        teacher = run.analysis["teacher"]
        of = Markdown("Debiased linear CKA of each layer with each of {}").format(called(teacher["name"]))
        sentence = _cka_between(rows, columns, values, called(teacher["name"]))
    else:
        of = Markdown("Debiased linear CKA of each layer with each other")
        sentence = Markdown("The first and the last layer have {:.3f}.") if is_number(values[0][-1]) else EMPTY
        sentence = sentence.format(values[0][-1])
    method = Markdown("from mean patch tokens in batches of {:,} of the ").format(found["rows_per_batch"])
    return {"of": of, "method": method + measured_on(run.analysis["data"]), "found": sentence}


def _cka_between(rows: list[int], columns: list[int], values: list[list[float | None]], other: str) -> Markdown:
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


def curvature(run: RunFiles) -> Markdown | None:
    """Trace and ends of the Hessian's spectrum; None where it was not measured."""
    found = run.analysis.get("hessian")
    if found is None or not all(is_number(found[name]) for name in ("trace", "trace_standard_error")):
        return None
    text = (
        "The Hessian of the cross-entropy over {num_images:,} images has the trace {trace:.4g} ± "
        "{trace_standard_error:.2g} (standard error over {num_probes} probes) and eigenvalues from "
        "{smallest_eigenvalue:.4g} to {largest_eigenvalue:.4g}. Curvature depends on the scale of the weights."
    )
    return Markdown(text).format(**found)
