import errno
import multiprocessing
import os
import re
import socket

import pytest

from hf_ihb.errors import CheckpointError
from hf_ihb.storage import folder_lock
from hf_ihb.storage.lock import HOLDER_FILE


def hold(folder, pipe):
    """Holds a folder until it is told to end."""
    try:
        with folder_lock(folder):
            pipe.send("held")
            pipe.recv()
    except CheckpointError as error:
        pipe.send(str(error))


def another_process(folder):
    """One that asks for the folder, and what it says of it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ours, theirs = context.Pipe()
    process = context.Process(target=hold, args=(folder, theirs), daemon=True)
    process.start()
    return process, ours.recv(), ours


def test_a_folder_that_another_process_holds_is_refused_naming_it(tmp_path):
    other, said, pipe = another_process(tmp_path)
    assert said == "held"
    for _ in range(2):  # asking changes nothing
        with pytest.raises(CheckpointError, match=f"process {other.pid} on {re.escape(socket.gethostname())}"):
            with folder_lock(tmp_path):
                pass
    pipe.send("end")
    other.join()
    with folder_lock(tmp_path):
        pass


def test_a_process_that_is_killed_lets_go(tmp_path):
    other, said, _ = another_process(tmp_path)
    assert said == "held"
    other.kill()
    other.join()
    with folder_lock(tmp_path):
        pass


def test_a_process_may_hold_a_folder_twice_and_lets_go_at_the_end_of_the_first(tmp_path):
    with folder_lock(tmp_path):
        with folder_lock(tmp_path):
            pass
        assert f"process {os.getpid()} on" in another_process(tmp_path)[1]
    assert another_process(tmp_path)[1] == "held"


def test_a_process_that_does_not_take_it_writes_nothing(tmp_path):
    with folder_lock(tmp_path / "run", takes=False):
        assert not (tmp_path / "run").exists()


def test_a_folder_without_room_for_a_lock_is_one_line(tmp_path, monkeypatch):
    (tmp_path / HOLDER_FILE).symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match="can be written to, found 'No space left on device' where it is locked"):
        with folder_lock(tmp_path):
            pass
    (tmp_path / HOLDER_FILE).unlink()
    with folder_lock(tmp_path):  # it was let go of
        pass
    monkeypatch.setattr("hf_ihb.storage.lock.FileLock.acquire", refuse)
    with pytest.raises(CheckpointError, match="found 'No space left on device'"):
        with folder_lock(tmp_path):
            pass


def refuse(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
