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
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_ihb.errors import CheckpointError

HEADS_FILE = Path("distillation", "heads.safetensors")
# inside a checkpoint: the average of the weights, saved like the weights, and how it was made
AVERAGE_FOLDER = "average"
_AVERAGE_RECORD = "average.json"
# inside an output folder: what is being written
STAGING_FOLDER = ".staging"
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
    student = _apart(student, getattr(module.student, "all_tied_weights_keys", None) or {})
    module.student.save_pretrained(directory, state_dict=student, is_main_process=main_process)
    if heads and main_process:
        (directory / HEADS_FILE).parent.mkdir(parents=True, exist_ok=True)
        save_file(heads, directory / HEADS_FILE)


def _apart(state: Mapping[str, Tensor], tied: Mapping[str, str]) -> dict[str, Tensor]:
    """A state in which no two tensors share memory but those that transformers knows of, and saves once.

    A network of timm may hold a module at two places (CoaT); transformers refuses to save that.
    """
    known = {*tied, *tied.values()}
    seen: set[int] = set()
    whole = {}
    for name, tensor in state.items():
        place = tensor.untyped_storage().data_ptr() if type(tensor) is Tensor and tensor.device.type != "meta" else 0
        again = place != 0 and place in seen and name not in known
        whole[name] = tensor.clone() if again else tensor
        seen.add(place)
    return whole


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


def load_student(student: PreTrainedModel, directory: Path) -> None:
    """Reads the weights of a model of transformers, in place, by the names that `save_pretrained` gave them.

    Raises:
        CheckpointError: If a file is missing or unreadable, or a tensor is missing, left over or of another shape.
    """
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


def load_module(module: nn.Module, directory: Path) -> None:
    """Reads back, in place, what `save_module` wrote.

    Raises:
        CheckpointError: If a file is missing or unreadable, or a tensor is missing, left over or of another shape.
    """
    load_student(module.student, directory)
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


def checkpoints_of(output_dir: str | Path) -> list[Path]:
    """Folders of checkpoints, whole or not, the one with the most steps first."""
    pattern = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    found = [
        (int(m[1]), p) for p in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if (m := pattern.fullmatch(p.name))
    ]
    return [path for _, path in sorted(found, reverse=True) if path.is_dir()]


def readable_checkpoint(folder: Path) -> None:
    """Reads each file of a checkpoint that has no manifest, and asks for those that nothing goes on without.

    Raises:
        CheckpointError: If one is missing or cannot be read.
    """
    sharded = any(
        p.is_dir() and re.match(r"optimizer|pytorch_model_fsdp|global_step", p.name) for p in folder.glob("*")
    )
    expected = [[TRAINER_STATE_NAME], ["rng_state.pth", "rng_state_0.pth"]]
    expected += [] if sharded else [[OPTIMIZER_NAME], [SCHEDULER_NAME], [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME]]
    for names in expected:
        if not any((folder / name).is_file() for name in names):
            raise CheckpointError(f"{folder}: expected a complete checkpoint, found no {names[0]}")
    for path in sorted(p for p in folder.rglob("*") if p.suffix in _READERS):
        try:
            _READERS[path.suffix](path)
        except Exception as error:  # whatever a damaged file makes its reader raise
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            raise CheckpointError(f"{path}: expected a whole file, found one that cannot be read ({reason})") from error


def _read_pickle(path: Path) -> None:
    with safe_globals():
        torch.load(path, map_location="cpu", weights_only=True)


_READERS = {
    ".json": lambda path: json.loads(path.read_text("utf-8")),
    ".safetensors": load_file,
    ".pt": _read_pickle,
    ".pth": _read_pickle,
}
