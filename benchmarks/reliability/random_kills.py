"""Trainings that are killed, or told to end, at a random time: does each go on to the same end?

python benchmarks/reliability/random_kills.py [--kills 30] [--terms 10] [--seed 0] [--name NAME]

Small trainings of each kind in turn (labels with an average, logits, structure) save at each of 12 steps. SIGKILL, or
SIGTERM, comes after a time that is drawn evenly from nothing to the length of a training; one that is done by then is
drawn again. A run that is told to end must save its step (`Preempted`). What is left is gone on with, and the weights
are compared with those of a training that nothing happened to.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from small_runs import KINDS, Forks, begin_with, finish, table, write

from hf_ihb.storage.lock import HOLDER_FILE

TRAINING = {"max_steps": 12, "save_steps": 1, "save_total_limit": 3}


def newest(folder: Path) -> int:
    """Step of the newest checkpoint; 0 if there is none."""
    return max((int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoint-*")), default=0)


def begun(folder: Path, process: Any) -> float:
    """Waits until a training has taken its folder; when that was."""
    while process.is_alive() and not (folder / HOLDER_FILE).exists():
        time.sleep(0.005)
    return time.monotonic()


def length(forks: Forks, kind: str, folder: Path) -> tuple[float, Any]:
    """Seconds of a training that nothing happens to, and what it says."""
    started = forks.start(finish, folder, KINDS[kind], **TRAINING)
    since = begun(folder, started[0][0])
    said = forks.end(started)[0][1]
    return time.monotonic() - since, said


def struck(forks: Forks, kind: str, how: signal.Signals, after_s: float, folder: Path) -> dict[str, Any] | None:
    """A training that a signal ends after some seconds, and what it ended with; None if it was done by then."""
    started = forks.start(finish, folder, KINDS[kind], **TRAINING)
    process = started[0][0]
    begun(folder, process)
    process.join(after_s)
    if process.is_alive():
        os.kill(process.pid, how)
    ((code, said),) = forks.end(started)
    if said is not None and said[0] == "done":
        return None
    ended = f"exit code {code}" if said is None else said[0]
    return {"training": kind, "signal": how.name, "after_s": round(after_s, 3), "ended": ended, "step": newest(folder)}


def main() -> None:
    """Writes a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--terms", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default=None, help="Of the results, without ending; printed alone if not given.")
    args = parser.parse_args()
    begin_with()
    started, forks, rng, rows = time.monotonic(), Forks(), random.Random(args.seed), []
    whole, seconds, done = {}, {}, 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind in KINDS:
            for turn in range(2):  # the first one also loads what is loaded late
                seconds[kind], whole[kind] = length(forks, kind, folder / f"{kind}-{turn}")
        while len(rows) < args.kills + args.terms:
            number = len(rows)
            kind, how = list(KINDS)[number % len(KINDS)], signal.SIGKILL if number < args.kills else signal.SIGTERM
            shutil.rmtree(folder / "run", ignore_errors=True)
            row = struck(forks, kind, how, rng.uniform(0, seconds[kind]), folder / "run")
            if row is None:
                done += 1
                continue
            row["the same end"] = forks(finish, folder / "run", KINDS[kind], **TRAINING) == whole[kind]
            rows.append(row)
            print(f"\r{number + 1}: {row} ", end="", file=sys.stderr)
    same = {how: [row["the same end"] for row in rows if row["signal"] == how] for how in ("SIGKILL", "SIGTERM")}
    text = ", ".join(f"{how}: {sum(found)} of {len(found)} to the same end bit for bit" for how, found in same.items())
    text += f"; {done} more were done before their signal came"
    columns = ["training", "signal", "after_s", "ended", "step", "the same end"]
    write(args.name, "Killed at random times", f"{text}.\n\n{table(rows, columns)}", rows, started)


if __name__ == "__main__":
    main()
