"""Weights in bfloat16 with no autocast around them, as DeepSpeed's ZeRO keeps them: every student, loss and head."""

import pytest
import torch

from hf_ihb.config.model import ModelArguments
from hf_ihb.errors import RecipeError
from hf_ihb.models.student import build_student
from hf_ihb.trainer import LogitDistillationTrainer, SupervisedTrainer, distillation
from tests.trainer.conftest import LABELS, MEAN, SIZE, STD
from tests.trainer.test_whole_step import LOGITS, STRUCTURAL, StructuralDistillationTrainer, make  # noqa: F401

CNN = {"hidden_sizes": [8, 16], "depths": [1, 1]}
STUDENTS = {
    "deit": {}, "deit_cls": {}, "resnet18_cifar_w16": {}, "adaptive_cnn": CNN, "convnextv2": CNN,
    "stem and LayerScale": {"conv_stem": True, "layer_scale_init": 0.1},
}  # fmt: skip


def half_step(trainer):
    """Losses of a training and an evaluation step with half weights, the gradients left in them."""
    if isinstance(trainer, distillation.DistillationTrainer):
        trainer.prepare_teacher()
    trainer.model.to(torch.bfloat16).train()
    batch = trainer.train_dataset.__getitems__(range(16))
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    trainer.model.eval()
    with torch.no_grad():
        evaluated = trainer.compute_loss(trainer.model, batch)
    assert (loss.dtype, evaluated.dtype) == (torch.float32, torch.float32)
    assert torch.isfinite(loss)
    missing = [name for name, p in trainer.model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert missing == []
    return loss.item()


@pytest.mark.parametrize("name", STUDENTS)
def test_students_with_half_weights_train_to_the_loss_of_whole_ones(
    name, make_student, make_args, train_split, processor
):
    keys = STUDENTS[name]
    if name in ("deit", "deit_cls") or "conv_stem" in keys:
        student = make_student("deit" if keys else name, **keys)
    else:
        student = build_student(ModelArguments(architecture=name, **keys), LABELS, SIZE, MEAN, STD)[0]
    args = make_args(SupervisedTrainer.arguments_class)
    trainer = SupervisedTrainer(student, args, train_dataset=train_split, processing_class=processor)
    whole = trainer.compute_loss(trainer.model.train(), train_split.__getitems__(range(16))).item()
    assert half_step(trainer) == pytest.approx(whole, rel=5e-2)


@pytest.mark.parametrize(("trainer_class", "settings"), [
    *((LogitDistillationTrainer, LOGITS[name] | {"teacher_cache": "off"}) for name in LOGITS),
    *((StructuralDistillationTrainer, settings | {"teacher_cache": "off"}) for settings in STRUCTURAL.values()),
])  # fmt: skip
def test_distillation_into_half_weights_has_losses_in_float32_and_every_gradient(trainer_class, settings, make):  # noqa: F811
    half_step(make(trainer_class, "deit", settings))


def test_batch_norm_in_bf16_is_refused_under_deepspeed_and_welcome_elsewhere(make_args, make_student, monkeypatch):
    args = make_args(SupervisedTrainer.arguments_class, bf16=True)
    SupervisedTrainer(make_student(conv_stem=True), args)
    prepare = SupervisedTrainer.create_accelerator_and_postprocess

    def under_deepspeed(self):
        prepare(self)
        self.is_deepspeed_enabled = True

    monkeypatch.setattr(SupervisedTrainer, "create_accelerator_and_postprocess", under_deepspeed)
    SupervisedTrainer(make_student(), args)
    with pytest.raises(RecipeError, match="without BatchNorm under DeepSpeed"):
        SupervisedTrainer(make_student(conv_stem=True), args)
