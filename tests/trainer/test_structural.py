import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import Dinov2Config, Dinov2Model, TrainerCallback, set_seed

from hf_ihb.arguments import AugmentationArguments, StructuralDistillationTrainingArguments
from hf_ihb.errors import RecipeError, TeacherMismatchError
from hf_ihb.functional.similarity import gram_distance, linear_cka
from hf_ihb.models.features import extract_features
from hf_ihb.models.processing import PixelFormat
from hf_ihb.models.teacher import Teacher
from hf_ihb.trainer import StructuralDistillationTrainer

ALL = {"cka_weight": 1.0, "gram_weight": 1.0, "token_weight": 1.0}
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
    trainer = make_trainer(task_loss_weight=0.5, cka_weight=2.0, gram_weight=3.0, token_weight=0.25)
    trainer.train()
    parts = zip(*(entries(trainer, f"{n}_loss") for n in ("task", "cka", "gram", "token")), strict=True)
    expected = [0.5 * task + 2 * cka + 3 * gram + 0.25 * token for task, cka, gram, token in parts]
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
    from hf_ihb.functional.augment import crop_flip
    from hf_ihb.views import Views, as_float

    def augment(images, index):
        top, left = 4 * (index % 3), 4 * ((index // 3) % 3)
        views, affine = crop_flip(images, top, left, torch.zeros(len(index), dtype=torch.bool), padding=4)
        return Views(as_float(images), as_float(views), affine, torch.ones(len(index)))

    trainer._augment = augment


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
    trainer = make_trainer(augmentation=AugmentationArguments(mixup_alpha=1.0), teacher_view=view, max_steps=1)
    trainer.train()
    for name in ("cka_loss", "gram_loss", "token_loss"):
        (value,) = entries(trainer, name)
        assert value == 0 if view == "shared" else value > 0


def test_warm_ups_raise_each_weight_linearly(make_trainer):
    trainer = make_trainer(cka_warmup_epochs=1.0, gram_weight=0.0, token_weight=0.0, max_steps=6)  # 4 steps an epoch
    trainer.train()
    task, cka = entries(trainer, "task_loss"), entries(trainer, "cka_loss")
    factors = [0, 0.25, 0.5, 0.75, 1, 1]
    expected = [t + f * c for t, f, c in zip(task, factors, cka, strict=True)]
    assert entries(trainer) == pytest.approx(expected, abs=1e-5)


def test_every_parameter_gets_a_gradient_even_at_weight_zero(make_trainer):
    trainer = make_trainer(token_warmup_epochs=10.0, max_steps=1)
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
        "projections.0.weight": (32, 32), "projections.0.bias": (32,),
        "projections.1.weight": (64, 32), "projections.1.bias": (64,),
    }  # fmt: skip
    assert not list(make_trainer(token_weight=0.0).model.projections.parameters())


def test_the_students_start_does_not_depend_on_the_losses(make_trainer, make_student):
    first, second = (make_trainer(make_student(), token_weight=w) for w in (0.0, 1.0))
    for name, tensor in first.student.state_dict().items():
        assert torch.equal(second.student.state_dict()[name], tensor)


def test_training_leaves_the_teacher_as_it_was(make_trainer, make_teacher):
    teacher = make_teacher(None)
    before = {name: tensor.clone() for name, tensor in teacher.model.state_dict().items()}
    make_trainer(teacher=teacher).train()
    assert not teacher.model.training
    for name, tensor in teacher.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_resuming_brings_back_the_heads_and_equals_never_stopping(make_trainer, make_student, tmp_path):
    augmentation = AugmentationArguments(
        random_crop_padding=3, horizontal_flip=0.5, mixup_alpha=0.8, mix_probability=0.3
    )
    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "augmentation": augmentation}
    whole = make_trainer(make_student(drop_path_rate=0.2), **settings)
    whole.train()
    checkpoint = tmp_path / "run" / "checkpoint-3"
    assert len(load_file(checkpoint / "distillation" / "heads.safetensors")) == 4
    resumed = make_trainer(make_student(drop_path_rate=0.2), **settings, output_dir=str(tmp_path / "resumed"))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert entries(resumed) == entries(whole)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


def test_position_statistics_of_the_teacher_equal_numpy(make_trainer, vit_teacher, train_split):
    trainer = make_trainer(teacher=vit_teacher, teacher_statistics_samples=128)
    (mean, std), *_ = trainer._teacher_statistics()
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
    teacher.pixels = teacher.pixels._replace(size=(8, 8))  # four stages: 8, 4, 2, 1
    with pytest.raises(RecipeError, match="expected several tokens, found one in block 3"):
        make_trainer(teacher=teacher, student_layers=[0], teacher_layers=[3])


def test_a_teacher_block_that_does_not_exist_is_named(make_trainer, vit_teacher):
    with pytest.raises(TeacherMismatchError, match="has blocks 0 to 2, not 7"):
        make_trainer(teacher=vit_teacher, student_layers=[0], teacher_layers=[7])
