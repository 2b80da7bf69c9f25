import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_ihb.config.augmentation import AugmentationArguments
from hf_ihb.errors import TeacherMismatchError
from hf_ihb.methods.schedules import scheduled_alpha
from hf_ihb.trainer import LogitDistillationTrainer
from hf_ihb.trainer.arguments import LogitDistillationTrainingArguments


@pytest.fixture
def make_trainer(make_student, make_teacher, make_args, train_split, eval_split, processor):
    def make(student=None, teacher=None, augmentation=None, eval_dataset=eval_split, **overrides):
        return LogitDistillationTrainer(
            student or make_student(),
            make_args(LogitDistillationTrainingArguments, **overrides),
            train_dataset=train_split,
            eval_dataset=eval_dataset,
            processing_class=processor,
            augmentation=augmentation,
            teacher_model=teacher or make_teacher(),
        )

    return make


def entries(trainer, key="loss"):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def pixels(split):
    return (split.images.float() / 255 - 0.5) / 0.25


@pytest.mark.parametrize(("kind", "temperature"), [("soft", 3.0), ("hard", 1.0)])
def test_the_loss_is_cls_cross_entropy_plus_kd_on_the_distillation_head(kind, temperature, make_trainer, train_split):
    trainer = make_trainer(
        alpha=0.3, temperature=temperature, distillation_type=kind, max_steps=1, learning_rate=0.0,
        per_device_train_batch_size=128, label_smoothing_factor=0.1,
    )  # fmt: skip
    trainer.train()
    with torch.no_grad():
        student = trainer.student.train()(pixel_values=pixels(train_split))
        teacher = trainer.teacher.model(pixel_values=pixels(train_split)).logits
    task = F.cross_entropy(student.cls_logits, train_split.labels, label_smoothing=0.1)
    if kind == "soft":
        p = (teacher / temperature).softmax(-1)
        log_q = (student.distillation_logits / temperature).log_softmax(-1)
        kd = (p * (p.log() - log_q)).sum(-1).mean() * temperature**2
    else:
        kd = F.cross_entropy(student.distillation_logits, teacher.argmax(-1))
    assert entries(trainer)[0] == pytest.approx((0.7 * task + 0.3 * kd).item(), abs=1e-4)
    assert entries(trainer, "kd_loss")[0] == pytest.approx(kd.item(), abs=1e-4)
    agreement = (student.distillation_logits.argmax(-1) == teacher.argmax(-1)).float().mean().item()
    assert trainer.state.log_history[1]["teacher_agreement"] == pytest.approx(agreement, abs=0.02)


def test_a_student_with_one_head_gets_both_losses_on_its_logits(make_trainer, make_student, train_split):
    trainer = make_trainer(
        make_student("vit"), alpha=0.5, max_steps=1, learning_rate=0.0, per_device_train_batch_size=128
    )
    trainer.train()
    with torch.no_grad():
        logits = trainer.student(pixel_values=pixels(train_split)).logits
        teacher = trainer.teacher.model(pixel_values=pixels(train_split)).logits
    kd = F.kl_div(logits.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")
    expected = 0.5 * F.cross_entropy(logits, train_split.labels) + 0.5 * kd
    assert entries(trainer)[0] == pytest.approx(expected.item(), abs=1e-4)


def test_before_the_warm_up_ends_the_distillation_head_is_not_moved_by_the_teacher(make_trainer):
    trainer = make_trainer(
        alpha=0.9, distillation_warmup_epochs=0.5, distillation_warmup_type="step", max_steps=4, weight_decay=0.0
    )  # 4 steps an epoch
    head, snapshots = trainer.student.distillation_classifier.weight, []

    class Look(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            snapshots.append(head.detach().clone())

    start = head.detach().clone()
    trainer.add_callback(Look())
    trainer.train()
    assert torch.equal(snapshots[1], start)
    assert not torch.equal(snapshots[2], start)
    task, kd = entries(trainer, "task_loss"), entries(trainer, "kd_loss")
    assert entries(trainer)[1] == pytest.approx(task[1], abs=1e-6)
    assert entries(trainer)[2] == pytest.approx(0.1 * task[2] + 0.9 * kd[2], abs=1e-5)


def test_both_heads_learn_from_labels_and_teacher_where_a_recipe_says_so(make_trainer, train_split):
    trainer = make_trainer(
        distilled_heads="both", alpha=0.3, temperature=2.0, max_steps=1, learning_rate=0.0,
        per_device_train_batch_size=128,
    )  # fmt: skip
    trainer.train()
    with torch.no_grad():
        student = trainer.student.train()(pixel_values=pixels(train_split))
        teacher = trainer.teacher.model(pixel_values=pixels(train_split)).logits
    expected = 0
    for logits in (student.cls_logits, student.distillation_logits):
        kd = F.kl_div((logits / 2).log_softmax(-1), (teacher / 2).softmax(-1), reduction="batchmean") * 4
        expected += (0.7 * F.cross_entropy(logits, train_split.labels) + 0.3 * kd) / 2
    assert entries(trainer)[0] == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("warmup", ["step", "linear"])
def test_the_cosine_of_alpha_has_the_published_values(warmup):
    published = {5: 0.0, 10: 0.0041, 28: 0.0827, 52: 0.295, 75: 0.5032, 99: 0.5998, 100: 0.6}
    for epoch, value in published.items():
        assert scheduled_alpha(epoch, 100, 0.0, 0.6, "cosine", 5, warmup) == pytest.approx(value, abs=6e-5)
    begin = [scheduled_alpha(epoch, 100, 0.2, 0.6, "cosine", 5, warmup) for epoch in (0, 2.5, 5)]
    assert begin == ([0, 0, 0.2] if warmup == "step" else [0, 0.1, 0.2])


def test_alpha_follows_its_schedule_over_the_fractional_epochs_of_training(make_trainer):
    trainer = make_trainer(
        alpha=0.8, alpha_start=0.2, alpha_schedule="linear", distillation_warmup_epochs=0.5,
        distillation_warmup_type="linear", max_steps=6,
    )  # 4 steps an epoch: 1.5 epochs  # fmt: skip
    trainer.train()
    parts = zip(*(entries(trainer, key) for key in ("loss", "task_loss", "kd_loss")), strict=True)
    alphas = [0.0, 0.1, 0.2, 0.35, 0.5, 0.65]
    for alpha, (loss, task, kd) in zip(alphas, parts, strict=True):
        assert loss == pytest.approx((1 - alpha) * task + alpha * kd, abs=1e-5)


# ---- A DeiT that is saved with one head ----


def test_a_deit_with_one_head_is_distilled_through_a_head_that_is_not_saved_with_it(
    make_trainer, make_student, train_split, eval_split, tmp_path
):
    trainer = make_trainer(
        make_student("deit_cls"), alpha=0.3, max_steps=1, learning_rate=0.0, per_device_train_batch_size=128
    )
    trainer.train()
    metrics = trainer.evaluate()
    student, head = trainer.student, trainer.model.distillation_head

    def logits(split):
        with torch.no_grad():
            tokens = student.deit(pixel_values=pixels(split)).last_hidden_state
            return student.classifier(tokens[:, 0]), head(tokens[:, 1])

    cls, distillation = logits(train_split)
    with torch.no_grad():
        teacher = trainer.teacher.model(pixel_values=pixels(train_split)).logits
    kd = F.kl_div(distillation.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")
    expected = 0.7 * F.cross_entropy(cls, train_split.labels) + 0.3 * kd
    assert entries(trainer)[0] == pytest.approx(expected.item(), abs=1e-5)

    for name, scores in zip(("cls_accuracy", "distillation_accuracy"), logits(eval_split), strict=True):
        accuracy = (scores.argmax(-1) == eval_split.labels).double().mean().item()
        assert metrics[f"eval_{name}"] == pytest.approx(accuracy, abs=1e-12)
    assert metrics["eval_accuracy"] == metrics["eval_cls_accuracy"]
    with torch.no_grad():
        (used,) = trainer.model(pixel_values=pixels(eval_split)).heads
    torch.testing.assert_close(used, logits(eval_split)[0])

    trainer.save_model()
    saved = type(student).from_pretrained(tmp_path / "run")
    assert not any("distillation" in name for name in saved.state_dict() if "token" not in name)
    heads = load_file(tmp_path / "run" / "distillation" / "heads.safetensors")
    assert torch.equal(heads["distillation_head.weight"], head.weight)


def test_the_head_beside_a_deit_is_drawn_from_a_stream_of_its_own(make_trainer, make_student):
    trainer, student = make_trainer(make_student("deit_cls")), make_student("deit_cls")
    before = torch.get_rng_state()
    heads = [trainer._module(student, trainer.args, dict).distillation_head.weight for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*heads)
    assert heads[0].std().item() == pytest.approx(student.config.initializer_range, rel=0.3)


def test_the_one_head_of_a_deit_gets_both_losses_where_both_heads_are_distilled(
    make_trainer, make_student, train_split
):
    trainer = make_trainer(
        make_student("deit_cls"), distilled_heads="both", alpha=0.5, max_steps=1, learning_rate=0.0,
        per_device_train_batch_size=128,
    )  # fmt: skip
    trainer.train()
    with torch.no_grad():
        logits = trainer.student(pixel_values=pixels(train_split)).logits
        teacher = trainer.teacher.model(pixel_values=pixels(train_split)).logits
    kd = F.kl_div(logits.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")
    expected = 0.5 * F.cross_entropy(logits, train_split.labels) + 0.5 * kd
    assert entries(trainer)[0] == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("head", ["cls", "distillation"])
def test_a_student_that_answers_with_one_of_its_heads_has_both_trained(head, make_student, make_trainer):
    student = make_student(inference_head=head, layer_scale_init=0.1)
    assert student.config.inference_head == head
    trainer = make_trainer(student, alpha=0.5)
    missing = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            missing.extend(name for name, parameter in model.named_parameters() if parameter.grad is None)

    before = {name: p.detach().clone() for name, p in student.named_parameters() if "classifier" in name}
    trainer.add_callback(Look())
    trainer.train()
    assert missing == []
    assert len(before) == 4
    for name, tensor in before.items():
        assert not torch.equal(student.state_dict()[name], tensor), name


# ---- The teacher ----


def test_training_leaves_the_teacher_as_it_was(make_trainer, make_teacher):
    teacher = make_teacher()
    before = {name: tensor.clone() for name, tensor in teacher.model.state_dict().items()}
    trainer = make_trainer(teacher=teacher, augmentation=AugmentationArguments(mixup_alpha=1.0), max_steps=8)
    trainer.train()
    assert not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    for name, tensor in teacher.model.state_dict().items():  # batch-norm statistics among them
        assert torch.equal(tensor, before[name]), name
    assert not any("teacher" in name for name in trainer.model.state_dict())


def test_accumulation_equals_one_batch(make_trainer):
    mixing = AugmentationArguments(random_crop_padding=2, mixup_alpha=0.8, cutmix_alpha=1.0)
    whole, parts = (
        make_trainer(
            augmentation=mixing, optim="sgd", learning_rate=0.1, per_device_train_batch_size=32 // n,
            gradient_accumulation_steps=n,
        )
        for n in (1, 4)
    )  # fmt: skip
    whole.train(), parts.train()
    assert entries(parts) == pytest.approx(entries(whole), abs=5e-6)
    for name, tensor in whole.student.state_dict().items():
        torch.testing.assert_close(parts.student.state_dict()[name], tensor, rtol=0, atol=5e-6)


def test_the_identical_view_shows_the_teacher_the_students_pixels(make_trainer):
    trainer = make_trainer(
        augmentation=AugmentationArguments(random_crop_padding=4, horizontal_flip=0.5, cutmix_alpha=1.0), max_steps=1
    )
    seen = {"student": [], "teacher": []}
    for name, model in (("student", trainer.student), ("teacher", trainer.teacher.model)):
        model.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: seen[name].append(kwargs["pixel_values"]), with_kwargs=True
        )
    trainer.train()
    # both normalise alike here, so one view is one tensor of pixels; the last forward of each is the training step's
    assert torch.equal(seen["student"][-1], seen["teacher"][-1])
    assert not torch.equal(seen["student"][-1], pixels(trainer.train_dataset)[:32])


def test_the_teacher_is_scored_before_training_and_logged_once(make_trainer, eval_split, make_teacher):
    trainer = make_trainer()
    with torch.no_grad():
        decisions = make_teacher().model(pixel_values=pixels(eval_split)).logits.argmax(-1)
    expected = (decisions == eval_split.labels).double().mean().item()
    trainer.train()
    assert entries(trainer, "teacher_accuracy") == [pytest.approx(expected, abs=1e-12)]
    metrics = trainer.evaluate()
    with torch.no_grad():
        student = trainer.student.eval()(pixel_values=pixels(eval_split)).logits.argmax(-1)
    assert metrics["eval_teacher_agreement"] == pytest.approx((student == decisions).double().mean().item(), abs=1e-12)


def test_without_an_evaluation_set_the_teacher_is_scored_on_training_images(make_trainer):
    trainer = make_trainer(eval_dataset=None)
    trainer.train()
    assert entries(trainer, "teacher_accuracy")[0] > 0.5


@pytest.mark.parametrize("control", ["none", "shuffled"])
def test_a_teacher_at_chance_is_refused_before_a_step_is_made(control, make_trainer, make_teacher):
    teacher = make_teacher()
    teacher.control = control  # a shuffled teacher is scored on its own images
    teacher.permutation = torch.tensor([1, 2, 3, 0])
    trainer = make_trainer(teacher=teacher)
    with pytest.raises(TeacherMismatchError, match=r"expected accuracy above chance, 0\.250, found 0\.0"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_an_untrained_control_may_be_at_chance_and_its_accuracy_is_logged(make_trainer, make_teacher):
    teacher = make_teacher()
    teacher.permutation = torch.tensor([1, 2, 3, 0])
    teacher.control = "untrained"
    trainer = make_trainer(teacher=teacher, max_steps=1)
    trainer.train()
    assert entries(trainer, "teacher_accuracy")[0] < 0.25


def test_a_teacher_with_its_classes_in_another_order_is_read_by_name(make_trainer, make_teacher):
    teacher = make_teacher()
    order = [2, 0, 3, 1]
    classifier = teacher.model.timm_model.fc
    with torch.no_grad():
        classifier.weight.copy_(classifier.weight[order])
        classifier.bias.copy_(classifier.bias[order])
    names = [teacher.model.config.id2label[i] for i in order]
    teacher.model.config.id2label = dict(enumerate(names))
    shuffled = type(teacher)(teacher.model, teacher.pixels, ["red", "green", "blue", "dark"])
    scores = [make_trainer(teacher=t).score_teacher() for t in (make_teacher(), shuffled)]
    assert scores[0] == scores[1] > 0.5


@pytest.mark.parametrize("by_init", [False, True])
def test_a_model_given_as_teacher_is_read_by_the_students_class_names(
    by_init, make_student, make_teacher, make_args, train_split, processor
):
    student = make_student()
    student.config.id2label = dict(enumerate(["blue", "dark", "red", "green"]))
    given = {"model_init": lambda: student} if by_init else {"model": student}
    trainer = LogitDistillationTrainer(
        args=make_args(LogitDistillationTrainingArguments), train_dataset=train_split, processing_class=processor,
        teacher_model=make_teacher().model, teacher_processor=processor, **given,
    )  # fmt: skip
    assert trainer.teacher.permutation.tolist() == [2, 3, 0, 1]


def test_a_clean_view_contradicts_mixing(make_trainer):
    with pytest.raises(ValueError, match="teacher_logits_view"):
        make_trainer(teacher_view="clean", augmentation=AugmentationArguments(mixup_alpha=0.5))
