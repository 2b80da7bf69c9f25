"""Rows of mean tokens: what is learned from them is what is learned from the tokens they are means of."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from transformers import Dinov2ForImageClassification, set_seed

from hf_ihb.config.augmentation import AugmentationArguments
from hf_ihb.data import ImageSplit
from hf_ihb.errors import CacheError
from hf_ihb.functional.geometry import identity_affine
from hf_ihb.functional.resampling import Resampler
from hf_ihb.functional.tokens import TokenMean
from hf_ihb.methods import METHODS
from hf_ihb.models.teacher import Teacher
from hf_ihb.step import Needs
from hf_ihb.trainer import StructuralDistillationTrainer
from hf_ihb.trainer.arguments import StructuralDistillationTrainingArguments
from hf_ihb.trainer.cache_rows import Code, Layout
from hf_ihb.trainer.score_rows import ScoreRow
from hf_ihb.trainer.view_rows import ViewRow
from tests.invariants.test_methods import made
from tests.trainer.test_caching import MOVED, OTHERS, PIXELS, Forwards, curve, nearly_blind_teacher, vit_teacher
from tests.trainer.test_view_cache import COVERED, VIEWS, _Kill, rows_of

POOLED = [kind.name for kind in METHODS if made(kind.name).needs.final == "mean"]
STEPS = 8  # two epochs of four batches of 32


@pytest.fixture
def make(make_student, make_args, train_split, eval_split, processor, tmp_path):
    def make(teacher=None, *, augmentation=None, student=None, images=None, **overrides):
        settings = {
            "student_layers": [0, 2], "teacher_layers": [1, 2], "max_steps": STEPS, "teacher_view": "identical",
            "teacher_cache": "views", "teacher_cache_dir": str(tmp_path / "caches"),
        }  # fmt: skip
        return StructuralDistillationTrainer(
            student or make_student(),
            make_args(StructuralDistillationTrainingArguments, **settings | overrides),
            train_dataset=images or train_split,
            eval_dataset=eval_split,
            processing_class=processor,
            augmentation=augmentation or AugmentationArguments(augmentation_seed=7, **VIEWS),
            teacher_model=teacher or vit_teacher(),
        )

    return make


def clean(make, teacher=None, cache="auto", **settings):
    """A run whose teacher sees stored images, and whose student sees them moved."""
    settings = {"max_steps": 9, "teacher_view": "clean", "teacher_cache": cache, "augmentation": MOVED} | settings
    return make(teacher, **settings)


def classifier(label_names, seed=5):
    """A ViT that has class scores too."""
    config = vit_teacher().model.config
    config.id2label = dict(enumerate(label_names))
    set_seed(seed)
    return Teacher(Dinov2ForImageClassification(config), PIXELS, label_names)


def opened(trainer):
    """After the teacher is made ready; another run may write its views."""
    trainer.prepare_teacher()
    trainer.teacher_side.views.close()
    return trainer


def gradient(make, **settings):
    """Of the student's weights, in the first step, flat."""
    plain = {"optim": "sgd", "learning_rate": 1.0, "weight_decay": 0.0, "max_grad_norm": 0.0, "max_steps": 1}
    trainer = make(**plain, lr_scheduler_type="constant", warmup_steps=0, task_loss_weight=0.0, **settings)
    before = [p.detach().clone() for p in trainer.student.parameters()]
    trainer.train()
    return torch.cat([(a - b).flatten() for a, b in zip(before, trainer.student.parameters(), strict=True)])


# ---- Augmented images ----


@pytest.mark.parametrize("name", POOLED)
def test_a_pooled_loss_and_its_gradient_are_those_of_the_live_teacher(name, make):
    settings = {f"{name}_weight": 1.0}
    live = make(**settings, teacher_cache="off")
    wanted = [curve(live), torch.tensor([e["grad_norm"] for e in live.state.log_history if "grad_norm" in e])]
    first = make(**settings)
    wrote = [curve(first), torch.tensor([e["grad_norm"] for e in first.state.log_history if "grad_norm" in e])]
    for found, expected in zip(wrote, wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)
    teacher = vit_teacher()
    forwards = Forwards(teacher)
    assert torch.equal(curve(make(teacher, **settings)), wrote[0])
    assert forwards.count == 1 + 32  # the probe of its shapes, and the batch of which some rows are compared
    assert len(rows_of(first)) == 256
    assert first.teacher_views.row == ViewRow(mean=24)


@pytest.mark.parametrize("name", POOLED)
@pytest.mark.parametrize("view", ["identical", "clean"])
def test_every_weight_gets_the_gradient_of_the_live_teacher(view, name, make):
    settings = {f"{name}_weight": 1.0, "teacher_view": view}
    if view == "clean":
        settings["augmentation"] = MOVED
    live = gradient(make, **settings, teacher_cache="off")
    cached = gradient(make, **settings, teacher_cache="views" if view == "identical" else "mean")
    assert live.norm() > 1e-3
    assert (cached - live).norm() < 2e-3 * live.norm()


WAYS = {
    "covered": {"relation_weight": 1.0, "augmentation": AugmentationArguments(augmentation_seed=7, **COVERED)},
    "several": {"relation_weight": 1.0, "rsd_weight": 0.1, "pkt_weight": 1.0},
    "beside inner products": {"sp_weight": 100.0, "cka_weight": 1.0, "gram_weight": 1.0},
    "beside inner products with position codes": {"sp_weight": 100.0, "cka_weight": 1.0, "center_positions": False},
    "beside scores": {"relation_weight": 1.0, "alpha": 0.5},
    "beside all": {"relation_weight": 1.0, "alpha": 0.5, "gram_weight": 1.0},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_row_serves_all_methods_of_a_run(way, make, train_split):
    settings = WAYS[way]

    def run(**more):
        trainer = make(classifier(train_split.label_names), **settings, **more)
        trainer.score_teacher = lambda: 1.0  # it is at chance
        return trainer

    live = curve(run(teacher_cache="off"))
    first = run()
    wrote = curve(first)
    torch.testing.assert_close(wrote, live, rtol=2e-3, atol=2e-3)
    again = run()
    forwards = Forwards(again.teacher)
    assert torch.equal(curve(again), wrote)
    assert forwards.count == 32
    row, grams = first.teacher_views.row, "cka_weight" in settings or "gram_weight" in settings
    assert row == ViewRow(ScoreRow(4) if "alpha" in settings else None, (16, 16) if grams else (), 24)


def test_a_shuffled_teacher_reads_the_same_rows(make):
    def run(**settings):
        teacher = vit_teacher()
        teacher.control = "shuffled"
        return make(teacher, relation_weight=1.0, **settings)

    live, plain = curve(run(teacher_cache="off")), make(relation_weight=1.0)
    straight = curve(plain)
    read = run()
    torch.testing.assert_close(curve(read), live, rtol=2e-3, atol=2e-3)
    assert read.teacher_views.key == plain.teacher_views.key
    assert (straight - live).abs().max() > 1e-3


def test_a_run_by_one_method_reads_what_a_run_by_another_wrote(make, make_student):
    first = make(sp_weight=100.0)
    first.train()
    rows = rows_of(first)
    for settings in (
        {"relation_weight": 1.0},
        {"rkd_weight": 1.0, "student_layers": [1], "teacher_layers": [2], "seed": 5},
        {"procrustes_weight": 1.0, "student_layers": [2, 0], "teacher_layers": [2, 0], "center_positions": False},
        {"pkt_weight": 1.0, "student": make_student(seed=3)},
    ):
        teacher = vit_teacher()
        forwards = Forwards(teacher)
        other = make(teacher, **settings)
        losses = curve(other)
        assert other.teacher_views.key == first.teacher_views.key
        assert forwards.count == 1 + 32
        assert {place: row.tolist() for place, row in rows_of(other).items()} == {
            k: v.tolist() for k, v in rows.items()
        }
        student = {"student": make_student(seed=3)} if "student" in settings else {}
        torch.testing.assert_close(losses, curve(make(**settings | student, teacher_cache="off")), rtol=2e-3, atol=2e-3)


def test_every_row_is_the_mean_of_the_teachers_tokens_of_its_view(make, train_split):
    """Of views that are made alone, and of a teacher that is asked with nothing of a training around it."""
    trainer, teacher = make(sp_weight=1.0), vit_teacher()
    trainer.train()
    found = rows_of(trainer)
    assert set(found) == {(epoch, k) for epoch in range(2) for k in range(128)}
    for (epoch, k), row in list(found.items())[::7]:
        index = torch.tensor([k])
        views = trainer.batches.augmenter(train_split.images[index], index, epoch)
        states = teacher.model(teacher.prepare(views.seen, True)).last_hidden_state[0, 1:]  # after the final norm
        torch.testing.assert_close(row, states.mean(dim=0), rtol=1e-3, atol=1e-3)


def test_a_damaged_row_is_asked_for_again(make, caplog):
    first = make(relation_weight=1.0)
    losses = curve(first)
    rows, path = rows_of(first), sorted(first.teacher_views.folder.glob("*.safetensors"))[1]
    for damaged in (path, first.teacher_views.folder / "statistics"):
        content = bytearray(damaged.read_bytes())
        content[-3] ^= 64
        damaged.write_bytes(content)
    again = make(relation_weight=1.0)
    assert torch.equal(curve(again), losses)
    assert "expected what was written, found something else; the teacher is asked again" in caplog.text
    assert all(torch.equal(row, rows_of(again)[place]) for place, row in rows.items())


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(make, tmp_path):
    settings = {"relation_weight": 1.0, "gram_weight": 1.0, "save_strategy": "steps", "save_steps": 3}
    whole = make(**settings, output_dir=str(tmp_path / "whole"), teacher_cache_dir=str(tmp_path / "one"))
    losses = curve(whole)
    more = {"output_dir": str(tmp_path / "part"), "teacher_cache_dir": str(tmp_path / "two")}
    part = make(**settings, **more)
    part.add_callback(_Kill(part, 4))
    with pytest.raises(KeyboardInterrupt):
        part.train()
    assert len(rows_of(part)) == 96
    part.teacher_side.views.cache._lock.close()
    resumed = make(**settings, **more)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(torch.tensor([e["loss"] for e in resumed.state.log_history if "loss" in e]), losses)
    for name, tensor in whole.student.state_dict().items():
        assert torch.equal(tensor, resumed.student.state_dict()[name]), name
    assert {k: v.tolist() for k, v in rows_of(resumed).items()} == {k: v.tolist() for k, v in rows_of(whole).items()}


# ---- What names them ----

CHANGES = {
    "teacher": lambda make, **view: make(vit_teacher(seed=6), **view),
    "resolution": lambda make, **view: make(vit_teacher(image_size_px=32), **view),
    "deepest layer": lambda make, **view: make(teacher_layers=[0, 1], **view),
    "norm": lambda make, **view: make(teacher_norm=True, **view),
    "samples of the code": lambda make, **view: make(teacher_statistics_samples=64, **view),
    "images": lambda make, **view: make(images=ImageSplit(OTHERS, torch.arange(128) % 4, list("abcd")), **view),
    "inner products beside": lambda make, **view: make(cka_weight=1.0, **view),
}
OF_VIEWS = {
    "augmentation": lambda make: make(
        augmentation=AugmentationArguments(augmentation_seed=7, **VIEWS | {"random_crop_padding": 3})
    ),
    "seed of the augmentation": lambda make: make(augmentation=AugmentationArguments(augmentation_seed=8, **VIEWS)),
    "scores beside": lambda make: make(alpha=0.5),
}


@pytest.mark.parametrize("change", [*CHANGES, *OF_VIEWS])
def test_whatever_makes_a_row_of_a_view_names_its_cache(change, make, train_split, monkeypatch):
    def run(*teacher, **settings):
        trainer = make(*teacher or [classifier(train_split.label_names)], relation_weight=1.0, **settings)
        trainer.score_teacher = lambda: 1.0
        return opened(trainer).teacher_views.key

    assert run() == run()
    assert (CHANGES | OF_VIEWS)[change](run) != run()


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_makes_a_row_of_a_stored_image_names_its_cache(change, make):
    def run(*teacher, **settings):
        return opened(clean(make, *teacher, relation_weight=1.0, **settings)).teacher_cache.key

    assert run() == run()
    assert CHANGES[change](run) != run()


def test_rows_without_a_mean_are_described_as_they_were():
    assert ViewRow(ScoreRow(10), (4,)).description() == {"scores": {"num_classes": 10}, "tokens": (4,)}
    assert ViewRow(ScoreRow(10), (4,), 8).description() == {"scores": {"num_classes": 10}, "tokens": (4,), "mean": 8}
    assert {f.name for f in dataclasses.fields(ViewRow)} == {"scores", "tokens", "mean", "code"}


# ---- Stored images ----

KINDS = {
    "mean": {"relation_weight": 1.0, "rsd_weight": 0.1},
    "gram+mean": {"sp_weight": 100.0, "cka_weight": 1.0},
    "tokens+mean": {"pkt_weight": 1.0, "token_weight": 1.0},
    "logits+mean": {"relation_weight": 1.0, "alpha": 0.5},
    "logits+gram+mean": {"relation_weight": 1.0, "alpha": 0.5, "gram_weight": 1.0},
    "logits+tokens+mean": {"rkd_weight": 1.0, "alpha": 0.5, "token_weight": 1.0, "cka_weight": 1.0},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_smallest_row_of_stored_images_serves_all_methods(kind, make, train_split):
    def run(cache):
        teacher = classifier(train_split.label_names)
        trainer = clean(make, teacher, cache, teacher_logits_view="clean", **KINDS[kind])
        trainer.score_teacher = lambda: 1.0
        return trainer

    live = curve(run("off"))
    for _ in range(2):
        trainer = run("auto")
        torch.testing.assert_close(curve(trainer), live, rtol=2e-3, atol=2e-3)
        assert trainer.teacher_cache.layout.kind == kind
    forwards = Forwards(trainer.teacher)
    trainer.prepare_teacher()
    assert forwards.count == 8  # the rows that are compared: means and codes are kept with them


def test_what_is_chosen_is_said(make, capsys):
    trainer = clean(make, sp_weight=1.0)
    trainer.prepare_teacher()
    said = capsys.readouterr().out
    assert "teacher_cache auto: mean (an image's mean token is all that the losses need; 128 teacher forwards" in said
    assert trainer.teacher_cache.layout.row_bytes == 48
    clean(make, sp_weight=1.0, cka_weight=1.0).prepare_teacher()
    assert "(inner products of an image's tokens and its mean token are all that the losses" in capsys.readouterr().out
    trainer = opened(make(sp_weight=1.0))
    assert "256 views x 48.12 B (the mean token) = " in capsys.readouterr().out
    assert trainer.teacher_cache is None


def test_whole_tokens_may_be_asked_for(make):
    live = curve(clean(make, cache="off", relation_weight=1.0))
    trainer = clean(make, cache="tokens", relation_weight=1.0)
    torch.testing.assert_close(curve(trainer), live, rtol=2e-3, atol=2e-3)
    assert trainer.teacher_cache.layout == Layout("tokens", ((16, 24),) * 3)


def test_where_the_students_crop_decides_tokens_are_kept(make, capsys):
    trainer = clean(make, relation_weight=1.0, teacher_view="shared")
    trainer.prepare_teacher()
    assert trainer.teacher_cache.layout.kind == "tokens"
    assert "teacher_cache auto: tokens ('relation_weight' needs the tokens themselves;" in capsys.readouterr().out


REFUSED = {
    "under a view that moves": ({"relation_weight": 1.0}, "mean", "'relation_weight'.*'tokens', or teacher_view 'cl"),
    "where inner products are needed": (
        {"relation_weight": 1.0, "cka_weight": 1.0, "teacher_view": "clean"}, "mean", "'cka_weight'.*'gram' or 'tok",
    ),
    "where tokens are": ({"token_weight": 1.0, "sp_weight": 1.0, "teacher_view": "clean"}, "mean", "'token_weight'.*d "
        "teacher_cache 'tokens'$"),
    "inner products that nobody needs": ({"sp_weight": 1.0, "teacher_view": "clean"}, "gram", "'sp_weight'.*'mean' or"),
    "of augmented images": ({"sp_weight": 1.0, "teacher_view": "identical"}, "mean", "new image in every epoch"),
}  # fmt: skip


@pytest.mark.parametrize("way", REFUSED)
def test_rows_that_do_not_serve_are_refused_when_the_arguments_are_made(way, make_args):
    settings, kind, what = REFUSED[way]
    with pytest.raises(ValueError, match=what):
        make_args(StructuralDistillationTrainingArguments, teacher_cache=kind, **settings)


def test_methods_say_how_much_of_the_final_tokens_they_need():
    with pytest.raises(ValueError, match="'final': expected 'tokens', 'mean' or None, found True"):
        Needs(final=True)


# ---- Rows, and what they are means over ----


def test_rows_keep_what_tells_images_apart(make, train_split):
    """Where that is a thousandth of what they have in common, and half precision of the mean itself would lose it."""
    teacher, index = nearly_blind_teacher(), torch.arange(0, 128, 2)
    tokens = teacher.model(teacher.prepare(train_split.images[index], True)).last_hidden_state[:, 1:]
    live = tokens.mean(dim=1).detach()
    deviation = live - live.mean(dim=0)
    assert deviation.norm() < 1e-3 * live.norm()
    assert (live.half().float() - live).norm() > 0.05 * deviation.norm()
    cached = opened(clean(make, teacher, sp_weight=1.0))
    (stored,) = cached.teacher_cache(index)
    assert (stored[:, 0] - live).norm() < 4e-3 * deviation.norm()
    plain = AugmentationArguments(augmentation_seed=7)
    views = make(teacher, sp_weight=1.0, augmentation=plain)
    views.train()
    found = rows_of(views)
    read = torch.stack([found[0, int(k)] for k in index])
    assert (read - live).norm() < 4e-3 * deviation.norm()


def test_a_mean_that_half_precision_does_not_reach_is_not_kept():
    row = ViewRow(mean=2, code=Code(torch.zeros(1, 2), torch.ones(2)))
    mean = torch.tensor([[1.0, 2.0], [1e6, 0.0], [torch.nan, 0.0]])
    rows = row.pack(None, [], mean)
    assert row.undefined(rows).tolist() == [False, True, True]
    (read,) = row.unpack(rows)[1]
    assert torch.equal(read.mean[:1], mean[:1])


def test_a_teacher_that_says_no_numbers_is_named_by_the_image(make):
    trainer = make(sp_weight=1.0)
    trainer.prepare_teacher()
    with torch.no_grad():
        trainer.teacher.model.layernorm.bias[3] = torch.nan
    trainer.prepare(trainer._prepare_inputs(next(iter(trainer.get_train_dataloader()))), train=True)
    with pytest.raises(CacheError, match=r"expected numbers that half precision holds, found NaN or one beyond for tr"):
        trainer.teacher_side.views.flush()
    trainer.teacher_side.views.close()


@pytest.mark.parametrize("size", [8, 12, 16, 32, 20])
@pytest.mark.parametrize("view", ["identical", "clean"])
def test_the_mean_is_over_the_places_of_the_student_whatever_the_grid_of_the_teacher(view, size, make):
    """Fewer tokens are interpolated and more are averaged first; none is outside."""

    def run(cache):
        teacher = vit_teacher(image_size_px=size)
        if view == "identical":
            return make(teacher, relation_weight=1.0, teacher_cache=cache, max_steps=4)
        return clean(make, teacher, {"views": "mean"}.get(cache, cache), relation_weight=1.0, max_steps=4)

    live, trainer = curve(run("off")), run("views")
    torch.testing.assert_close(curve(trainer), live, rtol=2e-3, atol=2e-3)
    side = trainer.teacher_side
    count, width = side.layers.teacher_shapes[-1]
    tokens = torch.randn(3, count, width, generator=torch.Generator().manual_seed(0))
    rows, columns = side.layers.teacher_grids[-1]
    maps = F.interpolate(tokens.mT.unflatten(2, (rows, columns)), side.layers.grids[-1], mode="bilinear")
    torch.testing.assert_close(side.rows.mean(tokens), maps.mean((2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(side.rows._counts_evenly(), size != 12)
    _, share = Resampler(None)(tokens, (rows, columns), side.layers.grids[-1])
    mean, as_cached = Resampler(None)(TokenMean(tokens.mean(dim=1)), (rows, columns), side.layers.grids[-1])
    assert torch.equal(as_cached, share)
    assert torch.equal(share, torch.ones_like(share))
    assert torch.equal(mean.mean, tokens.mean(dim=1))


def test_students_of_other_grids_share_rows_where_all_tokens_count_alike(make, make_student):
    def key(size, **student):
        trainer = opened(make(vit_teacher(image_size_px=size), relation_weight=1.0, student=make_student(**student)))
        return trainer.teacher_views.key

    coarse = {"patch_size": 8}
    assert key(16) == key(16, **coarse)
    assert key(32) == key(32, **coarse)
    assert key(12) != key(12, **coarse)  # 3 x 3 tokens at 4 x 4 places: those in the middle count more


def test_a_mean_cannot_follow_the_student():
    with pytest.raises(TypeError, match="expected a student that looks at the whole image"):
        Resampler(identity_affine(2))(TokenMean(torch.zeros(2, 3)), (4, 4), (4, 4))
