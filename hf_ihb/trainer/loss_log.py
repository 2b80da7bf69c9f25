"""What is logged of the losses, added up on the device: nothing is waited for until it is read."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_ihb.errors import NumericsError
from hf_ihb.trainer.saving import last_good

_NAMED = 16


class _Batch(NamedTuple):
    """A micro-batch that was not asked for yet: what it is of, and its loss and components, a number each."""

    step: int
    values: Tensor
    index: Tensor | None


class LossLog:
    """Sums of the loss and its components since the last log, and how many images they are of."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begins a new window."""
        self._sums: Tensor | None = None
        self._names: tuple[str, ...] = ()
        self._count = 0
        self._num_images = 0
        self._gradient: Tensor | None = None
        self._unchecked: list[_Batch] = []
        self._norms: list[tuple[int, Tensor]] = []
        self._start = time.perf_counter()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Around what is not training: its time is taken out."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._start += time.perf_counter() - started

    def record(
        self, step: int, loss: Tensor, components: Mapping[str, Tensor], num_images: int, index: Tensor | None = None
    ) -> None:
        """Adds a micro-batch's loss and components.

        Args:
            step: Optimizer steps that were made before.
            loss: Scalar.
            components: Scalars by name.
            num_images: On all processes.
            index: ``(B,)`` numbers of its images here, if they have any.
        """
        self._num_images += num_images
        values = torch.stack([value.detach().float() for value in (loss, *components.values())])
        self._unchecked.append(_Batch(step, values, index))
        self._sums = values if self._sums is None else self._sums + values
        self._names = tuple(components)
        self._count += 1

    def record_gradient(self, step: int, norm: Any, scaler: Any) -> None:
        """Adds the norm of an optimizer step's gradient; not where a scaler leaves out steps that overflow."""
        if scaler is not None:
            return
        norm = torch.as_tensor(norm).detach().float()
        self._norms.append((step, norm))
        self._gradient = norm if self._gradient is None else self._gradient + norm

    def spoiled(self) -> Tensor | None:
        """1.0 on the device, a scalar, once a loss or gradient since the last check was NaN or Inf, otherwise 0.0.

        None of sharded weights, and where a scaler leaves out steps.
        """
        if self._gradient is None or isinstance(self._gradient, DTensor):
            return None
        return 1 - (self._sums[0].isfinite() & self._gradient.isfinite()).float()

    def check_finite(self, folder: str) -> None:
        """Raises if a loss or the norm of a gradient since the last check was NaN or Inf: sums keep them.

        On a CPU this is asked in every step, before the weights are changed. On an accelerator asking means waiting for
        it, so it is asked where one waits anyway, before something is logged, evaluated or saved; until then a fused
        optimizer steps no further (`optimization.hold_back`).

        Args:
            folder: Where the checkpoints are, of which the newest that verifies is named.

        Raises:
            NumericsError: If so, with the first such step, its components and the numbers of its images.
        """
        if self._count == 0:
            return
        values = self._sums[:1]
        if self._gradient is not None:
            values = torch.cat((values, _whole(self._gradient).to(values.device).reshape(1)))
        bad = None if all(map(math.isfinite, values.tolist())) else self._first_bad()
        if bad is None:
            self._unchecked.clear()
            self._norms.clear()
            return
        what, step, batches = bad
        means = torch.stack([batch.values[1:] for batch in batches]).mean(dim=0).tolist() if batches else []
        parts = ", ".join(f"{n} {v:.4g}" for n, v in zip(self._names, means, strict=False))
        raise NumericsError(
            f"step {step + 1}: expected a finite {what}, found NaN or Inf ({parts}){_images(batches)}; "
            f"{last_good(folder)}"
        )

    def _first_bad(self) -> tuple[str, int, list[_Batch]] | None:
        """Whether it is of the loss or of the gradient, its step, and the micro-batch, or those of the step.

        None where each is finite: large ones may add up to infinity.
        """
        for batch in self._unchecked:
            if not batch.values[0].isfinite():
                return "loss", batch.step, [batch]
        for step, norm in self._norms:
            if not _whole(norm).isfinite():
                return "gradient", step, [batch for batch in self._unchecked if batch.step == step]
        return None

    def read(self, reduce: Callable[[Tensor, str], Tensor]) -> dict[str, float]:
        """Means over the window and all processes, sorted by name, and images per second; begins a new window.

        Args:
            reduce: `Accelerator.reduce`.
        """
        if self._count == 0:
            return {}
        means = reduce(self._sums[1:] / self._count, "mean").tolist()
        logs = dict(sorted(zip(self._names, means, strict=True)))
        logs["images_per_second"] = round(self._num_images / (time.perf_counter() - self._start), 1)
        self.reset()
        return logs


def _whole(norm: Tensor) -> Tensor:
    """A norm that may be one of sharded weights."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _images(batches: list[_Batch]) -> str:
    """Of micro-batches the images, in words."""
    known = [batch.index for batch in batches if batch.index is not None]
    if not known:
        return ""
    numbers = torch.cat(known).tolist()
    more = f" and {len(numbers) - _NAMED} more" if len(numbers) > _NAMED else ""
    return f", with training images {', '.join(map(str, numbers[:_NAMED]))}{more}"
