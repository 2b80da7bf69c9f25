"""Attention maps of a teacher against those of eager attention, where the student's tokens look."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from hf_ihb.config.augmentation import AugmentationArguments
from hf_ihb.config.fields import NON_NEGATIVE, key
from hf_ihb.errors import RecipeError
from hf_ihb.functional.geometry import identity_affine
from hf_ihb.methods.base import Method
from hf_ihb.step import Needs
from hf_ihb.trainer import DistillationTrainer
from hf_ihb.trainer.arguments import DistillationTrainingArguments
from tests.trainer.test_caching import Forwards, curve


@dataclass
class Watching(Method):
    """Asks for the attention of both sides."""

    name: ClassVar[str] = "cka"
    label: ClassVar[str] = "watching"
    cka_weight: float = key(1.0, "Weight.", within=NON_NEGATIVE)

    @property
    def needs(self):
        return Needs(layers="tokens", because="cka_weight", attention=True, teacher_attention=True)

    def loss(self, student, step):
        return torch.stack([a.square().mean() for a in student.attentions]).mean()


@pytest.fixture
def make_trainer(make_student, make_args, train_split, eval_split, processor, monkeypatch):
    def make(teacher, student=None, **keys):
        monkeypatch.setattr("hf_ihb.trainer.lessons.methods_of", lambda args: [Watching()])
        keys = {"student_layers": [0, -1], "teacher_layers": [1, -1], "teacher_cache": "off", "cka_weight": 1.0} | keys
        return DistillationTrainer(
            student or make_student(), make_args(DistillationTrainingArguments, **keys), train_dataset=train_split,
            eval_dataset=eval_split, processing_class=processor, augmentation=AugmentationArguments(),
            teacher_model=teacher,
        )  # fmt: skip

    return make


def maps_of(trainer, affine=None):
    trainer.prepare_teacher()
    batch = trainer._prepare_inputs(trainer.data_collator(trainer.train_dataset.__getitems__(list(range(5)))))
    step = trainer.prepare(batch, train=True)
    if affine is not None:
        step.views.affine = affine(len(batch["labels"]))
        step.teacher = trainer.teacher_side.outputs(step, shuffled=False)
    return step.teacher.attentions, step.views.images


def eager(teacher, images, layer):
    """Of the patches, mean over heads, ``(B, N, N)``."""
    teacher.model.set_attn_implementation("eager")
    seen = teacher.model(teacher.prepare(images, True), output_attentions=True).attentions
    teacher.model.set_attn_implementation("sdpa")
    return seen[layer].mean(1)[:, 1:, 1:].detach()


def normalised(attention):
    return attention / attention.sum(-1, keepdim=True)


def test_a_finer_grid_is_averaged_over_queries_and_summed_over_keys(make_trainer, make_vit_classifier):
    teacher = make_vit_classifier(patch_size=2)
    trainer = make_trainer(teacher)
    rows, columns = trainer.teacher_side.layers.grids[0]
    maps, images = maps_of(trainer)
    for layer, found in zip((1, 2), maps, strict=True):
        cells = eager(teacher, images, layer).reshape(-1, rows, 8 // rows, columns, 8 // columns, 64)
        cells = cells.mean((2, 4)).flatten(1, 2).reshape(5, -1, rows, 8 // rows, columns, 8 // columns).sum((3, 5))
        torch.testing.assert_close(normalised(found), normalised(cells.flatten(2)), rtol=1e-4, atol=1e-6)


def test_attention_follows_a_flip_of_the_students_view(make_trainer, make_vit_classifier):
    def flipped(count):
        affine = identity_affine(count, torch.device("cpu")).clone()
        affine[:, 0, 0] = -1
        return affine

    teacher = make_vit_classifier()
    trainer = make_trainer(teacher)
    rows, columns = trainer.teacher_side.layers.grids[0]
    assert (rows, columns) == (4, 4)
    (found, _), images = maps_of(trainer, flipped)
    expected = eager(teacher, images, 1).unflatten(1, (4, 4)).unflatten(3, (4, 4)).flip(2, 4).flatten(3).flatten(1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_models_without_attention_between_all_patches_are_refused_in_one_line(
    make_trainer, make_teacher, make_vit_classifier
):
    with pytest.raises(RecipeError, match=r"^key 'attention_weight', teacher .*: .*expected a ViT .*found none.*$"):
        make_trainer(make_teacher())
    with pytest.raises(RecipeError, match=r"^key 'attention_weight', student: .*expected a ViT .*found none.*$"):
        make_trainer(make_vit_classifier(), make_teacher().model)


SCORES = {  # of a view that maps are not taken of: a forward of its own
    "stored images, attention to augmented ones": (
        {"teacher_logits_view": "clean", "teacher_view": "identical"},
        "logits",
    ),
    "augmented images, attention to stored ones": (
        {"teacher_logits_view": "identical", "teacher_view": "clean"},
        "views",
    ),
}


@pytest.mark.parametrize("way", SCORES)
def test_scores_of_another_view_are_read_beside_them(
    way, make_student, make_args, make_vit_classifier, train_split, eval_split, processor, tmp_path
):
    settings, kind = SCORES[way]
    keys = {"student_layers": [0, -1], "teacher_layers": [1, -1], "attention_weight": 1.0, "alpha": 0.5, "max_steps": 6}

    def run(cache):
        trainer = DistillationTrainer(
            make_student(),
            make_args(
                DistillationTrainingArguments, **keys, **settings, teacher_cache=cache,
                teacher_cache_dir=str(tmp_path / "caches"),
            ),
            train_dataset=train_split, eval_dataset=eval_split, processing_class=processor,
            augmentation=AugmentationArguments(augmentation_seed=7, horizontal_flip=0.5, random_crop_padding=2),
            teacher_model=make_vit_classifier(),
        )  # fmt: skip
        trainer.score_teacher = lambda: 1.0  # it is at chance
        return trainer

    live, first = curve(run("off")), run("auto")
    torch.testing.assert_close(curve(first), live, rtol=2e-3, atol=2e-3)
    kinds = [first.teacher_cache and first.teacher_cache.layout.kind, first.teacher_views and first.teacher_views.kind]
    assert kinds == (["logits", None] if kind == "logits" else [None, "views"])
    again = run("auto")
    forwards = Forwards(again.teacher)
    again.train()
    assert forwards.count == 6 * 32 + (8 if kind == "logits" else 32)  # for the maps of each step, and rows to compare


def test_no_cache_holds_them(make_trainer, make_vit_classifier, capsys):
    trainer = make_trainer(make_vit_classifier(), teacher_cache="auto")
    trainer.prepare_teacher()
    assert trainer.teacher_cache is None
    assert "teacher_cache auto: off (attention maps" in capsys.readouterr().out
    with pytest.raises(RecipeError, match="expected 'off', found 'tokens': attention maps of the teacher"):
        make_trainer(make_vit_classifier(), teacher_cache="tokens").prepare_teacher()
