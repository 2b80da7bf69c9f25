from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import EvalPrediction, PreTrainedModel, TrainerCallback, TrainingArguments

from hf_ihb.augment import Augmenter
from hf_ihb.config.augmentation import AugmentationArguments
from hf_ihb.config.model import ModelArguments
from hf_ihb.data import ImageSplit
from hf_ihb.errors import CheckpointError, DataError, NumericsError
from hf_ihb.models.student import build_student
from hf_ihb.trainer import SupervisedTrainer, arguments, batches, callbacks
from hf_ihb.trainer.arguments import SupervisedTrainingArguments
from tests.trainer.conftest import LABELS, MEAN, SIZE, STD

AUGMENT = AugmentationArguments(
    random_crop_padding=2, horizontal_flip=0.5, cutout_size=4, mixup_alpha=0.8, cutmix_alpha=1.0, mix_probability=0.7
)


@pytest.fixture
def make_trainer(make_student, make_args, train_split, eval_split, processor):
    def make(student=None, *, trainer_kwargs=None, **overrides):
        return SupervisedTrainer(
            student or make_student(),
            make_args(SupervisedTrainingArguments, **overrides),
            train_dataset=train_split,
            eval_dataset=eval_split,
            processing_class=processor,
            augmentation=AUGMENT,
            **(trainer_kwargs or {}),
        )

    return make


def losses(trainer):
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, msg=lambda m, name=name: f"{name}: {m}", **tolerance)


def test_plain_training_arguments_are_refused_by_name(make_student):
    with pytest.raises(TypeError, match="SupervisedTrainingArguments"):
        SupervisedTrainer(make_student(), TrainingArguments(output_dir="unused", report_to="none"))


def test_four_micro_batches_of_eight_train_like_one_batch_of_thirty_two(make_trainer):
    whole, parts = (
        make_trainer(
            per_device_train_batch_size=32 // n, gradient_accumulation_steps=n, label_smoothing_factor=0.1, optim="sgd",
            learning_rate=0.1,
        )
        for n in (1, 4)
    )  # fmt: skip
    whole.train(), parts.train()
    torch.testing.assert_close(losses(parts), losses(whole), rtol=0, atol=2e-6)
    assert_same_state(state(parts.student), state(whole.student), rtol=0, atol=2e-6)


def test_both_heads_that_inference_averages_learn(make_trainer):
    trainer = make_trainer()
    before = state(trainer.student)
    trainer.train()
    for head in ("cls_classifier.weight", "distillation_classifier.weight"):
        assert not torch.equal(trainer.student.state_dict()[head], before[head])


def test_the_task_loss_is_cross_entropy_of_smoothed_labels_over_both_heads(
    make_student, make_args, train_split, processor
):
    student = make_student()
    args = make_args(SupervisedTrainingArguments, max_steps=1, learning_rate=0.0, label_smoothing_factor=0.2,
                     per_device_train_batch_size=128)  # fmt: skip
    trainer = SupervisedTrainer(student, args, train_dataset=train_split, processing_class=processor)
    trainer.train()
    pixels = (train_split.images.float() / 255 - 0.5) / 0.25
    with torch.no_grad():
        outputs = student.train()(pixel_values=pixels)
    expected = sum(
        torch.nn.functional.cross_entropy(logits, train_split.labels, label_smoothing=0.2)
        for logits in (outputs.cls_logits, outputs.distillation_logits)
    ) / 2  # fmt: skip
    torch.testing.assert_close(losses(trainer)[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("head", ["cls", "distillation"])
def test_a_head_that_inference_leaves_out_gets_a_gradient_of_zero(head, make_trainer, make_student):
    student = make_student(inference_head=head, layer_scale_init=0.1)
    weights = {name: getattr(student, f"{name}_classifier").weight for name in ("cls", "distillation")}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    gradients = {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, *args, **kwargs):
            gradients.update({name: weight.grad.abs().sum().item() for name, weight in weights.items()})

    trainer = make_trainer(student, max_steps=2, weight_decay=0.0)
    trainer.add_callback(Look())
    trainer.train()
    for name, weight in weights.items():
        assert (gradients[name] > 0) == (name == head)
        assert torch.equal(weight, before[name]) == (name != head)


def test_every_parameter_gets_a_gradient(make_trainer):
    trainer = make_trainer(max_steps=1)
    missing = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            missing.extend(name for name, parameter in model.named_parameters() if parameter.grad is None)

    trainer.add_callback(Look())
    trainer.train()
    assert missing == []


def test_norms_biases_tokens_and_positions_are_not_decayed(make_trainer):
    trainer = make_trainer()
    decayed = set(trainer.get_decay_parameter_names(trainer.model))
    spared = {name for name, _ in trainer.model.named_parameters()} - decayed
    for part in ("cls_token", "distillation_token", "position_embeddings", "bias", "layernorm"):
        assert any(part in name for name in spared)
        assert not any(part in name for name in decayed)
    assert all(name.endswith("weight") for name in decayed)


def test_every_parameter_is_decayed_where_a_recipe_says_so(make_trainer):
    trainer = make_trainer(weight_decay_scope="all", weight_decay=0.1)
    trainer.create_optimizer()
    decayed = sum(len(g["params"]) for g in trainer.optimizer.param_groups if g["weight_decay"] == 0.1)
    assert decayed == len(list(trainer.model.parameters()))


def test_a_cnns_batch_norm_is_not_decayed(make_trainer):
    args = ModelArguments(architecture="resnet18_cifar_w16")
    trainer = make_trainer(build_student(args, list("abcd"), (16, 16), [0.5] * 3, [0.25] * 3)[0])
    shapes = {name: parameter.ndim for name, parameter in trainer.model.named_parameters()}
    assert {shapes[name] for name in trainer.get_decay_parameter_names(trainer.model)} == {2, 4}


def test_a_convnexts_response_normalisation_is_not_decayed(make_trainer):
    args = ModelArguments(architecture="convnextv2", hidden_sizes=[8, 16], depths=[1, 1])
    trainer = make_trainer(build_student(args, list("abcd"), (16, 16), [0.5] * 3, [0.25] * 3)[0])
    decayed = set(trainer.get_decay_parameter_names(trainer.model))
    assert not any("grn" in name for name in decayed)
    assert {name for name in decayed if "pwconv" in name and name.endswith("weight")}


def test_a_grey_image_keeps_one_channel_under_cutout(make_args, eval_split):
    grey = ImageSplit(eval_split.images[:, :1], eval_split.labels, eval_split.label_names)
    args = ModelArguments(architecture="adaptive_cnn", hidden_sizes=[8], depths=[1])
    model, processor = build_student(args, list("abcd"), (16, 16), [0.5], [0.25])
    trainer = SupervisedTrainer(
        model, make_args(SupervisedTrainingArguments), train_dataset=grey, processing_class=processor,
        augmentation=AugmentationArguments(cutout_size=6),
    )  # fmt: skip
    batch = grey.__getitems__(list(range(8)))
    views = trainer.prepare(batch, train=True).views
    assert views.augmented.shape == (8, 1, 16, 16)


def test_sgd_takes_momentum_and_nesterov_from_optim_args(make_trainer):
    trainer = make_trainer(optim="sgd", optim_args="momentum=0.9, nesterov=true")
    group = trainer.create_optimizer().param_groups[0]
    assert (group["momentum"], group["nesterov"]) == (0.9, True)


def test_training_logs_components_and_speed(make_trainer):
    trainer = make_trainer()
    trainer.train()
    for entry in [e for e in trainer.state.log_history if "loss" in e]:
        assert entry["task_loss"] == pytest.approx(entry["loss"], abs=1e-6)
        assert entry["images_per_second"] > 0


@pytest.mark.parametrize("accumulation", [1, 2])
def test_each_epoch_has_views_of_its_own_the_same_for_any_batch(accumulation, make_trainer, monkeypatch):
    seen = []
    trainer = make_trainer(
        max_steps=-1, num_train_epochs=3, per_device_train_batch_size=32 // accumulation,
        gradient_accumulation_steps=accumulation,
    )  # fmt: skip

    class Recorded(Augmenter):
        def __call__(self, images, index, *others):
            views = super().__call__(images, index, *others)
            seen.extend(zip(index.tolist(), views.augmented, strict=True))
            return views

    monkeypatch.setattr(batches, "Augmenter", Recorded)
    trainer.train()
    assert len(seen) == 3 * 128
    for epoch in range(3):
        views = dict(seen[128 * epoch : 128 * (epoch + 1)])
        assert len(views) == 128
        rows = torch.arange(128)
        expected = Augmenter.__call__(trainer.batches.augmenter, trainer.train_dataset.images, rows, epoch).augmented
        assert torch.equal(torch.stack([views[row] for row in rows.tolist()]), expected)


# ---- Evaluation ----


def test_evaluation_counts_every_image_once_and_by_hand(make_trainer, eval_split):
    trainer = make_trainer(max_steps=3)
    trainer.train()
    metrics = trainer.evaluate()
    with torch.no_grad():
        outputs = trainer.student.eval()(pixel_values=(eval_split.images.float() / 255 - 0.5) / 0.25)
    for name, logits in (
        ("accuracy", outputs.logits), ("cls_accuracy", outputs.cls_logits),
        ("distillation_accuracy", outputs.distillation_logits),
    ):  # fmt: skip
        expected = (logits.argmax(-1) == eval_split.labels).double().mean().item()
        assert metrics[f"eval_{name}"] == pytest.approx(expected, abs=1e-12)
    # 70 images in batches of 32: stock Trainer would drop the last 6 with dataloader_drop_last
    prediction = trainer.predict(eval_split)
    torch.testing.assert_close(torch.tensor(prediction.predictions), outputs.logits, rtol=0, atol=1e-5)
    assert prediction.label_ids.tolist() == eval_split.labels.tolist()


def test_the_users_metrics_see_the_logits_of_inference_and_join_ours(make_trainer, eval_split):
    seen = []

    def compute_metrics(prediction: EvalPrediction):
        seen.append(prediction.predictions.shape)
        return {"mine": 1.5}

    metrics = make_trainer(trainer_kwargs={"compute_metrics": compute_metrics}).evaluate()
    assert seen == [(len(eval_split), 4)]
    assert metrics["eval_mine"] == 1.5
    assert "eval_accuracy" in metrics


def test_batch_wise_metrics_equal_metrics_of_the_whole_set(make_trainer, eval_split):
    counts = []

    def compute_metrics(prediction, compute_result):
        counts.append(len(prediction.predictions))
        return {"counted": sum(counts)} if compute_result else {}

    student = make_trainer().student
    whole = make_trainer(student).evaluate()
    batched = make_trainer(
        student, batch_eval_metrics=True, trainer_kwargs={"compute_metrics": compute_metrics}
    ).evaluate()
    assert batched["eval_counted"] == len(eval_split)
    assert batched["eval_accuracy"] == whole["eval_accuracy"]


def test_preprocess_logits_for_metrics_shapes_what_the_users_metrics_see(make_trainer):
    shapes = []
    trainer = make_trainer(
        trainer_kwargs={
            "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1),
            "compute_metrics": lambda prediction: shapes.append(prediction.predictions.shape),
        }
    )
    assert "eval_accuracy" in trainer.evaluate()
    assert shapes == [(70,)]


def test_a_batch_of_float_pixels_is_used_as_it_is(make_student, make_args):
    class Pixels(torch.utils.data.Dataset):
        def __len__(self):
            return 64

        def __getitem__(self, index):
            return {"pixel_values": torch.full((3, 16, 16), float(index % 4)), "label": index % 4}

    student, seen = make_student(), []
    student.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True)
    args = make_args(SupervisedTrainingArguments, max_steps=1)
    SupervisedTrainer(student, args, train_dataset=Pixels(), augmentation=AUGMENT).train()
    assert set(seen[0].unique().tolist()) <= {0.0, 1.0, 2.0, 3.0}


# ---- Early stopping ----

# losses that the users' metric reports, one an evaluation: it improves by less than 0.1 from the third on
REPORTED = [1.0, 0.5, 0.45, 0.43, 0.42, 0.2]


def stopping(make_trainer, **overrides):
    trainer = make_trainer(
        max_steps=6, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        metric_for_best_model="reported", greater_is_better=False, early_stopping_patience=3,
        early_stopping_threshold=0.1, **overrides,
        trainer_kwargs={"compute_metrics": lambda _: {"reported": REPORTED[max(trainer.state.global_step - 1, 0)]}},
    )  # fmt: skip
    return trainer


@pytest.mark.parametrize("load_best", [False, True])
def test_training_stops_when_the_metric_has_not_improved_enough(load_best, make_trainer):
    trainer = stopping(make_trainer, load_best_model_at_end=load_best)
    trainer.train()
    assert trainer.state.global_step == 5
    assert trainer.state.best_metric == 0.42


def test_a_resumed_run_stops_where_an_uninterrupted_one_does(make_trainer, tmp_path):
    stopping(make_trainer).train()
    resumed = stopping(make_trainer, output_dir=str(tmp_path / "resumed"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert resumed.state.global_step == 5


def test_an_evaluation_of_another_split_does_not_count(make_trainer, eval_split):
    class Evaluate(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            trainer.evaluate(eval_split, metric_key_prefix="other")

    trainer = stopping(make_trainer)
    trainer.add_callback(Evaluate())
    trainer.train()
    assert trainer.state.global_step == 5


# ---- Numerics and data ----


def test_a_batch_without_labels_is_named(make_student, make_args):
    rows = [{"pixel_values": torch.zeros(3, 16, 16), "target": 0} for _ in range(32)]
    trainer = SupervisedTrainer(make_student(), make_args(SupervisedTrainingArguments), train_dataset=rows)
    with pytest.raises(DataError, match="expected 'labels', found pixel_values, target"):
        trainer.train()


def test_a_nan_loss_stops_before_the_optimizer_step(make_trainer):
    trainer = make_trainer(max_steps=4)
    before = []

    class Break(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            if state.global_step == 2:
                before.append({n: p.detach().clone() for n, p in model.named_parameters()})
                trainer.compute_loss_func = lambda outputs, labels, **_: outputs.logits.sum() * torch.nan

    trainer.add_callback(Break())
    with pytest.raises(NumericsError, match="step 3: expected a finite loss"):
        trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[0][name])


def test_a_split_smaller_than_a_batch_is_an_error_not_zero_steps(make_student, make_args, processor):
    split = ImageSplit(torch.zeros(5, 3, 16, 16, dtype=torch.uint8), torch.zeros(5).long(), ["a", "b"])
    trainer = SupervisedTrainer(
        make_student(), make_args(SupervisedTrainingArguments), train_dataset=split, processing_class=processor
    )
    with pytest.raises(DataError, match="5 training images do not fill one batch of 32"):
        trainer.train()


# ---- Checkpoints ----


@pytest.mark.parametrize("architecture", ["deit", "deit_cls", "vit", "resnet18_cifar_w16"])
def test_resuming_at_any_checkpoint_equals_never_stopping(architecture, make_trainer, make_student, tmp_path):
    drop_path = 0.0 if architecture.startswith("resnet") else 0.2
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "per_device_train_batch_size": 48}

    def student():
        if architecture.startswith("resnet"):
            torch.manual_seed(0)
            return build_student(
                ModelArguments(architecture=architecture), list("abcd"), (16, 16), [0.5] * 3, [0.25] * 3
            )[0]
        return make_student(architecture, drop_path_rate=drop_path)

    whole = make_trainer(student(), **settings)
    whole.train()
    for step in (2, 4):
        resumed = make_trainer(student(), **settings, output_dir=str(tmp_path / f"from-{step}"))
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
        assert torch.equal(losses(resumed), losses(whole))
        assert_same_state(state(resumed.model), state(whole.model), rtol=0, atol=0)


def test_load_best_model_at_end_brings_back_every_tensor_of_the_best_step(make_trainer, make_student):
    trainer = make_trainer(
        make_student(), max_steps=6, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=False,
    )  # fmt: skip
    kept = {}

    class WreckAfterStepTwo(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 2:
                kept.update({n: t.clone() for n, t in model.state_dict().items()})
            if state.global_step == 3:
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.add_(torch.randn_like(parameter))

    trainer.add_callback(WreckAfterStepTwo())
    trainer.train()
    assert trainer.state.best_global_step == 2
    assert_same_state(state(trainer.model), kept, rtol=0, atol=0)


@pytest.mark.parametrize("damage", ["missing", "unexpected", "shape"])
def test_a_checkpoint_that_does_not_hold_exactly_the_model_is_refused(damage, make_trainer, tmp_path):
    make_trainer(max_steps=2, save_strategy="steps", save_steps=2).train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    weights = load_file(checkpoint / "model.safetensors")
    name = "cls_classifier.bias"
    if damage == "missing":
        del weights[name]
    elif damage == "unexpected":
        weights["left_over"] = torch.zeros(1)
    else:
        weights[name] = torch.zeros(9)
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"checkpoint-2"):
        make_trainer(max_steps=4).train(resume_from_checkpoint=str(checkpoint))


def test_resuming_skips_a_save_that_was_cut_short(make_trainer, tmp_path):
    make_trainer(max_steps=4, save_strategy="steps", save_steps=2).train()
    (tmp_path / "run" / "checkpoint-4" / "trainer_state.json").unlink()
    trainer = make_trainer(max_steps=5, allow_changed=["max_steps"])
    steps = []

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    trainer.add_callback(Look())
    trainer.train(resume_from_checkpoint=True)
    assert steps == [2]


def test_resuming_without_a_checkpoint_says_so(make_trainer):
    with pytest.raises(CheckpointError, match="expected a complete checkpoint to resume, found none"):
        make_trainer().train(resume_from_checkpoint=True)


def test_no_pickle_of_the_arguments_is_written(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=2, save_strategy="steps", save_steps=2, hub_token="canary-token")
    trainer.train()
    trainer.save_model()
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= {path.name for path in files}
    assert not any(b"canary-token" in path.read_bytes() for path in files)


# ---- Where stored images are ----


class ElsewhereSplit(ImageSplit):
    """Pretends to be on an accelerator: counts what is asked of it."""

    asked = 0

    def of(split, device):
        return ElsewhereSplit(split.images, split.labels, split.label_names)

    def __getitems__(self, indices):
        type(self).asked += len(indices)
        return super().__getitems__(indices)


@pytest.mark.parametrize("where", ["device", "host"])
def test_images_that_fit_are_read_from_the_device_to_the_same_end(where, make_trainer, monkeypatch):
    monkeypatch.setattr(batches, "placement", lambda num_bytes, device: where)
    monkeypatch.setattr(ImageSplit, "to", ElsewhereSplit.of)
    ElsewhereSplit.asked = 0
    trainer = make_trainer(max_steps=4, eval_strategy="steps", eval_steps=2)
    kept = trainer.train_dataset
    trainer.train()
    monkeypatch.undo()
    expected = make_trainer(max_steps=4, eval_strategy="steps", eval_steps=2)
    expected.train()
    assert_same_state(state(trainer.student), state(expected.student))
    assert trainer.train_dataset is kept
    assert ElsewhereSplit.asked == (4 * 32 + 2 * 70 if where == "device" else 0)


def test_loaders_of_images_on_an_accelerator_gather_in_this_process_without_pinning(make_trainer):
    trainer = make_trainer(dataloader_num_workers=2, dataloader_prefetch_factor=4)
    images = torch.empty(4, 3, 16, 16, dtype=torch.uint8, device="meta")
    elsewhere = ImageSplit(images, torch.zeros(4, dtype=torch.long), ["a"])
    trainer.args.dataloader_pin_memory = True
    here = trainer.get_eval_dataloader()
    there = trainer.get_eval_dataloader(elsewhere)
    assert (here.num_workers, here.prefetch_factor, here.pin_memory) == (2, 4, True)
    assert (there.num_workers, there.prefetch_factor, there.pin_memory) == (0, None, False)


def test_a_short_last_batch_is_left_out_of_training_alone(make_trainer, train_split):
    few = train_split.select(torch.arange(7))
    trainer = make_trainer(per_device_train_batch_size=4, per_device_eval_batch_size=4)
    trainer.train_dataset = few
    assert (len(trainer.get_train_dataloader()), len(trainer.get_eval_dataloader(few))) == (1, 2)
    assert len(trainer.get_test_dataloader(few)) == 2


def test_workers_that_stay_never_bring_the_images_of_another_data_set(make_trainer):
    trainer = make_trainer(dataloader_num_workers=1, dataloader_persistent_workers=True)
    few = trainer.eval_dataset.select(torch.arange(5))
    assert trainer.evaluate()["eval_accuracy"] == trainer.evaluate(trainer.eval_dataset)["eval_accuracy"]
    assert len(trainer.predict(few).predictions) == 5
    by_workers = trainer.evaluate(few)["eval_loss"]
    assert by_workers == make_trainer().evaluate(few)["eval_loss"]


# ---- A loss that is not finite ----


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_nan_ends_the_run_in_its_step_or_before_anything_is_logged_or_saved(device, make_trainer, monkeypatch):
    trainer = make_trainer(max_steps=6, logging_steps=4, save_strategy="steps", save_steps=3)
    steps, losses = [], trainer.training_losses

    def broken(*args):
        loss, parts = losses(*args)
        steps.append(trainer.state.global_step)
        return (loss * float("nan") if trainer.state.global_step == 1 else loss), parts

    monkeypatch.setattr(trainer, "training_losses", broken)
    hooks = next(c for c in trainer.callback_handler.callbacks if isinstance(c, callbacks.Hooks))
    pretended = SimpleNamespace(device=torch.device(device))
    checked = hooks.on_pre_optimizer_step
    monkeypatch.setattr(hooks, "on_pre_optimizer_step", lambda *args, **kwargs: checked(pretended, **kwargs))
    with pytest.raises(NumericsError, match="expected a finite loss, found NaN or Inf"):
        trainer.train()
    assert steps == ([0, 1] if device == "cpu" else [0, 1, 2])  # elsewhere at the checkpoint of step 3
    assert not list(Path(trainer.args.output_dir).glob("checkpoint-*/model.safetensors"))


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_on_an_accelerator_a_fused_optimizer_makes_no_step_after_one_that_is_not_finite(
    what, accumulation, make_trainer, monkeypatch
):
    settings = {
        "lr_scheduler_type": "constant", "optim": "adamw_torch_fused", "gradient_accumulation_steps": accumulation,
        "per_device_train_batch_size": 4, "save_strategy": "no", "logging_steps": 100,
    }  # fmt: skip
    expected = make_trainer(max_steps=2, **settings)
    expected.train()
    trainer = make_trainer(max_steps=6, **settings)
    seen, losses = [], trainer.training_losses

    def broken(outputs, step):
        loss, parts = losses(outputs, step)
        if trainer.state.global_step == 2:
            seen.append(step.inputs["index"].tolist())
        if trainer.state.global_step != 2 or len(seen) < accumulation:
            return loss, parts
        bad = torch.nan if what == "loss" else (outputs.logits * 0).sum().sqrt()  # whose gradient is 0 / 0
        return loss + bad, parts

    monkeypatch.setattr(trainer, "training_losses", broken)
    hooks = next(c for c in trainer.callback_handler.callbacks if isinstance(c, callbacks.Hooks))
    pretended, checked = SimpleNamespace(device=torch.device("cuda")), hooks.on_pre_optimizer_step
    monkeypatch.setattr(hooks, "on_pre_optimizer_step", lambda *args, **kwargs: checked(pretended, **kwargs))
    with pytest.raises(NumericsError) as caught:
        trainer.train()
    named = seen[-1] if what == "loss" else [number for batch in seen for number in batch]
    line = str(caught.value)
    assert line.startswith(f"step 3: expected a finite {what}, found NaN or Inf (task_loss ")
    assert f"with training images {', '.join(map(str, named))};" in line
    assert_same_state(state(trainer.student), state(expected.student))
    optimizers = [x.optimizer.optimizer.state_dict()["state"] for x in (trainer, expected)]
    for one, other in zip(*(torch.utils._pytree.tree_leaves(x) for x in optimizers), strict=True):
        assert torch.equal(one, other)
    assert not hasattr(trainer.optimizer.optimizer, "found_inf")


@pytest.mark.parametrize(("architecture", "wanted"), [("resnet18_cifar_w16", True), ("deit", False)])
def test_convolutions_that_look_beside_themselves_are_laid_out_channels_last_and_saved_as_they_were(
    architecture, wanted, make_trainer, make_student, tmp_path
):
    args = ModelArguments(architecture=architecture)
    student = build_student(args, LABELS, SIZE, MEAN, STD)[0] if wanted else make_student()
    trainer = make_trainer(student)
    found = [
        module.weight.is_contiguous(memory_format=torch.channels_last)
        for module in trainer.student.modules()
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size != (1, 1) and module.in_channels > 1
    ]
    assert found
    assert all(found) == any(found) == wanted
    trainer.save_model(str(tmp_path / "saved"))
    again = type(student).from_pretrained(tmp_path / "saved")
    assert_same_state(state(again), state(trainer.student))


def test_operations_are_counted_as_trainer_counts_them_and_parameters_once(make_trainer, monkeypatch):
    trainer, pixels = make_trainer(), {"pixel_values": torch.zeros(5, 3, 16, 16)}
    expected = 6 * 5 * 3 * 16 * 16 * sum(p.numel() for p in trainer.model.parameters())
    assert trainer.floating_point_ops(pixels) == expected
    monkeypatch.setattr(PreTrainedModel, "num_parameters", None)
    assert trainer.floating_point_ops(pixels) == expected


def test_precision_is_what_was_asked_for_after_accelerate_had_its_say(make_trainer, monkeypatch):
    monkeypatch.setattr(arguments, "is_torch_tf32_available", lambda: True)

    def accelerate_does(*args, **kwargs):  # with torch_compile and float32, on CUDA
        torch.backends.cuda.matmul.allow_tf32 = True
        create(*args, **kwargs)

    create = SupervisedTrainer.create_accelerator_and_postprocess
    monkeypatch.setattr(SupervisedTrainer, "create_accelerator_and_postprocess", accelerate_does)
    make_trainer()
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"


@pytest.mark.parametrize(("given", "device", "wanted"), [
    ({}, "cuda", True), ({}, "cpu", False), ({"dataloader_pin_memory": False}, "cuda", False),
    ({"accelerator_config": {"even_batches": False}}, "cuda", False),
])  # fmt: skip
def test_batches_are_copied_without_a_wait_unless_it_is_said_how(given, device, wanted, make_args, monkeypatch):
    monkeypatch.setattr(SupervisedTrainingArguments, "device", property(lambda args: torch.device(device)))
    args = make_args(SupervisedTrainingArguments, **{"use_cpu": False} | given)
    assert args.accelerator_config.non_blocking == wanted


def test_batches_that_the_main_process_hands_out_are_tensors_alone(make_trainer):
    trainer = make_trainer(max_steps=2, accelerator_config={"dispatch_batches": True})
    assert {type(value) for value in next(iter(trainer.get_train_dataloader())).values()} == {torch.Tensor}
    trainer.train()
    expected = make_trainer(max_steps=2)
    expected.train()
    assert_same_state(state(trainer.student), state(expected.student))
