"""What caches of every kind need: room on the disk, and an error of one process as one of all."""

import contextlib
from collections.abc import Iterator

from accelerate import PartialState
from accelerate.utils import gather_object

from hf_ihb.data.placement import readable_bytes
from hf_ihb.errors import CacheError
from hf_ihb.storage.cache_folder import CacheFolder


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
