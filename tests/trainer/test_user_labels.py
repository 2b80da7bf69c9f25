"""Labels and training sets of a user's own, from Python: learned from as they are, or refused in one line."""

import datasets
import pytest
import torch
from torch.utils.data import IterableDataset

from hf_ihb.errors import DataError
from hf_ihb.trainer import StructuralDistillationTrainer, SupervisedTrainer
from hf_ihb.trainer.arguments import StructuralDistillationTrainingArguments, SupervisedTrainingArguments

FAST = {"max_steps": 2, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "report_to": "none"}
FAST |= {"save_strategy": "no", "disable_tqdm": True, "use_cpu": True}


def items(labels):
    generator = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": label} for label in labels]


@pytest.fixture
def make(make_student, tmp_path):
    def make(train, evaluation=None, **options):
        args = SupervisedTrainingArguments(output_dir=str(tmp_path), **FAST, **options)
        return SupervisedTrainer(make_student(), args, train_dataset=train, eval_dataset=evaluation)

    return make


GOOD = [0, 1, 2, 3, 0, 1, 2, 3]
MULTI_HOT = torch.tensor([1.0, 1.0, 0.0, 0.0])
BAD = {
    "multi-hot": ([MULTI_HOT] * 8, r"sum to 1, found \[1, 1, 0, 0\], which sum to 2; several classes of one image"),
    "soft": ([MULTI_HOT / 4] * 8, r"sum to 1, found \[0.25, 0.25, 0, 0\], which sum to 0.5"),
    "bool": ([torch.tensor(True)] * 8, r"expected integers \(B,\) .*, found torch.bool \(4,\)"),
    "ignored": ([-100] * 8, r"expected a label in \[0, 4\), found -100"),
    "too large": ([4] * 8, r"expected a label in \[0, 4\), found 4"),
}


@pytest.mark.parametrize("case", BAD)
def test_labels_that_cannot_be_learned_from_are_one_line(make, case):
    labels, line = BAD[case]
    trainer = make(items(labels), items(labels))
    for act in (trainer.train, trainer.evaluate):
        with pytest.raises(DataError, match=f"^labels.*{line}"):
            act()
    assert trainer.state.global_step == 0


def test_they_are_one_line_out_of_a_worker_process_too(make):
    with pytest.raises(DataError, match=r"^labels, row 0: expected a label in \[0, 4\), found -100$"):
        make(items([-100] * 8), dataloader_num_workers=1).train()


def test_class_probabilities_are_learned_from(make):
    losses = []
    for labels in (GOOD, list(torch.eye(4)[GOOD])):
        trainer = make(items(labels), items(labels), logging_steps=1)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        losses[-1].append(trainer.evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


class Stream(IterableDataset):
    def __iter__(self):
        yield from items(GOOD)


def test_a_stream_is_refused_where_features_are_compared_and_trained_on_elsewhere(
    make, make_student, make_teacher, tmp_path
):
    lazy = datasets.Dataset.from_list([{"pixel_values": torch.zeros(3, 16, 16).tolist(), "labels": 0}] * 8)
    args = StructuralDistillationTrainingArguments(
        output_dir=str(tmp_path), cka_weight=1.0, student_layers=[1], teacher_layers=[1], **FAST
    )
    for stream in (Stream(), lazy.to_iterable_dataset()):
        with pytest.raises(DataError, match=r"^train_dataset: expected .*, found a stream \(\w*\), which methods that"):
            StructuralDistillationTrainer(make_student(), args, train_dataset=stream, teacher_model=make_teacher())
    trainer = make(Stream())
    trainer.train()
    assert trainer.state.global_step == 2
