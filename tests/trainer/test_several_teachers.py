"""Several teachers in one run: what they add up to, what each sees, and what is refused."""

import copy
import gc
import json
import weakref

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from hf_ihb.config.augmentation import AugmentationArguments
from hf_ihb.config.model import TeacherArguments
from hf_ihb.config.teachers import teachers_of
from hf_ihb.errors import CheckpointError, RecipeError, TeacherMismatchError
from hf_ihb.trainer.arguments import DistillationTrainingArguments
from hf_ihb.trainer.teacher_dropping import kept_teachers
from tests.trainer.test_distillation import gradients

LOGITS = {"alpha": 0.4, "temperature": 2.0}
STRUCTURE = {"cka_weight": 1.0, "token_weight": 0.5, "student_layers": [0, 2], "teacher_layers": [1, 2]}
DEEPER = {"gram_weight": 0.7, "relation_weight": 0.3, "student_layers": [2, 1], "teacher_layers": [3, 0]}


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def test_a_list_of_one_teacher_is_that_teacher(make_several, make_teacher):
    keys = {**LOGITS, **STRUCTURE}
    ways = [
        make_several(make_teacher(), **keys),
        make_several([make_teacher()], **keys),
        make_several([make_teacher()], teacher_models=[keys]),
    ]
    found = []
    for trainer in ways:
        trainer.train()
        found.append((trainer.state.log_history, trainer.model.state_dict()))
    times = ("images_per_second", "train_runtime", "train_samples_per_second", "train_steps_per_second")
    for history, weights in found[1:]:
        assert [{k: v for k, v in e.items() if k not in times} for e in history] == [
            {k: v for k, v in e.items() if k not in times} for e in found[0][0]
        ]
        assert weights.keys() == found[0][1].keys()
        assert all(torch.equal(weights[name], tensor) for name, tensor in found[0][1].items())


@pytest.mark.parametrize("projector", ["none", "trainable"])
def test_the_gradient_of_several_teachers_is_the_sum_of_those_of_each(
    projector, make_several, make_student, make_teacher, make_vit
):
    exits = {"ofa_weight": 0.5, "student_layers": [1]}  # a layer of the student that no teacher's is compared with
    first = LOGITS | (exits if projector == "none" else {})
    entries = [first, STRUCTURE | {"teacher_projector": projector}, DEEPER | {"teacher_projector": projector}]
    made = [make_teacher(), make_vit(), make_teacher(None)]
    together, found = gradients(make_several(made, make_student(), teacher_models=entries))
    total, added = 0.0, {}
    for teacher, entry in zip(made, entries, strict=True):
        weight = 1.0 if "alpha" in entry else 0.0  # the labels are counted once
        loss, own = gradients(make_several(teacher, make_student(), task_loss_weight=weight, **entry))
        total += loss
        for name, gradient in own.items():
            if name.startswith("student."):
                added[name] = added.get(name, 0) + gradient
    assert together == pytest.approx(total, rel=1e-5)
    for name, gradient in added.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    heads = {name.split(".")[1] for name in found if name.startswith("heads.")}
    assert heads == ({"ofa_1", "token_2"} if projector == "none" else {"token_2", "cka_2", "gram_3"})


@pytest.mark.parametrize("count", [1, 2])
def test_a_step_is_gone_when_nobody_holds_it(count, make_several, make_teacher, train_split):
    """One that named itself would keep its tensors until the garbage collector comes."""
    trainer = make_several([make_teacher() for _ in range(count)], teacher_models=[LOGITS, STRUCTURE][:count])
    trainer.prepare_teacher()
    step = trainer.prepare(train_split.__getitems__(list(range(8))), train=True)
    kept = weakref.ref(step)
    gc.disable()
    try:
        del step
        assert kept() is None
    finally:
        gc.enable()


def test_class_scores_of_two_teachers_share_the_labels_weight(make_several, make_teacher, train_split):
    other = make_teacher()
    with torch.no_grad():
        for weight in other.model.parameters():
            weight.mul_(1.05)
    entries = [{"alpha": 0.3, "temperature": 2.0}, {"alpha": 0.5, "temperature": 3.0}]
    teachers = [make_teacher(), other]
    trainer = make_several(teachers, teacher_models=entries, augmentation=None)
    batch = train_split.__getitems__(list(range(24)))
    step = trainer.prepare(batch, train=True)
    with torch.no_grad():
        outputs = trainer.model.eval()(pixel_values=step.pixel_values)
        loss, parts = trainer.training_losses(outputs, step)
        heads = [x.double() for x in (outputs.cls_logits, outputs.distillation_logits)]
        scores = [t.logits(t.prepare(batch["pixel_values"])).double() for t in teachers]
        labels = torch.stack([F.cross_entropy(x, batch["labels"]) for x in heads]).mean()

    def kd(of_teacher, t):
        log_p = (of_teacher / t).log_softmax(-1)
        return torch.stack([(log_p.exp() * (log_p - (x / t).log_softmax(-1))).sum(-1).mean() for x in heads]).mean()

    values = [t**2 * kd(of_teacher, t) for of_teacher, t in zip(scores, (2.0, 3.0), strict=True)]
    assert abs(values[0] - values[1]) > 1e-3
    assert [parts["kd_loss_1"].item(), parts["kd_loss_2"].item()] == pytest.approx([v.item() for v in values], rel=1e-5)
    assert loss.item() == pytest.approx((0.2 * labels + 0.3 * values[0] + 0.5 * values[1]).item(), rel=1e-5)
    for number, of_teacher in enumerate(scores, 1):
        agrees = (sum(heads).argmax(-1) == of_teacher.argmax(-1)).float().mean()
        assert parts[f"teacher_agreement_{number}"] == agrees


def test_each_teacher_has_the_cache_that_it_would_have_alone(make_several, make_teacher, make_vit):
    stored = {"teacher_logits_view": "clean"}
    entries = [{**LOGITS, **stored, "teacher_cache": "logits"}, {**STRUCTURE, "teacher_cache": "tokens"}]
    together = make_several([make_teacher(), make_vit()], teacher_models=entries)
    together.prepare_teacher()
    for teacher, entry, lesson in zip((make_teacher(), make_vit()), entries, together.lessons, strict=True):
        alone = make_several(teacher, **entry)
        assert alone.teacher_side._choose_cache()[0].missing() == []  # read, not built again
        alone.prepare_teacher()
        assert alone.teacher_cache.folder == lesson.teacher_side.cache.folder


def test_cached_and_live_training_give_the_same_losses(make_several, make_teacher, make_vit):
    entries = [{**LOGITS, "teacher_logits_view": "clean"}, STRUCTURE]
    curves = []
    for kinds in (("off", "off"), ("logits", "tokens")):
        own = [entry | {"teacher_cache": kind} for entry, kind in zip(entries, kinds, strict=True)]
        trainer = make_several([make_teacher(), make_vit()], teacher_models=own, max_steps=4)
        trainer.train()
        curves.append(torch.tensor([logged(trainer, name) for name in ("loss", "kd_loss_1", "cka_loss_2")]))
    torch.testing.assert_close(*curves, rtol=1e-3, atol=2e-3)


def test_teachers_see_their_own_size_and_view(make_several, make_teacher, make_vit, train_split):
    seen = {}
    teachers = [make_teacher(), make_vit(side=24)]
    for number, teacher in enumerate(teachers):
        teacher.model.register_forward_pre_hook(
            lambda module, args, kwargs, number=number: seen.__setitem__(number, kwargs["pixel_values"]),
            with_kwargs=True,
        )
    mixed = AugmentationArguments(random_crop_padding=2, mixup_alpha=0.8, mix_probability=0.5)
    entries = [{**STRUCTURE, "teacher_view": "identical"}, STRUCTURE]
    trainer = make_several(teachers, teacher_models=entries, augmentation=mixed)
    trainer.prepare_teacher()
    batch = train_split.__getitems__(list(range(16)))
    step = trainer.prepare(batch, train=True)
    assert torch.equal(seen[0], teachers[0].prepare(step.views.seen, True))
    assert torch.equal(seen[1], teachers[1].prepare(batch["pixel_values"], True))
    assert seen[1].shape[-2:] == (24, 24)
    # what is mixed has a counterpart at the first teacher's alone
    first, second = step.of_teachers
    assert first.unmixed is None
    assert 0 < second.unmixed.sum() < 16


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    make_several, make_student, make_teacher, make_vit, tmp_path
):
    keys = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "teacher_dropping": 0.5}
    keys["teacher_models"] = [LOGITS, STRUCTURE]

    def run(folder, entry=None, **more):
        own = keys | {"output_dir": str(tmp_path / folder)} | (entry or {})
        trainer = make_several([make_teacher(), make_vit()], make_student(drop_path_rate=0.1), **own)
        trainer.train(**more)
        trainer.save_model()
        return trainer

    whole, again = run("whole"), {"resume_from_checkpoint": str(tmp_path / "whole" / "checkpoint-3")}
    resumed = run("resumed", **again)
    for file in ("model.safetensors", "distillation/heads.safetensors"):
        ours, theirs = (load_file(tmp_path / folder / file) for folder in ("whole", "resumed"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert logged(whole, "loss") == logged(resumed, "loss")
    assert logged(whole, "teacher_kept_1") == logged(resumed, "teacher_kept_1")
    # names and places may change, what is learned may not
    with pytest.raises(CheckpointError, match=r"teacher_models .*0\.4.* -> .*0\.2"):
        run("other", {"teacher_models": [LOGITS | {"alpha": 0.2}, STRUCTURE]}, **again)
    run("moved", {"teacher_models": [LOGITS | {"teacher_model": "elsewhere"}, STRUCTURE]}, **again)


def test_each_teacher_of_class_scores_is_scored_and_one_at_chance_is_refused(make_several, make_teacher):
    bad = make_teacher()
    bad.permutation = torch.tensor([1, 2, 3, 0])  # as if its classes were called otherwise
    trainer = make_several([make_teacher(), make_teacher()], teacher_models=[LOGITS, LOGITS])
    trainer.train()
    assert logged(trainer, "teacher_accuracy_1") == logged(trainer, "teacher_accuracy_2")
    assert trainer.evaluate().keys() >= {"eval_teacher_agreement_1", "eval_teacher_agreement_2"}
    with pytest.raises(TeacherMismatchError, match="expected accuracy above chance"):
        make_several([make_teacher(), bad], teacher_models=[LOGITS, LOGITS]).train()


def test_a_head_of_one_teacher_rests_while_only_the_others_are_learned_from(
    make_several, make_teacher, make_vit, make_student
):
    late = STRUCTURE | {"token_warmup_epochs": 99, "distillation_warmup_type": "step"}
    trainer = make_several([make_teacher(None), make_vit()], teacher_models=[STRUCTURE, late], weight_decay=0.1)
    before = copy.deepcopy(trainer.model.heads.state_dict())
    trainer.train()
    moved = {name.split(".")[0] for name, x in trainer.model.heads.state_dict().items() if not x.equal(before[name])}
    assert moved == {"token_1"}


def test_what_is_learned_from_each_teacher_has_its_share_and_its_fade(make_several, make_teacher, make_vit):
    entries = [LOGITS, STRUCTURE | {"distillation_stop_epoch": 0.5}]
    trainer = make_several(
        [make_teacher(), make_vit()], teacher_models=entries, uncertainty_weighting=1.0, max_steps=12
    )
    trainer.train()
    weights = {name: logged(trainer, f"{name}_weight") for name in ("task", "kd_1", "cka_2", "token_2")}
    assert all(weight > 0 for weight in weights["kd_1"] + weights["task"])
    assert weights["cka_2"][0] > 0
    assert weights["cka_2"][-1] == weights["token_2"][-1] == 0  # the second teacher's stop


# ---- Dropping ----


def test_the_hardest_teacher_is_kept_and_the_others_as_often_as_asked():
    losses = torch.tensor([0.5, 2.0, 1.0])
    rows = torch.stack([kept_teachers(losses, 0.3, seed=1, step=step) for step in range(4000)])
    assert (rows[:, 1] == 1).all()
    assert rows.mean(dim=0)[[0, 2]].tolist() == pytest.approx([0.7, 0.7], abs=0.03)
    both = ((rows[:, 0] == 0) & (rows[:, 2] == 0)).float().mean().item()
    assert both == pytest.approx(0.09, abs=0.02)  # each for itself
    again = torch.stack([kept_teachers(losses, 0.3, seed=1, step=step) for step in range(50)])
    assert torch.equal(again, rows[:50])
    assert not torch.equal(again, torch.stack([kept_teachers(losses, 0.3, seed=2, step=s) for s in range(50)]))


def test_a_teacher_that_is_left_out_teaches_nothing_in_that_step(make_several, make_student, make_teacher, make_vit):
    entries = [LOGITS, STRUCTURE | {"cka_weight": 9.0}]  # the second is the hardest
    teachers = [make_teacher(), make_vit()]
    dropping = make_several(teachers, make_student(), teacher_models=entries, teacher_dropping=0.99)
    loss, found = gradients(dropping)
    alone_loss, alone = gradients(make_several(teachers[1], make_student(), **entries[1]))
    assert dropping.loss_log._names[-2:] == ("teacher_kept_1", "teacher_kept_2")
    assert dropping.loss_log._sums[-2:].tolist() == [0.0, 1.0]
    # with task_heads 'inference' the same heads learn from the labels, whose weight is whole again
    assert loss == pytest.approx(alone_loss, rel=1e-6)
    for name, gradient in alone.items():
        if name.startswith("student."):
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)


# ---- Keys ----


@pytest.mark.parametrize(("keys", "line"), [
    ({"teacher_models": []}, "key 'teacher_models': expected at least one teacher"),
    ({"teacher_models": [LOGITS], "cka_weight": 1.0}, "keys 'teacher_models' and 'cka_weight' contradict"),
    ({"teacher_models": [LOGITS], "alpha": 0.2}, "keys 'teacher_models' and 'alpha' contradict"),
    ({"teacher_models": [LOGITS], "method": "logits"}, "keys 'teacher_models' and 'method' contradict"),
    ({"teacher_models": [LOGITS, {"cka_wieght": 1}]}, "entry 2: key 'cka_wieght': unknown; did you mean 'cka_weight'?"),
    ({"teacher_models": [LOGITS, {"learning_rate": 1}]}, "entry 2: key 'learning_rate': expected beside"),
    ({"teacher_models": [LOGITS | {"distilled_heads": "both"}]}, "entry 1: key 'distilled_heads': expected beside"),
    ({"teacher_models": [LOGITS | {"uncertainty_weighting": 1.0}]}, "entry 1: key 'uncertainty_weighting': expected"),
    ({"teacher_models": [LOGITS, {"alpha": 0.7}]}, "that leave the labels 0 or more, found 0.4 + 0.7, above 1"),
    ({"teacher_models": [LOGITS, {}]}, "entry 2: keys 'alpha', "),
    ({"teacher_models": [LOGITS, STRUCTURE | {"teacher_layers": [1]}]}, "entry 2: keys 'student_layers' and 'teacher"),
    ({"teacher_models": [LOGITS, {"cka_weight": "much"}]}, "entry 2: key 'cka_weight': expected a number"),
    ({"teacher_models": [LOGITS | {"teacher_cache": "gram"}]}, "entry 1: key 'teacher_cache': expected 'logits'"),
    ({"teacher_models": [LOGITS], "teacher_dropping": 0.5}, "the only teacher is never left out"),
    ({"cka_weight": 1.0, "teacher_dropping": 0.5}, "keys 'teacher_dropping' and 'teacher_models' contradict"),
    ({"teacher_models": [{"alpha_start": 0.7, "alpha_schedule": "linear"}, LOGITS]}, "found 0.7 + 0.4, above 1"),
])  # fmt: skip
def test_keys_that_contradict_are_refused_in_one_line(keys, line, make_args):
    with pytest.raises(ValueError, match="key") as caught:
        make_args(DistillationTrainingArguments, **keys)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_teachers_are_the_entries_over_the_runs_own_keys():
    entries = [{"teacher_model": "a", "alpha": 0.5}, {"teacher_model": "b", "teacher_normalization": "own"}]
    base = TeacherArguments(teacher_normalization="dataset", teacher_image_size=8)
    found = teachers_of(base, entries)
    assert [(t.teacher_model, t.teacher_normalization, t.teacher_image_size) for t in found] == [
        ("a", "dataset", 8), ("b", "own", 8),
    ]  # fmt: skip
    for wrong, line in [
        (TeacherArguments(teacher_model="c"), "keys 'teacher_model' and 'teacher_models' contradict"),
        (TeacherArguments(teacher_revision="main"), "keys 'teacher_revision' and 'teacher_models' contradict"),
    ]:
        with pytest.raises(ValueError, match=line):
            teachers_of(wrong, entries)
    with pytest.raises(ValueError, match="entry 2: key 'teacher_model': expected a Hub id or a folder, found nothing"):
        teachers_of(TeacherArguments(), [entries[0], {"alpha": 0.1}])
    with pytest.raises(ValueError, match="entry 1: key 'teacher_image_size': expected a number >= 1, found 0"):
        teachers_of(TeacherArguments(), [entries[0] | {"teacher_image_size": 0}])


def test_what_contradicts_for_one_teacher_does_for_one_of_several(make_several, make_teacher, make_vit):
    mixing = AugmentationArguments(mixup_alpha=0.8, mix_probability=1.0)
    entries = [LOGITS, STRUCTURE]
    with pytest.raises(ValueError, match="entry 2: keys 'mix_probability' and 'teacher_view' contradict"):
        make_several([make_teacher(), make_vit()], teacher_models=entries, augmentation=mixing)
    with pytest.raises(RecipeError, match="expected an entry for each of 1 teachers, found 2"):
        make_several([make_teacher()], teacher_models=entries)
    with pytest.raises(RecipeError, match="expected an entry for each of 2 teachers, found 0"):
        make_several([make_teacher(), make_vit()], alpha=0.5)


# ---- What is said of them ----


def test_the_card_of_a_list_of_one_teacher_is_that_of_the_teacher(make_several, make_teacher, tmp_path):
    keys, cards = {**LOGITS, **STRUCTURE}, []
    for folder, own in (("a", keys), ("b", {"teacher_models": [keys]})):
        trainer = make_several([make_teacher()], output_dir=str(tmp_path / folder / "run"), **own)
        trainer.create_model_card()
        cards.append((tmp_path / folder / "run" / "README.md").read_text())
    assert "weight 0.4) + (1 - CKA) over the tokens" in cards[0]
    assert cards[0] == cards[1]


def test_card_and_records_name_each_teacher_with_what_is_learned_from_it(
    make_several, make_teacher, make_vit, tmp_path, capsys
):
    teachers = [make_teacher(), make_vit()]
    for teacher, name in zip(teachers, ("org/cnn", "org/vit"), strict=True):
        teacher.name, teacher.revision = name, name[-3:] * 10
    keys = {"output_dir": str(tmp_path / "run"), "teacher_models": [LOGITS, STRUCTURE | {"cka_scope": "images"}]}
    trainer = make_several(teachers, **keys)
    trainer.train()
    trainer.create_model_card()
    said = capsys.readouterr().out
    assert "teacher 1, 'org/cnn': soft logits" in said
    assert "teacher 2, 'org/vit': cka + token" in said
    card = (tmp_path / "run" / "README.md").read_text()
    for text in (
        "teacher_model:\n- org/cnn\n- org/vit\nteacher_revision:\n- cnncnn",
        "the labels and 2 frozen teachers: [`org/cnn`](https://huggingface.co/org/cnn), by soft logit distillation",
        "; [`org/vit`](https://huggingface.co/org/vit), by CKA + token losses between layers.",
        "cross-entropy on the labels (weight 0.6)",
        "weight 0.4) of teacher 1 + (1 - CKA) over the images of a batch",
    ):
        assert text in card, text
    rows = {row.split("|")[1].strip(): row.split("|")[2].strip() for row in card.splitlines() if row.startswith("|")}
    assert rows["teacher 1"].endswith("shown the student's augmented images")
    assert rows["teacher 2"].endswith("shown the stored images, its tokens following the student's augmentation")
    assert rows["layers compared of teacher 2"].startswith("0 with 1, 2 with 2")
    assert "layers compared of teacher 1" not in rows
    record = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert [teacher["name"] for teacher in record["teachers"]] == ["org/cnn", "org/vit"]
    assert record["teachers"][1]["keys"].items() >= (STRUCTURE | {"cka_scope": "images"}).items()
