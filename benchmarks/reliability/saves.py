"""A save that is killed, or refused room, at every write: does the run go on to the same end?

python benchmarks/reliability/saves.py [--every 1] [--processes 1] [--kinds supervised,logits,structural] [--name NAME]

Small trainings of each kind save at steps 2, 4 and 6. The save of step 4 is struck at its n-th call of write, open,
fsync, mkdir, rename, unlink or rmdir, for every n (a library loaded before libc counts them): by SIGKILL, and by
ENOSPC. With two processes each of them is the one that is struck, in turn; the other must end by itself, with one line.
Then the run is resumed from its newest checkpoint, and its weights are compared with those of a run that nothing
happened to.
"""

import argparse
import ctypes
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from small_runs import KINDS, Forks, begin_with, finish, strike_library, table, trainer_of, write


def struck_run(out: Any, kind: str, folder: Path, at: int, refuses: bool, rank: int) -> None:
    """Trains; the save of step 4 is struck at its `at`-th call by process `rank`."""
    strike = ctypes.CDLL(os.environ["LD_PRELOAD"])
    strike.end.restype = ctypes.c_long
    at = at if int(os.environ.get("RANK", 0)) == rank else -1
    strike.begin(b"checkpoint-4", ctypes.c_long(at), int(refuses))
    try:
        trainer_of(folder, KINDS[kind]).train()
        out.send(("done", strike.end()))
    except Exception as error:
        strike.end()
        out.send((type(error).__name__, str(error)))


def is_clear(said: Any) -> bool:
    """Whether a refused save ended in one line that says how much room there is.

    What may fail without harm (an fsync of a cleaning, a folder that is there) does not end a run.
    """
    return said is not None and (
        said[0] == "done" or (said[0] == "CheckpointError" and "bytes" in said[1] and len(said[1].splitlines()) == 1)
    )


def is_left_alone(said: Any) -> bool:
    """Whether a process whose neighbour died ended in one line."""
    return said is not None and said[0] == "ProcessLostError" and len(said[1].splitlines()) == 1


def sweep(
    forks: Forks, kind: str, refuses: bool, rank: int, processes: int, every: int, folder: Path
) -> dict[str, Any]:
    """Strikes one of the processes at every n-th of its calls."""
    whole = forks(finish, folder / "whole", KINDS[kind], processes=processes)
    counted = forks.end(forks.start(struck_run, kind, folder / "count", -1, False, rank, processes=processes))
    calls = counted[rank][1][1]
    row: dict[str, Any] = {"training": kind, "processes": processes, "rank": rank, "calls in a save": calls}
    row |= {"struck by": "ENOSPC" if refuses else "SIGKILL", "others": []}
    struck = same = clear = 0
    for at in range(1, calls + 1, every if calls > every else 1):
        run = folder / "run"
        shutil.rmtree(run, ignore_errors=True)
        ended = forks.end(forks.start(struck_run, kind, run, at, refuses, rank, processes=processes))
        code = ended[rank][0]
        if not refuses and code != -signal.SIGKILL:
            row["others"].append([at, "not killed", ended])
            continue
        struck += 1
        lines = [said for number, (_, said) in enumerate(ended) if refuses or number != rank]
        # a process that has no more to do with the save may have ended well
        fine = all(is_clear(said) if refuses else is_left_alone(said) or said == ("done", calls) for said in lines)
        clear += fine and all(code is not None for code, _ in ended)
        if not fine:
            row["others"].append([at, *lines])
        resumed = forks(finish, run, KINDS[kind], processes=processes)
        same += resumed == whole
        if resumed != whole:
            row["others"].append([at, "resumed", resumed])
        print(f"\r{kind} {row['struck by']} rank {rank} {at}/{calls}: {same}/{struck} ", end="", file=sys.stderr)
    is_said = refuses or processes > 1
    row |= {"struck": struck, "resumed bit for bit": f"{same} of {struck}"}
    return row | {"one clear line": f"{clear} of {struck}" if is_said else ""}


def main() -> None:
    """Writes a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="Strike at every n-th call; at all where there are fewer.")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--name", default=None, help="Of the results, without ending; printed alone if not given.")
    args = parser.parse_args()
    begin_with(strike_library())
    started, forks, rows = time.monotonic(), Forks(), []
    with tempfile.TemporaryDirectory() as folder:
        for kind in args.kinds.split(","):
            for refuses in (False, True):
                for rank in range(args.processes):
                    where = Path(folder, f"{kind}-{refuses}-{rank}")
                    rows.append(sweep(forks, kind, refuses, rank, args.processes, args.every, where))
    columns = ["training", "processes", "rank", "struck by", "calls in a save", "struck", "resumed bit for bit"]
    text = table(rows, [*columns, "one clear line"])
    write(args.name, f"A save struck at its calls, {args.processes} process(es)", text, rows, started)


if __name__ == "__main__":
    main()
