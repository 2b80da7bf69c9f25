"""How well a model does, in the words of its card; percentages with two decimals."""

from collections.abc import Mapping
from typing import Any

from hf_ihb.markdown import EMPTY, Markdown, called, is_number, measured_on, percent, table, value_or_nothing
from hf_ihb.model_card.files import RunFiles, Taught
from hf_ihb.model_card.header import answering_accuracy
from hf_ihb.model_card.training import named

# Key of a head's results -> title of the column, format, factor.
_METRICS = {
    "accuracy": ("accuracy %", "{:.2f}", 100),
    "top_5_accuracy": ("top-5 %", "{:.2f}", 100),
    "nll": ("NLL (nats)", "{:.4f}", 1),
    "ece": ("ECE %", "{:.2f}", 100),
}


def results(run: RunFiles) -> dict[str, Any] | None:
    """Accuracy beside the control's and the teacher's, and what compares them; None before there is any."""
    if (answer := answering_accuracy(run)) is None:
        return None
    accuracy, data = answer
    return {
        "on": measured_on(data),
        "accuracy": value_or_nothing(accuracy, "{:.2f}", 100),
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
    name = None if run.metrics["teacher"] is None else run.metrics["teacher"]["name"]
    controls = [taught.keys["teacher_control"] for taught in run.taught if taught.teacher["name"] == name]
    if not controls:
        return "compared with: "
    return "teacher, with its trained weights: " if controls[0] == "untrained" else "teacher: "


def _count(number: int) -> Markdown:
    return Markdown("{:,}").format(number)


def _head(name: str) -> Markdown:
    return Markdown("its {} head alone").format(name)


def _row(head: Mapping[str, Any]) -> list[Markdown]:
    return [value_or_nothing(head.get(key), text, factor) for key, (_, text, factor) in _METRICS.items()]


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
        found = [(taught, run.evaluation["test"].get(taught.of("teacher_agreement"))) for taught in run.taught]
        text = "It decides as its {teacher} on {agreement} of the images."
        return [
            Markdown(text).format(teacher=_which(taught), agreement=percent(agreement))
            for taught, agreement in found
            if is_number(agreement)
        ]
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
    found = [(taught, run.evaluation.get(taught.of("teacher_validation_accuracy"))) for taught in run.taught]
    others = [
        Markdown("; its {}'s: {}").format(_which(taught), percent(accuracy))
        for taught, accuracy in found
        if is_number(accuracy)
    ]
    return [Markdown("Accuracy on the validation split: {}").format(own) + EMPTY.join(others) + Markdown(".")]


def _which(taught: Taught) -> Markdown:
    """Which of the teachers, where there are several."""
    return Markdown(taught.of("teacher").replace("_", " "))
