"""A run that is told to end: it finishes its step, saves, and ends with 143; and one that lost a process."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from hf_ihb.errors import Preempted, ProcessLostError
from hf_ihb.trainer.saving import last_good


class Preemption(TrainerCallback):
    """Turns SIGTERM into a checkpoint of the step that is under way, on all processes the same.

    Processes agree over the store that they met by, on the host: the main one says after each step whether it was the
    last, and the others wait for that word. No device is asked for anything.

    Args:
        trainer: Whose training may be ended.
    """

    _trainings = 0

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        # `enable_jit_checkpoint` installs one that saves in the middle of a step, and goes on to whatever follows
        if (stock := trainer.pop_callback(JITCheckpointCallback)) is not None:
            signal.signal(signal.SIGTERM, stock.jit_manager._original_sigterm_handler)
        self._asked = self._said = self._ends = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Around a training: SIGTERM asks it to end. Where somebody else handles the signal already, it is theirs."""
        Preemption._trainings += 1
        self._asked = self._said = self._ends = False
        in_main_thread = threading.current_thread() is threading.main_thread()
        if not in_main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            yield
            return
        signal.signal(signal.SIGTERM, self._ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _ask(self, *args: Any) -> None:
        self._asked = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Asks for a checkpoint where the training is to end."""
        if self._is_last(state.global_step):
            self._ends = control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ends the training, once the checkpoint is there.

        Raises:
            Preempted: If it was asked to end.
        """
        if self._ends:
            raise Preempted(
                f"step {state.global_step}: told to end (SIGTERM); saved in {args.output_dir}, go on by "
                "--resume_from_checkpoint true"
            )

    def _is_last(self, step: int) -> bool:
        if self.trainer.args.world_size == 1:
            return self._asked
        store, prefix = dist.distributed_c10d._get_default_store(), f"hf_ihb/training-{self._trainings}"
        if self._asked and not self._said:
            store.set(f"{prefix}/asked", "1")
            self._said = True
        if self.trainer.args.process_index > 0:
            return store.get(f"{prefix}/{step}") == b"1"
        ends = store.check([f"{prefix}/asked"])
        store.set(f"{prefix}/{step}", "1" if ends else "0")
        store.delete_key(f"{prefix}/{step - 100}")  # hosts run ahead of each other by less
        return ends


@contextmanager
def together(trainer: Trainer) -> Iterator[None]:
    """Around what processes do together: those that one leaves alone end in a line.

    Args:
        trainer: Whose output folder holds what can be gone on from.

    Raises:
        ProcessLostError: If another process has ended, or cannot be reached.
    """
    try:
        yield
    except RuntimeError as error:
        # gloo has no class of its own; the name of its file stands in all that it says
        if not dist.is_initialized() or not (isinstance(error, dist.DistError) or "/gloo/" in str(error)):
            raise
        said = " ".join(str(error).split())
        raise ProcessLostError(
            f"step {trainer.state.global_step}: another process of this run has ended or cannot be reached "
            f"({said[:160]}); {last_good(trainer.args.output_dir)}; go on by --resume_from_checkpoint true"
        ) from error
