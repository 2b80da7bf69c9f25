"""What the arguments do beyond holding values: precision switches of torch, and one process a GPU."""

import json
import sys

import pytest
import torch
from transformers import TrainingArguments, training_args

from hf_ihb.config.recipe import parse_recipe
from hf_ihb.config.run import RunArguments
from hf_ihb.errors import RecipeError
from hf_ihb.run import batch_note, open_run
from hf_ihb.trainer import arguments
from hf_ihb.trainer.arguments import SupervisedTrainingArguments


@pytest.fixture
def ampere(monkeypatch):
    """A machine whose GPU has TF32, as far as transformers can tell."""
    monkeypatch.setattr(arguments, "is_torch_tf32_available", lambda: True)
    monkeypatch.setattr(training_args, "is_torch_tf32_available", lambda: True)
    yield
    torch.backends.fp32_precision = "none"
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, True


@pytest.mark.usefixtures("ampere")
@pytest.mark.parametrize(("given", "products"), [({}, False), ({"tf32": False}, False), ({"tf32": True}, True)])
@pytest.mark.parametrize("more", [{}, {"bf16": True}, {"torch_compile": True}, {"bf16": True, "torch_compile": True}])
def test_products_are_in_float32_unless_asked_for_convolutions_keep_tf32_and_all_can_be_read(
    given, products, more, tmp_path
):
    SupervisedTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, **given, **more)
    assert torch.backends.cuda.matmul.allow_tf32 == products
    assert torch.backends.cuda.matmul.fp32_precision == ("tf32" if products else "ieee")
    assert torch.get_float32_matmul_precision() == ("high" if products else "highest")
    assert torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.conv.fp32_precision == "tf32"


def test_one_process_that_sees_several_gpus_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda args: 4))
    monkeypatch.setattr(sys, "argv", ["scripts/train.py"])
    (tmp_path / "recipe.json").write_text("{}")
    with pytest.raises(RecipeError) as caught:
        parse_recipe([str(tmp_path / "recipe.json")], RunArguments, SupervisedTrainingArguments)
    assert "accelerate launch --multi_gpu --num_processes 4 scripts/train.py" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def note(tmp_path, monkeypatch):
    def make(processes, recipe, **overrides):
        args = SupervisedTrainingArguments(
            output_dir=str(tmp_path), report_to="none", use_cpu=True, **{**recipe, **overrides}
        )
        monkeypatch.setattr(SupervisedTrainingArguments, "world_size", processes)
        return batch_note(args, recipe, "a.json")

    return make


RECIPE = {"per_device_train_batch_size": 512}
ACCUMULATING = {"per_device_train_batch_size": 32, "gradient_accumulation_steps": 4}


def test_more_processes_than_the_recipe_was_written_for_are_named_with_what_keeps_its_batch(note):
    assert note(4, RECIPE) == (
        "4 processes x 512 images x 1 accumulated make steps of 2048 images, where a.json means 512: "
        "set --per_device_train_batch_size 128 to keep its learning rate right"
    )
    assert "steps of 256 images, where a.json means 128: set --per_device_train_batch_size 16 " in note(2, ACCUMULATING)
    assert "means 512: start a number of processes that divides 512" in note(3, RECIPE)
    assert "where a.json means 8: set --per_device_train_batch_size 4 " in note(2, {}, per_device_train_batch_size=8)


def test_nothing_is_said_where_the_batch_is_the_recipes(note):
    assert note(1, RECIPE) is None
    assert note(1, RECIPE, per_device_train_batch_size=64) is None  # asked for, not brought about
    assert note(4, RECIPE, per_device_train_batch_size=128) is None
    assert note(4, ACCUMULATING, gradient_accumulation_steps=1) is None


def test_the_line_is_said_once_when_a_run_is_opened(tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(RECIPE))
    args = SupervisedTrainingArguments(output_dir=str(tmp_path / "run"), report_to="none", use_cpu=True, **RECIPE)
    monkeypatch.setattr(SupervisedTrainingArguments, "world_size", 2)
    open_run(args, RunArguments(), recipe)
    said = capsys.readouterr().out
    assert f"where {recipe} means 512" in said
    assert said.count("\n") == 1
