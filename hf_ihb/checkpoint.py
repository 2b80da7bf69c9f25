"""Checkpoints that hold the Hub's key names and are read back strictly.

`save_pretrained` writes a model's published names while the Trainer reads them back by the module's own names and skips
what does not match: of a DeiT that is all but a few tensors. Here a checkpoint is read through `from_pretrained`, which
knows both, and every tensor must be there.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_ihb.errors import CheckpointError

HEADS_FILE = Path("distillation", "heads.safetensors")
# inside a checkpoint: the average of the weights, saved like the weights, and how it was made
AVERAGE_FOLDER = "average"
_AVERAGE_RECORD = "average.json"
_STUDENT_PREFIX = "student."


def save_module(module: nn.Module, directory: Path, state_dict: dict[str, Tensor] | None, main_process: bool) -> None:
    """Writes the plain student, and the student-side heads into a folder of their own.

    Args:
        module: A `StudentModule`.
        directory: Folder to write to.
        state_dict: The whole state where the live tensors are sharded; the module's own if None.
        main_process: Whether this process writes shared files.
    """
    state = module.state_dict() if state_dict is None else state_dict
    student = student_state(state)
    heads = {k: v.contiguous() for k, v in state.items() if not k.startswith(_STUDENT_PREFIX)}
    module.student.save_pretrained(directory, state_dict=student, is_main_process=main_process)
    if heads and main_process:
        (directory / HEADS_FILE).parent.mkdir(parents=True, exist_ok=True)
        save_file(heads, directory / HEADS_FILE)


def student_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The student's part of a `StudentModule`'s state, by the student's own names."""
    return {k.removeprefix(_STUDENT_PREFIX): v for k, v in state.items() if k.startswith(_STUDENT_PREFIX)}


def save_run(module: nn.Module, directory: Path, state_dict: dict[str, Tensor] | None, processor: Any) -> None:
    """Writes the plain student with its image processor, and its heads.

    No ``training_args.bin`` is: it is a pickle that holds the Hub token. A processor of timm lives in ``config.json``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    save_module(module, directory, state_dict, main_process=True)
    if processor is not None and not isinstance(processor, TimmWrapperImageProcessor):
        processor.save_pretrained(directory)


def load_module(module: nn.Module, directory: Path) -> None:
    """Reads back, in place, what `save_module` wrote.

    Raises:
        CheckpointError: If a file is missing or unreadable, or a tensor is missing, left over or of another shape.
    """
    student: PreTrainedModel = module.student
    dtype = next(student.parameters()).dtype
    try:
        loaded, info = type(student).from_pretrained(
            directory, config=student.config, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{directory}: the student cannot be read ({' '.join(str(error).split())[:200]})"
        ) from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise CheckpointError(
                f"{directory}: expected every tensor of {type(student).__name__}, found {len(info[kind])} "
                f"{kind.replace('_', ' ')}, {sorted(map(str, info[kind]))[0]} first"
            )
    student.load_state_dict(loaded.state_dict(), strict=True)

    expected = {k: v for k, v in module.state_dict().items() if not k.startswith(_STUDENT_PREFIX)}
    if not expected:
        return
    try:
        heads = load_file(directory / HEADS_FILE)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{directory / HEADS_FILE}: the student-side heads cannot be read ({error})") from error
    heads = {_name_today(name): tensor for name, tensor in heads.items()}
    shapes = {k: tuple(v.shape) for k, v in heads.items()}
    if shapes != {k: tuple(v.shape) for k, v in expected.items()}:
        raise CheckpointError(f"{directory / HEADS_FILE}: expected heads {sorted(expected)}, found {sorted(heads)}")
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(heads[name])


def _name_today(name: str) -> str:
    """A head's tensor as it is called today: there was one place for linear maps, and one for paired heads, before."""
    name = re.sub(r"^projections\.", "heads.token.", name)
    return re.sub(r"^paired_heads\.(student|teacher)\.(\w+)\.", r"heads.\2.\1.", name)


def save_average(module: nn.Module, checkpoint: Path, state: dict[str, Tensor] | None, record: dict[str, Any]) -> None:
    """Writes an average of the weights into a checkpoint.

    Args:
        module: A `StudentModule`.
        checkpoint: Folder of the checkpoint.
        state: The average, by the names of the module's state; None if there is none yet.
        record: How it was made (``kind``) and from how many updates (``count``).
    """
    folder = checkpoint / AVERAGE_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    if state is not None:
        save_module(module, folder, state, main_process=True)
    (folder / _AVERAGE_RECORD).write_text(json.dumps(record), "utf-8")


def read_average_record(checkpoint: Path) -> dict[str, Any]:
    """What `save_average` was told of the average; its tensors are read by `load_module`.

    Raises:
        CheckpointError: If it is missing or cannot be read.
    """
    path = checkpoint / AVERAGE_FOLDER / _AVERAGE_RECORD
    try:
        record = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: expected how an average was made, found a file that cannot be read ({type(error).__name__})"
        ) from error
    if not isinstance(record, dict) or not {"kind", "count"} <= record.keys():
        raise CheckpointError(f"{path}: expected 'kind' and 'count', found {str(record)[:80]}")
    return record


def newest_checkpoint(output_dir: str | Path) -> Path | None:
    """The complete checkpoint with the most steps; a save that was cut short has no trainer state yet.

    Returns:
        Its folder, or None if there is none.
    """
    pattern = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    found = [
        (int(m[1]), p) for p in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if (m := pattern.fullmatch(p.name))
    ]
    complete = [(step, path) for step, path in found if (path / TRAINER_STATE_NAME).is_file()]
    return max(complete)[1] if complete else None


def checkpoint_to_resume(asked: str | bool | None, output_dir: str | Path) -> str | None:
    """The checkpoint that a training goes on from.

    Args:
        asked: Its folder; ``True`` for the newest complete one, nothing for none.
        output_dir: Folder of the checkpoints.

    Raises:
        CheckpointError: If it is not there, or not complete.
    """
    if not asked:
        return None
    if asked is not True:
        if not Path(asked, TRAINER_STATE_NAME).is_file():
            raise CheckpointError(f"{asked}: expected a complete checkpoint, found no {TRAINER_STATE_NAME}")
        return str(asked)
    newest = newest_checkpoint(output_dir)
    if newest is None:
        raise CheckpointError(f"{output_dir}: expected a complete checkpoint to resume, found none")
    return str(newest)
