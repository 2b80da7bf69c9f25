"""Evaluation by the `evaluate` library: its image-classification evaluator, and a whole split in one batched pass."""

import inspect
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from numbers import Number
from typing import Any, NamedTuple

import evaluate
import numpy as np
import torch
from scipy.stats import bootstrap
from torch import Tensor
from tqdm.auto import tqdm
from transformers import Pipeline, PreTrainedModel, pipeline

from hf_ihb.data import StoredSplit
from hf_ihb.errors import NumericsError, TeacherMismatchError
from hf_ihb.metrics import Accuracy, TeacherFidelity, classification_metrics, decisions, needs_logits, paired_transfer
from hf_ihb.models.features import size_arguments
from hf_ihb.models.pretrained import Pretrained, label_permutation
from hf_ihb.models.teacher import Teacher
from hf_ihb.runs.environment import default_device, environment
from hf_ihb.runs.tables import markdown_table

TASK = "image-classification"


class Reader(NamedTuple):
    """A model that is shown a split.

    Attributes:
        split: Its images as the model's image processor makes them, as far as they can be had so.
        read: ``(B, C, H, W)`` uint8 images of it -> ``(B, K)`` logits of each head.
    """

    split: StoredSplit
    read: Callable[[Tensor], dict[str, Tensor]]


# How a pipeline is asked for the logits of every class; it cuts top_k down to the classes there are.
_LOGITS = {"function_to_apply": "none", "top_k": sys.maxsize}


class ImageClassificationEvaluator(evaluate.ImageClassificationEvaluator):
    """`evaluate`'s evaluator, for ready pipelines and callables on transformers 5 and for metrics of logits.

    A metric that takes logits alone gets them in the order of `label_mapping`, whose values are 0 to K - 1. A callable
    is called with the images alone, or as a pipeline is (``function_to_apply="none"``) where logits are needed.
    Without a metric it is accuracy, and nothing is downloaded.

    Args:
        task: ``image-classification``.
        default_metric_name: Metric on the Hub in place of our accuracy.
        batch_size: Images in one forward of a pipeline.
    """

    def __init__(self, task: str = TASK, default_metric_name: str | None = None, batch_size: int = 32) -> None:
        super().__init__(task, default_metric_name=default_metric_name)
        self.PIPELINE_KWARGS = {"batch_size": batch_size}
        self._wants_logits = False

    def prepare_metric(self, metric: str | evaluate.EvaluationModule | None) -> Any:
        """The metric; `Accuracy` where there is none and no default."""
        if metric is None and self.default_metric_name is None:
            metric = Accuracy()
        metric = super().prepare_metric(metric)
        self._wants_logits = needs_logits(metric)
        return metric

    def prepare_pipeline(
        self,
        model_or_pipeline: str | Pipeline | Callable | PreTrainedModel,
        tokenizer: Any = None,
        feature_extractor: Any = None,
        device: int | None = None,
    ) -> Pipeline | Callable:
        """A pipeline of a Hub id, a folder or a model; anything else is used as it is.

        Args:
            model_or_pipeline: A model, or what takes images and returns a list of ``{"label", "score"}`` for each.
            tokenizer: Of no use for images.
            feature_extractor: Image processor of a model.
            device: Of the pipeline that is made; -1 for the CPU, the first GPU if there is one when None.

        Raises:
            ValueError: If there is nothing to evaluate, or it is a pipeline for another task.
        """
        if isinstance(model_or_pipeline, (str, PreTrainedModel)):
            device = self._infer_device() if device is None else device
            return pipeline(self.task, model=model_or_pipeline, image_processor=feature_extractor, device=device)
        if not callable(model_or_pipeline):
            raise ValueError(f"expected a model, a pipeline or a callable, got {model_or_pipeline!r}")
        if (task := getattr(model_or_pipeline, "task", self.task)) != self.task:
            raise ValueError(f"expected a pipeline for {self.task}, got one for {task}")
        return model_or_pipeline

    def call_pipeline(self, pipe: Pipeline | Callable, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, float]]:
        """Calls it on all images; returns its answers and how long they took."""
        if self._wants_logits:
            kwargs |= _LOGITS
        if isinstance(pipe, Pipeline):
            kwargs |= self.PIPELINE_KWARGS
        elif not _takes(pipe, kwargs):
            raise ValueError("a metric of logits calls a callable with 'function_to_apply' and 'top_k', as a pipeline")
        start = time.perf_counter()
        answers = pipe(*args, **kwargs)
        return answers, self._compute_time_perf(start, time.perf_counter(), len(answers))

    def predictions_processor(
        self, predictions: Sequence[Sequence[Mapping[str, Any]]], label_mapping: Mapping[str, Number] | None
    ) -> dict[str, Any]:
        """Answers of the pipeline -> classes as the library makes them, or ``(N, K)`` logits in label order."""
        if not self._wants_logits:
            return super().predictions_processor(predictions, label_mapping)
        if label_mapping is None or sorted(label_mapping.values()) != list(range(len(label_mapping))):
            raise ValueError(
                f"a metric of logits needs label_mapping from every label to 0 ... K - 1, got {label_mapping}"
            )
        logits = np.empty((len(predictions), len(label_mapping)), dtype=np.float32)
        for row, answer in zip(logits, predictions, strict=True):
            scores = {entry["label"]: entry["score"] for entry in answer}
            if scores.keys() != label_mapping.keys():
                found, expected = sorted(scores), sorted(label_mapping)
                raise ValueError(f"expected a score for each of the labels {expected}, got scores for {found}")
            for label, score in scores.items():
                row[label_mapping[label]] = score
        return {"predictions": logits}

    @staticmethod
    def _compute_confidence_interval(
        metric: Any,
        metric_inputs: dict[str, Any],
        metric_keys: Sequence[str],
        confidence_level: float = 0.95,
        n_resamples: int = 9999,
        random_state: int | None = None,
    ) -> dict[str, dict[str, Any]]:
        """Bootstrap over images of every scalar result; lists and tables get no interval.

        As the library's (BCa), but it draws rows instead of handing scipy the columns, which may be matrices here.
        """
        columns = {name: np.asarray(values) for name, values in metric_inputs.items()}
        rows = np.arange(len(next(iter(columns.values()))))
        scores = metric.compute(**metric_inputs)

        def result_of(key: str) -> Callable[[np.ndarray], float]:
            return lambda chosen: metric.compute(**{name: values[chosen] for name, values in columns.items()})[key]

        intervals: dict[str, dict[str, Any]] = {key: {} for key in metric_keys}
        for key in metric_keys:
            if not isinstance(scores[key], Number):
                continue
            result = bootstrap(
                (rows,),
                result_of(key),
                vectorized=False,
                confidence_level=confidence_level,
                n_resamples=n_resamples,
                random_state=random_state,
            )
            bounds = result.confidence_interval
            intervals[key] = {
                "confidence_interval": (float(bounds.low), float(bounds.high)),
                "standard_error": float(result.standard_error),
            }
        return intervals


def _takes(function: Callable, keywords: Mapping[str, Any]) -> bool:
    try:
        inspect.signature(function).bind([], **keywords)
    except TypeError:
        return False
    return True


def evaluator(task: str = TASK, batch_size: int = 32) -> ImageClassificationEvaluator:
    """The evaluator of a task, in the manner of `evaluate.evaluator`.

    Args:
        task: ``image-classification``.
        batch_size: Images in one forward of a pipeline.

    Raises:
        KeyError: If it is another task.
    """
    if task != TASK:
        raise KeyError(f"Unknown task {task}, available tasks are: ['{TASK}'].")
    return ImageClassificationEvaluator(task, batch_size=batch_size)


def evaluate_model(
    model: Pretrained,
    split: StoredSplit,
    *,
    teacher: Teacher | None = None,
    baseline: Pretrained | None = None,
    batch_size: int = 256,
    device: str | torch.device | None = None,
    data: Mapping[str, Any] | None = None,
    confidence_level: float = 0.95,
    logits: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Any]:
    """Evaluates a classifier, head by head, in one pass over the uint8 images of a split.

    Args:
        model: Moved to `device` and set to eval mode, like the others; its classes are put in the data set's order.
        split: The images. Each model is shown them through its own image processor, once and from what the data set
            holds; those that came as pixels alone, from these.
        teacher: Made with the split's class names; compared with what the model answers.
        baseline: The matched control, trained without the teacher; gives the transfer measures.
        batch_size: Images in one forward; results do not depend on it.
        device: The machine's accelerator if None.
        data: Name, revision and split of the data set, for the result.
        confidence_level: Of the interval of the gain over the baseline, in (0, 1).
        logits: What the model's heads have answered to the split already, ``(N, K)`` each, as `heads_of` orders them;
            it is not shown the images again.

    Returns:
        What ``metrics.json`` holds: `model`, `teacher` and `baseline` (summaries), `data` (as given, with number of
        images and class names), `environment`, `heads` (name -> results of `classification_metrics`; the head the
        model answers with comes first), `fidelity` and `transfer` of that head (None without the model they need),
        `seconds`. A head is ``logits`` where there is one, else ``cls``, ``distillation`` and, where the model answers
        with their mean, ``averaged``. A number that is not defined is NaN.

    Raises:
        TeacherMismatchError: If a model's classes are not the data set's.
        NumericsError: If a logit is not finite.
    """
    start = time.perf_counter()
    device = default_device(device)
    readers = {} if logits is not None else {"model": _model_reader("model", model, split, device)}
    if teacher is not None:
        readers["teacher"] = _teacher_reader(teacher, split, device)
    if baseline is not None:
        readers["baseline"] = _model_reader("baseline", baseline, split, device)
    scores = _read(readers, batch_size, device) if readers else {}
    scores |= {} if logits is None else {"model": dict(logits)}
    _check_finite(scores)
    answers = {role: next(iter(heads.values())) for role, heads in scores.items()}
    labels, num_classes = split.labels.numpy(), len(split.label_names)
    results = {
        "model": model.summary(),
        "teacher": None if teacher is None else _as_pretrained(teacher).summary(),
        "baseline": None if baseline is None else baseline.summary(),
        "data": {**(data or {}), "num_images": len(split), "label_names": split.label_names},
        "environment": environment(device),
        "heads": {
            head: classification_metrics(num_classes).compute(predictions=values, references=labels)
            for head, values in scores["model"].items()
        },
        "fidelity": None,
        "transfer": None,
    }
    if teacher is not None:
        pair = {"predictions": answers["model"], "teacher_predictions": answers["teacher"]}
        results["fidelity"] = TeacherFidelity().compute(**pair)
    if baseline is not None:
        right = {role: decisions(values) == labels for role, values in answers.items()}
        results["transfer"] = paired_transfer(right["model"], right.get("teacher"), right["baseline"], confidence_level)
    return results | {"seconds": time.perf_counter() - start}


def _as_pretrained(teacher: Teacher) -> Pretrained:
    return Pretrained(teacher.model, teacher.pixels, teacher.name, teacher.revision)


def _model_reader(role: str, model: Pretrained, split: StoredSplit, device: torch.device) -> Reader:
    network = model.model.to(device).eval()
    order = label_permutation(network.config, split.label_names, f"{role} '{model.name}'")
    order = slice(None) if order is None else order.to(device)
    view = split.through(model.pixels.geometry)

    def read(images: Tensor) -> dict[str, Tensor]:
        pixels = model.pixels.apply(images, view.geometry)
        outputs = network(pixel_values=pixels, **size_arguments(network, pixels))
        return {head: logits[:, order] for head, logits in heads_of(outputs, network.config).items()}

    return Reader(view, read)


def _teacher_reader(teacher: Teacher, split: StoredSplit, device: torch.device) -> Reader:
    teacher.to(device)
    if (found := teacher.model.config.num_labels) != (expected := len(split.label_names)):
        raise TeacherMismatchError(f"teacher '{teacher.name}': expected {expected} classes, found {found}")
    view = split if teacher.pixels is None else split.through(teacher.pixels.geometry)
    return Reader(view, lambda images: {"logits": teacher.logits(teacher.prepare(images, shown=view.geometry))})


def heads_of(outputs: Any, config: Any) -> dict[str, Tensor]:
    """``(B, K)`` logits of each head, first those that the model answers with."""
    if getattr(outputs, "cls_logits", None) is None:
        return {"logits": outputs.logits}
    heads = {"cls": outputs.cls_logits, "distillation": outputs.distillation_logits}
    answer = getattr(config, "inference_head", "average")  # transformers' own DeiT knows no other
    return {answer if answer in heads else "averaged": outputs.logits} | heads


@torch.inference_mode()
def _read(readers: Mapping[str, Reader], batch_size: int, device: torch.device) -> dict[str, dict[str, np.ndarray]]:
    """Role -> head -> ``(N, K)`` float32 logits."""
    batches: dict[str, dict[str, list[Tensor]]] = {role: {} for role in readers}
    count = len(next(iter(readers.values())).split)
    with tqdm(total=count, desc="Evaluating", unit="img", mininterval=1.0) as progress:
        for rows in torch.arange(count).split(batch_size):
            images: dict[str, Tensor] = {}  # of each view, once
            for role, (view, read) in readers.items():
                if view.key not in images:
                    images[view.key] = view.__getitems__(rows)["pixel_values"].to(device)
                for head, logits in read(images[view.key]).items():
                    batches[role].setdefault(head, []).append(logits.float().cpu())
            progress.update(len(rows))
    found = {role: {head: torch.cat(parts) for head, parts in heads.items()} for role, heads in batches.items()}
    return {role: {head: logits.numpy() for head, logits in heads.items()} for role, heads in found.items()}


def _check_finite(scores: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    for role, heads in scores.items():
        for head, logits in heads.items():
            finite = np.isfinite(logits).all(axis=1)
            if not finite.all():
                row = int(finite.argmin())
                raise NumericsError(f"{role}, head '{head}', image {row}: expected finite logits, found NaN or Inf")


# Column of the table, key of a head's results, factor.
_COLUMNS = (
    ("accuracy %", "accuracy", 100),
    ("top-5 %", "top_5_accuracy", 100),
    ("precision %", "precision", 100),
    ("recall %", "recall", 100),
    ("F1 %", "f1", 100),
    ("AUC", "auc", 1),
    ("NLL (nats)", "nll", 1),
    ("ECE %", "ece", 100),
)


def metrics_table(results: Mapping[str, Any]) -> str:
    """What `evaluate_model` found, or ``metrics.json`` holds, as Markdown: a row a head, then the comparisons."""
    shown = [c for c in _COLUMNS if any(c[1] in head for head in results["heads"].values())]
    rows = [["head", *(title for title, _, _ in shown)]]
    for name, head in results["heads"].items():
        rows.append([name, *(_number(head[key], factor) for _, key, factor in shown)])
    return "\n".join([markdown_table(rows), *_comparisons(results)])


def _comparisons(results: Mapping[str, Any]) -> list[str]:
    lines = []
    if (fidelity := results["fidelity"]) is not None:
        agreement, divergence = _number(fidelity["agreement"], 100), _number(fidelity["kl_divergence"])
        lines.append(f"- Teacher: {agreement} % of the decisions agree; KL(teacher || student) {divergence} nats.")
    if (transfer := results["transfer"]) is not None:
        models = ("student", "teacher", "baseline")
        found = ", ".join(f"{model} {_number(transfer[f'{model}_accuracy'], 100)} %" for model in models)
        efficiency, closed = _number(transfer["transfer_efficiency"]), _number(transfer["gap_closed"])
        low, high = (_number(transfer[f"gain_ci_{bound}"], 100) for bound in ("low", "high"))
        lines.append(f"- Transfer: {found}; student / teacher {efficiency}, gap closed {closed}.")
        lines.append(
            f"- Gain over the baseline: {_number(transfer['gain'], 100)} points, {transfer['confidence_level']:.0%} "
            f"interval [{low}, {high}] over the drawing of test images, not of training seeds."
        )
    return [""] * bool(lines) + lines


def _number(value: float | None, factor: int = 1) -> str:
    """Per cent with two decimals, anything else with four."""
    return "n/a" if value is None or math.isnan(value) else f"{factor * value:.{2 if factor == 100 else 4}f}"
