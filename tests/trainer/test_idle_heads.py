"""Heads whose loss weighs nothing yet: neither decayed nor counted by Adam, and nothing else is changed by it."""

import itertools

import pytest
import torch

from hf_ihb.trainer import DistillationTrainer, SupervisedTrainer
from hf_ihb.trainer.arguments import DistillationTrainingArguments, SupervisedTrainingArguments

STRUCTURAL = {"student_layers": [0, 2], "teacher_layers": [0, 2], "teacher_cache": "off"}
STEP = {"distillation_warmup_type": "step", "token_weight": 1.0, "token_warmup_epochs": 1.0}  # of four steps
CALM = {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "learning_rate": 1e-3}


@pytest.fixture
def make_trainer(make_student, make_teacher, make_args, train_split, eval_split, processor):
    def make(student=None, **overrides):
        scores = "student_layers" not in overrides
        return DistillationTrainer(
            student or make_student(),
            make_args(DistillationTrainingArguments, **{**CALM, **overrides}),
            train_dataset=train_split,
            eval_dataset=eval_split,
            processing_class=processor,
            teacher_model=make_teacher(["red", "green", "blue", "dark"] if scores else None),
        )

    return make


def followed(trainer, heads):
    """Parameters of some heads before the first step and after each one."""
    found, step = [], trainer.create_optimizer

    def create(*args):
        optimizer = step(*args)
        found.append([p.detach().clone() for head in heads for p in head.parameters()])
        optimizer.register_step_post_hook(
            lambda *_: found.append([p.detach().clone() for head in heads for p in head.parameters()])
        )
        return optimizer

    trainer.create_optimizer = create
    trainer.train()
    return found


def largest_steps(found):
    pairs = itertools.pairwise(found)
    return [max((b - a).abs().max().item() for a, b in zip(x, y, strict=True)) for x, y in pairs]


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_a_head_rests_over_a_step_warm_up_and_adam_then_begins_with_it(decay, make_trainer):
    trainer = make_trainer(**STRUCTURAL, **STEP, max_steps=6, weight_decay=decay)
    steps = largest_steps(followed(trainer, [trainer.model.heads["token"]]))
    assert steps[:4] == [0.0] * 4
    # Adam's first step is the learning rate for every weight; it was 3.2 times that after four steps of nothing
    assert steps[4] == pytest.approx(1e-3, rel=2e-2 if decay == 0 else 0.5)


def test_the_distillation_head_rests_until_the_teacher_is_listened_to(make_trainer):
    trainer = make_trainer(
        method="logits", alpha=0.5, distillation_warmup_type="step", distillation_warmup_epochs=1.0, max_steps=5,
        weight_decay=0.5,
    )  # fmt: skip
    steps = largest_steps(followed(trainer, [trainer.student.distillation_classifier]))
    assert steps[:4] == [0.0] * 4
    assert steps[4] > 0


@pytest.mark.parametrize(
    ("keys", "resting"),
    [
        ({"alpha": 1.0}, {"cls_classifier"}),
        ({**STRUCTURAL, "cka_weight": 1.0, "task_heads": "cls"}, {"distillation_classifier"}),
        ({**STRUCTURAL, "cka_weight": 1.0, "task_loss_weight": 0.0}, {"cls_classifier", "distillation_classifier"}),
        ({"alpha": 1.0, "distilled_heads": "both"}, set()),
    ],
)
def test_class_heads_without_a_loss_are_not_decayed(keys, resting, make_trainer):
    trainer = make_trainer(**keys, max_steps=2, weight_decay=0.5)
    for name in ("cls_classifier", "distillation_classifier"):
        before = {n: t.clone() for n, t in trainer.student.state_dict().items() if n.startswith(name)}
        assert before, name
    start = {n: t.clone() for n, t in trainer.student.state_dict().items()}
    trainer.train()
    moved = {n.split(".")[0] for n, t in trainer.student.state_dict().items() if not torch.equal(t, start[n])}
    assert {"cls_classifier", "distillation_classifier"} - moved == resting


def test_a_head_that_inference_leaves_out_is_not_decayed_by_labels_alone(
    make_student, make_args, train_split, processor
):
    student = make_student(inference_head="distillation")
    start = student.cls_classifier.weight.clone()
    args = make_args(SupervisedTrainingArguments, max_steps=2, weight_decay=0.5)
    SupervisedTrainer(student, args, train_dataset=train_split, processing_class=processor).train()
    assert torch.equal(student.cls_classifier.weight, start)


def test_resting_heads_change_nothing_else_and_resume_like_never_stopping(make_trainer, make_student, tmp_path):
    keys = {**STRUCTURAL, **STEP, "max_steps": 6, "weight_decay": 0.1, "save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(**keys, output_dir=str(tmp_path / "whole"))
    whole.train()
    again = make_trainer(make_student(seed=9), **keys, output_dir=str(tmp_path / "again"))
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name
