"""What each loss of a run weighs in a step."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from hf_ihb.methods import Method
from hf_ihb.methods.schedules import uncertainty_shares
from hf_ihb.trainer.collectives import sum_over_processes


class LossWeights:
    """Weights of the labels' loss, ``task``, and of each method's by its name.

    Args:
        methods: That are learned by, by the names of their losses.
        args: Of the training; read when it is asked.
    """

    def __init__(self, methods: Mapping[str, Method], args: TrainingArguments) -> None:
        self.methods, self.args = dict(methods), args

    def scheduled(self, epoch: float, num_epochs: float) -> dict[str, float]:
        """By their schedules, at a (fractional) epoch of a training of some length."""
        task = self.args.task_loss_weight
        weights = {
            name: method.weight(epoch, num_epochs) * (task if method.shares_task else 1)
            for name, method in self.methods.items()
        }
        return {"task": self.of_labels(weights)} | weights

    def of_labels(self, weights: Mapping[str, Any]) -> Any:
        """What is left to the labels' loss of their weight by the methods that share it."""
        shared = [weights[name] for name, method in self.methods.items() if method.shares_task]
        return self.args.task_loss_weight - sum(shared)

    def total(self, losses: Mapping[str, Tensor], weights: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of losses, scalars, by their scheduled weights and by their shares, where those are asked for.

        Returns:
            The sum; and ``<name>_weight`` of each, to log, where they change but by a warm-up.
        """
        args, applied = self.args, dict(weights)
        if args.uncertainty_weighting is not None:
            # a weight on the device is not asked for: nothing waits
            on = {name for name, weight in weights.items() if isinstance(weight, Tensor) or weight > 0}
            weighed = {name: loss for name, loss in losses.items() if name in on}
            shares = uncertainty_shares(weighed, args.uncertainty_weighting, self._mean)
            applied = {name: weight * shares.get(name, 0.0) for name, weight in weights.items()}
        # a zero weight multiplies, so that every parameter has a gradient
        first, *others = (applied[name] * loss for name, loss in losses.items())
        keys = [method.shared for method in self.methods.values()]
        fades = any(own.distillation_fade_epochs > 0 or own.distillation_stop_epoch is not None for own in keys)
        if not fades and args.uncertainty_weighting is None:
            return sum(others, start=first), {}
        # filled in on the device, not copied there
        logged = {f"{n}_weight": torch.zeros_like(losses[n]).detach().add(weight) for n, weight in applied.items()}
        return sum(others, start=first), logged

    def _mean(self, tensor: Tensor) -> Tensor:
        """Over processes, so that shares are the same in all of them."""
        size = self.args.world_size
        return sum_over_processes(tensor) / size if size > 1 else tensor
