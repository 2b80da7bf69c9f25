"""What benchmarks/analytics.py times and measures: ours and the common ways, as functions of rows of the test split."""

import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from peers import materialized
from peers.pyhessian_like import PyHessianLike
from torch import Tensor

from hf_ihb.analysis import AnalysisArguments
from hf_ihb.analysis.attention import AttentionAnalysis
from hf_ihb.analysis.cka import CKAAnalysis
from hf_ihb.config.data import DataArguments
from hf_ihb.config.model import ModelArguments
from hf_ihb.data import load_image_split
from hf_ihb.functional.attention import attention_distance
from hf_ihb.functional.curvature import HessianOperator, hutchinson_trace
from hf_ihb.functional.minibatch_cka import MinibatchCKA
from hf_ihb.models.attention import attention_geometry, capture_attention
from hf_ihb.models.features import extract_features
from hf_ihb.models.pretrained import Pretrained
from hf_ihb.models.processing import pixel_format
from hf_ihb.models.student import build_student

_RECIPE = Path(__file__).parents[1] / "recipes" / "ce_only.json"
_ROWS_PER_CHUNK = 256  # of the minibatch CKA, as scripts/analyze.py has it


class Pieces:
    """Every piece of work on an untrained DeiT-Tiny, on the CPU.

    Args:
        args: The command line.
    """

    def __init__(self, args: Namespace) -> None:
        self.args = args
        self.split, self.revision = load_image_split(DataArguments(dataset_name=args.dataset_name), "test")
        order = torch.randperm(len(self.split), generator=torch.Generator().manual_seed(args.seed))
        self.rows = order[: args.images]
        self.subject, self.eager = self._subject(), self._subject().model
        self.eager.set_attn_implementation("eager")
        self.tokens = attention_geometry(self.eager, self._pixels(self.rows[:1]))[:2]
        self.features: list[Tensor] = []  # what `extract` found

    def _subject(self) -> Pretrained:
        recipe = json.loads(_RECIPE.read_text("utf-8"))
        shape = {name: value for name, value in recipe.items() if name in ModelArguments.__dataclass_fields__}
        torch.manual_seed(self.args.seed)
        split = self.split
        model, processor = build_student(
            ModelArguments(**shape), split.label_names, split.image_size, [0.5] * 3, [0.25] * 3
        )
        return Pretrained(model.eval(), pixel_format(processor), "deit-tiny", None)

    def _pixels(self, rows: Tensor) -> Tensor:
        return self.subject.pixels.apply(self.split.__getitems__(rows)["pixel_values"].float() / 255)

    def _batches(self, rows: Tensor) -> Iterator[Tensor]:
        return (self._pixels(some) for some in rows.split(self.args.batch_size))

    # ---- Attention ----

    @torch.no_grad()
    def forward(self, rows: Tensor) -> None:
        """The forward passes that every way makes, without a look at attention."""
        for pixels in self._batches(rows):
            self.subject.model(pixel_values=pixels)

    def distance(self, rows: Tensor) -> Tensor:
        """Ours, the distance alone: ``(L, H)`` in patches."""
        sums: dict[int, Any] = {}

        def add(layer: int, attention: Tensor) -> None:
            sums[layer] = sums.get(layer, 0) + attention_distance(attention, *self.tokens).sum(dim=0)

        for pixels in self._batches(rows):
            capture_attention(self.subject.model, pixels, add)
        return torch.stack(list(sums.values())) / len(rows)

    def statistics(self, rows: Tensor) -> dict[str, Any]:
        """Ours, as scripts/analyze.py does it: six statistics, means and deviations in float64."""
        args = AnalysisArguments(batch_size=self.args.batch_size, untrained_reference=False, num_maps=0)
        return AttentionAnalysis.of(args).compute(self.subject, self.split, rows, args)

    def materialised(self, rows: Tensor) -> Tensor:
        """The maps of all layers of a batch at a time."""
        return materialized.distances_batch_by_batch(self.eager, self._batches(rows), *self.tokens)

    def materialised_whole(self, rows: Tensor) -> Tensor:
        """The maps of all layers of all images."""
        return materialized.distances_of_all_maps(self.eager, self._batches(rows), *self.tokens)

    # ---- CKA ----

    @torch.no_grad()
    def extract(self, rows: Tensor) -> None:
        """The mean patch token of every block, for the pieces below."""
        found = [extract_features(self.subject.model, pixels, None)[1] for pixels in self._batches(rows)]
        pooled = ([f.patch_tokens.mean(dim=1) for f in layer] for layer in zip(*found, strict=True))
        self.features = [torch.cat(layer) for layer in pooled]

    def minibatch(self, rows: Tensor) -> Tensor:
        """Ours: debiased CKA ``(L, L)`` from chunks of images."""
        cka = MinibatchCKA(_ROWS_PER_CHUNK)
        for some in zip(*(f[: len(rows)].split(self.args.batch_size) for f in self.features), strict=True):
            cka.update(some)
        return cka.compute()

    def gram(self, rows: Tensor) -> Tensor:
        """Gram matrices of all images, those of all layers at a time."""
        return materialized.gram_cka([f[: len(rows)] for f in self.features])

    def gram_pairs(self, rows: Tensor) -> Tensor:
        """Gram matrices of all images, those of two layers at a time."""
        return materialized.gram_cka_pair_by_pair([f[: len(rows)] for f in self.features])

    def similarity(self, rows: Tensor) -> dict[str, Any]:
        """Ours, as scripts/analyze.py does it: forward passes, a linear and an RBF kernel."""
        args = AnalysisArguments(batch_size=self.args.batch_size)
        return CKAAnalysis.of(args).compute(self.subject, self.split, rows, args)

    # ---- Hessian ----

    def _labelled(self, rows: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
        return [(self._pixels(some), self.split.labels[some]) for some in rows.split(size)]

    def trace(self, rows: Tensor) -> Tensor:
        """Ours: ``v^T H v`` of each probe, blocks of 8 probes sharing the first backward, as scripts/analyze.py."""
        model, batches = self.subject.model, self._labelled(rows, self.args.micro_batch)

        def losses() -> Iterator[Tensor]:
            for pixels, labels in batches:
                logits = model(pixel_values=pixels).logits
                yield F.cross_entropy(logits, labels, reduction="sum") / len(rows)
                del logits

        operator = HessianOperator(losses, list(model.parameters()))
        probes = self.args.probes
        return hutchinson_trace(
            operator, operator.size, max_probes=probes, min_probes=probes, tolerance=0, block_size=8
        ).samples

    def trace_micro_batches(self, rows: Tensor) -> list[float]:
        """PyHessian's way on the same micro-batches."""
        return PyHessianLike(self.eager, self._labelled(rows, self.args.micro_batch)).trace(self.args.probes, 0)

    def trace_full_batch(self, rows: Tensor) -> list[float]:
        """PyHessian's way on one batch; the gradient and its graph are made once."""
        return PyHessianLike(self.eager, self._labelled(rows, len(rows))).trace(self.args.probes, 0)

    def count_gradients(self, rows: Tensor) -> dict[str, int]:
        """How many gradients `trace` takes, and how many probes it makes of them."""
        with patch.object(torch.autograd, "grad", wraps=torch.autograd.grad) as grad:
            made = len(self.trace(rows))
        first = sum(call.kwargs.get("create_graph", False) for call in grad.call_args_list)
        return {
            "probes asked for": self.args.probes,
            "probes made": made,
            "micro-batches": -(-len(rows) // self.args.micro_batch),
            "first gradients": first,
            "second gradients": grad.call_count - first,
        }
