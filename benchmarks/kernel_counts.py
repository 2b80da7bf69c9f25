"""Kernels that a training step launches, forward, counted without a GPU.

python benchmarks/kernel_counts.py [--batch_size 1024]

The step runs on fake CUDA tensors, which have shapes and no values; every operation that is not a view or an allocation
counts as one kernel (a sort or a cumulative sum launches some more), and moves the bytes of its inputs and outputs. The
student, the augmentation and the losses are those of `recipes/cka.json` and `recipes/ce_only.json`, eager: compiled
they are far fewer.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

import torch
from side_by_side import write_results
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_ihb.augment import Augmenter, class_targets
from hf_ihb.config.augmentation import AugmentationArguments
from hf_ihb.config.model import ModelArguments
from hf_ihb.functional.gram import gram_width, unpack_gram
from hf_ihb.functional.logits import task_loss
from hf_ihb.functional.resampling import Resampler
from hf_ihb.methods.cka import CKA
from hf_ihb.models.module import StudentModule
from hf_ihb.models.processing import PixelFormat
from hf_ihb.models.student import build_student
from hf_ihb.runs.tables import markdown_table
from hf_ihb.step import Step, TeacherOutputs, TeacherTokens

ROOT = Path(__file__).parents[1]
MEAN, STD, SIZE = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26), (32, 32)
NAMES = list("abcdefghij")
_ALLOCATIONS = ("empty", "detach", "lift_fresh", "new_empty")


class Kernels(TorchDispatchMode):
    """Counts the operations of one part of a step after another.

    Attributes:
        counts: Kernels of each part.
        bytes: That they read and write.
        names: How often each operation ran in each part.
    """

    def __init__(self) -> None:
        super().__init__()
        self.part = ""
        self.counts, self.bytes, self.names = Counter(), Counter(), {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.namespace == "aten" and not func.is_view and not name.startswith(_ALLOCATIONS):
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
            self.counts[self.part] += 1
            self.bytes[self.part] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            self.names.setdefault(self.part, Counter())[name] += 1
        return result


def keys_of(recipe: str, arguments: type) -> dict:
    """What a recipe says of one class of arguments."""
    content = json.loads((ROOT / "recipes" / recipe).read_text("utf-8"))
    return {name: value for name, value in content.items() if name in arguments.__dataclass_fields__}


def on_device(module: torch.nn.Module, device: torch.device) -> None:
    """Puts fake tensors in the place of a module's own."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                part._parameters[name] = torch.nn.Parameter(torch.empty(value.shape, device=device))
        for name, value in part._buffers.items():
            part._buffers[name] = None if value is None else torch.empty_like(value, device=device)


def count(mode: FakeTensorMode, batch_size: int, augmentation: AugmentationArguments, cka: bool) -> Kernels:
    """One step, the second: tables are made in the first."""
    student = build_student(ModelArguments(**keys_of("cka.json", ModelArguments)), NAMES, SIZE, MEAN, STD)[0]
    module, device, layers = StudentModule(student, [5, 8, 11] if cka else []), torch.device("cuda:0"), 3
    with mode, torch.no_grad():
        on_device(module, device)
        module.train()
        stored = torch.empty(45_000, 3, *SIZE, dtype=torch.uint8, device=device)
        labels = torch.empty(45_000, dtype=torch.long, device=device)
        cache = torch.empty(45_000, layers * gram_width(64), dtype=torch.half, device=device)
        index = torch.empty(batch_size, dtype=torch.long, device=device)

        def fetch(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return stored.index_select(0, rows), labels[rows]

        augmenter = Augmenter(augmentation, 0, MEAN, fetch, len(stored))
        pixels, loss = PixelFormat(MEAN, STD, SIZE), CKA(cka_weight=1.0)
        for turn in range(2):
            kernels = Kernels()
            with kernels:
                kernels.part = "batch"
                images, own = fetch(index)
                kernels.part = "augmentation"
                views = augmenter(images, index, turn)
                kernels.part = "normalisation and targets"
                seen = pixels.apply(views.seen)
                targets = class_targets(own, len(NAMES), 0.1, views)
                kernels.part = "student"
                outputs = module(seen)
                kernels.part = "labels' loss"
                task_loss(outputs.heads, targets)
                if cka:
                    kernels.part = "cached teacher and structural loss"
                    rows = cache[index].split(gram_width(64), dim=1)
                    move = Resampler(views.affine)
                    known = [move(unpack_gram(row, 64), (8, 8), (8, 8)) for row in rows]
                    teacher = TeacherOutputs(layers={"centered": [TeacherTokens(*one) for one in known]})
                    loss.loss(outputs, Step(seen, teacher=teacher, unmixed=views.unmixed))
    return kernels


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=1024)
    parser.add_argument("--name", default="kernels", help="of the results")
    args = parser.parse_args()
    recipe = AugmentationArguments(**keys_of("cka.json", AugmentationArguments))
    basic = AugmentationArguments(random_crop_padding=4, horizontal_flip=0.5)
    mode = FakeTensorMode()  # one for all: tables are kept
    found = {
        "labels, crop and flip": count(mode, args.batch_size, basic, False),
        "labels": count(mode, args.batch_size, recipe, False),
        "CKA, cached Gram": count(mode, args.batch_size, recipe, True),
    }
    parts = list(found["CKA, cached Gram"].counts)
    rows = [["step", "kernels", *parts, "moved by augmentation"]]
    for name, kernels in found.items():
        counts = (f"{kernels.counts[part]:,}" for part in parts)
        moved = f"{kernels.bytes['augmentation'] / 1e9:.2f} GB"
        rows.append([name, f"{kernels.counts.total():,}", *counts, moved])
    content = {
        "batch_size": args.batch_size,
        "steps": {
            name: {"kernels": kernels.counts, "bytes": kernels.bytes, "operations": kernels.names}
            for name, kernels in found.items()
        },
    }
    about = (
        f"Kernels of one step, forward, DeiT-Tiny on 32 px, batch {args.batch_size}, eager; counted on fake tensors."
    )
    write_results(args.name, about, content, [markdown_table(rows)])


if __name__ == "__main__":
    main()
