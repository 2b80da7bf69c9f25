"""What is logged of the losses, added up on the device: nothing is waited for until it is read."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_ihb.errors import NumericsError
from hf_ihb.trainer.saving import last_good

_NAMED = 16


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
        self._unchecked: list[tuple[Tensor, Tensor | None]] = []
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
        self, loss: Tensor, components: Mapping[str, Tensor], num_images: int, index: Tensor | None = None
    ) -> None:
        """Adds a micro-batch's loss and components.

        Args:
            loss: Scalar.
            components: Scalars by name.
            num_images: On all processes.
            index: ``(B,)`` numbers of its images here, if they have any.
        """
        self._num_images += num_images
        self._unchecked.append((loss.detach(), index))
        values = torch.stack([value.detach().float() for value in (loss, *components.values())])
        self._sums = values if self._sums is None else self._sums + values
        self._names = tuple(components)
        self._count += 1

    def record_gradient(self, norm: Any, scaler: Any) -> None:
        """Adds the norm of an optimizer step's gradient; not where a scaler leaves out steps that overflow."""
        if scaler is not None:
            return
        norm = torch.as_tensor(norm).detach().float()
        self._gradient = norm if self._gradient is None else self._gradient + norm

    def check_finite(self, step: int, folder: str) -> None:
        """Raises if a loss or the norm of a gradient since the last log was NaN or Inf: sums keep them.

        On a CPU this is asked in every step, before the weights are changed. On an accelerator asking means waiting for
        it, so it is asked where one waits anyway: before something is logged, evaluated or saved.

        Args:
            step: Optimizer steps that were made.
            folder: Where the checkpoints are, of which the newest that verifies is named.

        Raises:
            NumericsError: If so, with the means of the components and the numbers of the images.
        """
        if self._count == 0:
            return
        values = self._sums / self._count
        if self._gradient is not None:
            gradient = self._gradient
            if isinstance(gradient, DTensor):  # of sharded weights
                gradient = gradient.full_tensor()
            values = torch.cat((values, gradient.to(values.device).reshape(1)))
        total, *parts = values.tolist()
        gradient = parts.pop() if self._gradient is not None else 0.0
        if math.isfinite(total) and math.isfinite(gradient):
            self._unchecked.clear()
            return
        what = "gradient" if math.isfinite(total) else "loss"
        means = ", ".join(f"{n} {v:.4g}" for n, v in zip(self._names, parts, strict=True))
        raise NumericsError(
            f"step {step + 1}: expected a finite {what}, found NaN or Inf (means since the last log: {means})"
            f"{self._images()}; {last_good(folder)}"
        )

    def _images(self) -> str:
        """The first micro-batch whose loss was not finite, or all whose gradient was not, in words."""
        bad = [index for loss, index in self._unchecked if not loss.isfinite()][:1]
        batches = [index for index in bad or [index for _, index in self._unchecked] if index is not None]
        if not batches:
            return ""
        numbers = torch.cat(batches).tolist()
        more = f" and {len(numbers) - _NAMED} more" if len(numbers) > _NAMED else ""
        return f", with training images {', '.join(map(str, numbers[:_NAMED]))}{more}"

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
