"""What a student is judged by, as modules of the `evaluate` library that download nothing and leave no files.

`references` are class indices. `predictions` are class indices, or one vector of logits an image (log-probabilities up
to a constant): a metric that needs more than the decision takes logits alone. The decision is the first class with the
greatest logit. What is computed is computed in float64 from all images at once, so that it does not depend on how they
were added; results are plain Python numbers, NaN where a value is not defined.
"""

import inspect
import itertools
import math
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from scipy import stats
from scipy.special import log_softmax
from sklearn.metrics import precision_recall_fscore_support, roc_auc_score

_CLASS = datasets.Value("int64")
_LOGITS = datasets.Sequence(datasets.Value("float32"))
_SCORES = datasets.Sequence(datasets.Sequence(datasets.Value("float32")))
_KINDS = {0: "class indices", 1: "vectors of logits", 2: "matrices"}


class _Module(evaluate.EvaluationModule):
    """A module in memory (the default with one process), whose inputs are numpy arrays when it computes.

    Args:
        num_process: Processes that add images; more than one share files in `cache_dir`.
        keep_in_memory: Write no files; not possible with several processes.
        **kwargs: Of `evaluate.EvaluationModule`.
    """

    paper: str | None = None

    def __init__(self, *, num_process: int = 1, keep_in_memory: bool | None = None, **kwargs: Any) -> None:
        in_memory = num_process == 1 if keep_in_memory is None else keep_in_memory
        super().__init__(num_process=num_process, keep_in_memory=in_memory, **kwargs)

    def _features(self) -> list[datasets.Features]:
        """The forms its inputs may have."""
        raise NotImplementedError

    def _info(self) -> evaluate.MetricInfo:
        info_class = evaluate.MeasurementInfo if isinstance(self, evaluate.Measurement) else evaluate.MetricInfo
        description = inspect.getdoc(type(self))
        urls = [self.paper] if self.paper else []
        info = info_class(description=description, citation="", features=self._features(), reference_urls=urls)
        # its constructor knows the format for columns of scalars only; columns of vectors become matrices
        info.format = "numpy"
        return info

    def _build_data_dir(self) -> str:
        return "" if self.keep_in_memory else super()._build_data_dir()

    def _infer_feature_from_batch(self, batch: dict[str, Any]) -> datasets.Features:
        if empty := [name for name, column in batch.items() if column is None or len(column) == 0]:
            raise ValueError(f"{self.name}: expected '{empty[0]}', found none")
        return self._infer_feature_from_example({name: column[0] for name, column in batch.items()})

    def _infer_feature_from_example(self, example: dict[str, Any]) -> datasets.Features:
        found = {name: _depth(value) for name, value in example.items()}
        for features in self.features:
            if found == {name: _axes(feature) for name, feature in features.items()}:
                return features
        for name, axes in found.items():
            allowed = {_axes(features[name]) for features in self.features}
            if axes not in allowed:
                expected = " or ".join(_KINDS[n] for n in sorted(allowed))
                raise ValueError(f"{self.name}: expected {expected} as '{name}', found {_KINDS.get(axes, 'neither')}")
        raise AssertionError("every input has a form that is allowed, but no form has them all")

    def _finalize(self) -> None:
        if self.writer is None:
            raise ValueError(f"{self.name}: expected at least one image before compute, found none")
        super()._finalize()


def _depth(value: Any) -> int:
    """Axes of an array, a tensor or nested lists."""
    if isinstance(value, (list, tuple)):
        return 1 + (_depth(value[0]) if len(value) > 0 else 0)
    return np.ndim(value)


def _axes(feature: Any) -> int:
    """Axes that a feature holds."""
    return 0 if isinstance(feature, datasets.Value) else 1 + _axes(feature.feature)


class _Metric(_Module, evaluate.Metric):
    """A metric of decisions or logits."""

    needs_logits = False
    scored: Sequence[str] = ("predictions",)
    has_references = True

    def _features(self) -> list[datasets.Features]:
        kinds = [_LOGITS] if self.needs_logits else [_CLASS, _LOGITS]
        references = {"references": _CLASS} if self.has_references else {}
        choices = itertools.product(kinds, repeat=len(self.scored))
        return [datasets.Features(dict(zip(self.scored, choice, strict=True)) | references) for choice in choices]

    def _compute(self, **inputs: np.ndarray) -> dict[str, Any]:
        for name in self.scored:
            inputs[name] = _checked(inputs[name], f"{self.name}, '{name}'")
        widths = {inputs[name].shape[1] for name in self.scored if inputs[name].ndim == 2}
        if len(widths) > 1:
            raise ValueError(f"{self.name}: expected as many logits everywhere, found {sorted(widths)}")
        if self.has_references:
            classes = inputs["references"]
            bound = widths.pop() if widths else math.inf
            if (wrong := (classes < 0) | (classes >= bound)).any():
                row = int(wrong.argmax())
                raise ValueError(
                    f"{self.name}, 'references', image {row}: expected a class in [0, {bound}), found {classes[row]}"
                )
        return self._measure(**inputs)

    def _measure(self, **inputs: np.ndarray) -> dict[str, Any]:
        """Of ``(N,)`` int64 classes and float64 ``(N, K)`` logits."""
        raise NotImplementedError


def _checked(predictions: np.ndarray, where: str) -> np.ndarray:
    """Class indices as they are, logits in float64."""
    if predictions.dtype == object:
        widths = sorted({len(row) for row in predictions})
        raise ValueError(f"{where}: expected as many logits for every image, found {widths}")
    if predictions.ndim == 1:
        return predictions
    finite = np.isfinite(predictions).all(axis=1)
    if not finite.all():
        raise ValueError(f"{where}, image {int(finite.argmin())}: expected finite logits, found NaN or Inf")
    return predictions.astype(np.float64)


def needs_logits(metric: Any) -> bool:
    """Whether a module of `evaluate`, or one of several combined, takes logits as predictions and no class indices."""
    if isinstance(metric, evaluate.CombinedEvaluations):
        return any(needs_logits(module) for module in metric.evaluation_modules)
    features = metric.features if isinstance(metric.features, list) else [metric.features]
    return all("predictions" in f and _axes(f["predictions"]) == 1 for f in features)


def decisions(predictions: np.ndarray) -> np.ndarray:
    """``(N,)`` classes of ``(N, K)`` logits (the first of equal ones); classes as they are."""
    return predictions.argmax(axis=1) if predictions.ndim == 2 else predictions


class Accuracy(_Metric):
    """Share of images whose class is predicted, in [0, 1]."""

    def _measure(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        return {"accuracy": float((decisions(predictions) == references).mean())}


class TopKAccuracy(_Metric):
    """Share of images whose class is among the k greatest logits, in [0, 1]; of equal ones the first come first.

    Args:
        k: Less than the number of classes.
        **kwargs: Of `evaluate.Metric`.
    """

    needs_logits = True

    def __init__(self, k: int = 5, **kwargs: Any) -> None:
        if k < 1:
            raise ValueError(f"k must be >= 1, got {k}")
        self.k = k
        super().__init__(**kwargs)

    def _measure(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        num_classes = predictions.shape[1]
        if num_classes <= self.k:
            raise ValueError(f"{self.name}: expected more than k={self.k} classes, found {num_classes}")
        own = np.take_along_axis(predictions, references[:, None], axis=1)
        earlier = np.arange(num_classes) < references[:, None]
        ahead = ((predictions > own) | ((predictions == own) & earlier)).sum(axis=1)
        return {f"top_{self.k}_accuracy": float((ahead < self.k).mean())}


class _PerClass(_Metric):
    """A metric of the counts of each pair of classes."""

    def __init__(self, num_classes: int | None = None, **kwargs: Any) -> None:
        self.num_classes = num_classes
        super().__init__(**kwargs)

    def _counts(self, predictions: np.ndarray, references: np.ndarray) -> np.ndarray:
        """``(K, K)`` images by true class (rows) and predicted class (columns)."""
        chosen = decisions(predictions)
        seen = int(max(chosen.max(), references.max())) + 1
        width = predictions.shape[1] if predictions.ndim == 2 else self.num_classes or seen
        if self.num_classes not in (None, width):
            raise ValueError(f"{self.name}: expected {self.num_classes} logits an image, found {width}")
        least = min(chosen.min(), references.min())
        if least < 0 or seen > width:
            raise ValueError(f"{self.name}: expected classes in [0, {width}), found {least} to {seen - 1}")
        return np.bincount(references * width + chosen, minlength=width * width).reshape(width, width)


class ConfusionMatrix(_PerClass):
    """Number of images of each true class (rows) for each predicted class (columns).

    Args:
        num_classes: K; of class indices it is the greatest one + 1 if not given, of logits always their number.
        **kwargs: Of `evaluate.Metric`.
    """

    def _measure(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, list[list[int]]]:
        return {"confusion_matrix": self._counts(predictions, references).tolist()}


class PrecisionRecallF1(_PerClass):
    """Precision, recall and F1 of each class and their means over classes, in [0, 1].

    By scikit-learn. A class that is never predicted has precision 0, one without images recall 0. A class that is
    neither predicted nor has an image is NaN and is left out of the means.

    Args:
        num_classes: K; of class indices it is the greatest one + 1 if not given, of logits always their number.
        **kwargs: Of `evaluate.Metric`.
    """

    def _measure(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, Any]:
        counts = self._counts(predictions, references)
        support, seen = counts.sum(axis=1), counts.sum(axis=1) + counts.sum(axis=0) > 0
        found = precision_recall_fscore_support(
            references, decisions(predictions), labels=np.arange(len(counts)), average=None, zero_division=0
        )
        per_class = {
            name: np.where(seen, values, np.nan)
            for name, values in zip(("precision", "recall", "f1"), found[:3], strict=True)
        }
        means = {name: float(values[seen].mean()) for name, values in per_class.items()}
        lists = {name: values.tolist() for name, values in per_class.items()}
        return means | {"per_class": lists | {"support": support.tolist()}}


class MacroAUC(_Metric):
    """Area under the ROC curve of each class's probability against all other classes, mean over classes, in [0, 1].

    By scikit-learn: the share of pairs of an image of the class and one of another that are in the right order, equal
    probabilities counting half (Hanley and McNeil, 1982). NaN if a class has no image, or all of them.
    """

    needs_logits = True

    def _measure(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        is_class = references[:, None] == np.arange(predictions.shape[1])
        inside = is_class.sum(axis=0)
        if not (inside * (len(references) - inside)).all():
            return {"auc": math.nan}
        # in the order of the probabilities, which round where logarithms do not
        return {"auc": float(roc_auc_score(is_class, log_softmax(predictions, axis=1), average="macro"))}


class NegativeLogLikelihood(_Metric):
    """Mean of ``-ln p(true class)``, in nats: cross-entropy without label smoothing."""

    needs_logits = True

    def _measure(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        log_probabilities = log_softmax(predictions, axis=1)
        return {"nll": float(-np.take_along_axis(log_probabilities, references[:, None], axis=1).mean())}


class ExpectedCalibrationError(_Metric):
    """Mean distance of confidence and accuracy over bins of equal width, weighted by their images, in [0, 1].

    Bin m of M holds confidences (greatest probability) in ``((m - 1) / M, m / M]``, as in Guo et al., 2017, section 2.

    Args:
        num_bins: M.
        **kwargs: Of `evaluate.Metric`.
    """

    needs_logits = True
    paper = "https://arxiv.org/abs/1706.04599"

    def __init__(self, num_bins: int = 15, **kwargs: Any) -> None:
        if num_bins < 1:
            raise ValueError(f"num_bins must be >= 1, got {num_bins}")
        self.num_bins = num_bins
        super().__init__(**kwargs)

    def _measure(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        confidence = np.exp(log_softmax(predictions, axis=1).max(axis=1))
        inner_edges = np.arange(1, self.num_bins) / self.num_bins
        bins = np.searchsorted(inner_edges, confidence, side="left")
        excess = (decisions(predictions) == references) - confidence
        return {"ece": float(np.abs(np.bincount(bins, weights=excess)).sum() / len(excess))}


class TeacherFidelity(_Metric):
    """How alike a student (`predictions`) and its teacher (`teacher_predictions`) answer, whatever the labels are.

    `agreement` is the share of images with the same decision, `kl_divergence` the mean of ``KL(teacher || student)`` in
    nats at temperature 1 (Stanton et al., 2021).
    """

    needs_logits = True
    scored = ("predictions", "teacher_predictions")
    has_references = False
    paper = "https://arxiv.org/abs/2106.05945"

    def _measure(self, predictions: np.ndarray, teacher_predictions: np.ndarray) -> dict[str, float]:
        student, teacher = log_softmax(predictions, axis=1), log_softmax(teacher_predictions, axis=1)
        return {
            "agreement": float((decisions(predictions) == decisions(teacher_predictions)).mean()),
            "kl_divergence": float((np.exp(teacher) * (teacher - student)).sum(axis=1).mean()),
        }


class TransferEfficiency(_Metric):
    """What a student has of its teacher's accuracy, against a baseline trained without the teacher.

    `transfer_efficiency` is student / teacher, which favours weak teachers; `gap_closed` is
    ``(student - baseline) / (teacher - baseline)``, NaN unless the teacher beats the baseline; `gain` is student -
    baseline. Its interval is the normal one of the mean of the paired differences, image by image: it covers which
    images were drawn for the test, not which seeds the models were trained from (see `transfer_measures`).

    Args:
        confidence_level: Of the interval of the gain, in (0, 1).
        **kwargs: Of `evaluate.Metric`.
    """

    scored = ("predictions", "teacher_predictions", "baseline_predictions")

    def __init__(self, confidence_level: float = 0.95, **kwargs: Any) -> None:
        self.confidence_level = _level(confidence_level)
        super().__init__(**kwargs)

    def _measure(
        self,
        predictions: np.ndarray,
        teacher_predictions: np.ndarray,
        baseline_predictions: np.ndarray,
        references: np.ndarray,
    ) -> dict[str, float]:
        models = (predictions, teacher_predictions, baseline_predictions)
        student, teacher, baseline = (decisions(p) == references for p in models)
        return paired_transfer(student, teacher, baseline, self.confidence_level)


def paired_transfer(
    student: np.ndarray, teacher: np.ndarray | None, baseline: np.ndarray, confidence_level: float = 0.95
) -> dict[str, float]:
    """The measures of `TransferEfficiency`, of ``(N,)`` booleans: which of the same images each model has right.

    What needs a teacher is NaN without one (a teacher may have no classifier).
    """
    teacher_accuracy = math.nan if teacher is None else teacher.mean()
    measures = transfer_measures(student.mean(), teacher_accuracy, baseline.mean(), confidence_level)
    difference = student.astype(np.float64) - baseline
    quantile = stats.norm.ppf((1 + _level(confidence_level)) / 2)
    return measures | _interval(difference, quantile)


def transfer_measures(
    student: float | Sequence[float],
    teacher: float | Sequence[float],
    baseline: float | Sequence[float],
    confidence_level: float = 0.95,
) -> dict[str, float]:
    """Transfer efficiency, gap closed and gain of accuracies that runs report.

    Args:
        student: Accuracy, in any one unit; or one for each seed.
        teacher: Its teacher's; or one for each seed.
        baseline: That of the same training without a teacher; or one for each seed, in the order of the student's.
        confidence_level: Of the interval of the gain, in (0, 1).

    Returns:
        The three mean accuracies; `transfer_efficiency` and `gap_closed` of these means, the latter NaN unless the
        teacher beats the baseline; `gain` and the bounds of Student's t interval of the differences paired by seed,
        which covers the seeds of training. The bounds are NaN for a single seed.

    Raises:
        ValueError: If student and baseline do not have as many seeds, or the level is not in (0, 1).
    """
    runs = [np.atleast_1d(np.asarray(values, dtype=np.float64)) for values in (student, teacher, baseline)]
    shapes = [values.shape for values in runs]
    if shapes[0] != shapes[2] or len(shapes[0]) > 1 or 0 in shapes[0] + shapes[1]:
        raise ValueError(f"expected as many accuracies of student and baseline, got {shapes[0]} and {shapes[2]}")
    own, of_teacher, without = (float(values.mean()) for values in runs)
    quantile = stats.t.ppf((1 + _level(confidence_level)) / 2, len(runs[0]) - 1)
    return {
        "student_accuracy": own,
        "teacher_accuracy": of_teacher,
        "baseline_accuracy": without,
        "transfer_efficiency": own / of_teacher if of_teacher > 0 else math.nan,
        "gap_closed": (own - without) / (of_teacher - without) if of_teacher > without else math.nan,
        "gain": own - without,
        **_interval(runs[0] - runs[2], quantile),
        "confidence_level": confidence_level,
    }


def _level(value: float) -> float:
    if not 0 < value < 1:
        raise ValueError(f"confidence_level must be in (0, 1), got {value}")
    return value


def _interval(differences: np.ndarray, quantile: float) -> dict[str, float]:
    """``mean +- quantile x standard error``; NaN of a single difference."""
    spread = quantile * differences.std(ddof=1) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    mean = differences.mean()
    return {"gain_ci_low": float(mean - spread), "gain_ci_high": float(mean + spread)}


class AttentionDistance(_Module, evaluate.Measurement):
    """Mean attention distance in patches: over everything, of each layer, and of each head of each layer.

    `data` holds one ``(layers, heads)`` matrix an image, the mean over its queries: attention maps are reduced before
    they are added (Dosovitskiy et al., 2020; Raghu et al., 2021).
    """

    paper = "https://arxiv.org/abs/2108.08810"

    def _features(self) -> list[datasets.Features]:
        return [datasets.Features({"data": _SCORES})]

    def _compute(self, data: np.ndarray) -> dict[str, Any]:
        if data.dtype == object:
            raise ValueError(f"{self.name}: expected as many heads in every layer of every image, found unequal rows")
        per_head = data.mean(axis=0, dtype=np.float64)
        return {
            "attention_distance": float(per_head.mean()),
            "attention_distance_per_layer": per_head.mean(axis=1).tolist(),
            "attention_distance_per_head": per_head.tolist(),
        }


def classification_metrics(num_classes: int) -> evaluate.CombinedEvaluations:
    """Everything a classifier is judged by from its logits; top-5 accuracy where there are more than five classes."""
    metrics = [Accuracy(), PrecisionRecallF1(), MacroAUC(), NegativeLogLikelihood(), ExpectedCalibrationError()]
    if num_classes > 5:
        metrics.insert(1, TopKAccuracy(5))
    return evaluate.combine([*metrics, ConfusionMatrix()])
