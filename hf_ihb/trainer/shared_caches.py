"""What caches of every kind need: room on the disk, tensors beside rows, and errors of one process as of all."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping

from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from hf_ihb.data.placement import readable_bytes
from hf_ihb.errors import CacheError
from hf_ihb.storage.cache_folder import CacheFolder, checksum


def trouble(store: CacheFolder, what: str, needed: int, share: float = 1.0) -> str | None:
    """What keeps a cache from being written: no leave, or more than a share of the disk's free space.

    Args:
        store: Its folder.
        what: It is, with an article.
        needed: Bytes that are still to be written.
        share: Of what is free.
    """
    if needed > 0 and not store.may_be_written():
        return f"{store.folder}: expected a folder for {what} that can be written to"
    free = int(share * store.bytes_free())
    if needed <= free:
        return None
    found = readable_bytes(free) if share == 1 else f"{readable_bytes(free)} ({share:.0%} of what is free)"
    return f"{store.folder}: expected {readable_bytes(needed)} of disk for {what}, found {found}"


def kept_tensors(store: CacheFolder, name: str, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors that belong to a cache and are made once, on the host; where nothing may be written, in every run.

    Args:
        store: Its folder.
        name: Of the file.
        make: Makes them, where they are not there or not what was written.

    Raises:
        CacheError: If the disk is full or cannot be written to.
    """
    path = store.folder / name
    with contextlib.suppress(OSError, SafetensorError):
        content = path.read_bytes()
        if checksum(content) == store.journal().get(name):
            return load(content)
    made = {name: tensor.cpu().contiguous() for name, tensor in make().items()}
    if PartialState().is_local_main_process and store.may_be_written():
        with store.storing():
            store.folder.mkdir(parents=True, exist_ok=True)
            content, staged = save(made), path.with_suffix(f".{os.getpid()}.tmp")  # two runs may make them at once
            staged.write_bytes(content)
            staged.replace(path)
            store.note(name, content, PartialState().process_index)
    return made


@contextlib.contextmanager
def on_every_process(state: PartialState, key: str, what: str) -> Iterator[None]:
    """An error of one process ends all of them, instead of leaving them in a collective.

    Args:
        state: Of the processes.
        key: That all of them must have.
        what: Has it.

    Raises:
        CacheError: On every process, if one raised it, or if the keys differ.
    """
    error: CacheError | None = None
    try:
        yield
    except CacheError as raised:
        error = raised
    if state.num_processes == 1:
        if error is not None:
            raise error
        return
    found = gather_object([(key, None if error is None else str(error))])
    if messages := [message for _, message in found if message is not None]:
        raise error or CacheError(messages[0])
    if len({key for key, _ in found}) > 1:
        raise CacheError(f"{what}: expected the same teacher and images on all processes, found different ones")
