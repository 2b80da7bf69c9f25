"""The Hessian's trace as PyHessian (Yao et al., 2020, https://arxiv.org/abs/1912.07145) goes about it.

One Rademacher vector at a time, as a list of tensors, one for each parameter. With one batch, the graph of its gradient
is made once and kept for all vectors; with a list of batches, every vector takes a forward, a backward and a second
backward of each. It ends when the running mean moves by less than a tolerance between one probe and the next.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]  # (B, C, H, W) normalised pixels, (B,) labels
Vector = list[Tensor]  # in the shapes of the parameters


class PyHessianLike:
    """Products with the Hessian of the mean cross-entropy of a classifier.

    Args:
        model: Any module whose output has ``logits``; its attention has to be differentiable twice.
        batches: The images. A single batch is the full-batch form, several are the form for a data loader.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        self.model, self.batches = model.eval(), batches
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.gradients = self._gradients(batches[0]) if len(batches) == 1 else None

    def _gradients(self, batch: Batch) -> Vector:
        """Of the loss of one batch, with the graph that made them."""
        pixels, labels = batch
        loss = F.cross_entropy(self.model(pixel_values=pixels).logits, labels)
        return list(torch.autograd.grad(loss, self.parameters, create_graph=True))

    def product(self, vector: Vector) -> Vector:
        """``H v``."""
        if self.gradients is not None:
            return list(torch.autograd.grad(self.gradients, self.parameters, vector, retain_graph=True))
        total, count = [torch.zeros_like(p) for p in self.parameters], 0
        for batch in self.batches:
            size = len(batch[1])
            products = torch.autograd.grad(self._gradients(batch), self.parameters, vector, retain_graph=False)
            total = [t + p * float(size) + 0.0 for t, p in zip(total, products, strict=True)]
            count += size
        return [t / float(count) for t in total]

    def trace(self, max_probes: int = 100, tolerance: float = 1e-3) -> list[float]:
        """``v^T H v`` of each probe that was made, at most `max_probes`."""
        samples: list[float] = []
        trace = 0.0
        for _ in range(max_probes):
            vector = [torch.randint_like(p, high=2) for p in self.parameters]
            for entry in vector:
                entry[entry == 0] = -1
            pairs = zip(self.product(vector), vector, strict=True)
            samples.append(sum((x * y).sum() for x, y in pairs).cpu().item())
            mean = sum(samples) / len(samples)
            if abs(mean - trace) / (abs(trace) + 1e-6) < tolerance:
                break
            trace = mean
        return samples
