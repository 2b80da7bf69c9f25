"""What labels say of a student: cross-entropy, or a user's own loss."""

from collections.abc import Sequence

from torch import Tensor
from transformers import Trainer

from hf_ihb.augment import class_targets
from hf_ihb.functional.logits import task_loss
from hf_ihb.step import Step, StudentOutput


def label_loss(trainer: Trainer, heads: Sequence[Tensor], outputs: StudentOutput, step: Step) -> Tensor:
    """Cross-entropy of some heads' logits ``(B, K)`` to smoothed and mixed labels, or a user's `compute_loss_func`."""
    if trainer.compute_loss_func is not None:
        return _users_loss(trainer, outputs, step)
    return task_loss(heads, step.targets)


def evaluation_loss(trainer: Trainer, outputs: StudentOutput, step: Step) -> Tensor | None:
    """The user's loss, or unsmoothed cross-entropy of the logits that inference returns; None without labels."""
    if step.labels is None:
        return None
    if trainer.compute_loss_func is not None:
        return _users_loss(trainer, outputs, step)
    return task_loss([outputs.logits], class_targets(step.labels, outputs.logits.shape[1], 0, None))


def _users_loss(trainer: Trainer, outputs: StudentOutput, step: Step) -> Tensor:
    """A user's loss of a micro-batch, as `Trainer` calls it.

    It gets the labels as the batch has them, or, where they are smoothed or mixed in training, class probabilities
    ``(B, K)``. ``num_items_in_batch`` is the number of images that `outputs` and labels are of: a mean, and a sum
    divided by it, are the same then, and the trainer takes the mean over micro-batches and processes. Stock `Trainer`
    gives the number of the whole accumulated batch, and a loss that does not divide by it grows with accumulation.
    """
    views = step.views
    soft = trainer.args.label_smoothing_factor > 0 or (views is not None and views.partner_labels is not None)
    labels = step.targets if soft and step.targets is not None else step.labels
    return trainer.compute_loss_func(outputs, labels, num_items_in_batch=len(step.labels))
