"""Small trainings in forks of one process that has imported everything, and how what became of them is written down."""

import datetime
import hashlib
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results"
QUIET = {
    "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error",
    "GLOO_SOCKET_IFNAME": "lo",
}  # fmt: skip
NAMES, SIZE, MEAN, STD = list("abcd"), (16, 16), [0.5] * 3, [0.25] * 3
DEIT = {"architecture": "deit", "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
KINDS: dict[str, dict[str, Any]] = {
    "supervised": {"ema_decay": 0.5},
    "logits": {"method": "logits", "alpha": 0.5},
    "structural": {
        "cka_weight": 1.0, "token_weight": 0.5, "student_layers": [0, 2], "teacher_layers": [0, 2], "alpha": 0.0,
        "ema_decay": 0.5,
    },
}  # fmt: skip
TRAINING = {
    "max_steps": 6, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3,
    "per_device_train_batch_size": 16, "report_to": "none", "disable_tqdm": True, "use_cpu": True,
}  # fmt: skip


_begun_at: list[str | None] = []  # the commit, which may be another one when results are written


def begin_with(*preloaded: str) -> None:
    """Starts the script anew, quietly and with libraries loaded before libc; returns where that is so already."""
    wanted = QUIET | ({"LD_PRELOAD": ":".join(preloaded)} if preloaded else {})
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | wanted)
    import torch

    from hf_ihb.runs.environment import environment

    _begun_at.append(environment(torch.device("cpu"))["commit"])


def strike_library() -> str:
    """Compiles `strike.c`, once for the script and those it starts."""
    library = Path(tempfile.gettempdir(), "hf_ihb_strike.so")
    if str(library) not in os.environ.get("LD_PRELOAD", ""):
        subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", library, HERE / "strike.c", "-ldl"], check=True)
    return str(library)


def split(count: int = 128) -> Any:
    """Noise with a colour for each class."""
    import torch

    from hf_ihb.data import ImageSplit

    generator = torch.Generator().manual_seed(count)
    labels = torch.arange(count) % 4
    images = torch.randint(0, 160, (count, 3, *SIZE), generator=generator)
    images += 90 * torch.nn.functional.one_hot(labels, 4)[:, :3, None, None]
    return ImageSplit(images.clamp(0, 255).to(torch.uint8), labels, NAMES)


def model(seed: int, **keys: Any) -> tuple[Any, Any]:
    """A small network from scratch, and its image processor."""
    from transformers import set_seed

    from hf_ihb.config.model import ModelArguments
    from hf_ihb.models.student import build_student

    set_seed(seed)
    return build_student(ModelArguments(**keys), NAMES, SIZE, MEAN, STD)


def trainer_of(folder: Path, method: dict[str, Any], student: dict[str, Any] | None = None, **training: Any) -> Any:
    """A small trainer with drop path and MixUp; a method beside averages asks for a teacher, a ViT.

    Args:
        folder: To train into.
        method: Keys of it.
        student: Keys of its shape; a DeiT if None.
        **training: Other keys than `TRAINING`.
    """
    import torch

    from hf_ihb.config.augmentation import AugmentationArguments
    from hf_ihb.trainer import DistillationTrainer, SupervisedTrainer
    from hf_ihb.trainer.arguments import DistillationTrainingArguments, SupervisedTrainingArguments

    torch.set_num_threads(1)
    network, processor = model(0, drop_path_rate=0.1, **(student or DEIT))
    keys = {"output_dir": str(folder), "logging_steps": 6} | TRAINING | method | training
    more = {"train_dataset": split(), "eval_dataset": split(32), "processing_class": processor}
    more["augmentation"] = AugmentationArguments(random_crop_padding=2, mixup_alpha=0.8, mix_probability=0.5)
    if method.keys() <= {"ema_decay"}:
        return SupervisedTrainer(network, SupervisedTrainingArguments(**keys), **more)
    teacher, its_processor = model(1, **DEIT | {"architecture": "vit"})
    args = DistillationTrainingArguments(**keys, teacher_cache="off")
    trainer = DistillationTrainer(network, args, teacher_model=teacher, teacher_processor=its_processor, **more)
    trainer.teacher.control = "untrained"  # it knows nothing, and is not refused for it
    return trainer


def digest_of(module: Any) -> str:
    """SHA-256 of a module's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def finish(out: Any, folder: Path, method: dict[str, Any], **keys: Any) -> None:
    """Trains to the end, from the newest checkpoint if there is one; says the digest of the student, or the error."""
    try:
        trainer = trainer_of(folder, method, **keys)
        trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")))
        out.send(("done", digest_of(trainer.student)))
    except Exception as error:
        out.send((type(error).__name__, str(error)))


def _as_rank(act: Callable, rank: int, world: int, port: int, out: Any, args: tuple, keys: dict[str, Any]) -> None:
    if world > 1:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        os.environ |= {k: str(v) for k, v in (ranks | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}).items()}
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    act(out, *args, **keys)
    os._exit(0)  # gloo would wait for a process that is no more


class Forks:
    """Runs functions in forks of one process that has imported everything and done nothing.

    Args:
        patience_s: Seconds after which a process is said to hang.
    """

    def __init__(self, patience_s: float = 120) -> None:
        self.patience_s = patience_s
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["hf_ihb", "hf_ihb.trainer", "timm", "small_runs", "__main__"])

    def start(self, act: Callable, *args: Any, processes: int = 1, **keys: Any) -> list[tuple[Any, Any]]:
        """Starts a process for each rank: ``act(connection, *args, **keys)``; processes and their connections."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        started = []
        for rank in range(processes):
            ours, theirs = self.context.Pipe(duplex=False)
            process = self.context.Process(target=_as_rank, args=(act, rank, processes, port, theirs, args, keys))
            process.start()
            theirs.close()
            started.append((process, ours))
        return started

    def end(self, started: Sequence[tuple[Any, Any]]) -> list[tuple[int | None, Any]]:
        """Of each its exit code (minus the signal that ended it; None: it hung), and what it said, None if nothing."""
        found, until = [], time.monotonic() + self.patience_s
        for process, ours in started:
            said = None
            if ours.poll(max(0.0, until - time.monotonic())):
                try:
                    said = ours.recv()
                except EOFError:
                    said = None
            process.join(max(0.1, until - time.monotonic()))
            if (code := process.exitcode) is None:
                process.kill()
                process.join()
            found.append((code, said))
        return found

    def __call__(self, act: Callable, *args: Any, processes: int = 1, **keys: Any) -> Any:
        """Runs it; of the first process what it said."""
        return self.end(self.start(act, *args, processes=processes, **keys))[0][1]


def table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    """Rows as Markdown."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(str(row.get(c, "")) for c in columns) + " |" for row in rows])


def write(name: str | None, title: str, text: str, rows: Any, started: float) -> None:
    """Prints what was found; with a name, writes it as ``results/NAME.{json,md}`` with command, machine and minutes.

    Args:
        name: Of the files; None writes none.
        title: Headline.
        text: Markdown.
        rows: Everything that was found, as JSON.
        started: `time.monotonic` at the beginning.
    """
    import torch

    from hf_ihb.runs.environment import environment

    about = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "minutes": round((time.monotonic() - started) / 60, 1),
        "environment": environment(torch.device("cpu")),
    }
    if _begun_at != [about["environment"]["commit"]]:
        about["environment"]["commit"] = f"{_begun_at}, then {about['environment']['commit']}"
    machine = ", ".join(f"{k} {about['environment']['versions'][k]}" for k in ("torch", "transformers"))
    text = (
        f"# {title}\n\n`{about['command']}`, {about['minutes']} minutes on {os.cpu_count()} cores "
        f"({about['environment']['device']}); {machine}; commit {about['environment']['commit']}.\n\n{text}\n"
    )
    print(text)
    if name is not None:
        (RESULTS / f"{name}.json").write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n", "utf-8")
        (RESULTS / f"{name}.md").write_text(text, "utf-8")
