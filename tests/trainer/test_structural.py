import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import Dinov2Config, Dinov2Model, TrainerCallback, set_seed

from hf_ihb.config.augmentation import AugmentationArguments
from hf_ihb.errors import RecipeError, TeacherMismatchError
from hf_ihb.functional.similarity import gram_distance, linear_cka
from hf_ihb.functional.tokens import correlation_divergence, token_cosine_distance
from hf_ihb.methods.base import Widths
from hf_ihb.methods.paired import PairedHeads
from hf_ihb.models.features import extract_features
from hf_ihb.models.processing import PixelFormat
from hf_ihb.models.teacher import Teacher
from hf_ihb.trainer import LogitDistillationTrainer, StructuralDistillationTrainer
from hf_ihb.trainer.arguments import LogitDistillationTrainingArguments, StructuralDistillationTrainingArguments

ALL = {"cka_weight": 1.0, "gram_weight": 1.0, "token_weight": 1.0}
ONE_STEP = {"max_steps": 1, "learning_rate": 0.0, "per_device_train_batch_size": 128}
PUBLISHED = {"teacher_projector": "trainable", "task_heads": "cls", "center_positions": False}
LAYERS = {"student_layers": [0, 2], "teacher_layers": [1, 2]}
PIXELS = PixelFormat((0.5,) * 3, (0.25,) * 3, (16, 16))


@pytest.fixture
def make_trainer(make_student, make_teacher, make_args, train_split, eval_split, processor):
    def make(student=None, teacher=None, augmentation=None, **overrides):
        return StructuralDistillationTrainer(
            student or make_student(),
            make_args(StructuralDistillationTrainingArguments, **{**ALL, **LAYERS, **overrides}),
            train_dataset=train_split,
            eval_dataset=eval_split,
            processing_class=processor,
            augmentation=augmentation,
            teacher_model=teacher or make_teacher(None),
        )

    return make


@pytest.fixture
def vit_teacher():
    set_seed(5)
    config = Dinov2Config(
        image_size=16, patch_size=4, hidden_size=24, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32
    )
    return Teacher(Dinov2Model(config), PIXELS)


def entries(trainer, key="loss"):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def test_the_loss_is_the_weighted_sum_of_its_logged_parts(make_trainer):
    weights = {"task_loss": 0.5, "cka": 2.0, "gram": 3.0, "token": 0.25, "relation": 0.1}
    trainer = make_trainer(**{f"{name}_weight": weight for name, weight in weights.items()})
    trainer.train()
    parts = zip(*(entries(trainer, f"{n.removesuffix('_loss')}_loss") for n in weights), strict=True)
    expected = [sum(w * part for w, part in zip(weights.values(), step, strict=True)) for step in parts]
    assert entries(trainer) == pytest.approx(expected, abs=1e-5)


def test_cka_and_gram_of_the_first_step_equal_a_computation_from_hidden_states(make_trainer, vit_teacher, train_split):
    trainer = make_trainer(
        teacher=vit_teacher, token_weight=0.0, center_positions=False, cka_estimator="biased", max_steps=1,
        learning_rate=0.0, per_device_train_batch_size=128,
    )  # fmt: skip
    trainer.train()
    images = PIXELS.apply(train_split.images.float() / 255)
    with torch.no_grad():
        student = trainer.student(pixel_values=images, output_hidden_states=True).hidden_states
        teacher = vit_teacher.model(pixel_values=images, output_hidden_states=True).hidden_states
    pairs = [(student[1][:, 2:], teacher[2][:, 1:]), (student[3][:, 2:], teacher[3][:, 1:])]
    cka = sum(1 - linear_cka(s, t).mean() for s, t in pairs) / 2
    gram = sum(gram_distance(s, t).mean() for s, t in pairs) / 2
    assert entries(trainer, "cka_loss")[0] == pytest.approx(cka.item(), abs=1e-5)
    assert entries(trainer, "gram_loss")[0] == pytest.approx(gram.item(), abs=1e-5)


def test_the_token_loss_compares_projected_student_with_standardised_teacher_tokens(
    make_trainer, vit_teacher, train_split
):
    trainer = make_trainer(
        teacher=vit_teacher, cka_weight=0.0, gram_weight=0.0, teacher_statistics_samples=128, **ONE_STEP
    )
    trainer.train()
    images = PIXELS.apply(train_split.images.float() / 255)
    with torch.no_grad():
        student = trainer.student(pixel_values=images, output_hidden_states=True).hidden_states
        teacher = vit_teacher.model(pixel_values=images, output_hidden_states=True).hidden_states
        distances = []
        for layer, (s, t) in enumerate(
            [(student[1][:, 2:], teacher[2][:, 1:]), (student[3][:, 2:], teacher[3][:, 1:])]
        ):
            centered = t - t.mean(dim=0)
            target = centered / centered.square().mean(dim=(0, 1)).sqrt()
            distances.append(token_cosine_distance(trainer.model.heads["token"][layer](s), target).mean())
    assert entries(trainer, "token_loss")[0] == pytest.approx(torch.stack(distances).mean().item(), abs=1e-5)


@pytest.mark.parametrize("teacher_norm", [False, True])
def test_the_relation_loss_is_between_both_models_last_normed_blocks(
    make_trainer, vit_teacher, train_split, teacher_norm
):
    torch.nn.init.uniform_(vit_teacher.model.layernorm.weight, 0, 2)  # else a second norm would not show
    trainer = make_trainer(
        teacher=vit_teacher, cka_weight=0.0, gram_weight=0.0, token_weight=0.0, relation_weight=1.0,
        teacher_norm=teacher_norm, student_layers=[1, 0], teacher_layers=[1, 0], **ONE_STEP,
    )  # fmt: skip
    trainer.train()
    images = PIXELS.apply(train_split.images.float() / 255)
    with torch.no_grad():
        student = trainer.student.deit(pixel_values=images).last_hidden_state[:, 2:].mean(dim=1)
        states = vit_teacher.model(pixel_values=images, output_hidden_states=True).hidden_states
        teacher = vit_teacher.model.layernorm(states[2])[:, 1:].mean(dim=1)
    expected = correlation_divergence(student, teacher, 0.1)
    assert entries(trainer, "relation_loss")[0] == pytest.approx(expected.item(), rel=1e-4)


def test_relations_need_no_final_norm_of_the_teacher(make_trainer):
    trainer = make_trainer(cka_weight=0.0, gram_weight=0.0, token_weight=0.0, relation_weight=1.0, max_steps=2)
    trainer.train()
    assert trainer.teacher_side.statistics is None  # nothing here needs the teacher's statistics
    assert all(value > 0 for value in entries(trainer, "relation_loss"))


# ---- What the published study did ----


def test_the_published_heads_are_as_large_as_published():
    heads = PairedHeads(Widths((192,) * 4, (384,) * 4), "plain")
    assert sum(p.numel() for p in heads.parameters()) == 2_246_656


def test_published_heads_project_both_sides_of_token_cka_and_gram_losses(make_trainer, vit_teacher, train_split):
    trainer = make_trainer(
        teacher=vit_teacher, cka_estimator="biased", relation_weight=1.0, **PUBLISHED, **ONE_STEP
    )  # fmt: skip
    trainer.train()
    images = PIXELS.apply(train_split.images.float() / 255)
    heads = trainer.model.heads
    with torch.no_grad():
        student = trainer.student(pixel_values=images, output_hidden_states=True).hidden_states
        teacher = vit_teacher.model(pixel_values=images, output_hidden_states=True).hidden_states
        pairs = [(student[1][:, 2:], teacher[2][:, 1:]), (student[3][:, 2:], teacher[3][:, 1:])]
        functions = {"cka": lambda s, t: 1 - linear_cka(s, t), "gram": gram_distance, "token": token_cosine_distance}
        for name, function in functions.items():
            expected = sum(
                function(heads[name].student[layer](s), heads[name].teacher[layer](t)).mean()
                for layer, (s, t) in enumerate(pairs)
            )
            assert entries(trainer, f"{name}_loss")[0] == pytest.approx(expected.item() / 2, abs=1e-5), name


def test_published_heads_are_trained_on_both_sides_and_saved_apart_from_the_student(make_trainer, tmp_path):
    trainer = make_trainer(**PUBLISHED, optim="sgd", learning_rate=0.1)
    before = {name: tensor.clone() for name, tensor in trainer.model.heads.state_dict().items()}
    student = set(trainer.student.state_dict())
    trainer.train()
    after = trainer.model.heads.state_dict()
    assert all(not torch.equal(after[name], tensor) for name, tensor in before.items())
    trainer.save_model()
    assert set(load_file(tmp_path / "run" / "distillation" / "heads.safetensors")) == {
        f"heads.{name}" for name in before
    }
    assert set(trainer.student.state_dict()) == student
    assert not any("heads" in name for name in load_file(tmp_path / "run" / "model.safetensors"))


def test_labels_that_teach_the_cls_head_alone_leave_the_distillation_head_as_it_was(make_trainer):
    """Found in the published study: inference averages in a head that nothing has trained."""
    trainer = make_trainer(task_heads="cls", optim="sgd", learning_rate=0.1)
    before = {name: tensor.clone() for name, tensor in trainer.student.state_dict().items()}
    trainer.train()
    after = trainer.student.state_dict()
    assert torch.equal(after["distillation_classifier.weight"], before["distillation_classifier.weight"])
    assert not torch.equal(after["cls_classifier.weight"], before["cls_classifier.weight"])
    assert entries(trainer) == pytest.approx(
        [
            sum(parts)
            for parts in zip(*(entries(trainer, f"{n}_loss") for n in ("task", "cka", "gram", "token")), strict=True)
        ]
    )


# ---- Controls ----


def seen_by_the_teacher(trainer):
    """The images of each step as the teacher saw them."""
    seen, features = [], trainer.teacher.features

    def look(pixels, *args, **kwargs):
        if trainer.state.max_steps:  # statistics are taken before
            seen.append(pixels.clone())
        return features(pixels, *args, **kwargs)

    trainer.teacher.features = look
    return seen


@pytest.mark.parametrize("view", ["shared", "identical"])
def test_a_shuffled_teacher_sees_the_next_image_of_the_batch_in_training_alone(
    make_trainer, vit_teacher, train_split, view
):
    settings = {"teacher_view": view, "augmentation": AugmentationArguments(horizontal_flip=0.5), "max_steps": 2}
    statistics, batches = [], []
    for control in ("none", "shuffled"):
        vit_teacher.control = control
        trainer = make_trainer(teacher=vit_teacher, **settings)
        batches.append(seen_by_the_teacher(trainer))
        trainer.train()
        statistics.append(trainer.teacher_side.statistics)
        del vit_teacher.features
    assert len(batches[0]) == 2
    for own, shown in zip(*batches, strict=True):
        assert torch.equal(shown[:-1], own[1:])
        assert torch.equal(shown[-1], own[0])
    for (mean, std), (expected_mean, expected_std) in zip(*statistics, strict=True):
        assert torch.equal(mean, expected_mean)
        assert torch.equal(std, expected_std)


def test_a_shuffled_teacher_is_scored_on_its_own_images(
    make_student, make_teacher, make_args, train_split, eval_split, processor
):
    losses, accuracies, agreements = [], [], []
    for control in ("none", "shuffled"):
        teacher = make_teacher()
        teacher.control = control
        trainer = LogitDistillationTrainer(
            make_student(), make_args(LogitDistillationTrainingArguments, max_steps=2), train_dataset=train_split,
            eval_dataset=eval_split, processing_class=processor, teacher_model=teacher,
        )  # fmt: skip
        trainer.train()
        losses.append(entries(trainer, "kd_loss")[0])
        accuracies.append(trainer.teacher_accuracy)
        agreements.append(entries(trainer, "teacher_agreement")[0])
    assert accuracies[0] == accuracies[1]
    assert losses[0] != losses[1]
    assert agreements[0] != agreements[1]


def test_one_image_has_no_next(make_trainer, vit_teacher):
    vit_teacher.control = "shuffled"
    with pytest.raises(RecipeError, match="'teacher_control' and 'per_device_train_batch_size'"):
        make_trainer(teacher=vit_teacher, per_device_train_batch_size=1)


# ---- Geometry ----


@pytest.mark.parametrize("view", ["identical", "shared"])
def test_a_teacher_that_is_the_student_itself_costs_nothing(view, make_trainer, make_student, train_split):
    """Whatever the view's geometry, both sides look at the same places."""
    student = make_student()
    with torch.no_grad():
        if view == "shared":  # without position code and attention, a token depends on its patch alone
            student.deit.embeddings.position_embeddings.zero_()
            for layer in student.deit.layers:
                layer.attention.o_proj.weight.zero_()
    teacher = Teacher(copy.deepcopy(student), PIXELS)
    # a crop by whole patches moves tokens onto tokens
    augmentation = AugmentationArguments(random_crop_padding=3 if view == "identical" else 0, horizontal_flip=0.0)
    trainer = make_trainer(
        student, teacher, augmentation, teacher_view=view, token_weight=0.0, center_positions=False,
        student_layers=[0, 2], teacher_layers=[0, 2], max_steps=1, learning_rate=0.0,
    )  # fmt: skip
    if view == "shared":
        shift_by_whole_patches(trainer)
    trainer.train()
    assert entries(trainer, "cka_loss")[0] == pytest.approx(0, abs=1e-5)
    assert entries(trainer, "gram_loss")[0] == pytest.approx(0, abs=1e-5)


def shift_by_whole_patches(trainer):
    from hf_ihb.augment.ops import crop_flip
    from hf_ihb.step import Views, as_float

    def augment(images, index, *others):
        top, left = 4 * (index % 3), 4 * ((index // 3) % 3)
        still = torch.zeros(len(index), dtype=torch.bool)
        views, affine = crop_flip(images, torch.stack((top, left), dim=1), still, padding=4)
        return Views(as_float(images), as_float(views), affine, torch.ones(len(index)))

    trainer.batches.augmenter = augment


def test_the_clean_view_is_misaligned_where_the_shared_one_is_not(make_trainer, make_student):
    student = make_student()
    with torch.no_grad():
        student.deit.embeddings.position_embeddings.zero_()
        for layer in student.deit.layers:
            layer.attention.o_proj.weight.zero_()
    settings = {
        "token_weight": 0.0, "center_positions": False, "student_layers": [0], "teacher_layers": [0], "max_steps": 1,
        "learning_rate": 0.0,
    }  # fmt: skip
    found = {}
    for view in ("shared", "clean"):
        trainer = make_trainer(
            copy.deepcopy(student), Teacher(copy.deepcopy(student), PIXELS), teacher_view=view, **settings
        )
        shift_by_whole_patches(trainer)
        trainer.train()
        found[view] = entries(trainer, "gram_loss")[0]
    assert found["shared"] < 1e-5 < 1e-2 < found["clean"]


@pytest.mark.parametrize("view", ["shared", "identical"])
def test_mixed_images_leave_the_structural_losses_unless_the_teacher_sees_them_mixed(view, make_trainer):
    mixing = AugmentationArguments(mixup_alpha=1.0, mix_probability=0.9999)
    trainer = make_trainer(augmentation=mixing, teacher_view=view, max_steps=1, relation_weight=1.0)
    trainer.train()
    for name in ("cka_loss", "gram_loss", "token_loss", "relation_loss"):
        (value,) = entries(trainer, name)
        assert value == 0 if view == "shared" else value > 0
    assert entries(trainer, "compared_images") == ([0.0] if view == "shared" else [])


def test_the_share_of_images_that_structural_losses_compare_is_logged(make_trainer):
    trainer = make_trainer(augmentation=AugmentationArguments(cutmix_alpha=1.0, mix_probability=0.4), max_steps=2)
    seen, prepare = [], trainer.prepare

    def counted(inputs, train):
        step = prepare(inputs, train)
        if train:
            seen.append((step.views.own_share == 1).double().mean().item())
        return step

    trainer.prepare = counted
    trainer.train()
    assert entries(trainer, "compared_images") == pytest.approx(seen)
    assert all(0 < share < 1 for share in seen)


@pytest.mark.parametrize("view", ["shared", "clean"])
def test_mixing_that_leaves_no_image_to_the_structural_losses_is_refused(view, make_trainer):
    line = "'mix_probability' and 'teacher_view' contradict: .* the CKA, Gram, token loss; expected mix_probability < 1"
    with pytest.raises(ValueError, match=line):
        make_trainer(augmentation=AugmentationArguments(cutmix_alpha=1.0), teacher_view=view)


def test_warm_ups_raise_each_weight_linearly(make_trainer):
    trainer = make_trainer(cka_warmup_epochs=1.0, gram_weight=0.0, token_weight=0.0, max_steps=6)  # 4 steps an epoch
    trainer.train()
    task, cka = entries(trainer, "task_loss"), entries(trainer, "cka_loss")
    factors = [0, 0.25, 0.5, 0.75, 1, 1]
    expected = [t + f * c for t, f, c in zip(task, factors, cka, strict=True)]
    assert entries(trainer) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("settings", [{}, PUBLISHED, {"relation_weight": 1.0, "relation_warmup_epochs": 9.0}])
def test_every_parameter_gets_a_gradient_even_at_weight_zero(make_trainer, settings):
    trainer = make_trainer(token_warmup_epochs=10.0, cka_warmup_epochs=1.0, max_steps=1, **settings)
    missing = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            missing.extend(name for name, parameter in model.named_parameters() if parameter.grad is None)

    trainer.add_callback(Look())
    trainer.train()
    assert missing == []


def test_both_heads_that_inference_averages_learn(make_trainer):
    trainer = make_trainer(max_steps=2)
    before = {name: tensor.clone() for name, tensor in trainer.student.state_dict().items()}
    trainer.train()
    for head in ("cls_classifier.weight", "distillation_classifier.weight"):
        assert not torch.equal(trainer.student.state_dict()[head], before[head])


def test_per_image_losses_do_not_care_how_a_batch_is_accumulated(make_trainer):
    augmentation = AugmentationArguments(
        random_crop_padding=3, horizontal_flip=0.5, cutmix_alpha=1.0, mix_probability=0.4
    )
    whole, parts = (
        make_trainer(
            augmentation=augmentation, center_positions=False, optim="sgd", learning_rate=0.05,
            per_device_train_batch_size=32 // n, gradient_accumulation_steps=n,
        )
        for n in (1, 4)
    )  # fmt: skip
    whole.train(), parts.train()
    assert entries(parts) == pytest.approx(entries(whole), abs=1e-5)
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(parts.model.state_dict()[name], tensor, rtol=0, atol=1e-5)


def test_the_projections_are_the_only_parameters_beside_the_student_and_none_is_the_teachers(make_trainer):
    trainer = make_trainer()
    extra = {n: tuple(p.shape) for n, p in trainer.model.named_parameters() if not n.startswith("student.")}
    assert extra == {
        "heads.token.0.weight": (32, 32), "heads.token.0.bias": (32,),
        "heads.token.1.weight": (64, 32), "heads.token.1.bias": (64,),
    }  # fmt: skip
    assert not list(make_trainer(token_weight=0.0).model.heads.parameters())


def test_the_students_start_does_not_depend_on_the_losses(make_trainer, make_student):
    settings = ({"token_weight": 0.0}, {"token_weight": 1.0}, {"teacher_projector": "trainable"})
    first, *others = (make_trainer(make_student(), **one) for one in settings)
    for name, tensor in first.student.state_dict().items():
        assert all(torch.equal(other.student.state_dict()[name], tensor) for other in others)


def test_training_leaves_the_teacher_as_it_was(make_trainer, make_teacher):
    teacher = make_teacher(None)
    before = {name: tensor.clone() for name, tensor in teacher.model.state_dict().items()}
    make_trainer(teacher=teacher).train()
    assert not teacher.model.training
    for name, tensor in teacher.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(("heads", "count"), [({}, 4), (PUBLISHED | {"relation_weight": 1.0}, 3 * 2 * 2 * 8)])
def test_resuming_brings_back_the_heads_and_equals_never_stopping(make_trainer, make_student, tmp_path, heads, count):
    augmentation = AugmentationArguments(
        random_crop_padding=3, horizontal_flip=0.5, mixup_alpha=0.8, mix_probability=0.3
    )
    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "augmentation": augmentation, **heads}
    whole = make_trainer(make_student(drop_path_rate=0.2), **settings)
    whole.train()
    checkpoint = tmp_path / "run" / "checkpoint-3"
    assert len(load_file(checkpoint / "distillation" / "heads.safetensors")) == count
    resumed = make_trainer(make_student(drop_path_rate=0.2), **settings, output_dir=str(tmp_path / "resumed"))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert entries(resumed) == entries(whole)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


def test_position_statistics_of_the_teacher_equal_numpy(make_trainer, vit_teacher, train_split):
    trainer = make_trainer(teacher=vit_teacher, teacher_statistics_samples=128)
    statistics = trainer.teacher_side.measure_statistics()
    mean, std = statistics["mean.0"], statistics["std.0"]
    with torch.no_grad():
        images = PIXELS.apply(train_split.images.float() / 255)
        _, (feature_map, *_) = extract_features(vit_teacher.model, images, [1])
    tokens = feature_map.patch_tokens.double().numpy()
    torch.testing.assert_close(mean, torch.from_numpy(tokens.mean(0)).float(), rtol=1e-4, atol=1e-5)
    expected = ((tokens - tokens.mean(0)) ** 2).mean((0, 1)) ** 0.5
    torch.testing.assert_close(std, torch.from_numpy(expected).float(), rtol=1e-4, atol=1e-6)


def test_a_student_block_that_does_not_exist_is_named(make_trainer):
    with pytest.raises(RecipeError, match=r"student_layers.*has blocks 0 to 2, not 3"):
        make_trainer(student_layers=[0, 3])


def test_a_teacher_block_of_one_token_holds_no_structure(make_trainer, make_teacher):
    teacher = make_teacher(None)
    teacher.pixels = teacher.pixels.whole((8, 8))  # four stages: 8, 4, 2, 1
    with pytest.raises(RecipeError, match="expected several tokens, found one in block 3"):
        make_trainer(teacher=teacher, student_layers=[0], teacher_layers=[3])
    pooled = {"cka_weight": 0.0, "gram_weight": 0.0, "token_weight": 0.0, "sp_weight": 1.0}
    trainer = make_trainer(teacher=teacher, student_layers=[0], teacher_layers=[3], **pooled)  # which asks for one
    assert trainer.teacher_side.layers.teacher_grids[-1] == (1, 1)


def test_a_teacher_block_that_does_not_exist_is_named(make_trainer, vit_teacher):
    with pytest.raises(TeacherMismatchError, match="has blocks 0 to 2, not 7"):
        make_trainer(teacher=vit_teacher, student_layers=[0], teacher_layers=[7])
