"""What a trainer sends to the Hub: the student that is evaluated, at every save or at the end, and how failures end."""

import logging
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load
from transformers import AutoModelForImageClassification

from hf_ihb.errors import HubPushError
from hf_ihb.trainer import SupervisedTrainer
from hf_ihb.trainer.arguments import SupervisedTrainingArguments

REPO = "me/student"


@pytest.fixture
def make_trainer(make_student, make_args, train_split, eval_split, processor):
    def make(**overrides):
        return SupervisedTrainer(
            make_student(),
            make_args(SupervisedTrainingArguments, **overrides),
            train_dataset=train_split,
            eval_dataset=eval_split,
            processing_class=processor,
        )

    return make


@pytest.fixture
def pushing(hub_here, make_trainer, monkeypatch):
    monkeypatch.setattr("hf_ihb.hub.pushing.time.sleep", lambda seconds: None)
    fixed = {"push_to_hub": True, "hub_model_id": REPO, "hub_strategy": "end"}
    return lambda **overrides: make_trainer(**{**fixed, **overrides})


def weights(server, revision="main"):
    return load(server.files(REPO, revision)["model.safetensors"])


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_a_trainer_of_ones_own_pushes_its_student_its_card_and_nothing_else(pushing, hub_here):
    trainer = pushing(save_strategy="steps", save_steps=3)
    trainer.train()
    Path(trainer.args.output_dir, "training_args.bin").write_bytes(b"pickle")
    trainer.push_to_hub(tags=["mine"], license="mit")
    assert hub_here.files(REPO).keys() == {
        ".gitattributes", "README.md", "config.json", "model.safetensors", "preprocessor_config.json", "recipe.json",
        "training_history.json",
    }  # fmt: skip
    assert len(hub_here.history(REPO)) == 2
    card = ModelCard.load(REPO)
    assert card.data.license == "mit"
    assert "mine" in card.data.tags
    found = AutoModelForImageClassification.from_pretrained(REPO)
    assert_same(found.state_dict(), trainer.student.state_dict())


def test_every_save_pushes_the_weights_that_were_evaluated(pushing, hub_here):
    trainer = pushing(
        hub_strategy="every_save", hub_always_push=True, save_strategy="steps", save_steps=3, ema_decay=0.5
    )
    trainer.train()
    run = Path(trainer.args.output_dir)
    commits = hub_here.history(REPO)[:-1]
    assert len(commits) == 2
    for commit, step in zip(reversed(commits), (3, 6), strict=True):
        folder = run / f"checkpoint-{step}"
        assert_same(weights(hub_here, commit), load((folder / "average" / "model.safetensors").read_bytes()))
        assert (folder / "model.safetensors").read_bytes() != hub_here.files(REPO, commit)["model.safetensors"]
    assert not any("optimizer" in name or "checkpoint" in name for name in hub_here.files(REPO))


def test_a_failed_push_on_the_way_is_reported_and_training_goes_on(pushing, hub_here, caplog):
    fault = hub_here.fail("POST", "/commit/", status=403, times=1)
    trainer = pushing(hub_strategy="every_save", save_strategy="steps", save_steps=6)
    trainer.train()
    assert fault.fired == 1
    assert trainer.state.global_step == 6
    lines = [
        r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "a push during" in r.getMessage()
    ]
    assert len(lines) == 1
    assert f"repo '{REPO}'" in lines[0]
    assert "403" in lines[0]
    trainer.push_to_hub()
    assert_same(AutoModelForImageClassification.from_pretrained(REPO).state_dict(), trainer.student.state_dict())


def test_a_push_that_fails_at_the_end_says_how_to_push_again_and_loses_nothing(pushing, hub_here):
    trainer = pushing(hub_private_repo=True)
    trainer.train()
    hub_here.fail("POST", "/commit/", status=503, times=100)
    with pytest.raises(
        HubPushError, match=r"503.*; the run is kept; to push it again: python scripts/publish\.py"
    ) as error:
        trainer.push_to_hub()
    run = trainer.args.output_dir
    assert str(error.value).endswith(f"publish.py {run} --hub_model_id {REPO} --private true")
    assert "\n" not in str(error.value)
    assert_same(AutoModelForImageClassification.from_pretrained(run).state_dict(), trainer.student.state_dict())
    assert len(hub_here.history(REPO)) == 1


def test_a_push_in_the_background_is_a_future_of_the_commit(pushing, hub_here):
    trainer = pushing()
    trainer.train()
    assert trainer.push_to_hub(blocking=False).result().oid == hub_here.history(REPO)[0]


@pytest.mark.parametrize(("token", "repo", "says"), [("hf_" + "x" * 30, REPO, "401"), (None, "them/model", "403")])
def test_who_may_not_write_hears_it_before_training(hub_here, make_trainer, token, repo, says):
    with pytest.raises(HubPushError, match=says) as error:
        make_trainer(push_to_hub=True, hub_model_id=repo, hub_strategy="end", hub_token=token)
    assert repo in str(error.value)
    assert "hf_" not in str(error.value)


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_the_optimizers_state_is_never_pushed(make_args, strategy):
    with pytest.raises(ValueError, match="key 'hub_strategy': expected 'end' or 'every_save'"):
        make_args(SupervisedTrainingArguments, push_to_hub=True, hub_strategy=strategy)


def test_a_card_is_written_without_a_hub(make_trainer):
    trainer = make_trainer()
    trainer.train()
    trainer.create_model_card(model_name="A student", dataset_tags="uoft-cs/cifar10", language="en")
    card = ModelCard.load(Path(trainer.args.output_dir, "README.md"))
    assert card.text.lstrip().startswith("# A student")
    assert card.data.datasets == ["uoft-cs/cifar10"]
    assert card.data.language == "en"
