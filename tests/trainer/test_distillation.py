"""Methods in one run: what they add up to, what the teacher is asked, and what a method may ask for."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from hf_ihb import methods
from hf_ihb.config.augmentation import AugmentationArguments
from hf_ihb.config.fields import NON_NEGATIVE, key
from hf_ihb.errors import RecipeError
from hf_ihb.methods import METHODS
from hf_ihb.methods.base import Method
from hf_ihb.step import Needs
from hf_ihb.trainer import DistillationTrainer, arguments
from hf_ihb.trainer.arguments import DistillationTrainingArguments, LogitDistillationTrainingArguments, keys_today
from tests.methods.steps import keys_of
from tests.methods.steps import method as method_of

LAYERS = {"student_layers": [0, 2], "teacher_layers": [1, 2], "teacher_statistics_samples": 64}
CROP = AugmentationArguments(random_crop_padding=2, horizontal_flip=0.5)


@pytest.fixture
def make_trainer(
    make_student, make_teacher, make_vit_classifier, make_args, train_split, eval_split, processor, tmp_path
):
    def make(student=None, augmentation=CROP, arguments_class=DistillationTrainingArguments, vit=False, **keys):
        keys = {**LAYERS, "teacher_cache": "off", "teacher_cache_dir": str(tmp_path / "caches"), "max_steps": 2} | keys
        return DistillationTrainer(
            student or make_student(), make_args(arguments_class, **keys), train_dataset=train_split,
            eval_dataset=eval_split, processing_class=processor, augmentation=augmentation,
            teacher_model=make_vit_classifier() if vit else make_teacher(),
        )  # fmt: skip

    return make


def gradients(trainer, rows=range(16)):
    """Of one step, without drop path, and the loss."""
    trainer.prepare_teacher()
    batch = trainer.train_dataset.__getitems__(list(rows))
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model.train(), batch)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}


def only_student(found):
    return {name: gradient for name, gradient in found.items() if name.startswith("student.")}


COMBINATIONS = {
    "KD + CKA": ({"alpha": 0.5}, {"cka_weight": 1.0}),
    "KD + Gram + token": ({"alpha": 0.3, "temperature": 2.0}, {"gram_weight": 2.0}, {"token_weight": 0.5}),
    "all": tuple({"alpha": 0.4} if kind.shares_task else {f"{kind.name}_weight": 0.7} for kind in METHODS),
}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_the_gradient_of_a_sum_is_the_sum_of_the_gradients(name, make_trainer, make_student):
    parts = COMBINATIONS[name]
    # one set of heads for the labels, whatever is on; and a teacher that has all that any method needs
    task = {"distilled_heads": "both", "vit": name == "all"}
    together, found = gradients(make_trainer(make_student(), **task, **{k: v for p in parts for k, v in p.items()}))
    total, added = 0.0, {}
    for part in parts:
        weight = 1.0 if "alpha" in part else 0.0  # the labels are counted once
        loss, own = gradients(make_trainer(make_student(), task_loss_weight=weight, **task, **part))
        total += loss
        for key_, gradient in own.items():
            added[key_] = added.get(key_, 0) + gradient
    assert together == pytest.approx(total, rel=1e-5)
    for key_, gradient in only_student(found).items():
        largest = added[key_].abs().max().item()  # rounding is that of the largest that were added
        torch.testing.assert_close(
            gradient, added[key_], rtol=1e-4, atol=2e-6 * max(1.0, largest), msg=f"{key_} {largest}"
        )


class Asked:
    """Counts the teacher's forwards."""

    def __init__(self, trainer):
        self.count = 0
        trainer.teacher.model.register_forward_hook(self)

    def __call__(self, *args):
        self.count += 1


@pytest.mark.parametrize(("views", "forwards"), [
    ({"teacher_view": "identical", "teacher_logits_view": "identical"}, 1),
    ({"teacher_view": "shared", "teacher_logits_view": "clean"}, 1),
    ({"teacher_view": "clean", "teacher_logits_view": "clean"}, 1),
    ({"teacher_view": "shared", "teacher_logits_view": "identical"}, 2),
])  # fmt: skip
def test_the_teacher_is_asked_once_for_each_distinct_view(views, forwards, make_trainer):
    trainer = make_trainer(alpha=0.5, cka_weight=1.0, token_weight=1.0, relation_weight=1.0, **views)
    trainer.prepare_teacher()
    asked = Asked(trainer)
    trainer.prepare(trainer.train_dataset.__getitems__(list(range(8))), train=True)
    assert asked.count == forwards


@pytest.mark.parametrize(("keys", "kind"), [
    ({"cka_weight": 1.0, "gram_weight": 1.0}, "logits+gram"),
    ({"token_weight": 1.0, "relation_weight": 1.0}, "logits+tokens"),
])  # fmt: skip
def test_scores_and_features_from_one_row_of_the_cache_are_those_of_the_live_teacher(keys, kind, make_trainer):
    views = {"alpha": 0.5, "teacher_view": "shared", "teacher_logits_view": "clean"}
    live, cached = make_trainer(**views, **keys), make_trainer(teacher_cache=kind.partition("+")[2], **views, **keys)
    losses = []
    for trainer in (live, cached):
        trainer.prepare_teacher()
        losses.append(gradients(trainer))
    assert cached.teacher_cache.layout.kind == kind
    asked = Asked(cached)
    step = cached.prepare(cached.train_dataset.__getitems__([3, 5, 7]), train=True)
    assert asked.count == 0
    with torch.no_grad():
        pixels = cached.teacher.prepare(cached.train_dataset.images[[3, 5, 7]])
        torch.testing.assert_close(step.teacher.logits, cached.teacher.logits(pixels))
    assert losses[0][0] == pytest.approx(losses[1][0], rel=2e-3)


def test_auto_takes_the_smallest_row_that_serves_all_methods(make_trainer, capsys):
    def chosen(**keys):
        trainer = make_trainer(teacher_cache="auto", max_steps=100, **keys)
        trainer.prepare_teacher()
        return trainer.teacher_cache and trainer.teacher_cache.layout.kind

    stored = {"alpha": 0.5, "teacher_logits_view": "clean"}
    assert chosen(cka_weight=1.0, **stored) == "logits+gram"
    assert chosen(cka_weight=1.0, token_weight=1.0, **stored) == "logits+tokens"
    assert chosen(cka_weight=1.0, alpha=0.5) == "gram"  # scores are of the augmented image
    assert chosen(**stored) == "logits"
    assert chosen(alpha=0.5) is None


def test_the_labels_teach_the_heads_that_alpha_and_then_the_keys_say(make_trainer, make_student):
    def taught(**keys):
        trainer = make_trainer(make_student(), cka_weight=1e-9, **keys)
        _, found = gradients(trainer)
        heads = ("cls_classifier", "distillation_classifier")
        return [found[f"student.{head}.weight"].abs().max().item() > 1e-6 for head in heads]

    assert taught() == [True, True]
    assert taught(task_heads="cls") == [True, False]
    # with alpha the teacher teaches the distillation head, and task_heads says nothing
    alone = {"alpha": 1e-12, "teacher_logits_view": "identical"}
    assert taught(**alone) == [True, False]
    assert taught(distilled_heads="both", **alone) == [True, True]


# ---- Keys ----


def test_method_selects_defaults_alone(make_args):
    assert make_args(DistillationTrainingArguments, method="logits").alpha == 0.5
    assert make_args(LogitDistillationTrainingArguments).alpha == 0.5
    assert make_args(DistillationTrainingArguments, method="structural", cka_weight=1.0).alpha == 0.0
    assert make_args(DistillationTrainingArguments, cka_weight=1.0).alpha == 0.0
    both = make_args(LogitDistillationTrainingArguments, cka_weight=1.0)
    assert [m.name for m in methods.methods_of(both)] == ["kd", "cka"]
    again = replace(both, output_dir=both.output_dir)
    assert (again.alpha, again.teacher_view, again.teacher_logits_view) == (0.5, "shared", "identical")


@pytest.mark.parametrize(("keys", "line"), [
    ({}, "keys 'alpha', "),
    ({"method": "logits", "teacher_view": "shared"}, "key 'teacher_view': expected 'identical' or 'clean' with method"),
    ({"cka_weight": 1.0, "teacher_cache": "logits"}, "expected 'tokens', 'gram', 'mean', 'auto' or 'off'"),
    ({"alpha": 0.5, "teacher_cache": "gram"}, "key 'teacher_cache': expected 'logits', 'auto' or 'off'"),
    ({"alpha": 0.5, "teacher_cache": "logits"}, "keys 'teacher_cache' and 'teacher_logits_view' contradict"),
    ({"cka_weight": 1.0, "method": "features"}, "key 'method': expected one of logits, structural"),
])  # fmt: skip
def test_keys_that_contradict_are_refused_in_one_line(keys, line, make_args):
    with pytest.raises(ValueError, match="key") as caught:
        make_args(DistillationTrainingArguments, **keys)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_one_view_of_a_logit_run_of_the_version_before_is_that_of_the_scores(make_args):
    for view in ("identical", "clean"):
        args = make_args(LogitDistillationTrainingArguments, teacher_view=view)
        assert (args.teacher_logits_view, args.teacher_view) == (view, "shared")
        assert keys_today({"method": "logits", "teacher_view": view})["teacher_logits_view"] == view
    assert keys_today({"method": "structural", "teacher_view": "clean"})["teacher_view"] == "clean"


# ---- A method may ask for more than the ones that are there ----


@dataclass
class Curious(Method):
    """Looks at attention maps, a masked second forward and a head at some depth."""

    name: ClassVar[str] = "curious"
    label: ClassVar[str] = "curious"
    curious_weight: float = key(1.0, "Weight.", within=NON_NEGATIVE)

    @property
    def needs(self):
        return Needs(layers="tokens", because="curious_weight", attention=True, masked=True)

    def head(self, widths):
        exits = nn.ModuleList(nn.Linear(width, 4) for width in widths.student)
        exits.forward = lambda student, teacher: [e(x.mean(1)) for e, x in zip(exits, student.features, strict=True)]
        return exits

    def masked_pixels(self, step):
        masked = step.pixel_values.clone()
        masked[:, :, :8] = 0
        return masked

    def loss(self, student, step):
        parts = {
            "attention": torch.stack([a.square().mean() for a in student.attentions]).mean(),
            "masked": (student.masked[self.name].logits - student.logits.detach()).square().mean(),
            "exits": torch.stack([x.square().mean() for x in student.method_heads["curious"]]).mean(),
        }
        return sum(parts.values()), parts

    def describe(self):
        return "curiosity"


def test_a_method_gets_attention_maps_with_gradients_a_masked_forward_and_exits(make_trainer, monkeypatch):
    monkeypatch.setattr("hf_ihb.trainer.lessons.methods_of", lambda args: [Curious()])
    trainer = make_trainer(cka_weight=1.0, task_loss_weight=0.0)
    assert not isinstance(trainer.model(torch.zeros(1, 3, 16, 16)), BaseModelOutput)
    _, found = gradients(trainer)
    for name in ("student.deit.layers.0.attention", "heads.curious.0.weight"):
        used = [gradient for key_, gradient in found.items() if key_.startswith(name)]
        assert used
        assert max(gradient.abs().max() for gradient in used) > 0
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "curious_loss" in entry)
    assert {"attention", "masked", "exits"} <= logged.keys()
    assert np.isclose(logged["curious_loss"], logged["attention"] + logged["masked"] + logged["exits"])


@dataclass
class Curiouser(Curious):
    """Looks at black images."""

    name: ClassVar[str] = "curiouser"
    curiouser_weight: float = key(1.0, "Weight.", within=NON_NEGATIVE)

    @property
    def needs(self):
        return Needs(masked=True)

    def head(self, widths):
        return None

    def masked_pixels(self, step):
        return torch.zeros_like(step.pixel_values)

    def loss(self, student, step):
        rows = student.masked[self.name].logits
        return rows.square().mean(), {"spread_of_images": (rows - rows[:1]).abs().max()}


def test_each_method_sees_its_own_masked_images(make_trainer, monkeypatch):
    monkeypatch.setattr("hf_ihb.trainer.lessons.methods_of", lambda args: [Curiouser(), Curious()])
    trainer = make_trainer(cka_weight=1.0, max_steps=1, logging_steps=1)
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "curious_loss" in entry)
    assert logged["spread_of_images"] < 1e-6  # one black image, as often as the batch is long
    assert logged["masked"] > 1e-6


@dataclass
class Exiting(Curious):
    """Looks at heads of the student's blocks, and at nothing of the teacher's."""

    name: ClassVar[str] = "curious"

    @property
    def needs(self):
        return Needs(logits=True, exits=True)

    def head(self, widths):
        self.widths = widths
        return super().head(widths)

    def loss(self, student, step):
        return torch.stack([x.square().mean() for x in student.method_heads["curious"]]).mean()


def test_exits_of_the_student_ask_nothing_of_the_teachers_layers(make_trainer, monkeypatch):
    method = Exiting()
    monkeypatch.setattr("hf_ihb.trainer.lessons.methods_of", lambda args: [method])
    monkeypatch.setattr("hf_ihb.models.teacher.Teacher.features", lambda *args: pytest.fail("features were asked for"))
    trainer = make_trainer(cka_weight=1.0, task_loss_weight=0.0, student_layers=[0, -1], max_steps=1)
    assert trainer.teacher_side.layers is None
    assert trainer.model.layers == (0, trainer.student.config.num_hidden_layers - 1)
    assert method.widths == ((trainer.student.config.hidden_size,) * 2, (), None, trainer.student.config.num_labels)
    _, found = gradients(trainer)
    assert all(found[f"heads.curious.{n}.weight"].abs().max() > 0 for n in (0, 1))
    with pytest.raises(RecipeError, match=r"key 'student_layers': .*9"):
        make_trainer(cka_weight=1.0, student_layers=[9], teacher_layers=[1])


# ---- Every method ----


@pytest.mark.parametrize("name", [kind.name for kind in METHODS])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(name, make_trainer, make_student, tmp_path):
    kind = method_of(name)
    keys = {**keys_of(kind), "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "ema_decay": 0.5}

    def run(folder, **more):
        student, vit = make_student(drop_path_rate=0.1), kind.needs.teacher_attention
        trainer = make_trainer(student, output_dir=str(tmp_path / folder), vit=vit, **keys)
        trainer.train(**more)
        trainer.save_model()
        return trainer

    whole = run("whole")
    resumed = run("resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for file in ("model.safetensors", "distillation/heads.safetensors"):
        if not (tmp_path / "whole" / file).is_file():
            assert not list(whole.model.heads.parameters())
            continue
        ours, theirs = (load_file(tmp_path / folder / file) for folder in ("whole", "resumed"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key_], theirs[key_]) for key_ in ours)
    assert whole.state.log_history[-2]["loss"] == resumed.state.log_history[-2]["loss"]


def test_an_unknown_method_is_none_of_the_list():
    names = {f.name for f in arguments.MethodKeys.__dataclass_fields__.values()}
    assert {f"{kind.name}_weight" for kind in METHODS if not kind.shares_task} <= names
