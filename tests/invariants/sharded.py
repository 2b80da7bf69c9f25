"""Trains students of every kind as a launch config asks for: FSDP2 on two CPU processes, or one process without it.

accelerate shards on accelerators alone; it is told here that there are some.
"""

import json
import os
from pathlib import Path

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


def train(folder: Path, name: str, precision: str) -> dict[str, list]:
    """Two steps of 16 images in all; saves the student, and returns its losses and the classes of what was sharded."""
    args = StructuralDistillationTrainingArguments(
        output_dir=str(folder / f"{name}-{precision}"), max_steps=2, optim="sgd", learning_rate=0.1,
        per_device_train_batch_size=16 // PartialState(cpu=True).num_processes, **LOSSES, student_layers=[0, 1],
        teacher_layers=[0, 1], teacher_projector="trainable", bf16=precision == "bf16", teacher_cache="off",
        teacher_statistics_samples=32, report_to="none", disable_tqdm=True, use_cpu=True, logging_steps=1,
        save_strategy="no",
    )  # fmt: skip
    set_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    processor = student_processor(MEAN, STD, SIZE)
    teacher = Teacher(Dinov2Model(Dinov2Config(image_size=8, patch_size=2, **shape)), pixel_format(processor))
    student, _ = build_student(ModelArguments(**STUDENTS[name][0]), ["even", "odd"], SIZE, MEAN, STD)
    trainer = StructuralDistillationTrainer(
        student, args, train_dataset=make_split(0), eval_dataset=make_split(1), processing_class=processor,
        teacher_model=teacher,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    trainer.evaluate()
    modules = trainer.model_wrapped.modules()
    sharded = {type(m).__name__.removeprefix("FSDP") for m in modules if isinstance(m, FSDPModule)}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"sharded": sorted(sharded - {"StudentModule"}), "losses": losses}


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
    if torch.distributed.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    run_script(main)
