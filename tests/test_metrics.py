import json
import math
import os
import socket

import evaluate
import numpy as np
import pytest
import torch
from datasets import Features, Sequence, Value
from scipy.special import log_softmax
from scipy.stats import ttest_rel
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from hf_ihb.functional.logits import kd_divergence
from hf_ihb.metrics import (
    Accuracy,
    AttentionDistance,
    ConfusionMatrix,
    ExpectedCalibrationError,
    MacroAUC,
    NegativeLogLikelihood,
    PrecisionRecallF1,
    TeacherFidelity,
    TopKAccuracy,
    TransferEfficiency,
    classification_metrics,
    needs_logits,
    transfer_measures,
)

CLASSES = 7
OF_LOGITS = (TopKAccuracy, MacroAUC, NegativeLogLikelihood, ExpectedCalibrationError)
OF_DECISIONS = (Accuracy, PrecisionRecallF1, ConfusionMatrix)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def labels(rng):
    return rng.integers(0, CLASSES, 150)


@pytest.fixture
def logits(rng, labels):
    return (rng.normal(size=(150, CLASSES)) * 2 + np.eye(CLASSES)[labels]).astype(np.float32)


@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a connection was tried")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def probabilities(logits):
    exponentials = np.exp(logits.astype(np.float64))
    return exponentials / exponentials.sum(1, keepdims=True)


# ---- Values ----


def test_accuracy_counts_the_first_of_equal_logits():
    assert Accuracy().compute(predictions=[[1, 1, 0], [0, 2, 2], [3, 0, 0]], references=[1, 1, 0]) == {
        "accuracy": 2 / 3
    }


def test_decisions_are_the_same_as_logits_and_as_class_indices(logits, labels):
    for metric in OF_DECISIONS:
        of_logits = metric().compute(predictions=logits, references=labels)
        options = {} if metric is Accuracy else {"num_classes": CLASSES}
        assert metric(**options).compute(predictions=logits.argmax(1), references=labels) == of_logits


@pytest.mark.parametrize("k", [1, 3, 6])
def test_top_k_is_membership_in_the_k_greatest(k, logits, labels):
    logits = logits.round()  # many equal ones
    greatest = [sorted(range(CLASSES), key=lambda c: (-row[c], c))[:k] for row in logits]
    expected = np.mean([label in row for label, row in zip(labels, greatest, strict=True)])
    result = TopKAccuracy(k).compute(predictions=logits, references=labels)
    assert result == {f"top_{k}_accuracy": pytest.approx(expected)}
    if k == 1:
        assert result["top_1_accuracy"] == Accuracy().compute(predictions=logits, references=labels)["accuracy"]


def test_precision_recall_and_f1_are_ratios_of_counts(logits, labels):
    found = PrecisionRecallF1().compute(predictions=logits, references=labels)
    pairs = list(zip(labels.tolist(), logits.argmax(1).tolist(), strict=True))
    for k in range(CLASSES):
        right = sum(pair == (k, k) for pair in pairs)
        images, chosen = (sum(pair[side] == k for pair in pairs) for side in (0, 1))
        expected = (right / chosen, right / images, 2 * right / (images + chosen))
        assert [found["per_class"][name][k] for name in ("precision", "recall", "f1")] == pytest.approx(expected)
        assert found["per_class"]["support"][k] == images
    for name in ("precision", "recall", "f1"):
        assert found[name] == pytest.approx(sum(found["per_class"][name]) / CLASSES)


def test_classes_without_predictions_or_images_are_zero_and_those_without_both_are_left_out():
    references, predictions = [0, 0, 1, 1, 4], [0, 2, 0, 0, 4]
    found = PrecisionRecallF1(num_classes=6).compute(predictions=predictions, references=references)
    means = precision_recall_fscore_support(references, predictions, average="macro", zero_division=0)
    assert [found[name] for name in ("precision", "recall", "f1")] == pytest.approx(means[:3])
    assert found["per_class"]["precision"][1] == 0  # never predicted
    assert found["per_class"]["recall"][2] == 0  # no image
    assert [math.isnan(value) for value in found["per_class"]["f1"]] == [False, False, False, True, False, True]
    assert found["per_class"]["support"] == [2, 2, 0, 0, 1, 0]


def test_rows_of_the_confusion_matrix_are_the_true_classes(logits, labels):
    found = ConfusionMatrix().compute(predictions=logits, references=labels)["confusion_matrix"]
    assert found == confusion_matrix(labels, logits.argmax(1), labels=range(CLASSES)).tolist()
    assert ConfusionMatrix().compute(predictions=[2], references=[0]) == {
        "confusion_matrix": [[0, 0, 1], [0, 0, 0], [0, 0, 0]]
    }


def test_auc_is_the_share_of_pairs_in_order_with_ties_and_nan_without_a_class(logits, labels):
    for scores in (logits, np.repeat(logits[::2], 2, axis=0)):
        shares = []
        for k, column in enumerate(log_softmax(scores.astype(np.float64), axis=1).T):
            differences = column[labels == k][:, None] - column[labels != k][None]
            shares.append(((differences > 0) + 0.5 * (differences == 0)).mean())
        found = MacroAUC().compute(predictions=scores, references=labels)["auc"]
        assert found == pytest.approx(np.mean(shares), abs=1e-12)
    absent = labels != 3
    assert math.isnan(MacroAUC().compute(predictions=logits[absent], references=labels[absent])["auc"])
    alone = MacroAUC().compute(predictions=logits[:, :1], references=np.zeros(len(labels), int))
    assert math.isnan(alone["auc"])


def test_nll_is_cross_entropy_without_smoothing_and_survives_large_logits(logits, labels):
    expected = torch.nn.functional.cross_entropy(torch.tensor(logits).double(), torch.tensor(labels)).item()
    found = NegativeLogLikelihood().compute(predictions=logits, references=labels)["nll"]
    assert found == pytest.approx(expected, abs=1e-12)
    assert NegativeLogLikelihood().compute(predictions=[[5000.0, 0.0]], references=[1])["nll"] == pytest.approx(5000)
    assert NegativeLogLikelihood().compute(predictions=[[7.0] * 10], references=[3])["nll"] == pytest.approx(
        math.log(10)
    )


def test_ece_is_the_weighted_gap_of_each_bin(logits, labels):
    confidence, right = probabilities(logits).max(1), logits.argmax(1) == labels
    expected = 0.0
    for m in range(1, 16):
        inside = (confidence > (m - 1) / 15) & (confidence <= m / 15)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    found = ExpectedCalibrationError().compute(predictions=logits, references=labels)["ece"]
    assert found == pytest.approx(expected, abs=1e-12)
    assert found > 0.02


def test_ece_of_perfect_calibration_is_zero_and_of_overconfidence_the_excess():
    sure = math.log(4.0)  # two classes: confidence 0.8
    predictions = [[sure, 0.0]] * 10
    calibrated = ExpectedCalibrationError().compute(predictions=predictions, references=[0] * 8 + [1] * 2)
    assert calibrated["ece"] == pytest.approx(0, abs=1e-6)
    overconfident = ExpectedCalibrationError().compute(predictions=[[100.0, 0.0]] * 10, references=[0] * 6 + [1] * 4)
    assert overconfident["ece"] == pytest.approx(0.4)


def test_a_confidence_on_an_edge_is_in_the_bin_below():
    # 0.5 is the upper edge of bin 1 of 2; 0.9 is in bin 2: apart, the gaps (0.5 and -0.9) do not cancel
    predictions = [[0.0, 0.0], [math.log(9), 0.0]]
    found = ExpectedCalibrationError(num_bins=2).compute(predictions=predictions, references=[0, 1])["ece"]
    assert found == pytest.approx((0.5 + 0.9) / 2)


def test_fidelity_is_agreement_and_the_divergence_from_the_teacher(logits, rng):
    teacher = rng.normal(size=logits.shape).astype(np.float32)
    found = TeacherFidelity().compute(predictions=logits, teacher_predictions=teacher)
    expected = kd_divergence(torch.tensor(logits).double(), torch.tensor(teacher).double(), 1.0).item()
    assert found["kl_divergence"] == pytest.approx(expected, abs=1e-12)
    assert found["agreement"] == np.mean(logits.argmax(1) == teacher.argmax(1))
    same = TeacherFidelity().compute(predictions=logits, teacher_predictions=logits + 3)
    assert same == {"agreement": 1.0, "kl_divergence": pytest.approx(0, abs=1e-6)}
    confident = TeacherFidelity().compute(predictions=[[0.0, 0.0]], teacher_predictions=[[100.0, 0.0]])
    assert confident["kl_divergence"] == pytest.approx(math.log(2))  # the other direction is infinite


# ---- Transfer ----


def test_transfer_of_published_accuracies():
    logit_kd, structural = transfer_measures(90.05, 95.10, 86.02), transfer_measures(90.11, 93.10, 86.02)
    assert logit_kd["transfer_efficiency"] == pytest.approx(0.9468980, abs=5e-8)
    assert structural["transfer_efficiency"] == pytest.approx(0.9678840, abs=5e-8)
    assert logit_kd["gap_closed"] == pytest.approx(0.4438326, abs=5e-8)
    assert structural["gap_closed"] == pytest.approx(409 / 708)
    assert logit_kd["gain"] == pytest.approx(4.03)
    assert math.isnan(logit_kd["gain_ci_low"])  # one seed


@pytest.mark.parametrize("teacher", [0.8, 0.7, math.nan])
def test_no_gap_is_closed_to_a_teacher_that_does_not_beat_the_baseline(teacher):
    assert math.isnan(transfer_measures(0.85, teacher, 0.8)["gap_closed"])


def test_gain_over_seeds_has_students_interval_paired_by_seed(rng):
    student, baseline = rng.normal(0.9, 0.01, 5), rng.normal(0.88, 0.01, 5)
    found = transfer_measures(student, 0.95, baseline, confidence_level=0.9)
    low, high = ttest_rel(student, baseline).confidence_interval(0.9)
    assert (found["gain_ci_low"], found["gain_ci_high"]) == pytest.approx((low, high))
    assert found["gain"] == pytest.approx((student - baseline).mean())
    assert found["gap_closed"] == pytest.approx((student.mean() - baseline.mean()) / (0.95 - baseline.mean()))


@pytest.mark.parametrize("arguments", [([0.9, 0.8], 0.9, 0.8), ([], 0.9, []), (0.9, 0.9, 0.8, 1.0)])
def test_transfer_refuses_seeds_without_a_partner_and_impossible_levels(arguments):
    with pytest.raises(ValueError, match=r"student and baseline|confidence_level"):
        transfer_measures(*arguments)


def test_transfer_efficiency_takes_classes_and_logits_side_by_side(logits, labels, rng):
    teacher = np.where(rng.random(150) < 0.9, labels, 0)
    baseline = rng.integers(0, CLASSES, 150)
    found = TransferEfficiency().compute(
        predictions=logits, teacher_predictions=teacher, baseline_predictions=baseline, references=labels
    )
    student = logits.argmax(1) == labels
    expected = transfer_measures(student.mean(), (teacher == labels).mean(), (baseline == labels).mean())
    bounds = {"gain_ci_low", "gain_ci_high"}
    assert {k: v for k, v in found.items() if k not in bounds} == {k: v for k, v in expected.items() if k not in bounds}
    # paired: both models right, student alone, baseline alone
    only_student, only_baseline = np.mean(student & (baseline != labels)), np.mean(~student & (baseline == labels))
    variance = only_student + only_baseline - (only_student - only_baseline) ** 2
    half = 1.959963984540054 * math.sqrt(variance / 149)
    assert (found["gain_ci_high"] - found["gain_ci_low"]) / 2 == pytest.approx(half)
    assert (found["gain_ci_high"] + found["gain_ci_low"]) / 2 == pytest.approx(found["gain"])


def test_the_interval_of_the_gain_covers_the_true_one_as_often_as_it_says(rng):
    """Student right on 80 %, baseline on 70 % of the images, 65 % in common: a true gain of 10 points."""
    covered, trials, images = 0, 200, 400
    for _ in range(trials):
        draw = rng.random(images)
        right = np.stack([draw < 0.8, (draw < 0.65) | ((draw >= 0.8) & (draw < 0.85))]).astype(int)
        found = TransferEfficiency(confidence_level=0.9).compute(
            predictions=right[0],
            teacher_predictions=right[0],
            baseline_predictions=right[1],
            references=np.ones(images, int),
        )
        covered += found["gain_ci_low"] <= 0.1 <= found["gain_ci_high"]
    assert 0.83 < covered / trials < 0.97


# ---- Attention distance ----


def test_attention_distance_is_the_mean_over_images_of_each_head(rng):
    data = rng.random((11, 3, 2)).astype(np.float32)
    metric = AttentionDistance()
    for part in (data[:4], data[4:5], data[5:]):
        metric.add_batch(data=torch.tensor(part))
    found = metric.compute()
    np.testing.assert_allclose(found["attention_distance_per_head"], data.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(found["attention_distance_per_layer"], data.astype(np.float64).mean((0, 2)), rtol=1e-12)
    assert found["attention_distance"] == pytest.approx(data.astype(np.float64).mean(), rel=1e-12)
    assert AttentionDistance().compute(data=data.tolist()) == found


# ---- Modules of the library ----


def test_results_do_not_depend_on_how_images_are_added(logits, labels):
    whole = classification_metrics(CLASSES).compute(predictions=logits, references=labels)
    parts = classification_metrics(CLASSES)
    for rows in np.split(np.arange(150), [1, 40, 41, 130]):
        parts.add_batch(predictions=torch.tensor(logits[rows]), references=torch.tensor(labels[rows]))
    assert parts.compute() == whole
    one_by_one = classification_metrics(CLASSES)
    for row, label in zip(logits, labels, strict=True):
        one_by_one.add(prediction=row, reference=int(label))
    assert one_by_one.compute() == whole
    assert classification_metrics(CLASSES).compute(predictions=logits.tolist(), references=labels.tolist()) == whole


def test_results_are_plain_and_the_same_alone_and_combined(logits, labels):
    combined = classification_metrics(CLASSES).compute(predictions=logits, references=labels)
    assert json.loads(json.dumps(combined)) == combined
    alone = {}
    for metric in (*OF_DECISIONS, *OF_LOGITS):
        alone |= metric().compute(predictions=logits, references=labels)
    assert combined == alone
    assert "top_5_accuracy" not in classification_metrics(5).compute(predictions=logits[:, :5], references=[0] * 150)


def test_modules_of_different_inputs_share_batches(logits, labels):
    both = evaluate.combine([Accuracy(), TeacherFidelity()])
    both.add_batch(predictions=logits, references=labels, teacher_predictions=logits[::-1].copy())
    found = both.compute()
    assert found["accuracy"] == np.mean(logits.argmax(1) == labels)
    assert found["agreement"] == np.mean(logits.argmax(1) == logits[::-1].argmax(1))


def test_a_module_starts_afresh_after_a_result_and_after_an_error(logits, labels):
    metric = Accuracy()
    with pytest.raises(ValueError, match="image 1: expected finite"):
        metric.compute(predictions=[[0.0, 1.0], [0.0, math.nan]], references=[1, 1])
    for n in (150, 9):
        found = metric.compute(predictions=logits[:n], references=labels[:n])
        assert found["accuracy"] == np.mean(logits[:n].argmax(1) == labels[:n])


def test_nothing_is_asked_of_the_network_or_left_on_disk(offline, logits, labels, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path / "metrics")
    classification_metrics(CLASSES).compute(predictions=logits, references=labels)
    AttentionDistance().compute(data=[[[1.0]]])
    assert list(tmp_path.iterdir()) == []


def test_instances_that_share_a_folder_and_an_experiment_do_not_mix(logits, labels, tmp_path):
    options = {"cache_dir": str(tmp_path), "keep_in_memory": False, "experiment_id": "one"}
    first, second = Accuracy(**options), Accuracy(**options)
    first.add_batch(predictions=logits, references=labels)
    second.add_batch(predictions=labels, references=labels)
    assert second.compute() == {"accuracy": 1.0}
    assert first.compute() == {"accuracy": np.mean(logits.argmax(1) == labels)}
    assert not [name for _, _, files in os.walk(tmp_path) for name in files if name.endswith(".arrow")]


def test_a_metric_of_logits_is_told_from_one_of_classes():
    assert [needs_logits(metric()) for metric in OF_DECISIONS] == [False] * 3
    assert [needs_logits(metric()) for metric in OF_LOGITS] == [True] * 4
    assert needs_logits(evaluate.combine([Accuracy(), MacroAUC()]))
    assert not needs_logits(evaluate.combine([Accuracy(), ConfusionMatrix()]))


def test_a_foreign_metric_is_told_by_its_features():
    class Foreign(evaluate.Metric):
        def _info(self):
            features = Features({"predictions": self.kind, "references": Value("int64")})
            return evaluate.MetricInfo(description="", citation="", features=features)

    for kind, expected in ((Value("int32"), False), (Sequence(Value("float64")), True)):
        Foreign.kind = kind
        assert needs_logits(Foreign(keep_in_memory=True)) is expected


# ---- Mistakes ----


@pytest.mark.parametrize(
    ("metric", "inputs", "says"),
    [
        (MacroAUC, {"predictions": [1, 2]}, "macro_auc: expected vectors of logits as 'predictions', found class ind"),
        (NegativeLogLikelihood, {"predictions": torch.tensor([1, 0])}, "found class indices"),
        (Accuracy, {"predictions": [[[1.0]], [[1.0]]]}, "expected class indices or vectors of logits"),
        (Accuracy, {"predictions": [[1, 2], [3]]}, "expected as many logits for every image, found .1, 2."),
        (Accuracy, {"predictions": [[1, math.inf], [0, 1]]}, "image 0: expected finite logits"),
        (Accuracy, {"predictions": []}, "accuracy: expected 'predictions', found none"),
        (Accuracy, {"predictions": [[0.0], [1.0]]}, r"'references', image 1: expected a class in \[0, 1\), found 1"),
        (TopKAccuracy, {"predictions": [[0, 1], [1, 0]]}, "expected more than k=5 classes, found 2"),
        (ConfusionMatrix, {"predictions": [-1, 0]}, r"expected classes in \[0, 2\), found -1 to 1"),
    ],
)
def test_a_mistake_is_one_line(metric, inputs, says):
    with pytest.raises(ValueError, match=says) as caught:
        metric().compute(references=[0, 1], **inputs)
    assert "\n" not in str(caught.value)


def test_other_mistakes_are_one_line():
    with pytest.raises(ValueError, match="expected at least one image before compute"):
        Accuracy().compute()
    with pytest.raises(ValueError, match=r"expected classes in \[0, 3\), found 0 to 5"):
        ConfusionMatrix(num_classes=3).compute(predictions=[5], references=[0])
    with pytest.raises(ValueError, match="expected 3 logits an image, found 2"):
        ConfusionMatrix(num_classes=3).compute(predictions=[[0.0, 1.0]], references=[0])
    with pytest.raises(ValueError, match="expected as many logits everywhere"):
        TeacherFidelity().compute(predictions=[[0.0, 1.0]], teacher_predictions=[[0.0, 1.0, 2.0]])
    with pytest.raises(ValueError, match="as many heads in every layer"):
        AttentionDistance().compute(data=[[[1.0, 2.0], [3.0]]])
