"""Checkpoints that are there whole or not at all: staged, hashed, synced, renamed, and verified before they are read.

A killed process, a full disk or a process that dies beside others leaves the checkpoints before as they were. Older
ones are deleted only once the new one is on the disk under its name.
"""

import errno
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from torch.utils.serialization import config as torch_files
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.utils import is_sagemaker_mp_enabled, is_torch_xla_available, logging

from hf_ihb.checkpoint import STAGING_FOLDER, checkpoints_of, readable_checkpoint
from hf_ihb.errors import CheckpointError, HfIhbError
from hf_ihb.storage import Sealing, publish, verify, write_manifest

logger = logging.get_logger(__name__)

_REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG, errno.EACCES, errno.EPERM}
# what torch and safetensors say where a write fails; the cause is not in it
_FAILED_WRITES = ("inline_container", "iostream error", "I/O error", "IoError", "file write failed", "No space left")


def save_checkpoint(trainer: Trainer, trial: Any, about: Callable[[], dict[str, Any]] = dict) -> None:
    """Saves what `Trainer._save_checkpoint` saves, under the same names.

    Args:
        trainer: In the middle of its training.
        trial: Of a hyperparameter search, if it is one.
        about: What its manifest says of it beside the files, asked for on the main process.

    Raises:
        CheckpointError: If it cannot be written, on every process; what was there before is untouched.
    """
    state = trainer.state
    if trainer.hp_search_backend is None and trial is None:
        trainer.store_flos()
    run = Path(trainer._get_output_dir(trial=trial))
    final = run / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
    staged = run / STAGING_FOLDER / final.name
    with _written_by_all(trainer, final):
        if trainer.args.should_save:
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir(parents=True)
            _check_room(trainer, run)
    with Sealing() as sealing:
        with _written_by_all(trainer, final):
            _stage(trainer, staged, final, sealing)
        with _written_by_all(trainer, final):
            if trainer.args.should_save:
                _check_complete(trainer, staged)
                facts = {"step": state.global_step, "processes": trainer.args.world_size}
                write_manifest(staged, facts | about(), sealing)
                publish(staged, final)
    if trainer.args.push_to_hub:
        trainer._push_from_checkpoint(str(final))
    if trainer.args.should_save:
        rotate_checkpoints(
            output_dir=str(run),
            save_total_limit=trainer.args.save_total_limit,
            best_model_checkpoint=state.best_model_checkpoint,
            use_mtime=True,
        )


def _stage(trainer: Trainer, staged: Path, final: Path, sealing: Sealing) -> None:
    """Writes what this process has to; the weights are hashed and synced meanwhile."""
    state = trainer.state
    trainer.save_model(str(staged), _internal_call=True)
    if trainer.args.should_save:
        sealing.begin(staged.rglob("*.safetensors"))
    if state.best_global_step:
        best = final.with_name(f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}")
        if best == final or best.is_dir():
            state.best_model_checkpoint = str(best)
    if not trainer.args.save_only_model:
        _save_optimizer(trainer, staged, sealing)
        trainer._save_scaler(str(staged))
        trainer._save_rng_state(str(staged))
    if trainer.args.should_save:
        _write_state(trainer, staged / TRAINER_STATE_NAME)


def _save_optimizer(trainer: Trainer, staged: Path, sealing: Sealing) -> None:
    """What `Trainer._save_optimizer_and_scheduler` writes, hashed meanwhile: it is most of a checkpoint.

    Its parts have no check sums of their own beside the file's hash: that takes a third of the writing. Where the
    method is not Trainer's, or weights are sharded, it is called itself.
    """
    own = type(trainer)._save_optimizer_and_scheduler is not Trainer._save_optimizer_and_scheduler
    elsewhere = is_torch_xla_available() or is_sagemaker_mp_enabled()
    if own or elsewhere or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        trainer._save_optimizer_and_scheduler(str(staged))
    elif trainer.args.should_save:
        for name, part in ((OPTIMIZER_NAME, trainer.optimizer), (SCHEDULER_NAME, trainer.lr_scheduler)):
            with sealing.written(staged / name) as stream, torch_files.patch({"save.compute_crc32": False}):
                torch.save(part.state_dict(), stream)


def _write_state(trainer: Trainer, path: Path) -> None:
    state = trainer.state
    for part in (*trainer.callback_handler.callbacks, trainer.control):
        if isinstance(part, ExportableState):
            name, now = type(part).__name__, part.state()
            if isinstance(state.stateful_callbacks[name], list):
                state.stateful_callbacks[name].append(now)
            else:
                state.stateful_callbacks[name] = now
    state.save_to_json(str(path))


def _check_complete(trainer: Trainer, staged: Path) -> None:
    """That every process has left its part: one that died in between has not."""
    if trainer.args.save_only_model or trainer.args.save_on_each_node:
        return
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    expected = [TRAINER_STATE_NAME, *rng_files(trainer.args.world_size)]
    expected += [] if sharded else [OPTIMIZER_NAME, SCHEDULER_NAME]
    if missing := [name for name in expected if not (staged / name).is_file()]:
        raise CheckpointError(f"{staged.name}: expected {missing[0]} from each process, found none; it is not kept")


def rng_files(num_processes: int) -> list[str]:
    """Names of the files that hold the states of random generators."""
    return ["rng_state.pth"] if num_processes == 1 else [f"rng_state_{i}.pth" for i in range(num_processes)]


# ---- Failures ----


@contextmanager
def _written_by_all(trainer: Trainer, final: Path) -> Iterator[None]:
    """Around what processes write: all go on, or all raise the line of the first that could not."""
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    line = None
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, HfIhbError) as error:
        if isinstance(error, HfIhbError) and not isinstance(error, CheckpointError):
            raise
        if (line := _said(error, trainer, final)) is None or sharded:  # others may be within a collective of the save
            if line is None:
                raise
            raise CheckpointError(line) from error
    if trainer.args.world_size > 1:
        line = next((other for other in gather_object([line]) if other is not None), None)
    if line is not None:
        if trainer.args.should_save:
            shutil.rmtree(final.parent / STAGING_FOLDER, ignore_errors=True)
        raise CheckpointError(line)


@contextmanager
def writing(trainer: Trainer, folder: Path) -> Iterator[None]:
    """Around what is written beside checkpoints.

    Raises:
        CheckpointError: If the disk refuses it.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if (line := _said(error, trainer, folder)) is None:
            raise
        raise CheckpointError(line) from error


def _said(error: Exception, trainer: Trainer, final: Path) -> str | None:
    """A failed write in one line; None if it is no such thing."""
    if isinstance(error, CheckpointError):
        return str(error)
    text = " ".join(str(error).split())
    refused = isinstance(error, OSError) and error.errno in _REFUSALS
    if not refused and not isinstance(error, SafetensorError) and not any(part in text for part in _FAILED_WRITES):
        return None
    return _room(final, bytes_of(trainer), f"could not be written ({text[:120]})")


def _check_room(trainer: Trainer, run: Path) -> None:
    needed = bytes_of(trainer)
    if shutil.disk_usage(run).free < needed:
        step = f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
        raise CheckpointError(_room(run / step, needed, "does not fit on the disk"))


def _room(final: Path, needed: int, what: str) -> str:
    free = shutil.disk_usage(final.parent).free
    return (
        f"{final}: {what}: it takes about {needed:,} bytes, {free:,} are free; the checkpoints before are as they "
        "were; free some, and go on by --resume_from_checkpoint true"
    )


def bytes_of(trainer: Trainer) -> int:
    """About what a checkpoint takes: weights and what the optimizer keeps of them."""
    module = trainer.accelerator.unwrap_model(trainer.model)
    total = sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
    total *= 2 if getattr(trainer.args, "ema_decay", 0) or getattr(trainer.args, "swa_start", None) is not None else 1
    if trainer.args.save_only_model or trainer.optimizer is None:
        return total
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    kept = (value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor))
    return total + sum(t.numel() * t.element_size() for t in kept)


# ---- Resuming ----


def checkpoint_to_resume(trainer: Trainer, asked: str | bool | None, policy: str = "latest_good") -> str | None:
    """The checkpoint that a training goes on from, chosen by the main process for all.

    Args:
        trainer: About to train.
        asked: Its folder; ``True`` for the newest in the output folder; nothing for none.
        policy: Whether the newest must be the one that is taken (``strict``), or those that do not verify are passed
            over (``latest_good``); a checkpoint asked for by its name must verify.

    Raises:
        CheckpointError: If it is not there, or does not verify; on every process.
    """
    if not asked:
        return None
    chosen: list[Any] = [None, None]
    if trainer.args.process_index == 0:
        try:
            chosen[0] = _choose(asked, Path(trainer.args.output_dir), policy)
        except CheckpointError as error:
            chosen[1] = str(error)
    folder, line = broadcast_object_list(chosen)
    if line is not None:
        raise CheckpointError(line)
    return folder


def _choose(asked: str | bool, output_dir: Path, policy: str) -> str:
    if asked is not True:
        check_checkpoint(Path(asked))
        return str(asked)
    passed_over = []
    for folder in checkpoints_of(output_dir):
        try:
            check_checkpoint(folder)
        except CheckpointError as error:
            if policy == "strict":
                raise CheckpointError(
                    f"{error}; an older checkpoint is taken with --resume_policy latest_good"
                ) from error
            passed_over.append(str(error))
            continue
        for line in passed_over:
            logger.warning(f"passed over: {line}")
        return str(folder)
    reasons = "".join(f"; {line}" for line in passed_over)
    raise CheckpointError(f"{output_dir}: expected a complete checkpoint to resume, found none{reasons}")


def last_good(output_dir: str | Path) -> str:
    """Which checkpoint of a folder is the newest that verifies, in words."""
    for folder in checkpoints_of(output_dir):
        try:
            check_checkpoint(folder)
        except CheckpointError:
            continue
        return f"the last checkpoint that verifies is {folder}"
    return f"{output_dir} holds no checkpoint that verifies"


def check_checkpoint(folder: Path) -> None:
    """Verifies a checkpoint against its manifest; one of before there were manifests by reading each of its files.

    Raises:
        CheckpointError: If a file is missing or damaged, or it holds weights alone.
    """
    manifest = verify(folder)
    if manifest is None:
        readable_checkpoint(folder)
        logger.warning(f"{folder}: it has no manifest, as checkpoints of earlier versions; it could be read, no more")
        return
    files = manifest["files"]
    sharded = not any(Path(name).name == OPTIMIZER_NAME for name in files)
    expected = [TRAINER_STATE_NAME, *rng_files(manifest["about"]["processes"])]
    if missing := [name for name in expected if name not in files]:
        raise CheckpointError(f"{folder}: expected {missing[0]} to go on from, found weights alone (save_only_model)")
    if not sharded and SCHEDULER_NAME not in files:
        raise CheckpointError(f"{folder}: expected {SCHEDULER_NAME} to go on from, found none")
    if json.loads((folder / TRAINER_STATE_NAME).read_text("utf-8"))["global_step"] != manifest["about"]["step"]:
        raise CheckpointError(f"{folder}: expected the state of step {manifest['about']['step']}, found another")
