"""Training from a cache equals training with the teacher at hand, and is chosen where it saves anything."""

import re

import pytest
import torch
from transformers import Dinov2Config, Dinov2ForImageClassification, Dinov2Model, set_seed

from hf_ihb.config.augmentation import AugmentationArguments
from hf_ihb.data import ImageSplit
from hf_ihb.errors import CacheError, RecipeError
from hf_ihb.models.processing import PixelFormat
from hf_ihb.models.teacher import Teacher
from hf_ihb.trainer import LogitDistillationTrainer, StructuralDistillationTrainer
from hf_ihb.trainer.arguments import LogitDistillationTrainingArguments, StructuralDistillationTrainingArguments

OTHERS = torch.randint(0, 256, (128, 3, 16, 16), generator=torch.Generator().manual_seed(9)).to(torch.uint8)

PIXELS = PixelFormat((0.5,) * 3, (0.25,) * 3, (16, 16))
MOVED = AugmentationArguments(random_crop_padding=2, horizontal_flip=0.5, rotation_degrees=10.0)
MIXED = AugmentationArguments(horizontal_flip=0.5, mixup_alpha=0.8, cutmix_alpha=1.0, mix_probability=0.5)


def vit_teacher(seed=5, image_size_px=16):
    set_seed(seed)
    config = Dinov2Config(
        image_size=16, patch_size=4, hidden_size=24, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32
    )
    return Teacher(Dinov2Model(config), PIXELS.whole((image_size_px,) * 2))


class Forwards:
    """Counts the images a teacher is asked about."""

    def __init__(self, teacher):
        self.count = 0
        teacher.model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module, args, kwargs):
        self.count += len(kwargs["pixel_values"])


@pytest.fixture
def structural(make_student, make_args, train_split, eval_split, processor, tmp_path):
    def make(teacher=None, augmentation=MOVED, **overrides):
        settings = {
            "student_layers": [0, 2], "teacher_layers": [1, 2], "max_steps": 6,
            "per_device_train_batch_size": 16, "teacher_cache_dir": str(tmp_path / "caches"),
        }  # fmt: skip
        images = overrides.pop("train_dataset", train_split)
        return StructuralDistillationTrainer(
            make_student(),
            make_args(StructuralDistillationTrainingArguments, **settings | overrides),
            train_dataset=images,
            eval_dataset=eval_split,
            processing_class=processor,
            augmentation=augmentation,
            teacher_model=teacher or vit_teacher(),
        )

    return make


@pytest.fixture
def logits(make_student, make_teacher, make_args, train_split, eval_split, processor, tmp_path):
    def make(teacher=None, **overrides):
        settings = {"teacher_view": "clean", "max_steps": 6, "teacher_cache_dir": str(tmp_path / "caches")}
        return LogitDistillationTrainer(
            make_student(),
            make_args(LogitDistillationTrainingArguments, **settings | overrides),
            train_dataset=train_split,
            eval_dataset=eval_split,
            processing_class=processor,
            augmentation=MOVED,
            teacher_model=teacher or make_teacher(),
        )

    return make


def curve(trainer, key="loss"):
    trainer.train()
    return torch.tensor([entry[key] for entry in trainer.state.log_history if key in entry])


WAYS = {
    "cka": ("gram", {"cka_weight": 1.0}),
    "cka with position code": ("gram", {"cka_weight": 1.0, "center_positions": False}),
    "rbf": ("gram", {"cka_weight": 1.0, "cka_kernel": "rbf", "cka_estimator": "biased"}),
    "gram": ("gram", {"gram_weight": 1.0}),
    "gram and cka": ("gram", {"gram_weight": 1.0, "cka_weight": 0.5, "teacher_norm": True}),
    "cka from tokens": ("tokens", {"cka_weight": 1.0, "center_positions": True}),
    "pooled": ("tokens", {"cka_weight": 1.0, "cka_scope": "pooled"}),
    "token": ("tokens", {"token_weight": 1.0}),
    "relation": ("tokens", {"relation_weight": 1.0}),
    "everything": ("tokens", {"token_weight": 1.0, "gram_weight": 1.0, "relation_weight": 0.5, "cka_weight": 1.0}),
    "published": ("tokens", {"cka_weight": 1.0, "token_weight": 1.0, "teacher_projector": "trainable"}),
    "unmoved": ("gram", {"cka_weight": 1.0, "teacher_view": "clean"}),
}


@pytest.mark.parametrize("way", WAYS)
def test_cached_and_live_training_give_the_same_losses(way, structural):
    kind, settings = WAYS[way]
    live = curve(structural(**settings, teacher_cache="off"))
    trainer = structural(**settings, teacher_cache=kind)
    cached = curve(trainer)
    assert len(live) == 6
    torch.testing.assert_close(cached, live, rtol=1e-3, atol=2e-3)  # half precision keeps eleven bits
    assert trainer.teacher_cache.layout.kind == kind


@pytest.mark.parametrize("kind", ["gram", "tokens"])
def test_mixed_and_finer_teachers_are_cached_all_the_same(kind, structural):
    """A teacher at twice the resolution has its tokens pooled before they are stored."""
    settings = {"cka_weight": 1.0, "center_positions": True, "augmentation": MIXED}
    live = curve(structural(vit_teacher(image_size_px=32), **settings, teacher_cache="off"))
    trainer = structural(vit_teacher(image_size_px=32), **settings, teacher_cache=kind)
    torch.testing.assert_close(curve(trainer), live, rtol=1e-3, atol=2e-3)
    assert trainer.teacher_cache.layout.shapes == ((16, 24), (16, 24))


def nearly_blind_teacher():
    """What it says of any image is nearly the same: large position codes, and a thousandth of the image."""
    teacher = vit_teacher()
    with torch.no_grad():
        embeddings = teacher.model.embeddings
        embeddings.position_embeddings.copy_(30 * torch.randn(embeddings.position_embeddings.shape))
        embeddings.patch_embeddings.projection.weight.mul_(0.03)
    return teacher


def test_stored_tokens_keep_what_tells_images_apart(structural, train_split):
    """Half precision of the tokens themselves would be of the size of it."""
    teacher = nearly_blind_teacher()
    trainer = structural(teacher, token_weight=1.0, relation_weight=1.0, teacher_cache="tokens")
    trainer.prepare_teacher()
    index = torch.arange(0, 128, 2)
    maps = teacher.features(teacher.prepare(train_split.images[index]), [1, 2])
    live = [m.patch_tokens for m in (*maps, teacher.normed(maps[-1]))]
    for stored, tokens in zip(trainer.teacher_cache(index), live, strict=True):
        deviation = tokens - tokens.mean(dim=0)
        assert deviation.norm() < 1e-3 * tokens.norm()
        assert (stored - tokens).norm() < 2e-3 * deviation.norm()
        assert (tokens.half().float() - tokens).norm() > 0.05 * deviation.norm()


def test_statistics_are_not_kept_beside_scores_which_do_not_know_of_layers(structural, train_split):
    settings = {"token_weight": 1.0, "alpha": 0.5, "teacher_view": "identical", "max_steps": 50}
    found = []
    for layers in ([1, 2], [0, 1]):
        config = vit_teacher().model.config
        set_seed(5)
        config.id2label = dict(enumerate(train_split.label_names))
        teacher = Teacher(Dinov2ForImageClassification(config), PIXELS, train_split.label_names)
        trainer = structural(teacher, teacher_layers=layers, teacher_logits_view="clean", **settings)
        trainer.prepare_teacher()
        assert trainer.teacher_cache.layout.kind == "logits"
        found.append(trainer.teacher_side.statistics[0][0])
    assert not torch.equal(*found)


def test_after_it_is_built_the_teacher_is_asked_about_a_few_images_only(structural):
    teacher = vit_teacher()
    forwards = Forwards(teacher)
    structural(teacher, cka_weight=1.0, teacher_cache="gram").train()
    first, forwards.count = forwards.count, 0
    structural(teacher, cka_weight=1.0, teacher_cache="gram").train()
    assert first >= 128
    assert forwards.count == 1 + 8  # the probe of its shapes, and the rows that are compared


def test_scores_of_stored_images_are_cached_exactly(logits, make_teacher):
    live = curve(logits(teacher_cache="off"))
    cached = curve(logits(teacher_cache="logits"))
    torch.testing.assert_close(cached, live, rtol=1e-6, atol=1e-6)
    assert cached[0] == live[0]


def test_a_shuffled_teacher_is_the_same_cached_and_live(structural, logits, make_teacher):
    def run(make, teacher, **settings):
        teacher.control = "shuffled"
        return curve(make(teacher, **settings))

    for make, teacher, kind, settings in (
        (structural, vit_teacher, "gram", {"cka_weight": 1.0}),
        (structural, vit_teacher, "tokens", {"token_weight": 1.0}),
        (logits, make_teacher, "logits", {}),
    ):
        live = run(make, teacher(), teacher_cache="off", **settings)
        torch.testing.assert_close(run(make, teacher(), teacher_cache=kind, **settings), live, rtol=1e-3, atol=2e-3)


def test_a_resumed_run_reads_the_same_cache_and_equals_the_uninterrupted_one(structural, tmp_path):
    settings = {"cka_weight": 1.0, "token_weight": 1.0, "teacher_cache": "tokens", "save_strategy": "steps"}
    settings["save_steps"] = 3
    whole = structural(**settings, output_dir=str(tmp_path / "whole"))
    whole.train()
    part = structural(**settings, output_dir=str(tmp_path / "whole"))
    part.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert whole.teacher_cache is not None
    assert part.teacher_cache.key == whole.teacher_cache.key
    for name, tensor in whole.student.state_dict().items():
        assert torch.equal(tensor, part.student.state_dict()[name]), name


# ---- What names a cache ----

CHANGES = {
    "teacher": lambda make: make(vit_teacher(seed=6)),
    "resolution": lambda make: make(vit_teacher(image_size_px=32)),
    "layers": lambda make: make(teacher_layers=[0, 2]),
    "norm": lambda make: make(teacher_norm=True),
    "position code": lambda make: make(center_positions=False),
    "images": lambda make: make(train_dataset=ImageSplit(OTHERS, torch.arange(128) % 4, list("abcd"))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_what_the_teacher_says_makes_another_cache(change, structural):
    def make(teacher=None, **settings):
        trainer = structural(teacher, cka_weight=1.0, teacher_cache="gram", **settings)
        trainer.prepare_teacher()
        return trainer.teacher_cache.key

    assert make() == make()
    assert CHANGES[change](make) != make()


def test_what_concerns_the_student_alone_shares_the_cache(structural):
    keys = set()
    for settings in ({}, {"seed": 3}, {"learning_rate": 1.0}, {"cka_weight": 2.0}, {"augmentation": MIXED}):
        trainer = structural(**{"cka_weight": 1.0, "teacher_cache": "gram", **settings})
        trainer.prepare_teacher()
        keys.add(trainer.teacher_cache.key)
    assert len(keys) == 1


def test_a_teacher_that_was_changed_behind_the_cache_is_found_out(structural, monkeypatch):
    structural(cka_weight=1.0, teacher_cache="gram").prepare_teacher()
    monkeypatch.setattr("hf_ihb.trainer.teacher_rows.describe_teacher", lambda teacher, whole: "the same")
    structural(cka_weight=1.0, teacher_cache="gram").prepare_teacher()
    with pytest.raises(CacheError, match="expected what the teacher says now"):
        structural(vit_teacher(seed=9), cka_weight=1.0, teacher_cache="gram").prepare_teacher()


# ---- The choice ----


def chosen(trainer, capsys):
    capsys.readouterr()
    trainer.prepare_teacher()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("teacher_cache auto")]
    return re.fullmatch(r"teacher_cache auto: (\w+) \((.*)\)", line).groups()


def test_auto_takes_the_smallest_cache_that_will_do(structural, capsys):
    assert chosen(structural(cka_weight=1.0, max_steps=9), capsys) == (
        "gram",
        "inner products of an image's tokens are all that the losses need; 128 teacher forwards instead of 144",
    )
    for settings, reason in (
        ({"token_weight": 1.0}, "token_weight"),
        ({"relation_weight": 1.0}, "relation_weight"),
        ({"cka_weight": 1.0, "cka_scope": "images"}, "cka_scope"),
        ({"gram_weight": 1.0, "teacher_projector": "trainable"}, "teacher_projector"),
    ):
        kind, said = chosen(structural(**settings, max_steps=9), capsys)
        assert kind == "tokens"
        assert said.startswith(f"'{reason}' needs the tokens themselves")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"max_steps": 8}, "a cache would take 128 teacher forwards instead of 128"),
        ({"max_steps": 4, "gradient_accumulation_steps": 2}, "a cache would take 128 teacher forwards instead of 128"),
        ({"max_steps": -1, "num_train_epochs": 1}, "a cache would take 128 teacher forwards instead of 128"),
        ({"max_steps": 50, "teacher_view": "identical"}, "a new one in every epoch"),
    ],
)
def test_auto_leaves_the_cache_where_it_saves_nothing(settings, reason, structural, capsys):
    kind, said = chosen(structural(cka_weight=1.0, **settings), capsys)
    assert kind == "off"
    assert reason in said


def test_auto_takes_a_cache_that_is_there_for_the_shortest_run(structural, capsys):
    structural(cka_weight=1.0, teacher_cache="gram").prepare_teacher()
    kind, said = chosen(structural(cka_weight=1.0, max_steps=1), capsys)
    assert kind == "gram"
    assert said.endswith("0 teacher forwards instead of 16")


def test_auto_leaves_the_cache_where_the_disk_is_full(structural, capsys, monkeypatch):
    monkeypatch.setattr("hf_ihb.storage.cache_folder.shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    kind, said = chosen(structural(cka_weight=1.0, max_steps=50), capsys)
    assert kind == "off"
    assert "found 0.00 MB (25% of what is free)" in said


def test_a_set_without_stored_images_is_asked_about_live(structural, capsys):
    items = [
        {"pixel_values": torch.randn(3, 16, 16), "labels": k % 4, "teacher_pixel_values": torch.randn(3, 16, 16)}
        for k in range(32)
    ]
    trainer = structural(cka_weight=1.0, max_steps=20)
    trainer.train_dataset = items
    assert chosen(trainer, capsys) == ("off", "the training set is not one of stored images")
    trainer.args.teacher_cache = "gram"
    with pytest.raises(RecipeError, match=r"key 'teacher_cache': expected 'off', found 'gram': the training set"):
        trainer.prepare_teacher()


@pytest.mark.parametrize(
    ("settings", "keys"),
    [
        ({"teacher_cache": "gram", "teacher_view": "identical"}, "'teacher_cache' and 'teacher_view'"),
        ({"teacher_cache": "tokens", "teacher_view": "identical"}, "'teacher_cache' and 'teacher_view'"),
        ({"teacher_cache": "gram", "token_weight": 1.0}, "'teacher_cache' and 'token_weight'"),
        ({"teacher_cache": "gram", "relation_weight": 1.0}, "'teacher_cache' and 'relation_weight'"),
        ({"teacher_cache": "gram", "cka_scope": "pooled"}, "'teacher_cache' and 'cka_scope'"),
        ({"teacher_cache": "gram", "teacher_projector": "trainable"}, "'teacher_cache' and 'teacher_projector'"),
    ],
)
def test_a_cache_that_cannot_serve_is_refused_before_anything_is_loaded(settings, keys, make_args):
    with pytest.raises(ValueError, match=keys):
        make_args(StructuralDistillationTrainingArguments, **{"cka_weight": 1.0, **settings})


def test_scores_of_augmented_images_cannot_be_cached(make_args):
    with pytest.raises(ValueError, match="'teacher_cache' and 'teacher_logits_view'"):
        make_args(LogitDistillationTrainingArguments, teacher_cache="logits")


# ---- Precision of the teacher ----


def test_a_teacher_in_bfloat16_says_nearly_the_same_and_has_a_cache_of_its_own(structural):
    single = structural(cka_weight=1.0, teacher_cache="gram")
    half = structural(cka_weight=1.0, teacher_cache="gram", teacher_dtype="bfloat16")
    losses = [curve(trainer) for trainer in (single, half)]
    assert {p.dtype for p in half.teacher.model.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(*losses, rtol=0.02, atol=0.02)
    assert not torch.equal(*losses)
    assert single.teacher_cache.key != half.teacher_cache.key


def test_compiled_losses_equal_eager_ones(structural):
    settings = {"cka_weight": 1.0, "center_positions": True, "teacher_cache": "gram"}
    eager = curve(structural(**settings))
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    trainer = structural(**settings, torch_compile=True, torch_compile_backend="aot_eager")
    torch.testing.assert_close(curve(trainer), eager, rtol=1e-5, atol=1e-5)
    # student, augmentation, alignment and losses
    assert counters["stats"]["unique_graphs"] == 4
    assert not counters["graph_break"]
