"""Resident memory of a piece of work, in a process of its own. Linux with glibc: peaks are in /proc."""

import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

MIB = 1 << 20


def resident(name: str = "VmRSS") -> int:
    """Bytes of this process, by the name /proc gives them: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{name}:"))) * 1024


def settle() -> None:
    """Gives back what is free, so that what is resident is what is held."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def measured(work: Callable[[], Any]) -> dict[str, Any]:
    """``seconds``, ``peak_bytes`` above what the process held before, and the ``result``."""
    settle()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before, start = resident(), time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_bytes": resident("VmHWM") - before, "result": result}


def in_process(script: str, words: Sequence[Any]) -> dict[str, Any]:
    """Runs a script in a process of its own and reads the JSON object on the last line it prints.

    Blocks of a megabyte and more go back to the system when they are freed (glibc's fixed mmap threshold): a peak is
    then what is held at once, and not how the heap happens to be cut up.
    """
    command = [sys.executable, script, *map(str, words)]
    environ = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(MIB)}
    printed = subprocess.run(command, env=environ, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(printed.splitlines()[-1])
