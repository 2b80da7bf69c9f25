"""Runs jobs one after the other, each in a process of its own, until the time is up."""

import datetime
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from gpu.job import ROOT, Context, Job, Journal, without_places

START_UP_S = 20  # of a training: imports, data, its evaluation and analysis
CHECKS_AT_ONCE = 4
AT_ONCE_GAIN = 1.1  # two trainings at once must be so much faster than one after the other
# Which of part 3's ways takes about as long as a recipe.
WAY_OF = {
    "ce_only": "labels",
    "cka": "CKA, cached Gram",
    "gram": "CKA, cached Gram",
    "kd_resnet18": "soft logits, live",
}


class Running:
    """A job's process.

    Args:
        job: What it does.
        context: What it is told.
        script: That does one job: ``SCRIPT --work_on ID CONTEXT RESULT``.
    """

    def __init__(self, job: Job, context: Context, script: Path) -> None:
        self.job, self.began = job, time.monotonic()
        self.started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        logs = context.folder / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        self.log, self.result = logs / f"{job.id}.log", logs / f"{job.id}.json"
        self.result.unlink(missing_ok=True)
        told = json.dumps(asdict(context) | {"folder": str(context.folder)})
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.getenv("PYTHONPATH")]))}
        if Path(context.dataset).exists():
            environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(script), "--work_on", job.id, told, str(self.result)],
                stdin=subprocess.PIPE,  # closed when this process ends, however it ends; the job ends itself then
                stdout=log,
                stderr=log,
                env=environment,
                cwd=ROOT,
                start_new_session=True,  # so that all it starts can be ended with it
            )

    @property
    def seconds(self) -> float:
        """Since it started."""
        return time.monotonic() - self.began

    def stop(self) -> None:
        """Ends it and all that it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def outcome(self) -> dict[str, Any]:
        """What became of it, once it has ended."""
        if self.result.is_file():
            return json.loads(self.result.read_text("utf-8"))
        tail = "\n".join(self.log.read_text("utf-8", errors="replace").splitlines()[-40:])
        return {"status": "failed", "error": f"exit code {self.process.returncode}\n{tail}"}


class Runner:
    """Gives each job that has no result yet its turn.

    Args:
        jobs: In the order they are to be done.
        context: What each is told.
        journal: The results.
        where: ``commit``, ``device`` (its name) and ``tier`` that results are kept with.
        minutes: Until no job may run any more.
        script: See `Running`.
        retry_failed: Do again what has failed.
        say: Takes a line for the reader.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        context: Context,
        journal: Journal,
        where: dict[str, str | None],
        *,
        minutes: float,
        script: Path,
        retry_failed: bool = False,
        say: Callable[[str], None] = print,
    ) -> None:
        self.jobs = {job.id: job for job in jobs}
        self.context, self.journal, self.where, self.script = context, journal, where, script
        self.say = say
        self.began = time.monotonic()
        self.deadline = self.began + 60 * minutes
        self.waiting = [job for job in jobs if not journal.done(job, where, retry_failed=retry_failed)]
        self.running: list[Running] = []
        self.failed: set[str] = set()
        context.folder.mkdir(parents=True, exist_ok=True)

    def run(self) -> None:
        """Until nothing is left to do, or no time to do it."""
        done = len(self.jobs) - len(self.waiting)
        self._tell(f"{len(self.waiting)} jobs to do, {done} done before")
        try:
            while True:
                while (job := self._next()) is not None:
                    self._start(job)
                if not self.running:
                    break
                time.sleep(0.05)
                self._look()
        finally:
            for running in self.running:
                running.stop()
        for job in self.waiting:
            self._tell(f"{job.id}: not reached")

    # ---- Whose turn it is ----

    def _next(self) -> Job | None:
        """Takes the first job off the list that can be done in the time that is left, if it may run beside what runs.

        A job that needs a teacher whose weights are not here has it trained first.
        """
        for job in self.waiting:
            missing = [name for name in job.needs if not self._is_trained(name)]
            if missing:
                teacher = self.jobs[missing[0]]
                if teacher.id in self.failed or any(running.job is teacher for running in self.running):
                    continue
                job = teacher
            if self.estimate_s(job) > self.deadline - time.monotonic():
                continue
            # what is measured is measured alone
            beside = all(running.job.part == job.part for running in self.running)
            if not beside or len(self.running) >= self._slots(job.part):
                return None
            if job in self.waiting:  # else it has a result of another time, and its weights were not kept
                self.waiting.remove(job)
            return job
        return None

    def _is_trained(self, job_id: str) -> bool:
        return (self.context.run_folder(job_id) / "evaluation.json").is_file()

    def _here(self, job_id: str) -> dict[str, Any]:
        """What a job of part 3 found on this machine."""
        record = self.journal.newest(self.where["device"], self.where["tier"]).get(job_id, {})
        return record.get("result") or {}

    def estimate_s(self, job: Job) -> float:
        """Seconds a job will take at the least: from others like it on this machine, from part 3, or 0 if unknown."""
        if job.images == 0:
            return 0.0
        found = [
            record["seconds"] / record["images"]
            for record in self.journal.records
            if record["status"] == "ok"
            and record["rate_of"] == job.rate_of
            and all(record[key] == self.where[key] for key in ("device", "tier"))
        ]
        if found:
            return job.images * min(found)
        like = self._measured(min(self.context.sizes.batch_sizes), WAY_OF.get(job.rate_of, ""), compiled=False)
        return 0.0 if like is None else START_UP_S + job.images / statistics.median(like["images_per_second"])

    def _measured(self, size: int, way: str, compiled: bool) -> dict[str, Any] | None:
        """What part 3 found of a way."""
        how = "compiled" if compiled else "eager"
        for job in self.jobs:
            if job.startswith(f"throughput-{size}-{how}") and (found := self._here(job).get("ways", {}).get(way)):
                return found
        return None

    def _slots(self, part: int) -> int:
        """How many jobs of a part run at once: checks do not mind each other, trainings where that is faster."""
        if part == 2 and self.context.device == "cuda":
            return CHECKS_AT_ONCE
        return 2 if part == 4 and self._here("two-at-once").get("gain", 0.0) >= AT_ONCE_GAIN else 1

    def _compiled(self, job: Job) -> tuple[str, ...]:
        """The job's recipe, if what compiling saves is more than what it takes."""
        size, way = max(self.context.sizes.batch_sizes), WAY_OF.get(job.rate_of, "")
        eager, compiled = (self._measured(size, way, compiled) for compiled in (False, True))
        if self.context.device == "cpu" or eager is None or compiled is None:
            return ()
        rates = [statistics.median(found["images_per_second"]) for found in (eager, compiled)]
        saved_s = job.images * (1 / rates[0] - 1 / rates[1])
        takes_s = compiled["until_first_window_s"] - eager["until_first_window_s"]
        return (job.rate_of,) if saved_s > takes_s else ()

    # ---- Its turn ----

    def _start(self, job: Job) -> None:
        if job.needs_cuda and self.context.device != "cuda":
            now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
            self._keep(job, {"status": "not run", "error": "needs CUDA"}, now, 0.0)
            return
        self._tell(f"{job.id} ...")
        self.running.append(Running(job, replace(self.context, compiled=self._compiled(job)), self.script))

    def _look(self) -> None:
        """Takes the results of what has ended, and stops what has run for too long."""
        for running in list(self.running):
            ended, late = running.process.poll() is not None, time.monotonic() > self.deadline
            if not ended and not late and running.seconds <= running.job.limit_s:
                continue
            self.running.remove(running)
            running.stop()
            if not ended and late:
                outcome = {"status": "out of time", "error": "stopped at the end of the minutes; it goes on next time"}
            elif not ended:
                outcome = {"status": "failed", "error": f"stopped after its limit of {running.job.limit_s:g} s"}
            else:
                outcome = running.outcome()
            self._keep(running.job, outcome, running.started, running.seconds)

    def _keep(self, job: Job, outcome: dict[str, Any], started: str, seconds: float) -> None:
        if outcome["status"] == "failed":
            self.failed.add(job.id)
        names = {str(self.context.folder): "WORK", self.context.dataset: Path(self.context.dataset).name}
        record = {"id": job.id, "part": job.part, **self.where, "started": started, "seconds": round(seconds, 2)}
        record |= {"images": job.images, "rate_of": job.rate_of}
        text = without_places(json.dumps(outcome, default=str), names=names)
        self.journal.append(record | json.loads(text))
        first = str(outcome.get("error", "")).strip().splitlines()
        self._tell(f"{job.id}: {outcome['status']} after {seconds:.0f} s" + (f" ({first[-1][:120]})" if first else ""))

    def _tell(self, line: str) -> None:
        self.say(f"[{time.monotonic() - self.began:4.0f} s] {line}")
