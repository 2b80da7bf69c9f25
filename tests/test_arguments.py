"""What the arguments do beyond holding values: precision switches of torch, and one process a GPU."""

import sys

import pytest
import torch
from transformers import TrainingArguments, training_args

from hf_ihb import arguments
from hf_ihb.arguments import RunArguments, SupervisedTrainingArguments
from hf_ihb.errors import RecipeError
from hf_ihb.recipe import parse_recipe
from hf_ihb.run import open_run


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


def test_several_processes_say_what_becomes_of_the_recipes_batch(tmp_path, monkeypatch, capsys):
    args = SupervisedTrainingArguments(
        output_dir=str(tmp_path / "run"), per_device_train_batch_size=128, gradient_accumulation_steps=2,
        report_to="none", use_cpu=True,
    )  # fmt: skip
    open_run(args, RunArguments())
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda args: 4))
    open_run(args, RunArguments())
    said = capsys.readouterr().out
    assert "4 processes: 1,024 images a step" in said
    assert "256 on one" in said
    assert "--per_device_train_batch_size 32" in said
    assert said.count("\n") == 1
