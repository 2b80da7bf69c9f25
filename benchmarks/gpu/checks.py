"""Part 2: is it right? The main command; every trainer and loss here and there; resuming; waits for the device."""

import json
import os
import shutil
import subprocess
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import BitImageProcessor, TrainerCallback

from gpu.builds import IMAGENET, Builder, dinov2
from gpu.job import ROOT, Context
from hf_ihb.augment import Augmenter
from hf_ihb.config.augmentation import AugmentationArguments
from hf_ihb.runs.files import read_json

STEPS, BATCH = 5, 32
# float32 there against float32 here, bfloat16 against float32, compiled against eager
TOLERANCES = {"float32": 1e-3, "bf16": 2e-2, "compiled": 1e-3}


# ---- The main command ----


def main_command(context: Context, precision: str) -> dict[str, Any]:
    """`accelerate launch scripts/distill.py recipes/cka.json` as a user types it, with a random DINOv2-small.

    Returns:
        The command, the loss of each step, images a second, and what ``evaluation.json`` holds.
    """
    teacher, folder = context.folder / "dinov2-small-random", context.run_folder(f"command-{precision}")
    if not (teacher / "preprocessor_config.json").is_file():
        dinov2().save_pretrained(teacher)
        BitImageProcessor(
            size={"shortest_edge": 256},
            crop_size={"height": 224, "width": 224},
            image_mean=list(IMAGENET[0]),
            image_std=list(IMAGENET[1]),
        ).save_pretrained(teacher)
    words = ["scripts/distill.py", "recipes/cka.json", *context.data_arguments, *context.sizes.command]
    words += ["--teacher_model", str(teacher), "--output_dir", str(folder), "--overwrite_output_dir", "true"]
    words += ["--logging_steps", "1", "--teacher_cache_dir", str(context.folder / "teacher_caches")]
    words += context.device_arguments
    launcher = ["-m", "accelerate.commands.launch", "--mixed_precision", precision]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    subprocess.run([sys.executable, *launcher, *words], cwd=ROOT, check=True, env=environment)
    logs = [entry for entry in json.loads((folder / "training_history.json").read_text("utf-8")) if "loss" in entry]
    return {
        "command": " ".join(["accelerate", "launch", *launcher[2:], *words]),
        "losses": [entry["loss"] for entry in logs],
        "images_per_second": logs[-1]["images_per_second"],
        "evaluation": read_json(folder / "evaluation.json"),
    }


# ---- Every trainer and loss ----

STUDENT = {"architecture": "deit", "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 4}
CNNS: dict[str, dict[str, Any]] = {
    "adaptive_cnn": {"architecture": "adaptive_cnn", "hidden_sizes": [16, 32], "depths": [1, 1]},
    "convnextv2": {"architecture": "convnextv2", "hidden_sizes": [16, 32], "depths": [1, 1]},
    "resnet18_cifar_w16": {"architecture": "resnet18_cifar_w16"},
}
SMALL_VIT = {"width": 48, "depth": 4, "heads": 3}
LAYERS = {"student_layers": [1, 2], "teacher_layers": [1, 3], "teacher_statistics_samples": 64}
CKA, LIVE = {"cka_weight": 1.0, **LAYERS}, {"teacher_cache": "off"}
# name -> (way, student, teacher, settings)
VARIANTS: dict[str, tuple[str, dict[str, Any], str | None, dict[str, Any]]] = {
    "labels": ("labels", STUDENT, None, {}),
    "labels, one head": ("labels", {**STUDENT, "architecture": "deit_cls"}, None, {}),
    "labels, stem and LayerScale": ("labels", {**STUDENT, "conv_stem": True, "layer_scale_init": 0.1}, None, {}),
    **{f"labels, {name}": ("labels", keys, None, {}) for name, keys in CNNS.items()},
    "labels, EMA": ("labels", STUDENT, None, {"ema_decay": 0.9}),
    "soft logits, live": ("logits", STUDENT, "cnn", {"temperature": 2.0}),
    "hard logits, live": ("logits", STUDENT, "cnn", {"distillation_type": "hard", "distilled_heads": "both"}),
    "soft logits, cached": ("logits", STUDENT, "cnn", {"teacher_view": "clean", "teacher_cache": "logits"}),
    "CKA, cached Gram": ("structural", STUDENT, "vit", {**CKA, "teacher_cache": "gram"}),
    "CKA, cached tokens": ("structural", STUDENT, "vit", {**CKA, "teacher_cache": "tokens"}),
    "CKA, live": ("structural", STUDENT, "vit", CKA | LIVE),
    "CKA, pooled": ("structural", STUDENT, "vit", CKA | LIVE | {"cka_scope": "pooled"}),
    "CKA of images": ("structural", STUDENT, "vit", CKA | LIVE | {"cka_scope": "images"}),
    "CKA, RBF": ("structural", STUDENT, "vit", CKA | LIVE | {"cka_kernel": "rbf"}),
    "CKA, published": ("structural", STUDENT, "vit", CKA | LIVE | {"cka_estimator": "published"}),
    "CKA to a CNN": ("structural", STUDENT, "cnn", CKA | {"teacher_cache": "gram"}),
    "Gram, cached": ("structural", STUDENT, "vit", {**LAYERS, "gram_weight": 1.0, "teacher_cache": "gram"}),
    "tokens, cached": ("structural", STUDENT, "vit", {**LAYERS, "token_weight": 1.0, "teacher_cache": "tokens"}),
    "relation": ("structural", STUDENT, "vit", {**LAYERS, "relation_weight": 1.0} | LIVE),
    "published heads": (
        "structural",
        STUDENT,
        "vit",
        {**LAYERS, "token_weight": 1.0, "cka_weight": 1.0, "teacher_projector": "trainable"} | LIVE,
    ),
}
COMPILED = ("labels", "CKA, cached Gram", "CKA, live")
AUGMENTATION = {
    "random_crop_padding": 4, "horizontal_flip": 0.5, "auto_augment": "trivialaugment_wide", "random_erasing": 0.25,
}  # fmt: skip
# a clean view of a mixed image would not be the same image
MIXED = AUGMENTATION | {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "mix_probability": 0.5}


class Waits(TrainerCallback):
    """CUDA's debug mode from the end of one step to that of the next: what it warns of is a place where the host waits.

    The batch of a step is fetched after the end of the one before.

    Args:
        step: After which it is turned on; everything should have run before.
    """

    def __init__(self, step: int) -> None:
        self.step, self.found = step, set()
        self._caught: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Turns it on or off."""
        if state.global_step == self.step:
            self._caught = warnings.catch_warnings(record=True)
            self._warnings = self._caught.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
        else:
            self.stop()

    def stop(self) -> None:
        """Turns it off where it is on, and reads what it said."""
        if self._caught is not None:
            torch.cuda.set_sync_debug_mode("default")
            self._caught.__exit__(None, None, None)
            self._caught = None
            said = (w for w in self._warnings if "synchroniz" in str(w.message))
            self.found |= {f"{Path(w.filename).name}:{w.lineno}" for w in said}


def loss_curves(context: Context, precision: str, on: str | None = None) -> dict[str, Any]:
    """A few steps of a small student with every trainer and loss.

    Args:
        context: Where.
        on: Another device than the context's.
        precision: ``float32``, ``bf16`` or ``compiled`` (float32, `COMPILED` alone).

    Returns:
        ``curves``: for each variant the loss and its parts at each step; ``waits``: where the host waited for CUDA in
        a step between logs; ``failed``: tracebacks. A variant that fails leaves the others.
    """
    builder = Builder(
        replace(context, device=on or context.device), max_train_samples=STEPS * BATCH, max_eval_samples=50
    )
    curves, waits, failed = {}, {}, {}
    for name in COMPILED if precision == "compiled" else VARIANTS:
        try:
            curves[name], waits[name] = _train_variant(builder, name, precision)
        except Exception:
            failed[name] = traceback.format_exc()
    return {"precision": precision, "curves": curves, "waits": waits, "failed": failed}


def _train_variant(builder: Builder, name: str, precision: str) -> tuple[list[dict[str, float]], list[str]]:
    way, student, kind, settings = VARIANTS[name]
    teacher = {
        None: lambda: None,
        "cnn": lambda: builder.classifier("resnet18_cifar_w16"),
        "vit": lambda: builder.features(56, **SMALL_VIT),
    }[kind]()
    cuda, compiled = builder.context.device == "cuda", precision == "compiled"
    waits = Waits(STEPS - 2)
    length = {"max_steps": STEPS, "per_device_train_batch_size": BATCH, "learning_rate": 1e-3}
    length |= {"bf16": precision == "bf16", "torch_compile": compiled}
    if compiled:
        torch._dynamo.reset()
        length["torch_compile_backend"] = "inductor" if cuda else "aot_eager"
    augmentation = AugmentationArguments(**(AUGMENTATION if settings.get("teacher_view") == "clean" else MIXED))
    trainer = builder.trainer(way, student, augmentation, teacher, **length, **settings, logging_steps=1)
    # a difference of 1e-3 would be TF32's rounding, which convolutions otherwise keep
    torch.backends.cudnn.allow_tf32 = False
    trainer.train()
    if cuda:  # again, without a log in every step, which waits
        silent = builder.trainer(way, student, augmentation, teacher, **length, **settings, logging_steps=10**6)
        silent.add_callback(waits)
        try:
            silent.train()
        finally:
            waits.stop()
    logs = [
        {key: value for key, value in entry.items() if key in ("loss", "grad_norm") or key.endswith("_loss")}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    return logs, sorted(waits.found)


def differences(curves: dict[str, list], reference: dict[str, list]) -> dict[str, float]:
    """The largest relative difference of each variant's losses (not its gradient norm) from another run's."""
    found = {}
    for name in (name for name in curves if name in reference):
        pairs = [
            (step[key], other[key])
            for step, other in zip(curves[name], reference[name], strict=True)
            for key in step
            if key != "grad_norm"
        ]
        found[name] = max(abs(a - b) / max(abs(b), 1e-6) for a, b in pairs)
    return found


# ---- Views ----


def colours(context: Context) -> dict[str, Any]:
    """Augmented images made on the device and on the CPU: grey levels they differ by.

    Returns:
        For each setting the share of values that differ, and the largest difference in levels of 255.
    """
    settings = {name: {"auto_augment": name} for name in ("trivialaugment_wide", "autoaugment_cifar10")}
    settings |= {f"randaugment {m}": {"auto_augment": "randaugment", "randaugment_magnitude": m} for m in (9, 30)}
    settings["jitter"] = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.2}
    settings["affine"] = {"rotation_degrees": 20.0, "translate_fraction": 0.1, "scale_jitter": 0.2, "shear_degrees": 9}
    settings["recipe"] = MIXED
    data, device, found = Builder(context).data.train, torch.device(context.device), {}
    rows = torch.arange(2048 if device.type == "cuda" else 256)
    images, labels = data.images[rows], data.labels[rows]
    for name, keys in settings.items():

        def views(where: torch.device, keys: dict[str, Any] = keys) -> torch.Tensor:
            stored, classes = images.to(where), labels.to(where)
            fetch = lambda index: (stored[index], classes[index])  # noqa: E731
            augmenter = Augmenter(AugmentationArguments(**keys), 0, (0.5,) * 3, fetch, len(stored))
            seen = augmenter(stored, rows.to(where), 3).seen.cpu()
            return seen.float() if seen.dtype == torch.uint8 else 255 * seen

        gap = (views(device) - views(torch.device("cpu"))).abs()
        found[name] = {"share": (gap > 1e-3).float().mean().item(), "levels": gap.max().item()}
    return found


# ---- Resuming ----


def resume(context: Context) -> dict[str, Any]:
    """Six steps, and three that are resumed for three more: the largest difference of a weight of the student."""
    builder = Builder(context, max_train_samples=6 * BATCH, max_eval_samples=50)
    found = {}
    for name in ("labels, EMA", "CKA, cached Gram"):
        with _fresh(context.folder / "resume") as folder:
            whole = _six_steps(builder, name, folder / "whole", None)
            resumed = _six_steps(builder, name, folder / "resumed", folder / "whole" / "checkpoint-3")
        found[name] = max((whole[key].float() - resumed[key].float()).abs().max().item() for key in whole)
    return {"largest_difference": found}


def _six_steps(builder: Builder, name: str, folder: Path, resumed: Path | None) -> dict[str, torch.Tensor]:
    way, student, kind, settings = VARIANTS[name]
    trainer = builder.trainer(
        way,
        {**student, "drop_path_rate": 0.2},
        AugmentationArguments(**MIXED),
        None if kind is None else builder.features(56, **SMALL_VIT),
        max_steps=6,
        per_device_train_batch_size=BATCH,
        save_strategy="steps",
        save_steps=3,
        output_dir=str(folder),
        **settings,
    )
    trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
    return trainer.student.state_dict()


@contextmanager
def _fresh(folder: Path) -> Iterator[Path]:
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
