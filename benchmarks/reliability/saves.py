"""A save that is killed, or refused room, at every write: does the run go on to the same end?

python benchmarks/reliability/saves.py [--every 1] [--kinds supervised,logits,structural] [--name NAME]

Small trainings of each kind save at steps 2, 4 and 6. The save of step 4 is struck at its n-th call of write, open,
fsync, mkdir, rename, unlink or rmdir, for every n (a library loaded before libc counts them): by SIGKILL, and by
ENOSPC. Then the run is resumed from its newest checkpoint, and its weights are compared with those of a run that
nothing happened to.
"""

import argparse
import ctypes
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
KINDS = ("supervised", "logits", "structural")
KEYS = {
    "supervised": {"ema_decay": 0.5},
    "logits": {"method": "logits", "alpha": 0.5},
    "structural": {
        "cka_weight": 1.0, "token_weight": 0.5, "student_layers": [0, 2], "teacher_layers": [0, 2], "alpha": 0.0,
        "ema_decay": 0.5,
    },
}  # fmt: skip


def trainer_of(kind: str, folder: Path) -> Any:
    """A small trainer, in the process that asks: everything heavy is imported by the fork server."""
    import torch
    from transformers import set_seed

    from hf_ihb.config.augmentation import AugmentationArguments
    from hf_ihb.config.model import ModelArguments
    from hf_ihb.data import ImageSplit
    from hf_ihb.models.student import build_student
    from hf_ihb.trainer import DistillationTrainer, SupervisedTrainer
    from hf_ihb.trainer.arguments import DistillationTrainingArguments, SupervisedTrainingArguments

    torch.set_num_threads(1)
    names, size, mean, std = list("abcd"), (16, 16), [0.5] * 3, [0.25] * 3
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(128) % 4
    images = torch.randint(0, 160, (128, 3, *size), generator=generator)
    images += 90 * torch.nn.functional.one_hot(labels, 4)[:, :3, None, None]
    split = ImageSplit(images.clamp(0, 255).to(torch.uint8), labels, names)

    def vit(seed: int, **more: Any) -> Any:
        set_seed(seed)
        keys = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2} | more
        return build_student(ModelArguments(**keys), names, size, mean, std)

    student, processor = vit(0, architecture="deit", drop_path_rate=0.1)
    common = {
        "output_dir": str(folder), "max_steps": 6, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3,
        "per_device_train_batch_size": 16, "report_to": "none", "disable_tqdm": True, "use_cpu": True,
        "logging_steps": 6,
    }  # fmt: skip
    more = {"train_dataset": split, "processing_class": processor}
    more["augmentation"] = AugmentationArguments(random_crop_padding=2, mixup_alpha=0.8, mix_probability=0.5)
    if kind == "supervised":
        return SupervisedTrainer(student, SupervisedTrainingArguments(**common, **KEYS[kind]), **more)
    teacher, its_processor = vit(1, architecture="vit")
    args = DistillationTrainingArguments(**common, **KEYS[kind], teacher_cache="off")
    trainer = DistillationTrainer(student, args, teacher_model=teacher, teacher_processor=its_processor, **more)
    trainer.teacher.control = "untrained"  # it knows nothing, and is not refused for it
    return trainer


def digest_of(trainer: Any) -> str:
    """SHA-256 of the student's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(trainer.student.state_dict().items()):
        digest.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def struck_run(kind: str, folder: Path, at: int, refuses: bool, out: Any) -> None:
    """Trains; the save of step 4 is struck at its `at`-th call."""
    strike = ctypes.CDLL(os.environ["LD_PRELOAD"])
    strike.end.restype = ctypes.c_long
    strike.begin(b"checkpoint-4", ctypes.c_long(at), int(refuses))
    try:
        trainer_of(kind, folder).train()
        out.send(("done", strike.end()))
    except Exception as error:
        strike.end()
        out.send((type(error).__name__, str(error)))


def resumed_run(kind: str, folder: Path, out: Any) -> None:
    """Goes on from the newest checkpoint."""
    try:
        trainer = trainer_of(kind, folder)
        trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")))
        out.send(("done", digest_of(trainer)))
    except Exception as error:
        out.send((type(error).__name__, str(error)))


class Forks:
    """Runs functions in forks of one process that has imported everything."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["hf_ihb", "hf_ihb.trainer", "timm", __name__])

    def __call__(self, act: Callable, *args: Any) -> tuple[int, Any]:
        """Exit code (minus the signal that ended it) and what it sent, None if nothing."""
        ours, theirs = self.context.Pipe(duplex=False)
        process = self.context.Process(target=act, args=(*args, theirs))
        process.start()
        theirs.close()
        try:
            said = ours.recv()
        except EOFError:
            said = None
        process.join()
        return process.exitcode, said


def sweep(forks: Forks, kind: str, refuses: bool, every: int, folder: Path) -> dict[str, Any]:
    """Strikes at every n-th call."""
    whole = forks(resumed_run, kind, folder / "whole")[1]
    _, (_, calls) = forks(struck_run, kind, folder / "count", -1, False)
    row: dict[str, Any] = {"kind": kind, "strike": "ENOSPC" if refuses else "SIGKILL", "calls": calls}
    row |= {"struck": 0, "same": 0, "clear": 0, "others": []}
    for at in range(1, calls + 1, every):
        run = folder / "run"
        shutil.rmtree(run, ignore_errors=True)
        code, said = forks(struck_run, kind, run, at, refuses)
        if not refuses and code != -signal.SIGKILL:
            row["others"].append([at, "not killed", said])
            continue
        row["struck"] += 1
        if refuses:
            # what may fail without harm (an fsync of a cleaning, a folder that is there) does not end a run
            clear = said is not None and (said[0] == "done" or ("bytes" in said[1] and said[0] == "CheckpointError"))
            row["clear"] += clear
            if not clear:
                row["others"].append([at, *said])
        resumed = forks(resumed_run, kind, run)[1]
        row["same"] += resumed == whole
        if resumed != whole:
            row["others"].append([at, "resumed", resumed])
        print(f"\r{kind} {row['strike']} {at}/{calls}: {row['same']}/{row['struck']}", end="", file=sys.stderr)
    print(file=sys.stderr)
    return row


def main() -> None:
    """Writes a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="Strike at every n-th call.")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--name", default=None, help="Of the results, without ending; printed alone if not given.")
    args = parser.parse_args()
    library = Path(tempfile.gettempdir(), "hf_ihb_strike.so")
    if os.environ.get("LD_PRELOAD") != str(library):
        subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", library, HERE / "strike.c", "-ldl"], check=True)
        quiet = {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | quiet | {"LD_PRELOAD": str(library)})
    forks, rows = Forks(), []
    with tempfile.TemporaryDirectory() as folder:
        for kind in args.kinds.split(","):
            for refuses in (False, True):
                rows.append(sweep(forks, kind, refuses, args.every, Path(folder, f"{kind}-{refuses}")))
    lines = ["| training | struck by | calls in a save | struck | resumed bit for bit | one clear line |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        clear = f"{row['clear']} of {row['struck']}" if row["strike"] == "ENOSPC" else ""
        lines.append(
            f"| {row['kind']} | {row['strike']} | {row['calls']} | {row['struck']} | "
            f"{row['same']} of {row['struck']} | {clear} |"
        )
    print("\n".join(lines))
    if args.name is not None:
        from hf_ihb.runs.environment import environment

        about = {"command": " ".join(["python", *sys.argv]), "environment": environment("cpu"), "rows": rows}
        (HERE.parent / "results" / f"{args.name}.json").write_text(json.dumps(about, indent=1), "utf-8")
        text = f"# A save struck at every call\n\n`{about['command']}`\n\n" + "\n".join(lines) + "\n"
        (HERE.parent / "results" / f"{args.name}.md").write_text(text, "utf-8")


if __name__ == "__main__":
    main()
