"""What the queue is made of: a piece of work with a name and a limit, what it is told, and where results are kept."""

import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Tier:
    """How large everything is.

    Attributes:
        recipes: Folder of the recipes that are trained.
        train_images: Of an epoch.
        epochs: Of a teacher, and of the first students.
        seeds: In the order they are trained.
        batch_sizes: At which throughput is measured, the one that matters most first.
        window: Steps that are timed together, and how many times.
        command: What the main command is given so that it fits.
        keys: What every training is given beside its recipe.
    """

    recipes: str
    train_images: int
    epochs: float
    seeds: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    window: tuple[int, int]
    command: tuple[str, ...]
    keys: tuple[str, ...] = ()


_FEW = ("--max_train_samples", "256", "--max_eval_samples", "60", "--per_device_train_batch_size", "16")
_FEW += ("--max_steps", "4")
TIERS = {
    "full": Tier("recipes", 45_000, 30, (0, 1, 2), (1024, 512), (20, 5), ("--max_steps", "50")),
    "small": Tier("recipes/micro", 45_000, 5, (0, 1, 2), (256,), (4, 3), _FEW),
    "micro": Tier(
        "recipes/micro",
        1280,
        1,
        (0,),
        (64,),
        (2, 3),
        _FEW,
        ("--max_train_samples", "1280", "--max_eval_samples", "200"),
    ),
}


@dataclass(frozen=True)
class Context:
    """What a job is told.

    Attributes:
        dataset: Hub id or folder of the data set.
        device: ``cuda`` or ``cpu``.
        tier: Name of the `Tier`.
        folder: For everything that is written and not kept: decoded images, run folders, logs.
        compiled: Names of recipes that are trained compiled, because it pays.
    """

    dataset: str
    device: str
    tier: str
    folder: Path
    compiled: tuple[str, ...] = ()

    @property
    def sizes(self) -> Tier:
        """The tier itself."""
        return TIERS[self.tier]

    @property
    def data_arguments(self) -> list[str]:
        """Command line of the data set, decoded once for all jobs into a file that each of them maps."""
        decoded = ["--decoded_memory_fraction", "0", "--decoded_cache_dir", str(self.folder / "decoded")]
        return ["--dataset_name", self.dataset, *decoded, "--decode", "once"]

    @property
    def device_arguments(self) -> list[str]:
        """Command line that keeps a training on the CPU, where that is asked for."""
        return ["--use_cpu", "true"] if self.device == "cpu" else []

    def run_folder(self, job: str) -> Path:
        """Where a training writes."""
        return self.folder / "runs" / job


@dataclass(frozen=True)
class Job:
    """A piece of work that runs in a process of its own.

    Attributes:
        id: Its name in the results; what is there already is not done again.
        part: Of the queue, 0 to 4.
        work: Does it; what it returns goes into the results as JSON.
        limit_s: Seconds after which it is stopped and has failed.
        needs: Trainings whose run folders it reads.
        needs_cuda: Whether it says nothing on a CPU.
        images: That a training sees, from which its time is estimated; 0 for anything else.
        rate_of: Jobs with the same value take the same time an image.
    """

    id: str
    part: int
    work: Callable[[Context], dict[str, Any]]
    limit_s: float
    needs: tuple[str, ...] = ()
    needs_cuda: bool = False
    images: int = 0
    rate_of: str = ""


@dataclass
class Journal:
    """The results: one JSON object a line, each on the disk before the next job starts.

    Args:
        path: Of the file; a last line that was not written to its end is dropped.
    """

    path: Path
    records: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.is_file():
            return
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        self.records = [json.loads(line) for line in whole.splitlines()]

    def append(self, record: dict[str, Any]) -> None:
        """Writes a record; it is on the disk when this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, default=str) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.records.append(record)

    def done(self, job: Job, where: dict[str, Any], *, retry_failed: bool = False) -> bool:
        """Whether a job has a result.

        What parts 0 to 3 found, and a failure, holds for one commit on one kind of machine; a training stands whatever
        came later.

        Args:
            job: Asked for.
            where: ``commit``, ``device`` and ``tier`` of this run.
            retry_failed: Take a failure for no result.
        """
        found = [r for r in self.newest(where["device"], where["tier"]).values() if r["id"] == job.id]
        if not found or (found[0]["status"] == "failed" and retry_failed):
            return False
        lasts = job.part == 4 and found[0]["status"] == "ok"
        return lasts or found[0]["commit"] == where["commit"]

    def newest(self, device: str, tier: str) -> dict[str, dict[str, Any]]:
        """The last record that ended, of each job on a device."""
        return {
            r["id"]: r
            for r in self.records
            if r["device"] == device and r["tier"] == tier and r["status"] in ("ok", "failed", "not run")
        }


def without_places(text: str, *, names: dict[str, str] | None = None) -> str:
    """A text for the results: no folder of this machine is in it.

    Args:
        text: A traceback or a command.
        names: Folders and what they are called instead.
    """
    known = {str(ROOT): ".", sys.prefix: "PYTHON", **(names or {})}
    for folder, name in sorted(known.items(), key=lambda pair: -len(pair[0])):
        text = text.replace(folder, name)
    return re.sub(r"(?<![\w.:/-])/(?:[\w.+-]+/)+(?=[\w.+-]+)", ".../", text)
