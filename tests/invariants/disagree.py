"""Trains where the main process alone sees no progress, with BatchNorm averaged; each process tells how it ended."""

from pathlib import Path

import torch
from transformers import set_seed

from hf_ihb.config.model import ModelArguments
from hf_ihb.data import ImageSplit
from hf_ihb.models.processing import student_processor
from hf_ihb.models.student import build_student
from hf_ihb.run import run_script
from hf_ihb.trainer import SupervisedTrainer
from hf_ihb.trainer.arguments import SupervisedTrainingArguments

MEAN, STD, SIZE = [0.5] * 3, [0.25] * 3, (8, 8)


def make_split(seed: int) -> ImageSplit:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (64, 3, *SIZE), generator=generator, dtype=torch.uint8)
    return ImageSplit(images, torch.arange(64) % 2, ["even", "odd"])


def train(folder: Path, **average: float) -> None:
    args = SupervisedTrainingArguments(
        output_dir=str(folder), num_train_epochs=6, per_device_train_batch_size=8, **average,
        eval_strategy="epoch", save_strategy="best", metric_for_best_model="progress", greater_is_better=True,
        early_stopping_patience=2, report_to="none", disable_tqdm=True, use_cpu=True, ddp_timeout=60,
    )  # fmt: skip
    rank = args.process_index

    def compute_metrics(_):
        return {"progress": float(trainer.state.global_step * rank)}

    set_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4}
    student, _ = build_student(ModelArguments(conv_stem=True, **shape), ["even", "odd"], SIZE, MEAN, STD)
    trainer = SupervisedTrainer(
        student, args, train_dataset=make_split(0), eval_dataset=make_split(1), compute_metrics=compute_metrics,
        processing_class=student_processor(MEAN, STD, SIZE),
    )  # fmt: skip
    trainer.train()
    ended = {"step": trainer.state.global_step, "best": trainer.state.best_metric, "world": args.world_size}
    torch.save({"ended": ended, "state": trainer.model.state_dict()}, folder / f"{rank}.pt")


def main(argv: list[str]) -> None:
    train(Path(argv[0], "swa"), swa_start=0.0)
    train(Path(argv[0], "ema"), ema_decay=0.9)


if __name__ == "__main__":
    run_script(main)
