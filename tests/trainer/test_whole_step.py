"""A whole step of every trainer on a pretended GPU: views, teacher, student, losses, optimizer, average, evaluation.

See `tests.invariants.test_no_waits`. A tensor on the wrong device, and a question to the device, are errors there;
copies between host and device are listed. Gradients are made up: torch's engine asks a real device for its streams
before it goes backwards, and on one device no operation of ours has a backward pass of its own.
"""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Dinov2Config, Dinov2Model, set_seed

from hf_ihb.config.augmentation import AugmentationArguments
from hf_ihb.config.model import ModelArguments
from hf_ihb.models.processing import PixelFormat
from hf_ihb.models.student import build_student
from hf_ihb.models.teacher import Teacher
from hf_ihb.trainer import (
    DistillationTrainer,
    LogitDistillationTrainer,
    StructuralDistillationTrainer,
    SupervisedTrainer,
    batches,
    teacher_cache,
)
from hf_ihb.trainer.arguments import (
    LogitDistillationTrainingArguments,
    StructuralDistillationTrainingArguments,
    SupervisedTrainingArguments,
)
from tests.invariants.test_no_waits import GPU, TABLES, Copies
from tests.trainer.conftest import LABELS, MEAN, SIZE, STD

EVERYTHING = AugmentationArguments(
    random_crop_padding=2, horizontal_flip=0.5, rotation_degrees=10.0, auto_augment="randaugment", random_erasing=0.25,
    brightness=0.4, saturation=0.4, mixup_alpha=0.8, cutmix_alpha=1.0, mix_probability=0.5,
)  # fmt: skip
UNMIXED = dataclasses.replace(EVERYTHING, mixup_alpha=0.0, cutmix_alpha=0.0)
STRUCTURAL = {
    "cka": {"cka_weight": 1.0, "gram_weight": 1.0}, "rbf": {"cka_weight": 1.0, "cka_kernel": "rbf"},
    "pooled": {"cka_weight": 1.0, "cka_scope": "pooled"}, "images": {"cka_weight": 1.0, "cka_scope": "images"},
    "centred": {"cka_weight": 1.0, "center_positions": True},
    "identical": {"cka_weight": 1.0, "teacher_view": "identical"},
    "token": {"cka_weight": 0.0, "token_weight": 1.0}, "relation": {"cka_weight": 0.0, "relation_weight": 1.0},
    "published": {
        "cka_weight": 1.0, "gram_weight": 1.0, "cka_estimator": "published", "teacher_projector": "trainable",
        "teacher_view": "identical",
    },
}  # fmt: skip
LOGITS = {"soft": {}, "hard": {"distillation_type": "hard"}, "both": {"distilled_heads": "both"}}
CASES = [
    *((SupervisedTrainer, architecture, {}) for architecture in ("deit", "deit_cls", "adaptive_cnn")),
    (SupervisedTrainer, "resnet18_cifar_w16", {"ema_decay": 0.9}),
    *((LogitDistillationTrainer, "deit", LOGITS[name] | {"teacher_cache": "off"}) for name in LOGITS),
    (LogitDistillationTrainer, "deit_cls", {"teacher_view": "clean", "teacher_cache": "logits"}),
    *((StructuralDistillationTrainer, "deit", settings | {"teacher_cache": "off"}) for settings in STRUCTURAL.values()),
    *((StructuralDistillationTrainer, "deit", STRUCTURAL[n] | {"teacher_cache": "gram"}) for n in ("cka", "centred")),
    *((StructuralDistillationTrainer, "deit", STRUCTURAL[n] | {"teacher_cache": "tokens"}) for n in ("token", "rbf")),
]


def make_cnn(architecture):
    return build_student(ModelArguments(architecture=architecture), LABELS, SIZE, MEAN, STD)[0]


@pytest.fixture
def make(make_student, make_teacher, make_args, train_split, eval_split, processor, tmp_path):
    def made(trainer_class, architecture, settings):
        arguments_class, more = trainer_class.arguments_class, {}
        if arguments_class is StructuralDistillationTrainingArguments:
            set_seed(5)
            config = Dinov2Config(
                image_size=16, patch_size=4, hidden_size=24, num_hidden_layers=3, num_attention_heads=2,
                intermediate_size=32,
            )  # fmt: skip
            pixels = PixelFormat((0.5,) * 3, (0.25,) * 3, (16, 16))
            more["teacher_model"] = Teacher(Dinov2Model(config), pixels)
            settings = {"student_layers": [0, 2], "teacher_layers": [1, 2]} | settings
        elif arguments_class is LogitDistillationTrainingArguments:
            more["teacher_model"] = make_teacher()
        if arguments_class is not SupervisedTrainingArguments:
            settings = settings | {"teacher_cache_dir": str(tmp_path / "caches")}
        small = make_student if architecture.startswith("deit") else make_cnn
        return trainer_class(
            small(architecture), make_args(arguments_class, **settings), train_dataset=train_split,
            eval_dataset=eval_split, processing_class=processor,
            augmentation=UNMIXED if settings.get("teacher_view") == "clean" else EVERYTHING, **more,
        )  # fmt: skip

    return made


def elsewhere(tensor, device=GPU):
    """A tensor of that shape on a device, inside of the fake mode."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


def backward(module):
    for parameter in module.parameters():
        parameter.grad = elsewhere(parameter)


def move(module):
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                part._parameters[name] = torch.nn.Parameter(elsewhere(value), value.requires_grad)
        for name, value in part._buffers.items():
            part._buffers[name] = None if value is None else elsewhere(value)


def move_trainer(trainer, monkeypatch, data_on=GPU):
    """Onto the GPU, its data and cache onto that device."""
    monkeypatch.setattr(type(trainer.args), "device", property(lambda args: GPU))
    move(trainer.model)
    for split in (trainer.train_dataset, trainer.eval_dataset):
        moved = copy.copy(split)
        moved.images, moved.labels = elsewhere(split.images, data_on), elsewhere(split.labels, data_on)
        trainer.batches.placed[id(split)] = (split, moved)
    if (teacher := getattr(trainer, "teacher", None)) is not None:
        move(teacher.model)
        if teacher.permutation is not None:
            teacher.permutation = elsewhere(teacher.permutation)
    side = getattr(trainer, "teacher_side", None)
    if side is not None and side.statistics is not None:
        side.statistics = [tuple(map(elsewhere, pair)) for pair in side.statistics]
    if (cache := getattr(trainer, "teacher_cache", None)) is not None:
        cache._rows = elsewhere(cache._rows, data_on)
        cache.codes = [type(code)(*map(elsewhere, code)) for code in cache.codes]


def batch_of(split, count=8):
    index, rows = torch.empty(count, dtype=torch.long, device=GPU), np.arange(count)
    images, labels = (elsewhere(x[:count]) for x in (split.images, split.labels))
    return {"pixel_values": images, "labels": labels, "index": index, "rows": rows, "split": split.key}


@pytest.fixture
def clean_tables():
    for table in TABLES:
        table.cache_clear()
    yield
    for table in TABLES:
        table.cache_clear()


def run_steps(trainer, monkeypatch, data_on=GPU):
    """Two steps of training and evaluation; the copies of the second."""
    if isinstance(trainer, DistillationTrainer):
        trainer.prepare_teacher()
    trainer.teacher_accuracy = 1.0
    trainer._begin_training()
    trainer.current_gradient_accumulation_steps = 1
    for table in TABLES:
        table.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=data_on != GPU):
        move_trainer(trainer, monkeypatch, data_on)
        trainer.create_optimizer()
        monkeypatch.setattr(trainer.accelerator, "backward", lambda loss, **kwargs: backward(trainer.model))
        trainer._averaging.on_train_begin(trainer.args, trainer.state, trainer.control)
        train = batch_of(trainer.batches.place(trainer.train_dataset))
        placed = trainer.batches.place(trainer.eval_dataset)

        def step():
            trainer.model.train()
            loss = trainer.training_step(trainer.model, train)
            assert (loss.ndim, loss.device) == (0, GPU)
            trainer.optimizer.step()
            trainer.state.global_step += 1
            trainer._averaging.on_step_end(trainer.args, trainer.state, trainer.control)
            trainer.floating_point_ops(train)
            trainer.optimizer.zero_grad()
            trainer.model.eval()
            trainer.prediction_step(trainer.model, batch_of(placed), False)

        step()
        with Copies() as copies:
            step()
    return copies.found


@pytest.mark.usefixtures("clean_tables")
@pytest.mark.parametrize(("trainer_class", "architecture", "settings"), CASES)
def test_a_step_is_on_one_device_and_asks_it_for_nothing(trainer_class, architecture, settings, make, monkeypatch):
    assert run_steps(make(trainer_class, architecture, settings), monkeypatch) == []


@pytest.mark.usefixtures("clean_tables")
@pytest.mark.parametrize(("trainer_class", "settings"), [
    (SupervisedTrainer, {}), (LogitDistillationTrainer, {"teacher_view": "clean", "teacher_cache": "logits"}),
    (StructuralDistillationTrainer, STRUCTURAL["cka"] | {"teacher_cache": "gram"}),
])  # fmt: skip
def test_images_and_caches_on_the_host_are_read_without_asking_the_device(trainer_class, settings, make, monkeypatch):
    sent = []

    def onto(device, *tensors):  # page-locked memory is not to be had without a GPU
        assert all(x.device.type == "cpu" for x in tensors)
        sent.append(tensors[0].shape)
        shape = tensors[0].shape if len(tensors) == 1 else (len(tensors[1]), *tensors[0].shape[1:])
        return torch.empty(shape, dtype=tensors[0].dtype, device=device)

    for module in (batches, teacher_cache):
        monkeypatch.setattr(module, "rows_onto", onto)
    monkeypatch.setattr(batches, "onto", onto)
    monkeypatch.setattr(batches, "placement", lambda num_bytes, device: "host")
    assert run_steps(make(trainer_class, "deit", settings), monkeypatch, torch.device("cpu")) == []
    mixes = settings.get("teacher_view") != "clean"
    assert len(sent) == 2 * (3 * mixes + ("teacher_cache" in settings))
