"""Metrics of an evaluation: ours of each image, and the user's of the logits."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import EvalPrediction, Trainer
from transformers.trainer_utils import EvalLoopOutput

from hf_ihb.step import Step, StudentOutput


def image_scores(outputs: StudentOutput, step: Step) -> dict[str, Tensor]:
    """``logits``, and for each metric of ours its value for each image ``(B,)``; without labels the logits alone."""
    scores, labels = {"logits": outputs.logits}, step.labels
    if labels is None:
        return scores
    labels = labels.argmax(-1) if labels.ndim == 2 else labels
    heads = {"accuracy": outputs.logits}
    if outputs.cls_logits is not None:
        heads |= {"cls_accuracy": outputs.cls_logits, "distillation_accuracy": outputs.distillation_logits}
    return scores | {name: (logits.argmax(-1) == labels).float() for name, logits in heads.items()}


class EvaluationMetrics:
    """The `compute_metrics` of a `Trainer`: means of ours over the images, then the user's.

    Args:
        compute_metrics: The user's, of the logits of inference; None if there are none.
        by_batch: Whether it is called batch by batch.
    """

    def __init__(self, compute_metrics: Callable | None, by_batch: bool) -> None:
        self._compute, self._by_batch = compute_metrics, by_batch
        self._values: dict[str, list[np.ndarray]] = {}

    def reset(self) -> None:
        """Forgets the batches of an evaluation."""
        self._values = {}

    @property
    def users(self) -> Callable | None:
        """The user's."""
        return self._compute

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        """Adds what was predicted, or a list of it by batch; the metrics, where `compute_result` asks for them."""
        found = prediction.predictions
        for batch in found if isinstance(found, list) else [found]:
            for name, values in batch.items():
                if name != "logits":
                    values = np.asarray(torch.as_tensor(values).cpu(), np.float64)
                    self._values.setdefault(name, []).append(values)
        metrics: dict[str, Any] = {}
        if compute_result:
            metrics = {name: float(np.concatenate(values).mean()) for name, values in self._values.items()}
        if self._compute is not None:
            user = EvalPrediction(
                logits_of(found), prediction.label_ids, inputs=prediction.inputs, losses=prediction.losses
            )
            more = {"compute_result": compute_result} if self._by_batch else {}
            metrics.update(self._compute(user, **more) or {})
        return metrics


def logits_of(predictions: Any) -> Any:
    """The logits alone of what was predicted, by batch where `eval_do_concat_batches` leaves batches apart."""
    if isinstance(predictions, list):
        return [logits_of(batch) for batch in predictions]
    return predictions["logits"] if isinstance(predictions, dict) else predictions


def of_logits(hook: Callable | None) -> Callable | None:
    """A user's `preprocess_logits_for_metrics`, which sees logits, for outputs that hold more."""
    if hook is None:
        return None
    return lambda outputs, labels: {**outputs, "logits": hook(outputs["logits"], labels)}


def take_metrics(trainer: Trainer) -> None:
    """Puts our metrics beside the user's, whose hooks go on seeing logits."""
    trainer.compute_metrics = EvaluationMetrics(trainer.compute_metrics, trainer.args.batch_eval_metrics)
    trainer.preprocess_logits_for_metrics = of_logits(trainer.preprocess_logits_for_metrics)


def of_main_process(output: EvalLoopOutput) -> EvalLoopOutput:
    """What an evaluation found, with logits alone as predictions, and the metrics of the main process on all.

    A user's metric may differ between processes; a run that is stopped or saved on one of them alone would hang.
    """
    output = output._replace(metrics=broadcast_object_list([output.metrics])[0])
    return output._replace(predictions=logits_of(output.predictions))
