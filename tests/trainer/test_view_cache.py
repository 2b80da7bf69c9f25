"""What a teacher says of augmented images is read instead of asked for: the same rows, of the right views, or none."""

import numpy as np
import pytest
import torch
from filelock import FileLock
from transformers import Dinov2ForImageClassification, TrainerCallback, set_seed

from hf_ihb.config.augmentation import AugmentationArguments
from hf_ihb.data import ImageSplit
from hf_ihb.errors import CacheError, CheckpointError, RecipeError
from hf_ihb.models.teacher import Teacher
from hf_ihb.trainer import LogitDistillationTrainer, StructuralDistillationTrainer
from hf_ihb.trainer.arguments import LogitDistillationTrainingArguments, StructuralDistillationTrainingArguments
from hf_ihb.trainer.score_rows import ScoreRow
from hf_ihb.trainer.view_cache import ViewCache
from hf_ihb.trainer.view_rows import ViewRow
from tests.trainer.test_caching import PIXELS, Forwards, curve, vit_teacher

VIEWS = {"random_crop_padding": 2, "horizontal_flip": 0.5, "mixup_alpha": 0.8, "cutmix_alpha": 1.0}
COVERED = {"auto_augment": "trivialaugment_wide", "random_erasing": 0.3, "cutout_size": 4}
STEPS = 8  # two epochs of four batches of 32


@pytest.fixture
def logits(make_student, make_teacher, make_args, train_split, eval_split, processor, tmp_path):
    def make(teacher=None, augmentation=None, student=None, train_dataset=None, **overrides):
        settings = {
            "max_steps": STEPS, "teacher_cache": "views", "teacher_cache_dir": str(tmp_path / "caches"),
            "output_dir": str(tmp_path / "first"),
        }  # fmt: skip
        return LogitDistillationTrainer(
            student or make_student(),
            make_args(LogitDistillationTrainingArguments, **settings | overrides),
            train_dataset=train_dataset or train_split,
            eval_dataset=eval_split,
            processing_class=processor,
            augmentation=AugmentationArguments(**{"augmentation_seed": 7, **VIEWS, **(augmentation or {})}),
            teacher_model=teacher or make_teacher(),
        )

    return make


def rows_of(trainer):
    """(epoch, image) -> scores that are stored, below the largest."""
    cache, found = trainer.teacher_views, {}
    for epoch in range(9):
        for rows, known in cache._parts(epoch):
            found |= {
                (epoch, k): row
                for k, row in zip(
                    np.flatnonzero(known).tolist(), torch.cat(cache.row.numbers(rows), dim=1), strict=True
                )
            }
    return found


@torch.no_grad()
def asked_alone(trainer, teacher, epoch, image):
    """What a teacher says of one view, made of the stored images and of nothing else."""
    index = torch.tensor([image])
    views = trainer.batches.augmenter(trainer.train_dataset.images[index], index, epoch)
    return below_largest(teacher.logits(teacher.prepare(views.seen)))[0]


def below_largest(scores):
    return scores - scores.amax(dim=-1, keepdim=True)


# ---- Rows ----


def test_few_classes_are_stored_whole_to_half_precision_of_what_tells_them_apart():
    scores = 5000 + 6 * torch.randn(64, 10, generator=torch.Generator().manual_seed(0))
    row = ScoreRow(10)
    read, wanted = row.unpack(row.pack(scores)), below_largest(scores)
    assert ((read - wanted).abs() <= 2.0**-11 * wanted.abs() + 2.0**-25).all()
    assert torch.equal(read.argmax(1), scores.argmax(1))
    assert row.width == 10
    assert torch.equal(row.pack(read), row.pack(scores))  # what was read is stored as the same


def test_the_sixteen_largest_and_the_rest_keep_their_probabilities():
    scores = 3 * torch.randn(64, 1000, generator=torch.Generator().manual_seed(0))
    row = ScoreRow(1000)
    read, p = row.unpack(row.pack(scores)).softmax(1), scores.softmax(1)
    largest = p.topk(16, dim=1).indices
    torch.testing.assert_close(read.gather(1, largest), p.gather(1, largest), rtol=5e-3, atol=0)
    rest = torch.ones_like(p).scatter(1, largest, 0).bool()
    torch.testing.assert_close(read[rest].view(64, -1).sum(1), p[rest].view(64, -1).sum(1), rtol=5e-3, atol=0)
    assert (read[rest].view(64, -1).std(1) == 0).all()
    assert row.width == 33


@pytest.mark.parametrize("classes", [3, 32, 33, 2**16])
def test_extreme_scores_are_stored_and_what_is_no_number_is_found(classes):
    row = ScoreRow(classes)
    scores = torch.zeros(3, classes)
    scores[0, 1], scores[1, -1], scores[2, 0] = 1e6, -torch.inf, torch.nan
    read = row.unpack(row.pack(scores))
    assert read[0].argmax() == 1
    assert read[:2].isfinite().all()
    assert ViewRow(row).undefined(row.pack(scores)).tolist() == [False, False, True]


def test_a_row_holds_scores_and_the_inner_products_of_each_layer():
    generator = torch.Generator().manual_seed(0)
    layers = [torch.randn(5, count, 8, generator=generator, dtype=torch.double) for count in (4, 6)]
    scores = torch.randn(5, 40, generator=generator)
    row = ViewRow(ScoreRow(40), (4, 6))
    rows = row.pack(scores, [x.float() for x in layers])
    read, grams = row.unpack(rows)
    assert rows.shape == (5, row.width) == (5, 33 + 15 + 28)
    assert torch.equal(read, row.scores.unpack(row.scores.pack(scores)))
    for tokens, gram in zip(layers, grams, strict=True):
        wanted, found = tokens @ tokens.mT, gram.raw().double()
        wanted, found = (x / x.flatten(1).norm(dim=1)[:, None, None] for x in (wanted, found))  # up to a factor
        torch.testing.assert_close(found, wanted, rtol=2e-3, atol=1e-3)
    assert ViewRow(tokens=(4, 6)).unpack(rows[:, 33:])[0] is None
    assert ViewRow(ScoreRow(40)).unpack(rows[:, :33])[1] is None


# ---- Training ----


@pytest.mark.parametrize("augmentation", [{}, COVERED, {"mixup_alpha": 0.0, "cutmix_alpha": 0.0}])
def test_cached_training_equals_the_run_that_wrote_exactly_and_live_training_nearly(augmentation, logits, make_teacher):
    live = curve(logits(teacher_cache="off", augmentation=augmentation))
    wrote = curve(logits(augmentation=augmentation))
    teacher = make_teacher()
    forwards = Forwards(teacher)
    trainer = logits(teacher, augmentation=augmentation)
    trainer.prepare_teacher()
    trainer.teacher_side.views.close()
    forwards.count = 0
    read = curve(trainer)
    assert torch.equal(read, wrote)
    torch.testing.assert_close(wrote, live, rtol=2e-3, atol=2e-3)
    assert forwards.count == 70 + 32  # the evaluation set, and a batch of which some rows are compared


def test_every_row_is_of_its_view(logits, make_teacher):
    """Each epoch's view of each image, made alone from the stored images, and asked for again."""
    trainer = logits()
    trainer.train()
    found, teacher = rows_of(trainer), make_teacher()
    assert set(found) == {(epoch, k) for epoch in range(2) for k in range(128)}
    for (epoch, k), row in found.items():
        torch.testing.assert_close(row, asked_alone(trainer, teacher, epoch, k), rtol=1e-3, atol=1e-4)
    views = {(round(float(row.sum()), 5)) for row in found.values()}
    assert len(views) > 200  # they are not all alike


SHARED = {
    "seed": {"seed": 11},
    "temperature": {"temperature": 4.0},
    "weight": {"alpha": 0.9},
    "loss": {"dkd_weight": 1.0, "alpha": 0.0},
    "batch": {"per_device_train_batch_size": 16, "max_steps": 2 * STEPS},
}


@pytest.mark.parametrize("change", SHARED)
def test_another_seed_loss_or_batch_reads_the_same_rows(change, logits, make_teacher):
    first = logits()
    first.train()
    rows = rows_of(first)
    teacher = make_teacher()
    forwards = Forwards(teacher)
    other = logits(teacher, **SHARED[change])
    other.train()
    assert other.teacher_views.key == first.teacher_views.key
    assert forwards.count == 70 + other.args.per_device_train_batch_size
    assert set(rows_of(other)) == set(rows)


def test_another_student_reads_the_same_rows(logits, make_student):
    first, other = logits(), logits(student=make_student(seed=5))
    first.train()
    other.train()
    assert other.teacher_views.key == first.teacher_views.key
    assert len(rows_of(other)) == 256


OTHERS = torch.randint(0, 256, (128, 3, 16, 16), generator=torch.Generator().manual_seed(9)).to(torch.uint8)
CHANGES = {
    "crop": {"augmentation": {"random_crop_padding": 3}},
    "mixing": {"augmentation": {"cutmix_alpha": 0.0}},
    "augmentation_seed": {"augmentation": {"augmentation_seed": 8}},
    "images": {"train_dataset": ImageSplit(OTHERS, torch.arange(128) % 4, list("abcd"))},
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_a_view_makes_another_cache(change, logits):
    keys = []
    for settings in ({}, {}, CHANGES[change]):
        trainer = logits(**settings)
        trainer.prepare_teacher()
        trainer.teacher_side.views.close()
        keys.append(trainer.teacher_views.key)
    assert keys[0] == keys[1] != keys[2]


def test_the_seed_of_the_augmentation_is_that_of_the_run_if_not_given(logits):
    for seed, other in ((3, True), (4, False)):
        own = logits(augmentation={"augmentation_seed": None}, seed=3).batches
        given = logits(augmentation={"augmentation_seed": seed}, seed=5).batches
        assert (own.augmentation_seed == given.augmentation_seed) == other


# ---- What is there in part ----


def test_a_cache_that_is_there_in_part_is_used_as_far_as_it_goes(logits, make_teacher):
    """Another seed meets images that the first never saw, among others that it did: it asks for those alone."""
    logits(max_steps=3).train()  # 96 of the first epoch's 128 views
    first = logits(max_steps=3)
    first.prepare_teacher()
    before = rows_of(first)
    first.teacher_side.views.close()
    assert len(before) == 96
    teacher = make_teacher()
    forwards = Forwards(teacher)
    other = logits(teacher, seed=11, output_dir=first.args.output_dir + "-other")
    losses = curve(other)
    asked, after = forwards.count, rows_of(other)
    torch.testing.assert_close(losses, curve(logits(seed=11, teacher_cache="off")), rtol=2e-3, atol=2e-3)
    for epoch, k in after.keys() - before.keys():
        torch.testing.assert_close(after[epoch, k], asked_alone(other, teacher, epoch, k), rtol=1e-3, atol=1e-4)
    assert len(after) == 256
    assert all(torch.equal(after[place], row) for place, row in before.items())
    assert asked == 70 + 32 + 256 - 96
    assert other.teacher_views.begun_by == first.args.output_dir


def test_what_a_killed_run_left_behind_is_no_row(logits):
    first = logits()
    first.train()
    folder, rows = first.teacher_views.folder, rows_of(first)
    whole = sorted(folder.glob("*.safetensors"))
    content = whole[1].read_bytes()
    whole[1].write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # flipped on the disk
    (folder / "000001-32-0123456789ab.safetensors").write_bytes(content)  # in no journal
    (folder / "000001-32-0123456789ab.tmp").write_bytes(content[:50])
    with (folder / "journal-0.jsonl").open("a") as journal:
        journal.write('\n{"000001-12')
    again = logits()
    again.train()
    assert curve(logits()).equal(torch.tensor([e["loss"] for e in first.state.log_history if "loss" in e]))
    assert all(torch.equal(row, rows_of(again)[place]) for place, row in rows.items())


def test_a_run_beside_the_one_that_writes_reads_and_writes_nothing(logits, capsys):
    logits(max_steps=4).train()
    first = logits()
    first.prepare_teacher()  # and has the lock
    other = logits(seed=11)
    files = len(list(other.teacher_side.views._made().folder.glob("*.safetensors")))
    other.train()
    assert "another run writes" in capsys.readouterr().out
    assert len(list(other.teacher_views.folder.glob("*.safetensors"))) == files
    first.teacher_side.views.close()
    after = logits(seed=11)
    after.train()
    assert len(rows_of(after)) == 256
    with FileLock(after.teacher_views.folder.with_suffix(".lock"), timeout=0):
        pass  # let go of


def test_a_full_disk_ends_the_writing_and_not_the_training(logits, monkeypatch, caplog):
    wanted = curve(logits())
    trainer = logits(teacher_cache_dir=str(logits().args.output_dir) + "-caches")
    trainer.prepare_teacher()
    monkeypatch.setattr(ViewCache, "_write", _full)
    assert torch.equal(curve(trainer), wanted)
    assert rows_of(trainer) == {}


def _full(cache, name, content):
    with cache.store.storing():
        raise OSError(28, "No space left on device")


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(logits, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": STEPS}
    whole = logits(**settings, output_dir=str(tmp_path / "whole"), teacher_cache_dir=str(tmp_path / "one"))
    losses = curve(whole)
    part = logits(**settings, output_dir=str(tmp_path / "part"), teacher_cache_dir=str(tmp_path / "two"))
    part.add_callback(_Kill(part, 4))
    with pytest.raises(KeyboardInterrupt):
        part.train()
    assert len(rows_of(part)) == 96  # of the steps up to the checkpoint: what came after is lost, and asked again
    part.teacher_side.views.cache._lock.close()
    resumed = logits(**settings, output_dir=str(tmp_path / "part"), teacher_cache_dir=str(tmp_path / "two"))
    resumed.train(resume_from_checkpoint=True)
    logged = torch.tensor([entry["loss"] for entry in resumed.state.log_history if "loss" in entry])
    assert torch.equal(logged, losses)
    for name, tensor in whole.student.state_dict().items():
        assert torch.equal(tensor, resumed.student.state_dict()[name]), name
    assert {k: v.tolist() for k, v in rows_of(resumed).items()} == {k: v.tolist() for k, v in rows_of(whole).items()}


class _Kill(TrainerCallback):
    """Ends a training after a step as a kill would: nothing of it is written any more."""

    def __init__(self, trainer, step):
        self.trainer, self.step = trainer, step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.trainer.teacher_side.views.cache._fresh.clear()
            raise KeyboardInterrupt


# ---- What is asked for ----


def said(trainer, capsys):
    capsys.readouterr()
    trainer.prepare_teacher()
    trainer.teacher_side.views.close()
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("teacher_cache auto")]


def test_auto_keeps_views_where_the_seed_of_the_augmentation_is_given(logits, capsys):
    (line,) = said(logits(teacher_cache="auto"), capsys)
    assert line == "teacher_cache auto: views (what it says of each view is kept, by epoch and image)"
    trainer = logits(teacher_cache="auto", augmentation={"augmentation_seed": None})
    (line,) = said(trainer, capsys)
    assert line.startswith(
        "teacher_cache auto: off (the teacher sees the student's augmented image, a new one in every"
    )
    assert "'views' would keep" in line
    assert trainer.teacher_views is None


def test_auto_leaves_them_where_the_disk_is_full(logits, capsys, monkeypatch):
    monkeypatch.setattr("hf_ihb.storage.cache_folder.shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    (line,) = said(logits(teacher_cache="auto"), capsys)
    assert "off" in line
    assert "of disk for the cache of views, found 0.00 MB (25% of what is free)" in line
    with pytest.raises(
        CacheError, match=r"expected 0.00 MB of disk for the cache of views, found 0.00 MB; give another"
    ):
        logits().prepare_teacher()


def test_the_start_says_how_much_there_is_and_who_began_it(logits, capsys):
    logits(max_steps=4).train()
    trainer = logits(output_dir=logits().args.output_dir + "-second")
    capsys.readouterr()
    trainer.train()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Teacher cache (views)")]
    assert line.startswith("Teacher cache (views): 256 views x 8.125 B (whole scores) = ")  # four halves, and a bit
    assert f"128 are there, begun by '{logits().args.output_dir}'; this run writes what is not there" in line


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"teacher_logits_view": "clean"}, r"expected 'auto' or 'off' where nothing is learned of augmented images"),
        ({"teacher_cache": "logits"}, r"'teacher_cache' and 'teacher_logits_view' contradict.*'views' or 'off'"),
    ],
)
def test_what_contradicts_is_refused_when_the_arguments_are_made(settings, what, make_args):
    with pytest.raises(ValueError, match=what):
        make_args(LogitDistillationTrainingArguments, **{"teacher_cache": "views", **settings})
    with pytest.raises(ValueError, match="nothing is learned of augmented images"):
        make_args(StructuralDistillationTrainingArguments, cka_weight=1.0, teacher_cache="views")


def test_a_set_whose_views_cannot_be_had_again_is_refused(logits):
    trainer = logits()
    trainer.train_dataset = [{"pixel_values": torch.zeros(3, 16, 16), "labels": 0}] * 32
    with pytest.raises(
        RecipeError, match=r"key 'teacher_cache': expected 'auto' or 'off', found 'views': the training"
    ):
        trainer.prepare_teacher()
    trainer.train_dataset = _Stream(OTHERS, torch.arange(128) % 4, list("abcd"))
    with pytest.raises(RecipeError, match="mixed with the next of their batch"):
        trainer.prepare_teacher()


class _Stream(ImageSplit):
    """Stored images that cannot be had at random."""

    def __init__(self, images, labels, names):
        super().__init__(images, labels, names)
        del self.images


def test_a_teacher_that_was_changed_behind_the_cache_is_found_out(logits, make_teacher, monkeypatch):
    logits().train()
    monkeypatch.setattr("hf_ihb.trainer.teacher_rows.describe_teacher", lambda teacher, whole: "the same")
    logits().train()
    teacher = make_teacher()
    with torch.no_grad():
        teacher.model.timm_model.fc.weight.mul_(1.2)
    with pytest.raises(CacheError, match=r"in epoch 1: expected what the teacher says now, found a row that is"):
        logits(teacher).prepare_teacher()


# ---- Beside others ----


def test_a_shuffled_teacher_reads_rows_of_the_same_cache(logits, make_teacher):
    def run(**settings):
        teacher = make_teacher()
        teacher.control = "shuffled"
        return logits(teacher, **settings)

    live = curve(run(teacher_cache="off"))
    torch.testing.assert_close(curve(run()), live, rtol=2e-3, atol=2e-3)
    plain = logits()
    plain.train()
    assert len(rows_of(plain)) == 256
    read = run()
    torch.testing.assert_close(curve(read), live, rtol=2e-3, atol=2e-3)
    assert read.teacher_views.key == plain.teacher_views.key


@pytest.fixture
def structural(make_student, make_args, train_split, eval_split, processor, tmp_path):
    def make(**settings):
        set_seed(5)
        config = vit_teacher().model.config
        config.id2label = dict(enumerate(train_split.label_names))
        fixed = {
            "student_layers": [0, 2], "teacher_layers": [1, 2], "cka_weight": 1.0, "alpha": 0.5, "max_steps": 12,
            "teacher_cache_dir": str(tmp_path / "caches"),
        }  # fmt: skip
        trainer = StructuralDistillationTrainer(
            make_student(),
            make_args(StructuralDistillationTrainingArguments, **fixed | settings),
            train_dataset=train_split,
            eval_dataset=eval_split,
            processing_class=processor,
            augmentation=AugmentationArguments(augmentation_seed=7, **VIEWS, mix_probability=0.5),
            teacher_model=Teacher(Dinov2ForImageClassification(config), PIXELS, train_split.label_names),
        )
        trainer.score_teacher = lambda: 1.0  # it is at chance
        return trainer

    return make


def test_scores_of_views_and_features_of_stored_images_have_a_cache_each(structural, capsys):
    live = curve(structural(teacher_cache="off"))
    for asked in ("views", "auto", "views"):
        trainer = structural(teacher_cache=asked)
        torch.testing.assert_close(curve(trainer), live, rtol=2e-3, atol=2e-3)
        assert trainer.teacher_cache.layout.kind == "gram"
        assert len(rows_of(trainer)) == 3 * 128
    assert "teacher_cache auto: gram and views (" in capsys.readouterr().out


FEATURES = {
    "gram": {"alpha": 0.0, "cka_weight": 0.0, "gram_weight": 1.0},
    "without position code": {"alpha": 0.0, "center_positions": False},
    "beside scores": {"gram_weight": 1.0},
}


@pytest.mark.parametrize("way", FEATURES)
def test_inner_products_of_augmented_images_are_kept_as_well(way, structural):
    settings = {"teacher_view": "identical", "max_steps": 8, **FEATURES[way]}
    live = curve(structural(**settings, teacher_cache="off"))
    wrote = curve(structural(**settings, teacher_cache="views"))
    torch.testing.assert_close(wrote, live, rtol=2e-3, atol=2e-3)
    trainer = structural(**settings, teacher_cache="views")
    forwards = Forwards(trainer.teacher)
    assert torch.equal(curve(trainer), wrote)
    assert forwards.count == 32  # rows that are compared; the means of positions are kept with them
    assert len(rows_of(trainer)) == 256


def test_tokens_of_augmented_images_are_too_many(structural):
    with pytest.raises(ValueError, match="'teacher_cache' and 'token_weight' contradict: of augmented images inner"):
        structural(teacher_cache="views", teacher_view="identical", token_weight=1.0)
    trainer = structural(teacher_cache="auto", teacher_view="identical", token_weight=1.0)
    trainer.prepare_teacher()
    assert trainer.teacher_views is None


def test_images_that_the_last_batch_leaves_out_are_asked_for_when_the_next_epoch_begins(
    logits, make_student, make_teacher
):
    """Another seed leaves others out, and would lack some in most of its batches."""
    settings = {"per_device_train_batch_size": 48, "max_steps": 4}
    first = logits(**settings, student=make_student(drop_path_rate=0.3))
    wrote = curve(first)
    found, teacher = rows_of(first), make_teacher()
    assert sorted(epoch for epoch, _ in found) == [0] * 128 + [1] * 96
    for k in range(128):
        torch.testing.assert_close(found[0, k], asked_alone(first, teacher, 0, k), rtol=1e-3, atol=1e-4)
    assert torch.equal(curve(logits(**settings, student=make_student(drop_path_rate=0.3))), wrote)
    forwards = Forwards(teacher)
    logits(teacher, **settings | {"max_steps": 2}, seed=11).train()
    assert forwards.count == 70 + 48


def test_a_last_batch_that_is_short_is_kept_too(logits):
    settings = {"dataloader_drop_last": False, "per_device_train_batch_size": 48, "max_steps": 6}
    first = logits(**settings)
    wrote = curve(first)
    assert len(rows_of(first)) == 256
    assert torch.equal(curve(logits(**settings)), wrote)


def test_a_resume_may_name_the_seed_that_it_had(logits):
    settings = {"save_strategy": "steps", "save_steps": 4, "seed": 7}
    logits(**settings, augmentation={"augmentation_seed": None}).train()
    logits(**settings, augmentation={"augmentation_seed": 7}).train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match="found augmentation_seed null -> 8; take"):
        logits(**settings, augmentation={"augmentation_seed": 8}).train(resume_from_checkpoint=True)
