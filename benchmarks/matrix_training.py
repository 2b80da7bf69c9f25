"""What is promised of a training, for a family as teacher and for one as student, on a CPU and in seconds."""

import contextlib
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageClassification, PreTrainedModel, TrainerCallback, set_seed

from benchmarks.families import MEAN, STD, Family
from hf_ihb.config.augmentation import AugmentationArguments
from hf_ihb.config.model import ModelArguments
from hf_ihb.data import ImageSplit
from hf_ihb.models.processing import student_processor
from hf_ihb.models.student import build_student
from hf_ihb.models.teacher import Teacher
from hf_ihb.trainer import DistillationTrainer
from hf_ihb.trainer.arguments import DistillationTrainingArguments

NAMES = [f"LABEL_{i}" for i in range(5)]
STEPS = 20


def images(size: int, count: int = 64) -> ImageSplit:
    """Smooth pictures, a colour a class."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(count) % 5
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    coarse[torch.arange(count), labels % 3] += 0.5 * (1 + labels[:, None, None] // 3)
    fine = torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear") / 2
    return ImageSplit((fine.clamp(0, 1) * 255).round().to(torch.uint8), labels, NAMES)


def deit(size: int = 32) -> PreTrainedModel:
    """The student of all teachers."""
    set_seed(0)
    shape = ModelArguments(hidden_size=24, num_hidden_layers=3, num_attention_heads=3, patch_size=8)
    return build_student(shape, NAMES, (size, size), MEAN, STD)[0]


class _Gradients(TrainerCallback):
    """Parameters that have no gradient when the first step is made."""

    def __init__(self) -> None:
        self.missing: list[str] | None = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Looks, once."""
        if self.missing is None:
            self.missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]


def trainer_of(
    student: PreTrainedModel, teacher: Teacher, folder: Path, size: int, **options: Any
) -> DistillationTrainer:
    """CKA, Gram and token losses of the last blocks at the shared view."""
    keys: dict[str, Any] = {
        "max_steps": STEPS, "per_device_train_batch_size": 16, "learning_rate": 2e-3, "logging_steps": 1,
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "seed": 0,
        "cka_weight": 1.0, "gram_weight": 1.0, "token_weight": 1.0, "teacher_view": "shared",
        "student_layers": ["last"], "teacher_layers": [-1], "teacher_statistics_samples": 64,
        "teacher_cache_dir": str(folder / "cache"), "lr_scheduler_type": "constant", "teacher_cache": "off",
    }  # fmt: skip
    args = DistillationTrainingArguments(str(folder / "run"), **keys | options)
    return DistillationTrainer(
        student,
        args,
        train_dataset=images(size),
        processing_class=student_processor(MEAN, STD, (size, size)),
        augmentation=AugmentationArguments(random_crop_padding=2),
        teacher_model=teacher,
    )


def train(trainer: DistillationTrainer, **kwargs: Any) -> list[float]:
    """Trains without a word; the loss of each step."""
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train(**kwargs)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _falls(losses: list[float]) -> None:
    assert all(torch.isfinite(torch.tensor(losses))), losses
    first, last = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    assert last < first, f"loss {first:.4f} -> {last:.4f}"


def _same_from_a_cache(make: Callable[..., DistillationTrainer]) -> None:
    """All images once, at a learning rate that moves nothing: rounding is not amplified from step to step."""
    keys = {"max_steps": 4, "learning_rate": 1e-8}
    live, cached = (train(make(teacher_cache=cache, **keys)) for cache in ("off", "tokens"))
    worst = max(abs(a - b) / abs(a) for a, b in zip(live, cached, strict=True))
    assert worst < 1e-2, f"cached and live differ by {worst:.3f}"


def structural_teacher(teacher: Teacher, folder: Path) -> None:
    """A DeiT learns from it: finite, decreasing over 20 steps, and the same from a cache."""
    _falls(train(trainer_of(deit(), teacher, folder, 32)))
    # tokens that are the same to five digits all over an image, as a random LeViT's, have the CKA of rounding
    keys = {} if _spread(teacher) > 1e-3 else {"cka_weight": 0.0}
    _same_from_a_cache(lambda **more: trainer_of(deit(), teacher, folder, 32, **keys, **more))


def _spread(teacher: Teacher) -> float:
    """How much an image's tokens differ from each other, as a share of what they differ by from the mean image's."""
    shown = teacher.prepare(images(32).images, whole=True)
    (last,) = teacher.features(shown, [-1])
    own = last.patch_tokens - last.patch_tokens.mean(0)
    return float((own - own.mean(1, keepdim=True)).norm() / own.norm())


def structural_student(family: Family, teacher: Teacher, folder: Path) -> None:
    """It learns from a small DINOv2: finite, decreasing over 20 steps, and the same from a cache."""
    _falls(train(_student(family, teacher, folder)))
    _same_from_a_cache(lambda **keys: _student(family, teacher, folder, **keys))


def _student(family: Family, teacher: Teacher, folder: Path, **options: Any) -> DistillationTrainer:
    set_seed(0)
    return trainer_of(family.build(), teacher, folder, family.size, **options)


def gradients(family: Family, teacher: Teacher, folder: Path) -> None:
    """Every parameter that is trained gets a gradient."""
    trainer = _student(family, teacher, folder, max_steps=1)
    seen = _Gradients()
    trainer.add_callback(seen)
    train(trainer)
    assert seen.missing == [], f"none for {seen.missing[:3]} ({len(seen.missing)})"


def reload(family: Family, teacher: Teacher, folder: Path) -> None:
    """What is saved of it is plain: its library reads it, and it says the same."""
    trainer = _student(family, teacher, folder, max_steps=2)
    train(trainer)
    trainer.save_model(str(folder / "saved"))
    plain = AutoModelForImageClassification.from_pretrained(folder / "saved").eval()
    pixels = torch.randn(2, 3, family.size, family.size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(plain(pixels).logits, trainer.student.eval()(pixels).logits, rtol=1e-5, atol=1e-5)


def resume(family: Family, teacher: Teacher, folder: Path) -> None:
    """A run that goes on from a checkpoint ends with the same weights, bit for bit, with averaging on."""
    keys = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "ema_decay": 0.9, "save_total_limit": 3}
    whole = _student(family, teacher, folder, **keys)
    losses = train(whole)
    again = _student(family, teacher, folder, **keys)
    assert train(again, resume_from_checkpoint=str(folder / "run" / "checkpoint-2"))[-2:] == losses[-2:]
    for name, tensor in _weights(whole).items():
        assert torch.equal(tensor, _weights(again)[name]), name
    shutil.rmtree(folder / "run")


def _weights(trainer: DistillationTrainer) -> dict[str, Tensor]:
    return dict(trainer.student.state_dict())
