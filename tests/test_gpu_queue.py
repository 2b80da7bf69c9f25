"""The queue of `benchmarks/gpu_queue.py`: what has a result is kept and not done again, whatever happens on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from scipy import stats

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from gpu.job import ROOT, Context, Job, Journal, without_places  # noqa: E402
from gpu.report import check_rows, interval, study_rows  # noqa: E402
from gpu.runner import Runner  # noqa: E402

WHERE = {"commit": "a" * 40, "device": "a processor", "tier": "micro"}
# stands for the queue's own: what a job does is in its name
WORKER = """
import json, os, signal, sys, threading, time
from pathlib import Path
_, _, job, told, result = sys.argv
def watch():
    sys.stdin.buffer.read()
    os.killpg(0, signal.SIGKILL)
threading.Thread(target=watch, daemon=True).start()
folder = Path(json.loads(told)["folder"])
with (folder / "trace").open("a") as trace:
    print("begin", job, time.monotonic(), os.getpid(), file=trace)
if "fails" in job:
    raise ValueError(f"no good: {folder}/some/file")
if "sleeps" in job:
    time.sleep(60)
if "takes" in job:
    time.sleep(0.4)
if job.startswith(("teacher", "student")):
    run = folder / "runs" / job
    run.mkdir(parents=True, exist_ok=True)
    (run / "evaluation.json").write_text("{}")
with (folder / "trace").open("a") as trace:
    print("end", job, time.monotonic(), os.getpid(), file=trace)
Path(result).write_text(json.dumps({"status": "ok", "result": {"gain": 1.5} if job == "two-at-once" else {}}))
"""


def job(name, part=2, **more):
    return Job(name, part, lambda context: {}, **({"limit_s": 30} | more))


@pytest.fixture
def run(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)

    def run(*jobs, minutes=1.0, device="cpu", **more):
        journal = Journal(tmp_path / "results" / "gpu-queue.jsonl")
        context = Context("some/images", device, "micro", tmp_path / "work")
        where = WHERE | more.pop("where", {})
        Runner(jobs, context, journal, where, minutes=minutes, script=script, say=lambda line: None, **more).run()
        return Journal(journal.path).records

    return run


@pytest.fixture
def trace(tmp_path):
    """What began and ended, in order: (word, job, time, process)."""
    return lambda: [line.split() for line in (tmp_path / "work" / "trace").read_text().splitlines()]


def begun(trace):
    return [name for word, name, *_ in trace() if word == "begin"]


def is_alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_every_job_has_a_line_and_a_failure_leaves_its_traceback_and_the_others(run, trace):
    records = run(job("first"), job("fails"), job("last"), job("gpu", needs_cuda=True))
    assert [(r["id"], r["status"]) for r in records] == [
        ("first", "ok"), ("fails", "failed"), ("last", "ok"), ("gpu", "not run"),
    ]  # fmt: skip
    assert "ValueError: no good: WORK/some/file" in records[1]["error"]
    assert begun(trace) == ["first", "fails", "last"]


def test_what_has_a_result_is_not_done_again(run, trace):
    jobs = job("first"), job("fails"), job("student", 4)
    run(*jobs)
    assert len(run(*jobs)) == 3
    # another commit: what was measured is measured anew, a training stands, and what failed may have been mended
    run(*jobs, where={"commit": "b" * 40})
    assert begun(trace) == ["first", "fails", "student", "first", "fails"]
    run(*jobs, where={"commit": "b" * 40}, retry_failed=True)
    assert begun(trace)[5:] == ["fails"]


def test_a_job_that_takes_too_long_has_failed_and_one_that_time_ran_out_for_goes_on(run, trace):
    records = run(job("sleeps", limit_s=0.5), job("sleeps-too"), minutes=2 / 60)
    assert [(r["id"], r["status"]) for r in records] == [("sleeps", "failed"), ("sleeps-too", "out of time")]
    assert "limit of 0.5 s" in records[0]["error"]
    assert not any(is_alive(process) for *_, process in trace())
    run(job("sleeps", limit_s=0.5), replace(job("sleeps-too"), limit_s=0.5))
    assert begun(trace) == ["sleeps", "sleeps-too", "sleeps-too"]


def test_a_killed_queue_takes_its_job_along_and_goes_on_where_it_was(run, trace, tmp_path):
    source = f"""
import sys
sys.path[:0] = [{str(BENCHMARKS)!r}, {str(ROOT)!r}]
from pathlib import Path
from gpu.job import Context, Job, Journal
from gpu.runner import Runner
jobs = [Job(name, 2, lambda context: {{}}, 30) for name in ("first", "sleeps")]
Runner(jobs, Context("some/images", "cpu", "micro", Path({str(tmp_path / "work")!r})),
       Journal(Path({str(tmp_path / "results" / "gpu-queue.jsonl")!r})), {WHERE!r}, minutes=1,
       script=Path({str(tmp_path / "worker.py")!r})).run()
"""
    queue = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not (tmp_path / "work" / "trace").is_file() or "sleeps" not in begun(trace):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    queue.send_signal(signal.SIGKILL)
    queue.wait()
    process = trace()[-1][-1]
    while is_alive(process):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    records = run(job("first"), replace(job("sleeps"), limit_s=0.5))
    assert [r["id"] for r in records] == ["first", "sleeps"]
    assert begun(trace) == ["first", "sleeps", "sleeps"]


def test_a_line_that_was_cut_is_dropped_and_the_next_one_is_whole(tmp_path):
    path = tmp_path / "gpu-queue.jsonl"
    Journal(path).append({"id": "a"})
    path.write_bytes(path.read_bytes() + b'{"id": "b", "res')
    journal = Journal(path)
    assert journal.records == [{"id": "a"}]
    journal.append({"id": "c"})
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["a", "c"]


def test_what_is_measured_runs_alone_and_trainings_at_once_where_that_is_faster(run, trace):
    jobs = [job(f"takes-{i}", 3) for i in range(2)] + [job("two-at-once", 3)]
    run(*jobs, *(job(f"student-takes-{i}", 4) for i in range(3)))
    words = [word for word, *_ in trace()]
    assert words[:6] == ["begin", "end"] * 3
    assert words[6:8] == ["begin", "begin"]


def test_a_student_waits_for_its_teacher_and_a_teacher_whose_weights_are_gone_is_trained_again(run, trace, tmp_path):
    jobs = [job("two-at-once", 3), job("teacher-takes", 4), job("student-a", 4, needs=("teacher-takes",))]
    run(*jobs)
    assert [name for word, name, *_ in trace() if word == "end"] == ["two-at-once", "teacher-takes", "student-a"]
    (tmp_path / "work" / "runs" / "teacher-takes" / "evaluation.json").unlink()
    run(*jobs, job("student-b", 4, needs=("teacher-takes",)))
    assert begun(trace)[3:] == ["teacher-takes", "student-b"]


def test_a_student_of_a_teacher_that_fails_is_left_for_another_time(run, trace):
    records = run(job("teacher-fails", 4), job("student", 4, needs=("teacher-fails",)), job("student-alone", 4))
    assert [r["id"] for r in records] == ["teacher-fails", "student-alone"]


def test_a_training_that_would_not_end_in_time_is_left_out_for_one_that_does(run, trace):
    run(job("student-takes", 4, images=1000, rate_of="slow"))
    records = run(
        job("student-long", 4, images=100_000, rate_of="slow"),
        job("student-short", 4, images=1000, rate_of="slow"),
        minutes=10 / 60,
    )
    assert [r["id"] for r in records] == ["student-takes", "student-short"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f'File "{ROOT}/hf_ihb/run.py", line 3', 'File "./hf_ihb/run.py", line 3'),
        (f"{sys.prefix}/lib/x.py", "PYTHON/lib/x.py"),
        ("open /some/where/else/file.json: no", "open .../file.json: no"),
        ("https://example.org/a/b/c and a/b/c", "https://example.org/a/b/c and a/b/c"),
    ],
)
def test_results_name_no_folder_of_the_machine(text, expected):
    assert without_places(text) == expected


def result(arm, seed, accuracy, epochs=30):
    return {
        "arm": arm, "seed": seed, "epochs": epochs, "attention": None, "images_per_second": 100.0,
        "evaluation": {"test": {"accuracy": accuracy}, "num_parameters": 7, "train_seconds": 60.0},
    }  # fmt: skip


def test_gains_are_paired_by_seed_and_length_and_their_interval_is_students():
    control = [result("ce_only", seed, a) for seed, a in ((0, 0.5), (1, 0.6), (2, 0.55))] + [
        result("ce_only", 0, 0.9, 100)
    ]
    students = [result("cka", seed, a) for seed, a in ((2, 0.58), (0, 0.51), (1, 0.66), (3, 0.99))]
    rows = study_rows(students + control)
    found = next(row for row in rows if row[0] == "cka")
    gains = [1.0, 6.0, 3.0]
    low, high = stats.ttest_1samp(gains, 0).confidence_interval(0.95)
    assert found[6] == f"{sum(gains) / 3:+.2f} ± {(high - low) / 2:.2f}" == interval(gains)
    assert found[3] == "51.00 (0), 66.00 (1), 58.00 (2), 99.00 (3)"
    assert [row[6] for row in rows if row[0] == "ce_only"] == ["", ""]


def test_a_check_compares_each_step_with_the_reference_and_says_what_failed():
    curve = [{"loss": 2.0, "cka_loss": 0.5, "grad_norm": 1.0}, {"loss": 1.0, "cka_loss": 0.4, "grad_norm": 9.0}]
    other = [curve[0] | {"grad_norm": 5.0}, {**curve[1], "cka_loss": 0.4 * 1.01}]
    reference = {"precision": "float32", "curves": {"a": curve, "b": curve}, "waits": {}, "failed": {}}
    found = {
        "precision": "float32", "curves": {"a": curve, "b": other}, "waits": {"a": ["trainer.py:3"]},
        "failed": {"c": "Traceback\nValueError: no"},
    }  # fmt: skip
    records = {
        "curves-cpu": {"part": 2, "status": "ok", "result": reference},
        "curves-float32": {"part": 2, "status": "failed", "result": found},
    }
    rows = {what: (value, right) for what, _, value, right in check_rows(records)}
    assert rows["curves-float32 = curves-cpu: a"] == ("0", True)
    assert rows["curves-float32 = curves-cpu: b"] == ("0.01", False)
    assert rows["curves-float32: c"] == ("ValueError: no", False)
    assert rows["curves-float32: no wait in a step: a"] == ("trainer.py:3", False)


def test_the_queue_without_a_gpu_says_what_to_do():
    words = [sys.executable, str(BENCHMARKS / "gpu_queue.py"), "--dataset_name", "some/images"]
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    )
    assert done.returncode == 2
    assert "expected a CUDA GPU, found none; --device cpu --tier small" in done.stderr
    assert "Traceback" not in done.stderr
