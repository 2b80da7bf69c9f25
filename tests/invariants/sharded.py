"""Trains students of every kind as a launch config asks for: FSDP2 on two CPU processes, or one process without it.

accelerate shards on accelerators alone; it is told here that there are some.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.fsdp import FSDPModule
from transformers import Dinov2Config, Dinov2Model, set_seed

from hf_ihb.config.model import ModelArguments
from hf_ihb.models.processing import pixel_format, student_processor
from hf_ihb.models.student import build_student
from hf_ihb.models.teacher import Teacher
from hf_ihb.run import run_script
from hf_ihb.trainer import StructuralDistillationTrainer
from hf_ihb.trainer.arguments import StructuralDistillationTrainingArguments
from tests.invariants.conftest import ROOT
from tests.invariants.disagree import MEAN, SIZE, STD, make_split

VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 2}
STAGES = {"hidden_sizes": [8, 16], "depths": [2, 2]}
# each with what is gathered by itself
STUDENTS = {
    "deit": (VIT, ["DeiTLayer"]),
    "layer_scale": ({"layer_scale_init": 0.1, **VIT}, ["FlexibleDeiTLayer"]),
    "stem": ({"conv_stem": True, **VIT}, ["FlexibleDeiTLayer"]),
    "vit": ({"architecture": "vit", **VIT}, ["ViTLayer"]),
    "adaptive_cnn": ({"architecture": "adaptive_cnn", **STAGES}, ["AdaptiveCNNBlock"]),
    "convnextv2": ({"architecture": "convnextv2", **STAGES}, ["ConvNextV2Layer", "ConvNextV2Stage"]),
    "resnet": ({"architecture": "resnet18_cifar_w16"}, ["BasicBlock"]),
}
WITHOUT_BATCH_NORM = ["deit", "layer_scale", "vit", "convnextv2"]  # as its statistics are each process's own
IN_BF16 = ["deit", "stem", "adaptive_cnn", "convnextv2"]
LOSSES = {"cka_weight": 1.0, "gram_weight": 1.0, "token_weight": 1.0, "relation_weight": 1.0}


def make_trainer(folder: Path, name: str, seed: int = 0, **keys: Any) -> StructuralDistillationTrainer:
    """A trainer of 16 images a step in all."""
    args = StructuralDistillationTrainingArguments(**{
        "output_dir": str(folder), "max_steps": 2, "optim": "sgd", "learning_rate": 0.1, "student_layers": [0, 1],
        "per_device_train_batch_size": 16 // PartialState(cpu=True).num_processes, "teacher_layers": [0, 1],
        "teacher_cache": "off", "teacher_statistics_samples": 32, "report_to": "none", "disable_tqdm": True,
        "use_cpu": True, "logging_steps": 1, "save_strategy": "no", **keys,
    })  # fmt: skip
    set_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    processor = student_processor(MEAN, STD, SIZE)
    teacher = Teacher(Dinov2Model(Dinov2Config(image_size=8, patch_size=2, **shape)), pixel_format(processor))
    torch.manual_seed(torch.initial_seed() + seed)
    student, _ = build_student(ModelArguments(**STUDENTS[name][0]), ["even", "odd"], SIZE, MEAN, STD)
    return StructuralDistillationTrainer(
        student, args, train_dataset=make_split(0), eval_dataset=make_split(1), processing_class=processor,
        teacher_model=teacher,
    )  # fmt: skip


def losses_of(trainer: StructuralDistillationTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def train(folder: Path, name: str, precision: str) -> dict[str, list]:
    """Two steps; saves the student, and returns its losses and the classes of what was sharded."""
    keys = {**LOSSES, "teacher_projector": "trainable", "bf16": precision == "bf16"}
    trainer = make_trainer(folder / f"{name}-{precision}", name, **keys)
    trainer.train()
    trainer.save_model()
    trainer.evaluate()
    modules = trainer.model_wrapped.modules()
    sharded = {type(m).__name__.removeprefix("FSDP") for m in modules if isinstance(m, FSDPModule)}
    return {"sharded": sorted(sharded - {"StudentModule"}), "losses": losses_of(trainer)}


def resume(folder: Path) -> list[list[float]]:
    """Losses of six steps, and of the same from a checkpoint that was written while a head had no loss yet."""
    keys = {
        "max_steps": 6, "optim": "adamw_torch", "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 2,
        "token_weight": 1.0, "token_warmup_epochs": 1.0, "distillation_warmup_type": "step",
    }  # fmt: skip
    whole, again = (make_trainer(folder / "resumed", "deit", seed, **keys) for seed in (0, 1))
    whole.train()
    again.train(resume_from_checkpoint=str(folder / "resumed" / "checkpoint-2"))
    return [losses_of(whole), losses_of(again)]


def shard_on_cpus(config: Path) -> None:
    """From here on accelerate does what it would on several GPUs under a launch config."""
    parsed = launch_command_parser().parse_args(["--config_file", str(config), "--mixed_precision", "no", "script"])
    asked = prepare_multi_gpu_env(_validate_launch_command(parsed)[0])
    os.environ.update({key: value for key, value in asked.items() if key.startswith(("ACCELERATE_", "FSDP_"))})
    original = Accelerator.__init__

    def initialise(self: Accelerator, *args: object, **kwargs: object) -> None:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        original(self, *args, **kwargs)

    Accelerator.__init__ = initialise


def main(argv: list[str]) -> None:
    folder = Path(argv[0])
    shard_on_cpus(ROOT / "recipes/accelerate/fsdp2.yaml")
    found = {f"{name}-float32": train(folder, name, "float32") for name in STUDENTS}
    found |= {f"{name}-bf16": train(folder, name, "bf16") for name in IN_BF16}
    found["resumed"] = resume(folder)
    if torch.distributed.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    run_script(main)
