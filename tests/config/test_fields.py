"""A value that a key does not take is refused whoever makes the object; Python's ways of writing one pass."""

from pathlib import Path

import numpy as np
import pytest
import torch

from hf_ihb.analysis import AnalysisArguments
from hf_ihb.config.augmentation import AugmentationArguments
from hf_ihb.config.data import DataArguments
from hf_ihb.config.fields import Range, flaws_among, is_key, published_flaws
from hf_ihb.config.model import ModelArguments, TeacherArguments
from hf_ihb.trainer.arguments import LogitDistillationTrainingArguments, SupervisedTrainingArguments


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (
            lambda: AugmentationArguments(auto_augment="augmix"),
            "key 'auto_augment': expected one of none, randaugment, autoaugment_cifar10, trivialaugment_wide, found "
            '"augmix"',
        ),
        (lambda: AugmentationArguments(horizontal_flip="half"), "key 'horizontal_flip': expected a number in [0, 1]"),
        (lambda: AugmentationArguments(horizontal_flip=True), "key 'horizontal_flip': expected a number in [0, 1]"),
        (lambda: AugmentationArguments(horizontal_flip=1.5), "key 'horizontal_flip': expected a number in [0, 1]"),
        (lambda: AugmentationArguments(cutout_size=2.5), "key 'cutout_size': expected an integer >= 0, found 2.5"),
        (lambda: DataArguments(dataset_name=None), "key 'dataset_name': expected a string, found null"),
        (lambda: ModelArguments(depths=[1, "2"]), "key 'depths': expected a list, each item an integer >= 1"),
        (lambda: TeacherArguments(teacher_model="a", teacher_control="broken"), "key 'teacher_control': expected one"),
        (lambda: AnalysisArguments(hessian_dtype="float16"), "key 'hessian_dtype': expected one of float32, float64"),
        (lambda: SupervisedTrainingArguments(output_dir="a", weight_decay_scope="some"), "key 'weight_decay_scope'"),
        (
            lambda: LogitDistillationTrainingArguments(output_dir="a", distillation_type="medium"),
            "key 'distillation_type': expected one of soft, hard, found \"medium\"",
        ),
    ],
)
def test_python_is_refused_what_a_recipe_is(make, line):
    with pytest.raises(ValueError, match="key '") as caught:
        make()
    assert str(caught.value).startswith(line)


def test_what_json_would_hold_is_kept():
    assert ModelArguments(depths=(2, np.int64(3))).depths == [2, 3]
    assert DataArguments(dataset_name=Path("images")).dataset_name == "images"
    assert AugmentationArguments(horizontal_flip=1).horizontal_flip == 1
    assert AugmentationArguments(horizontal_flip=torch.tensor(0.5)).horizontal_flip == 0.5


def test_a_range_in_words():
    assert str(Range(0, 1, high_open=True)) == "in [0, 1)"
    assert str(Range(0, low_open=True)) == "> 0"
    assert float("nan") not in Range()
    assert 0 not in Range(0, low_open=True)


def test_every_key_of_ours_has_a_help_text():
    for arguments in (AugmentationArguments, DataArguments, ModelArguments, SupervisedTrainingArguments):
        own = [f for f in arguments.__dataclass_fields__.values() if is_key(f)]
        assert own
        assert all(f.metadata["help"] for f in own)


def test_published_flaws_are_those_of_the_values():
    name, value, reason = flaws_among(DataArguments, {"selection_split": "test"})[0]
    assert (name, value) == ("selection_split", "test")
    assert published_flaws([DataArguments(selection_split="test")]) == [
        f"selection_split=test repeats a flaw of the published study: {reason}"
    ]
    assert published_flaws([DataArguments()]) == []
