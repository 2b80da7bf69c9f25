"""What may happen to a process while it saves, and a small training it happens to."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from transformers import set_seed

from hf_ihb.config.augmentation import AugmentationArguments
from hf_ihb.config.model import ModelArguments
from hf_ihb.models.processing import student_processor
from hf_ihb.models.student import build_student
from hf_ihb.trainer import SupervisedTrainer
from hf_ihb.trainer.arguments import SupervisedTrainingArguments
from tests.trainer.conftest import LABELS, MEAN, SIZE, STD, make_split

SETTINGS = {
    "max_steps": 6, "save_strategy": "steps", "save_steps": 2, "ema_decay": 0.5, "learning_rate": 1e-3,
    "per_device_train_batch_size": 16, "report_to": "none", "disable_tqdm": True, "use_cpu": True,
}  # fmt: skip
_STRUCK = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")


class Attack:
    """Counts what this process does to files whose path holds a word, and strikes at one of them.

    Python tells an audit hook of each open, rename and removal before it is made; a hook stays until the process ends.
    """

    def __init__(self) -> None:
        self.word: str | None = None
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple) -> None:
        """The hook."""
        if self.word is None or event not in _STRUCK or self.word not in str(args[0]):
            return
        if event == "open" and not (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            return
        self.count += 1
        if self.count == self.strike_at:
            self.act()

    def begin(self, word: str, strike_at: int, act: Callable[[], None]) -> None:
        """Acts at the strike_at-th time, from now on."""
        self.word, self.strike_at, self.count, self.act = word, strike_at, 0, act

    def end(self) -> None:
        """Looks away."""
        self.word = None


def small_trainer(folder: Path, **overrides) -> SupervisedTrainer:
    """A DeiT with drop path, an average of its weights, and augmented images."""
    set_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "drop_path_rate": 0.1}
    student = build_student(ModelArguments(architecture="deit", **shape), LABELS, SIZE, MEAN, STD)[0]
    return SupervisedTrainer(
        student,
        SupervisedTrainingArguments(output_dir=str(folder), **(SETTINGS | overrides)),
        train_dataset=make_split(128, seed=0),
        eval_dataset=make_split(32, seed=1),
        processing_class=student_processor(MEAN, STD, SIZE),
        augmentation=AugmentationArguments(random_crop_padding=2),
    )


def train_until_killed(folder: Path, word: str, strike_at: int) -> None:
    """Trains, and is killed at what it does to a file, if it does so often."""
    Attack().begin(word, strike_at, lambda: os.kill(os.getpid(), signal.SIGKILL))
    small_trainer(folder).train()


def in_a_process(act: Callable, *args) -> int:
    """Runs a function in a fork of a process that has imported all of this and done nothing.

    Returns:
        Its exit code, or minus the signal that ended it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=act, args=args)
    process.start()
    process.join()
    return process.exitcode
