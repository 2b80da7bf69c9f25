"""Every student by every method: is a training that was killed and resumed one that nothing happened to, bit for bit?

python benchmarks/reliability/resume_matrix.py [--students deit,vit,convnextv2,resnet] [--name NAME]

Each small training has drop path, MixUp and a moving average, evaluates and saves at steps 2, 4 and 6, and ends with
its best step, by a metric that prefers an early one. It is killed at the beginning of step 6 and resumed from step 4.
What is compared: weights, average, optimizer, schedule and generators of the checkpoint of step 6, of both runs; what
the module holds at the end, of both, and with the average that was saved at the best step.
"""

import argparse
import hashlib
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from small_runs import DEIT, Forks, begin_with, digest_of, table, trainer_of, write

STUDENTS: dict[str, dict[str, Any]] = {
    "deit": DEIT,
    "vit": DEIT | {"architecture": "vit"},
    "convnextv2": {"architecture": "convnextv2", "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]},
    "resnet": {"architecture": "resnet18_cifar_w16"},
}
LAYERS = {"student_layers": [0, "last"], "teacher_layers": [0, "last"]}
METHODS: dict[str, dict[str, Any]] = {
    "labels": {},
    "logits": {"method": "logits", "alpha": 0.5},
    "CKA": {"cka_weight": 1.0, **LAYERS},
    "Gram": {"gram_weight": 1.0, **LAYERS},
    "KD + CKA": {"alpha": 0.5, "cka_weight": 1.0, **LAYERS},
}
TRAINING = {
    "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "loss",
    "lr_scheduler_type": "cosine",
}  # fmt: skip
_RISES = {"resnet"}  # the loss of an average whose BatchNorm has seen few batches


def state_of(checkpoint: Path) -> dict[str, str]:
    """What a training goes on from -> a digest of it."""
    import torch

    digests = {
        str(path.relative_to(checkpoint)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(checkpoint.rglob("*.safetensors"))
    }
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):  # their bytes hold names of files
        content = torch.load(checkpoint / name, weights_only=False)
        digests[name] = hashlib.sha256(_flat(content)).hexdigest()
    return digests


def _flat(value: Any) -> bytes:
    import torch

    if isinstance(value, torch.Tensor):
        return value.contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return b"".join(str(k).encode() + _flat(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return b"".join(map(_flat, value))
    return value.tobytes() if hasattr(value, "tobytes") else str(value).encode()


def run(out: Any, folder: Path, student: str, method: str, dies: bool) -> None:
    """Trains to the end, from the newest checkpoint if there is one; or dies at the beginning of the last step."""
    from transformers import TrainerCallback

    class Dies(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                os.kill(os.getpid(), signal.SIGKILL)

    settings = TRAINING | {"greater_is_better": student not in _RISES}
    try:
        trainer = trainer_of(folder, METHODS[method] | {"ema_decay": 0.5}, STUDENTS[student], **settings)
        if dies:
            trainer.add_callback(Dies())
        trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")))
        best = Path(trainer.state.best_model_checkpoint)
        left = digest_of(trainer.accelerator.unwrap_model(trainer.model))
        trainer.checkpoints.averaging.load_best(best)
        out.send(
            {
                "best": best.name,
                "left": left,
                "read": digest_of(trainer.accelerator.unwrap_model(trainer.model)),
                "checkpoint": state_of(folder / "checkpoint-6"),
            }
        )
    except Exception as error:
        out.send({"error": f"{type(error).__name__}: {error}"})


def cell(forks: Forks, folder: Path, student: str, method: str) -> dict[str, Any]:
    """One student by one method."""
    whole = forks(run, folder / "whole", student, method, False)
    ((code, _),) = forks.end(forks.start(run, folder / "run", student, method, True))
    resumed = forks(run, folder / "run", student, method, False)
    row: dict[str, Any] = {"student": student, "method": method}
    if code != -signal.SIGKILL or whole is None or resumed is None or "error" in whole or "error" in resumed:
        return row | {"checkpoint of step 6": "no", "error": str([code, whole, resumed])}
    other = [name for name, digest in whole["checkpoint"].items() if resumed["checkpoint"].get(name) != digest]
    row["checkpoint of step 6"] = "the same" if not other else f"differs: {', '.join(other)}"
    row["left at the end"] = "the same" if whole["left"] == resumed["left"] else "differs"
    row["best step"] = f"{whole['best']} / {resumed['best']}"
    entirely = all(found["left"] == found["read"] for found in (whole, resumed))
    return row | {"is the best step's": "entirely" if entirely else "no"}


def main() -> None:
    """Writes a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--students", default=",".join(STUDENTS))
    parser.add_argument("--name", default=None, help="Of the results, without ending; printed alone if not given.")
    args = parser.parse_args()
    begin_with()
    started, forks, rows = time.monotonic(), Forks(), []
    with tempfile.TemporaryDirectory() as folder:
        for student in args.students.split(","):
            for method in METHODS:
                rows.append(cell(forks, Path(folder, f"{student}-{method}"), student, method))
                print(f"\r{rows[-1]} ", end="", file=sys.stderr)
    columns = ["student", "method", "checkpoint of step 6", "left at the end", "best step", "is the best step's"]
    write(args.name, "Killed and resumed: every student by every method", table(rows, columns), rows, started)


if __name__ == "__main__":
    main()
