"""A trainer that trains several times, each with arguments of its own: `model_init` and searches."""

from types import SimpleNamespace

import pytest
import torch
from transformers.trainer_utils import HPSearchBackend

from hf_ihb.config.augmentation import AugmentationArguments
from hf_ihb.errors import RecipeError
from hf_ihb.trainer import DistillationTrainer
from hf_ihb.trainer.arguments import DistillationTrainingArguments, SupervisedTrainingArguments
from hf_ihb.trainer.averaging import Averaging

LAYERS = {"student_layers": [0, 2], "teacher_layers": [0, 2], "cka_weight": 1.0, "teacher_cache": "off"}
LOGITS = {"method": "logits", "alpha": 0.5}


@pytest.fixture
def make_trainer(make_student, make_teacher, make_args, train_split, eval_split, processor):
    def make(*, model=None, init=None, augmentation=None, **overrides):
        return DistillationTrainer(
            model,
            make_args(DistillationTrainingArguments, **{"max_steps": 2, **overrides}),
            model_init=None if model is not None else init or (lambda: make_student(drop_path_rate=0.1)),
            train_dataset=train_split,
            eval_dataset=eval_split,
            processing_class=processor,
            augmentation=augmentation,
            teacher_model=make_teacher(None if "student_layers" in overrides else ["red", "green", "blue", "dark"]),
        )

    return make


@pytest.fixture
def search(monkeypatch):
    """`hyperparameter_search` over given trials, as its backend runs it; the state of each student, and its log."""

    def run(trainer, *trials):
        found = []

        def begin(trainer, n_trials, direction):
            trainer.hp_space = lambda trial: trial.params
            for number, values in enumerate(trials):
                trainer.train(trial=SimpleNamespace(number=number, params=values))
                found.append((state(trainer), trainer.state.log_history))

        backend = SimpleNamespace(ensure_available=lambda: None, default_hp_space=None, run=begin)
        backends = {HPSearchBackend.OPTUNA: lambda: backend}
        monkeypatch.setattr("transformers.trainer.ALL_HYPERPARAMETER_SEARCH_BACKENDS", backends)
        monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)
        trainer.hyperparameter_search(backend="optuna", n_trials=len(trials))
        return found

    return run


def state(trainer):
    return {name: tensor.clone() for name, tensor in trainer.student.state_dict().items()}


def same(one, other):
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("keys", [LAYERS, LOGITS], ids=["structural", "logits"])
def test_a_trial_equals_a_training_with_its_values_and_the_next_starts_from_the_recipe(keys, make_trainer, search):
    trials = ({"learning_rate": 3e-3, "seed": 5}, {"ema_decay": 0.9}, {"label_smoothing_factor": 0.2})
    found = search(make_trainer(**keys), *trials)
    for values, (weights, history) in zip(trials, found, strict=True):
        alone = make_trainer(**{**keys, **values})
        alone.train()
        assert same(weights, state(alone)), values
        assert [entry.get("loss") for entry in history] == [entry.get("loss") for entry in alone.state.log_history]


def test_methods_layers_and_augmentation_can_be_tuned(make_trainer, search, make_student):
    space = {"gram_weight": 2.0, "student_layers": [1], "teacher_layers": [1], "horizontal_flip": 1.0}
    ((weights, history),) = search(make_trainer(**LAYERS), space)
    flips = {"augmentation": AugmentationArguments(horizontal_flip=space.pop("horizontal_flip"))}
    alone = make_trainer(**{**LAYERS, **space, **flips})
    alone.train()
    assert same(weights, state(alone))
    assert "gram_loss" in history[0] | history[1]


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"alpha": 1.7}, r"trial 0: key 'alpha': expected a number in \[0, 1\], found 1.7"),
        ({"learning_rate": -1.0}, "trial 0: key 'learning_rate'"),
        ({"learning_rate": "0.1"}, "trial 0: key 'learning_rate': expected a number"),
        ({"warmup": 3}, "trial 0: key 'warmup': expected an argument of training or augmentation"),
        ({"ema_decay": 0.9, "swa_start": 0.5}, "trial 0: keys 'ema_decay' and 'swa_start' contradict"),
        ({"teacher_dtype": "bfloat16"}, "trial 0: key 'teacher_dtype'"),
        ({"mixup_alpha": -1.0}, "trial 0: key 'mixup_alpha'"),
        ({"mixup_alpha": 1.0, "teacher_logits_view": "clean"}, "trial 0: .* a clean view is not mixed"),
    ],
)
def test_a_value_that_a_recipe_could_not_have_is_refused_in_a_trial(values, line, make_trainer, search):
    with pytest.raises(RecipeError, match=line):
        search(make_trainer(**LOGITS), values)


def test_a_whole_number_in_the_recipe_does_not_cut_a_trials_value(make_trainer, search):
    trainer = make_trainer(**{**LOGITS, "learning_rate": 1})
    search(trainer, {"learning_rate": 0.25, "per_device_train_batch_size": 16.0})
    assert (trainer.args.learning_rate, trainer.args.per_device_train_batch_size) == (0.25, 16)


def test_model_init_gets_the_trial_and_keys_of_its_own(make_trainer, search, make_student):
    def init(trial):
        return make_student(mlp_ratio=4.0 if trial is None else trial.params["mlp_ratio"])

    trainer = make_trainer(init=init, **LOGITS)
    search(trainer, {"mlp_ratio": 2.0})
    assert trainer.student.config.intermediate_size == 64


def test_what_is_set_by_hand_between_trainings_is_checked_and_honoured(make_trainer):
    trainer = make_trainer(**LOGITS)
    trainer.args.alpha = 1.7
    with pytest.raises(RecipeError, match="arguments of the trainer: key 'alpha'"):
        trainer.train()
    trainer.args.alpha, trainer.args.ema_decay, trainer.args.seed = 0.9, 0.9, 11
    trainer.train()
    alone = make_trainer(**{**LOGITS, "alpha": 0.9, "ema_decay": 0.9, "seed": 11})
    alone.train()
    assert same(state(trainer), state(alone))
    assert sum(isinstance(callback, Averaging) for callback in trainer.callback_handler.callbacks) == 1


def test_methods_of_a_model_that_was_passed_in_cannot_change(make_trainer, make_student):
    trainer = make_trainer(model=make_student(), **LOGITS)
    trainer.args.alpha = 0.9
    with pytest.raises(RecipeError, match="make another trainer, or give it a 'model_init'"):
        trainer.train()


def test_derived_keys_follow_what_they_are_derived_from(make_args):
    args = make_args(DistillationTrainingArguments, cka_weight=1.0)
    new = args.remade(method="logits", seed=8)
    assert (new.alpha, new.data_seed) == (0.5, 8)
    assert (args.alpha, args.data_seed, args.is_as_made) == (0.0, 3, True)
    assert make_args(SupervisedTrainingArguments, data_seed=4).remade(seed=8).data_seed == 4
