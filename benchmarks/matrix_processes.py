"""Two processes train every student for two steps and end with the same weights: what `matrix.py` starts by torchrun.

torchrun --nproc_per_node 2 benchmarks/matrix_processes.py OUT.json STUDENT ...
"""

import os
import sys
import tempfile
from pathlib import Path

import torch
import transformers

from benchmarks import matrix_training as training
from benchmarks.families import FAMILIES
from hf_ihb.config.model import TeacherArguments
from hf_ihb.models.processing import student_processor
from hf_ihb.models.teacher import Teacher, load_teacher
from hf_ihb.runs.files import write_json


def small_dinov2(folder: Path) -> Teacher:
    """The teacher of all, read as from the Hub; made before there are several processes, of which one would save."""
    family = FAMILIES["transformers/dinov2"]
    family.build().save_pretrained(folder)
    student_processor(training.MEAN, training.STD, (family.size, family.size)).save_pretrained(folder)
    return load_teacher(TeacherArguments(teacher_model=str(folder)), ["a", "b"], needs_logits=False)


def outcome(name: str, teacher: Teacher, folder: Path) -> str:
    """``ok``, or what is wrong, in one line."""
    transformers.set_seed(0)
    family = FAMILIES[name]
    options = {"max_steps": 2, "ddp_find_unused_parameters": False, "ddp_backend": "gloo"}
    trainer = training.trainer_of(family.build(), teacher, folder, family.size, **options)
    if trainer.args.world_size != 2:
        return f"expected two processes, found {trainer.args.world_size}"
    training.train(trainer)
    own = torch.cat([p.detach().flatten() for p in trainer.student.parameters()])
    gathered = trainer.accelerator.gather(own[None])
    return "ok" if torch.equal(gathered[0], gathered[1]) else "the weights of two processes differ"


def main() -> None:
    """Tries each student, and goes on with the next one where one fails."""
    out, *names = sys.argv[1:]
    transformers.logging.set_verbosity_error()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        teacher = small_dinov2(Path(folder))
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            try:
                found[name] = outcome(name, teacher, Path(folder))
            except Exception as error:
                found[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
                print(found[name], file=sys.stderr, flush=True)
        if os.environ["RANK"] == "0":
            write_json(Path(out), found)


if __name__ == "__main__":
    main()
