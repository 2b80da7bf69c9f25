"""Trains a student with parameters that no output depends on, saves, resumes; run by two processes."""

from pathlib import Path

import torch
from transformers import set_seed

from hf_ihb.models.processing import student_processor
from hf_ihb.run import run_script
from hf_ihb.trainer import SupervisedTrainer
from hf_ihb.trainer.arguments import SupervisedTrainingArguments
from tests.invariants.disagree import MEAN, STD, make_split
from tests.models.test_module import FAMILIES


def trainer_of(family: str, folder: Path, max_steps: int) -> SupervisedTrainer:
    args = SupervisedTrainingArguments(
        output_dir=str(folder), max_steps=max_steps, per_device_train_batch_size=8, ema_decay=0.9, weight_decay=0.1,
        save_steps=2, report_to="none", disable_tqdm=True, use_cpu=True, ddp_timeout=60,
    )  # fmt: skip
    set_seed(0)
    student = FAMILIES[family][0]()
    processor = student_processor(MEAN, STD, (16, 16))
    return SupervisedTrainer(student, args, train_dataset=make_split(0), processing_class=processor)


def main(argv: list[str]) -> None:
    """Three steps at once, and two and one."""
    family, folder = "siglip", Path(argv[0])
    whole = trainer_of(family, folder / "whole", 3)
    assert whole.args.world_size == int(argv[1])
    before = {name: p.clone() for name, p in whole.student.named_parameters()}
    whole.train()
    parts = trainer_of(family, folder / "whole", 3)
    parts.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-2"))
    moved = {name for name, p in whole.student.named_parameters() if not torch.equal(p, before[name])}
    assert len(before) - len(moved) == FAMILIES[family][1], sorted(before.keys() - moved)
    for name, tensor in whole.student.state_dict().items():
        assert torch.equal(parts.student.state_dict()[name], tensor), name


if __name__ == "__main__":
    run_script(main)
