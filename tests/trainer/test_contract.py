"""What `Trainer` is given, and what users expect of it: honoured, or refused before anything is trained."""

import itertools
import json

import numpy as np
import pytest
import torch
from transformers import default_data_collator, get_scheduler

from hf_ihb.config.augmentation import AugmentationArguments
from hf_ihb.errors import NumericsError, RecipeError
from hf_ihb.functional.logits import task_loss
from hf_ihb.trainer import DistillationTrainer, SupervisedTrainer
from hf_ihb.trainer.arguments import DistillationTrainingArguments, SupervisedTrainingArguments
from hf_ihb.trainer.callbacks import earlier_seconds

LABELS = ["red", "green", "blue", "dark"]
MIXED = AugmentationArguments(mixup_alpha=0.8, cutmix_alpha=1.0, mix_probability=0.7)
STRUCTURAL = {"student_layers": [0, 2], "teacher_layers": [0, 2], "token_weight": 1.0, "teacher_cache": "off"}


@pytest.fixture
def make_trainer(make_student, make_args, train_split, eval_split, processor):
    def make(student=None, *, hooks=(), sets=None, **overrides):
        return SupervisedTrainer(
            student or make_student(),
            make_args(SupervisedTrainingArguments, **{"max_steps": 2, **overrides}),
            train_dataset=train_split,
            eval_dataset=sets or eval_split,
            processing_class=processor,
            **dict(hooks),
        )

    return make


@pytest.fixture
def make_distiller(make_student, make_teacher, make_args, train_split, eval_split, processor):
    def make(hooks=lambda student: {}, teacher=None, **overrides):
        student = make_student()
        return DistillationTrainer(
            student,
            make_args(DistillationTrainingArguments, **{"max_steps": 2, **overrides}),
            train_dataset=train_split,
            eval_dataset=eval_split,
            processing_class=processor,
            teacher_model=teacher or make_teacher(None if "student_layers" in overrides else LABELS),
            **hooks(student),
        )

    return make


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# ---- compute_loss_func ----


def mean(outputs, labels, num_items_in_batch=None):
    return task_loss([outputs.cls_logits, outputs.distillation_logits], as_probabilities(labels))


def per_item(outputs, labels, num_items_in_batch=None):
    return mean(outputs, labels) * len(labels) / num_items_in_batch


def as_probabilities(labels):
    return labels if labels.ndim == 2 else torch.nn.functional.one_hot(labels, 4).float()


@pytest.mark.parametrize(
    ("function", "augmentation", "smoothing"), [(mean, MIXED, 0.1), (per_item, MIXED, 0.0), (per_item, None, 0.1)]
)
def test_a_loss_of_the_users_sees_the_labels_that_ours_does_however_a_batch_is_accumulated(
    function, augmentation, smoothing, make_trainer
):
    hooks, keys = {"augmentation": augmentation}, {"label_smoothing_factor": smoothing, "lr_scheduler_type": "constant"}
    ours = make_trainer(hooks=hooks, **keys)
    ours.train()
    users = make_trainer(
        hooks=hooks | {"compute_loss_func": function}, per_device_train_batch_size=8, gradient_accumulation_steps=4,
        **keys,
    )  # fmt: skip
    users.train()
    assert losses(users) == pytest.approx(losses(ours), abs=2e-5)


def test_hard_labels_stay_hard_and_evaluation_is_by_the_users_loss(make_trainer, eval_split):
    seen = []

    def function(outputs, labels, num_items_in_batch):
        seen.append((labels.dtype, tuple(labels.shape), num_items_in_batch))
        return outputs.logits.square().sum() / num_items_in_batch

    trainer = make_trainer(hooks={"compute_loss_func": function})
    trainer.train()
    assert seen == [(torch.int64, (32,), 32)] * 2
    found = trainer.predict(eval_split)
    rows = np.square(found.predictions).sum(1)
    batches = [rows[:32], rows[32:64], rows[64:]]
    weighted = np.concatenate([np.repeat(rows.mean(), 32) for rows in batches])[: len(eval_split)]
    assert found.metrics["test_loss"] == pytest.approx(weighted.mean(), rel=1e-4)


# ---- optimizers ----


def test_an_optimizer_of_the_students_parameters_trains_the_heads_as_well(make_distiller):
    found = {}
    for name, hooks in {
        "student's": lambda student: {"optimizers": (torch.optim.SGD(student.parameters(), lr=0.1), None)},
        "class": lambda student: {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})},
    }.items():
        trainer = make_distiller(hooks, **STRUCTURAL, learning_rate=0.1, weight_decay=0.0)
        before = {n: p.clone() for n, p in trainer.model.named_parameters()}
        trainer.train()
        found[name] = dict(trainer.model.named_parameters())
        assert not any(torch.equal(p, before[n]) for n, p in found[name].items() if n.startswith("heads."))
    for parameter, tensor in found["student's"].items():
        torch.testing.assert_close(tensor, found["class"][parameter])


def test_heads_follow_the_schedule_that_came_with_the_optimizer(make_distiller):
    def hooks(student):
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        return {"optimizers": (optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0))}

    trainer = make_distiller(hooks, **STRUCTURAL)
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    assert all(torch.equal(p, before[n]) for n, p in trainer.model.named_parameters())


def test_an_optimizer_of_another_model_or_a_schedule_of_another_optimizer_is_refused(make_trainer, make_student):
    optimizer = torch.optim.SGD(make_student().parameters(), lr=0.1)
    with pytest.raises(RecipeError, match="expected an optimizer of the student's parameters, found one of none"):
        make_trainer(hooks={"optimizers": (optimizer, None)}).train()
    schedule = get_scheduler("linear", optimizer, 0, 10)
    with pytest.raises(RecipeError, match="expected a schedule of the optimizer beside it, found one without one"):
        make_trainer(hooks={"optimizers": (None, schedule)})


# ---- Arguments that would be read and not honoured ----


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (
            {"report_to": "wandb"},
            r"key 'report_to': expected 'none', or loggers that are installed .* found \['wandb'\]",
        ),
        ({"optim": "adamw_bnb_8bit"}, "key 'optim': cannot make 'adamw_bnb_8bit': .*bitsandbytes"),
        ({"optim": "adamw_torch", "optim_args": "momentum=0.9"}, "key 'optim_args': .*'momentum' is none of them"),
        ({"optim": "sgd", "optim_args": "momentum"}, "key 'optim_args': expected name=value"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"min_lr": 1e-5}}, "key 'lr_scheduler_kwargs'"),
        ({"label_names": ["target"]}, "key 'label_names'"),
        ({"neftune_noise_alpha": 5.0}, "key 'neftune_noise_alpha'"),
        ({"train_sampling_strategy": "group_by_length"}, "key 'train_sampling_strategy'"),
        ({"train_sampling_strategy": "batch_rebalance"}, "key 'train_sampling_strategy'"),
        ({"use_liger_kernel": True}, "key 'use_liger_kernel'"),
        ({"include_num_input_tokens_seen": True}, "key 'include_num_input_tokens_seen'"),
        ({"optim": "sgd", "optim_args": "momentun=0.9"}, "key 'optim_args': .*'momentun' is none of them"),
        ({"optim": "sgd", "optim_args": "nesterov=true"}, "key 'optim_args': .*'sgd' does not take nesterov=true"),
        ({"optim": "rmsprop", "optim_args": "momentum=0.9,decay=1"}, "key 'optim_args': .*'decay' is none of them"),
        ({"dataloader_persistent_workers": True}, "suits 'dataloader_persistent_workers', found 0"),
        ({"dataloader_multiprocessing_context": "spawn"}, "suits 'dataloader_multiprocessing_context', found 0"),
    ],
)
def test_settings_without_a_counterpart_are_refused_when_the_arguments_are_made(keys, line, make_args, monkeypatch):
    monkeypatch.setattr("hf_ihb.config.training.get_available_reporting_integrations", lambda: ["tensorboard"])
    with pytest.raises(ValueError, match=line):
        make_args(SupervisedTrainingArguments, **keys)


@pytest.mark.parametrize(
    ("keys", "hooks", "line"),
    [
        ({"metric_for_best_model": "acuracy"}, {}, "expected one of loss, accuracy, cls_accuracy, .* found 'acuracy'"),
        ({"metric_for_best_model": "accuracy", "prediction_loss_only": True}, {}, "expected one of loss with"),
        ({"prediction_loss_only": True}, {"compute_metrics": dict}, "contradicts `compute_metrics`"),
        ({"metric_for_best_model": "teacher_agreement"}, {}, "found 'teacher_agreement'"),
    ],
)
def test_a_metric_that_will_not_be_measured_is_refused_before_training(keys, hooks, line, make_trainer):
    with pytest.raises(RecipeError, match=line):
        make_trainer(hooks=hooks, eval_strategy="steps", **keys)


def test_a_metric_that_the_users_did_not_return_is_named_after_the_first_evaluation(make_trainer):
    trainer = make_trainer(
        hooks={"compute_metrics": lambda prediction: {"theirs": 1.0}}, eval_strategy="steps", eval_steps=1,
        metric_for_best_model="eval_f1",
    )  # fmt: skip
    with pytest.raises(
        RecipeError, match=r"key 'metric_for_best_model': .* found 'f1' where there are accuracy, .*theirs"
    ):
        trainer.train()
    assert trainer.state.global_step == 1


class Rows(torch.utils.data.Dataset):
    """A user's images, as float pixels of student and teacher, and a column that nobody reads."""

    def __len__(self):
        return 32

    def __getitem__(self, index):
        pixels = torch.full((3, 16, 16), index / 32)
        return {"pixel_values": pixels, "teacher_pixel_values": -pixels, "label": index % 4, "name": str(index)}


def test_columns_that_nobody_reads_are_removed_and_the_teachers_pixels_are_not(
    make_student, make_teacher, make_args, make_trainer
):
    args = make_args(
        DistillationTrainingArguments, method="logits", remove_unused_columns=True, max_steps=1, teacher_cache="off"
    )
    trainer = DistillationTrainer(
        make_student(), args, default_data_collator, train_dataset=Rows(), teacher_model=make_teacher()
    )
    trainer.teacher_scores = None  # of noise, it would be at chance
    shown = []
    trainer.teacher.model.register_forward_pre_hook(lambda _, inputs, keys: shown.append(keys["pixel_values"]),
                                                    with_kwargs=True)  # fmt: skip
    trainer.train()
    assert all((pixels <= 0).all() for pixels in shown)
    assert len(shown) == 1
    make_trainer(remove_unused_columns=True).train()  # stored images have no columns


def test_metrics_of_the_users_and_of_several_sets_are_taken(make_trainer, eval_split):
    make_trainer(hooks={"compute_metrics": dict}, eval_strategy="steps", metric_for_best_model="theirs")
    make_trainer(sets={"a": eval_split, "b": eval_split}, eval_strategy="steps", metric_for_best_model="b_accuracy")


def test_batches_that_stay_apart_reach_the_users_metrics_as_lists_and_ours_as_ever(make_trainer, eval_split):
    seen = []

    def count(prediction):
        seen.append([len(batch) for batch in prediction.predictions])
        return {"images": sum(map(len, prediction.label_ids))}

    whole = make_trainer().predict(eval_split)
    apart = make_trainer(hooks={"compute_metrics": count}, eval_do_concat_batches=False).predict(eval_split)
    assert seen == [[32, 32, 6]]
    assert apart.metrics["test_images"] == 70
    np.testing.assert_array_equal(np.concatenate(apart.predictions), whole.predictions)
    assert apart.metrics["test_accuracy"] == whole.metrics["test_accuracy"]


def test_everything_that_stock_evaluation_can_be_asked_for_reaches_the_users_metrics(make_trainer, eval_split):
    def look(prediction):
        return {"pixels": prediction.inputs.shape[1], "of": len(prediction.losses)}

    keys = {"include_for_metrics": ["inputs", "loss"], "eval_accumulation_steps": 1, "eval_on_start": True}
    trainer = make_trainer(hooks={"compute_metrics": look}, eval_strategy="steps", eval_steps=2, **keys)
    trainer.train()
    found = [entry for entry in trainer.state.log_history if "eval_pixels" in entry]
    assert [(entry["step"], entry["eval_pixels"], entry["eval_of"]) for entry in found] == [(0, 3, 70), (2, 3, 70)]


# ---- Teachers and time ----


def test_a_teacher_whose_scores_overflow_is_not_said_to_have_other_labels(make_distiller, make_teacher):
    teacher = make_teacher()
    with torch.no_grad():
        next(p for n, p in teacher.model.named_parameters() if n.endswith("fc.weight")).fill_(torch.inf)
    with pytest.raises(NumericsError, match="expected finite class scores, found NaN or Inf for 70 of 70 images"):
        make_distiller(method="logits", teacher=teacher).train()


def test_a_teacher_whose_features_overflow_is_named(make_distiller, make_teacher):
    teacher = make_teacher(None)
    with torch.no_grad():
        next(p for p in teacher.model.parameters() if p.ndim == 4).fill_(torch.inf)
    with pytest.raises(NumericsError, match="expected finite features, found NaN or Inf"):
        make_distiller(**STRUCTURAL, teacher=teacher).train()


def test_the_time_of_a_resumed_run_is_the_sum_of_its_parts(make_trainer, make_student, tmp_path, monkeypatch):
    ticks = itertools.count(step=10.0)
    monkeypatch.setattr("hf_ihb.trainer.callbacks.time.perf_counter", lambda: next(ticks))
    keys = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "output_dir": str(tmp_path / "run")}
    first = make_trainer(**keys)
    first.train()
    before = [_seconds(tmp_path / "run" / f"checkpoint-{step}") for step in (1, 2, 3)]
    assert before == sorted(before)
    assert before[0] > 0 == earlier_seconds(first)
    again = make_trainer(make_student(seed=4), **{**keys, "output_dir": str(tmp_path / "again")})
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert earlier_seconds(again) == before[1]
    assert _seconds(tmp_path / "again" / "checkpoint-3") > before[1]


def _seconds(checkpoint):
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    return state["stateful_callbacks"]["Clock"]["attributes"]["earlier_seconds"]
