"""Trainings that are killed, or told to end, at a random time: does each go on to the same end?

python benchmarks/reliability/random_kills.py [--kills 30] [--terms 10] [--seed 0] [--name NAME]

Small trainings of each kind in turn (labels with an average, logits, structure) save at each of 12 steps. SIGKILL, or
SIGTERM, comes after a time that is drawn evenly from nothing to the length of the training. A run that is told to end
must have saved its step (`Preempted`), unless it had not begun or was at its end. What is left is gone on with, and the
weights are compared with those of a training that nothing happened to.
"""

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from small_runs import KINDS, Forks, begin_with, finish, table, write

TRAINING = {"max_steps": 12, "save_steps": 1, "save_total_limit": 3}


def newest(folder: Path) -> int:
    """Step of the newest checkpoint; 0 if there is none."""
    return max((int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoint-*")), default=0)


def struck(forks: Forks, kind: str, how: signal.Signals, after_s: float, folder: Path) -> dict[str, Any]:
    """A training that a signal ends after some seconds, and what it ended with."""
    started = forks.start(finish, folder, KINDS[kind], **TRAINING)
    process = started[0][0]
    process.join(after_s)
    if process.is_alive():
        getattr(process, {signal.SIGKILL: "kill", signal.SIGTERM: "terminate"}[how])()
    ((code, said),) = forks.end(started)
    if said is not None and said[0] == "Preempted":
        ended = "saved its step, and ended"
    else:
        ended = "done before" if said is not None and said[0] == "done" else f"exit code {code}"
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
    whole, seconds = {}, {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind in KINDS:
            for turn in range(2):  # the first one also loads what is loaded late
                begun = time.monotonic()
                whole[kind] = forks(finish, folder / f"{kind}-{turn}", KINDS[kind], **TRAINING)
                seconds[kind] = time.monotonic() - begun
        for number in range(args.kills + args.terms):
            kind, how = list(KINDS)[number % len(KINDS)], signal.SIGKILL if number < args.kills else signal.SIGTERM
            shutil.rmtree(folder / "run", ignore_errors=True)
            row = struck(forks, kind, how, rng.uniform(0, seconds[kind]), folder / "run")
            row["the same end"] = forks(finish, folder / "run", KINDS[kind], **TRAINING) == whole[kind]
            rows.append(row)
            print(f"\r{number + 1}: {row} ", end="", file=sys.stderr)
    same = {how: [row["the same end"] for row in rows if row["signal"] == how] for how in ("SIGKILL", "SIGTERM")}
    text = ", ".join(f"{how}: {sum(found)} of {len(found)} to the same end bit for bit" for how, found in same.items())
    columns = ["training", "signal", "after_s", "ended", "step", "the same end"]
    write(args.name, "Killed at random times", f"{text}.\n\n{table(rows, columns)}", rows, started)


if __name__ == "__main__":
    main()
