import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_ihb.config.augmentation import AugmentationArguments
from hf_ihb.config.model import ModelArguments
from hf_ihb.errors import CheckpointError, RecipeError
from hf_ihb.models.student import build_student
from hf_ihb.trainer import SupervisedTrainer
from hf_ihb.trainer.arguments import SupervisedTrainingArguments
from hf_ihb.trainer.averaging import Averaging

AUGMENT = AugmentationArguments(random_crop_padding=2, horizontal_flip=0.5, mixup_alpha=0.8)
EVALUATE = {"eval_strategy": "steps", "eval_steps": 2}
SAVE = {"save_strategy": "steps", "save_steps": 2}
# 128 images in batches of 32: four steps an epoch; the epochs end at steps 4, 8 and, cut short, 10
SWA = {"swa_start": 0.5, "max_steps": 10}
EMA = {"ema_decay": 0.4, "max_steps": 6}


@pytest.fixture
def make_trainer(make_student, make_args, train_split, eval_split, processor):
    def make(architecture="deit", *, augmentation=AUGMENT, callbacks=(), trainer_kwargs=None, **overrides):
        if not isinstance(architecture, str):
            student = architecture
        elif architecture == "resnet18_cifar_w16":
            args = ModelArguments(architecture=architecture)
            student = build_student(args, list("abcd"), (16, 16), [0.5] * 3, [0.25] * 3)[0]
        else:  # the stem has BatchNorm
            student = make_student(drop_path_rate=0.2, conv_stem=architecture == "conv_stem")
        return SupervisedTrainer(
            student,
            make_args(SupervisedTrainingArguments, **overrides),
            train_dataset=train_split,
            eval_dataset=eval_split,
            processing_class=processor,
            augmentation=augmentation,
            callbacks=list(callbacks),
            **(trainer_kwargs or {}),
        )

    return make


class Record(TrainerCallback):
    """Keeps what the module held after each step, and in each evaluation."""

    def __init__(self):
        self.raw, self.evaluated = {}, {}

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.raw.setdefault(state.global_step, copied(model))

    def on_step_end(self, args, state, control, model, **kwargs):
        self.raw[state.global_step] = copied(model)

    def on_prediction_step(self, args, state, control, model, **kwargs):
        self.evaluated[state.global_step] = copied(model)


def copied(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name].double(), tensor.double(), rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def ema_by_hand(raw, decay):
    """The average after each step, in float64, from the recorded weights."""
    average = {name: tensor.double() for name, tensor in raw[0].items()}
    averages = {}
    for step in range(1, max(raw) + 1):
        d = min(decay, (1 + step) / (10 + step))
        for name, tensor in raw[step].items():
            value = tensor.double()
            average[name] = d * average[name] + (1 - d) * value if tensor.is_floating_point() else value
        averages[step] = dict(average)
    return averages


def mean_by_hand(raw, steps):
    return {name: torch.stack([raw[s][name].double() for s in steps]).mean(0) for name in raw[0]}


# ---- What is averaged, evaluated and exported ----


@pytest.mark.parametrize("architecture", ["deit", "conv_stem"])
def test_the_moving_average_is_what_is_evaluated_and_exported(architecture, make_trainer, tmp_path):
    record = Record()
    trainer = make_trainer(architecture, callbacks=[record], **EMA, **EVALUATE)
    trainer.train()
    averages = ema_by_hand(record.raw, 0.4)  # the warm-up ends at step 5: (1 + 5) / (10 + 5)
    for step in (2, 4, 6):
        assert_close(record.evaluated[step], averages[step])
    assert_close(copied(trainer.model), averages[6])
    last = [entry for entry in trainer.state.log_history if "eval_loss" in entry][-1]
    metrics = trainer.evaluate()
    assert (metrics["eval_loss"], metrics["eval_accuracy"]) == (last["eval_loss"], last["eval_accuracy"])
    trainer.save_model()
    saved = type(trainer.student).from_pretrained(tmp_path / "run")
    assert_equal(copied(saved), copied(trainer.student))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_swa_is_the_equal_mean_of_the_weights_at_the_end_of_each_epoch(accumulation, make_trainer):
    record = Record()
    trainer = make_trainer(
        callbacks=[record], **SWA, **EVALUATE, per_device_train_batch_size=32 // accumulation,
        gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    trainer.train()
    raw = record.raw
    for step in (2, 4, 6):  # the epoch that ends at 4 is before the start, at 5
        assert_equal(record.evaluated[step], raw[step])
    assert_equal(record.evaluated[8], raw[8])
    assert_close(copied(trainer.model), mean_by_hand(raw, (8, 10)))
    assert_equal(record.evaluated[10], copied(trainer.model))


def test_swa_begins_with_the_epoch_that_ends_at_its_start(make_trainer):
    record = Record()
    trainer = make_trainer(callbacks=[record], swa_start=1 / 3, max_steps=-1, num_train_epochs=3)
    trainer.train()
    assert_close(copied(trainer.model), mean_by_hand(record.raw, (4, 8, 12)))


def test_batch_norm_of_an_swa_is_measured_over_augmented_training_images(make_trainer, train_split):
    record = Record()
    trainer = make_trainer("conv_stem", callbacks=[record], **SWA, eval_strategy="steps", eval_steps=8)
    trainer.train()  # evaluated at step 8, and not at the end
    views = trainer.batches.augmenter(train_split.images, torch.arange(128), 2)
    pixels = (views.augmented.double() - 0.5) / 0.25
    for found, steps in ((record.evaluated[8], (8,)), (copied(trainer.model), (8, 10))):
        mean = mean_by_hand(record.raw, steps)
        weight = next(v for k, v in mean.items() if k.endswith("stem.0.weight"))
        inside = torch.nn.functional.conv2d(pixels, weight, padding=1).mean((0, 2, 3))
        # the mean over all images, in whatever batches: an equal mean of the batches' means
        name = next(k for k in found if k.endswith("stem.1.running_mean"))
        torch.testing.assert_close(found[name].double(), inside, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("architecture", "settings"), [("deit", EMA), ("conv_stem", SWA)])
def test_averaging_leaves_training_as_it_is(architecture, settings, make_trainer, tmp_path):
    plain, averaged = Record(), Record()

    class SaveOnTheWay(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % 5 == 0:
                trainer.save_model(str(tmp_path / "on the way"))

    make_trainer(architecture, callbacks=[plain], max_steps=settings["max_steps"], **EVALUATE).train()
    trainer = make_trainer(architecture, callbacks=[averaged, SaveOnTheWay()], **settings, **EVALUATE)
    trainer.train()
    for step, state in plain.raw.items():
        assert_equal(averaged.raw[step], state)


def test_a_model_saved_on_the_way_is_the_average(make_trainer, tmp_path):
    record = Record()

    class SaveOnTheWay(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                trainer.save_model(str(tmp_path / "on the way"))

    trainer = make_trainer(callbacks=[record], **EMA)
    trainer.add_callback(SaveOnTheWay())
    trainer.train()
    saved = type(trainer.student).from_pretrained(tmp_path / "on the way")
    average = {k.removeprefix("student."): v for k, v in ema_by_hand(record.raw, 0.4)[4].items()}
    assert_close(copied(saved), average)


# ---- Checkpoints ----


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("deit", {**EMA, "ema_decay": 0.9}),
        ("deit", {**SWA, "swa_learning_rate": 5e-3}),
        ("conv_stem", {**SWA, "swa_learning_rate": 5e-3}),
    ],
)
def test_resuming_with_an_average_equals_never_stopping(architecture, settings, make_trainer, tmp_path):
    settings = {**settings, **SAVE, **EVALUATE}
    whole = make_trainer(architecture, **settings)
    whole.train()
    for step in (4, 8) if "swa_start" in settings else (2,):  # an epoch without, and one with a part in the average
        resumed = make_trainer(architecture, **settings, output_dir=str(tmp_path / f"from-{step}"))
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
        assert_equal(copied(resumed.model), copied(whole.model))
        keys = ("loss", "grad_norm", "learning_rate", "eval_loss", "eval_accuracy")
        logs = [[{k: e[k] for k in keys if k in e} for e in t.state.log_history] for t in (resumed, whole)]
        assert logs[0][:-1] == logs[1][:-1]


@pytest.mark.parametrize("architecture", ["deit", "resnet18_cifar_w16"])
def test_a_checkpoint_holds_the_raw_weights_and_the_average_as_a_model_of_its_own(architecture, make_trainer, tmp_path):
    record = Record()
    trainer = make_trainer(architecture, callbacks=[record], **{**EMA, "max_steps": 4}, **SAVE)
    trainer.train()
    checkpoint = tmp_path / "run" / "checkpoint-4"
    student = type(trainer.student)
    raw, average = (
        {f"student.{k}": v for k, v in copied(student.from_pretrained(folder)).items()}
        for folder in (checkpoint, checkpoint / "average")
    )
    assert_equal(raw, record.raw[4])
    assert_close(average, ema_by_hand(record.raw, 0.4)[4])
    names = [set(load_file(folder / "model.safetensors")) for folder in (checkpoint, checkpoint / "average")]
    assert names[0] == names[1]


@pytest.mark.parametrize(("settings", "wrecked", "best"), [(EMA, 5, 4), ({"swa_start": 0.25, "max_steps": 12}, 9, 8)])
def test_the_best_of_the_averages_is_loaded_at_the_end(settings, wrecked, best, make_trainer):
    record = Record()

    class Wreck(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            if state.global_step == wrecked - 1:
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.add_(torch.randn_like(parameter))

    trainer = make_trainer(
        callbacks=[record, Wreck()], **settings, **EVALUATE, **SAVE, load_best_model_at_end=True,
        metric_for_best_model="loss",
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_global_step == best
    assert_equal(copied(trainer.model), record.evaluated[best])
    assert not torch.equal(
        record.evaluated[best]["student.deit.layernorm.bias"], record.raw[best]["student.deit.layernorm.bias"]
    )
    assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric


def test_an_average_cannot_begin_or_change_when_a_run_is_resumed(make_trainer, tmp_path):
    make_trainer(max_steps=2, **SAVE).train()
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    changed = {"allow_changed": ["ema_decay", "swa_start", "swa_learning_rate", "max_steps", "num_train_epochs"]}
    with pytest.raises(CheckpointError, match="expected an average by ema, found one by nothing"):
        make_trainer(**EMA, **changed).train(resume_from_checkpoint=checkpoint)
    make_trainer(**{**EMA, "max_steps": 2}, **SAVE, output_dir=str(tmp_path / "ema")).train()
    for settings, expected in ((SWA, "swa"), ({}, "nothing")):
        with pytest.raises(CheckpointError, match=f"expected an average by {expected}, found one by ema"):
            make_trainer(**settings, **changed).train(resume_from_checkpoint=str(tmp_path / "ema" / "checkpoint-2"))


# ---- What it cannot do ----


def test_a_damaged_average_is_named(make_trainer, tmp_path):
    make_trainer(**{**EMA, "max_steps": 2}, **SAVE).train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    (checkpoint / "average" / "average.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"average\.json: expected 27 bytes, found 1"):
        make_trainer(**EMA).train(resume_from_checkpoint=str(checkpoint))


def test_sharded_weights_are_refused(make_trainer):
    trainer = make_trainer(**EMA)
    trainer.is_fsdp_enabled = True
    with pytest.raises(RecipeError, match="key 'ema_decay': expected whole weights in each process, found FSDP"):
        Averaging(trainer)


def test_half_precision_weights_are_refused(make_trainer):
    trainer = make_trainer(**SWA)
    trainer.model.to(torch.bfloat16)
    with pytest.raises(RecipeError, match=r"'swa_start': expected a model with float32 weights, found torch\.bfloat16"):
        trainer.train()


def test_checkpoints_of_swa_are_not_pushed(make_trainer):
    trainer = make_trainer(**SWA)
    trainer.args.push_to_hub = True
    with pytest.raises(RecipeError, match=r"'hub_strategy' contradict.* expected 'end', found 'every_save'"):
        Averaging(trainer)


# ---- Learning rate ----


def test_the_swa_learning_rate_is_approached_over_ten_epochs_in_every_group_and_held(make_trainer, make_student):
    student, rates, lr = make_student(), [], (0.08, 0.02)

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
            rates.append([group["lr"] for group in optimizer.param_groups])

    parameters = list(student.parameters())
    groups = [{"params": parameters[:5], "lr": lr[0]}, {"params": parameters[5:], "lr": lr[1]}]
    trainer = make_trainer(
        student, swa_start=0.25, swa_learning_rate=0.05, max_steps=16,
        per_device_train_batch_size=128,  # one step an epoch
        lr_scheduler_type="linear", callbacks=[Look()], trainer_kwargs={"optimizers": (torch.optim.SGD(groups), None)},
    )  # fmt: skip
    trainer.train()
    for step, found in enumerate(rates):
        for base, rate in zip(lr, found, strict=True):
            if step <= 4:
                expected = base * (1 - step / 16)
            else:
                share = min((step - 4) / 10, 1)
                expected = 0.05 + (0.75 * base - 0.05) * (1 + math.cos(math.pi * share)) / 2
            assert rate == pytest.approx(expected, rel=1e-12)
    assert rates[14] == rates[15] == [pytest.approx(0.05, rel=1e-12)] * 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"lr_scheduler_type": "reduce_lr_on_plateau", **EVALUATE}, "'lr_scheduler_type' contradict"),
     ({"learning_rate": 0.0}, "'learning_rate': expected a number > 0")],
)  # fmt: skip
def test_a_schedule_that_cannot_be_annealed_is_refused(settings, message, make_trainer):
    with pytest.raises(RecipeError, match=message):
        make_trainer(**SWA, swa_learning_rate=1e-3, **settings).train()
