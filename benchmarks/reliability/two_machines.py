"""A training on two machines: the same losses as one machine with two processes, and what is lost where one goes.

python benchmarks/reliability/two_machines.py [--dataset_name sklearn:digits] [--name NAME]

Two network namespaces, joined by a pair of virtual cables, each start one process of two with torchrun (which is what
`accelerate launch` starts where there are GPUs) and write to one folder. Labels alone, and CKA over the batch of both.
Then, in the middle of a training: one machine is killed, its cable is cut, it is told to end; the other must end by
itself, in a line and within its time-out, and the job must go on from what was saved to the same weights. Two folders
are refused. Last, on one machine, a process is killed and `torchrun --max_restarts` lets the run go on by itself.

Needs Linux, root and `ip`; without them it says "not run".
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from small_runs import begin_with, table, write

ROOT = Path(__file__).parents[2]
# of this process, so that another one's are left alone
SPACES, ADDRESSES = tuple(f"hf-ihb-{os.getpid()}-{side}" for side in "ab"), ("10.213.77.1", "10.213.77.2")
TIMEOUT_S = 15
DEIT = {
    "architecture": "deit", "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "patch_size": 4,
    "image_size": 32,
}  # fmt: skip
TRAINING = {
    "max_train_samples": 2048, "max_eval_samples": 64, "per_device_train_batch_size": 64, "max_steps": 24,
    "save_strategy": "steps", "save_steps": 4, "logging_steps": 1, "learning_rate": 1e-3, "drop_path_rate": 0.1,
    "random_crop_padding": 2, "mixup_alpha": 0.8, "mix_probability": 0.5, "report_to": "none", "disable_tqdm": True,
    "use_cpu": True, "analyses_after_training": "none", "ddp_timeout": TIMEOUT_S,
}  # fmt: skip
CKA = {"cka_weight": 1.0, "student_layers": [1, 3], "teacher_layers": [1, 2], "teacher_cache": "off"}


@contextlib.contextmanager
def two_networks() -> Iterator[None]:
    """Two namespaces and a cable between them; they go with all that runs in them, also where this is told to end."""

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    def away() -> None:
        for space in SPACES:
            inside = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True).stdout.split()
            for pid in inside:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", space], capture_output=True)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        for space in SPACES:
            ip("netns", "add", space)
            ip("-n", space, "link", "set", "lo", "up")
        ip("link", "add", "cable", "netns", SPACES[0], "type", "veth", "peer", "name", "cable", "netns", SPACES[1])
        for space, address in zip(SPACES, ADDRESSES, strict=True):
            ip("-n", space, "address", "add", f"{address}/24", "dev", "cable")
            ip("-n", space, "link", "set", "cable", "up")
        yield
    finally:
        away()


class Machine:
    """A launcher in a namespace, and all that it starts."""

    def __init__(self, words: Sequence[str], log: Path, space: str | None = None, **environment: str) -> None:
        inside = [] if space is None else ["ip", "netns", "exec", space]
        variables = os.environ | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "cable" if space else "lo"}
        self.log = log
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                [*inside, *words], stdout=stream, stderr=stream, env=variables | environment, start_new_session=True
            )

    def kill(self) -> None:
        """Pulls the plug."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def pids(self) -> list[int]:
        """Of the launcher and of those below it, the youngest first."""
        found = [self.process.pid]
        for pid in found:
            with contextlib.suppress(OSError):
                children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
                found += [int(child) for child in children]
        return found[::-1]

    def end(self, patience_s: float) -> int | None:
        """Its exit code; None if it had to be killed."""
        try:
            return self.process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self.kill()
            return None

    @property
    def said(self) -> list[str]:
        """Lines of errors."""
        return [line for line in self.log.read_text(errors="replace").splitlines() if line.startswith("error: ")]

    @property
    def is_traceback_free(self) -> bool:
        """Whether no line of a traceback is one of this package's."""
        return f'File "{ROOT / "hf_ihb"}' not in self.log.read_text(errors="replace")


class Job:
    """A training on both machines, in a folder that both see.

    Args:
        folder: Of everything.
        script: Of `scripts/`.
        recipe: Its keys.
    """

    def __init__(self, folder: Path, script: str, recipe: dict[str, Any]) -> None:
        self.folder, self.script, self.number = folder, script, 0
        self.recipe = folder / f"{script}.json"
        self.recipe.write_text(json.dumps(recipe))

    def start(self, run: Path, *words: str, folders: Sequence[Path] | None = None) -> list[Machine]:
        """Starts it; the folders are those of the machines if not one."""
        self.number += 1
        machines = []
        for rank, space in enumerate(SPACES):
            launcher = ["--nnodes=2", f"--node_rank={rank}", "--nproc_per_node=1", f"--master_addr={ADDRESSES[0]}"]
            launcher += [f"--master_port={29600 + self.number}"]
            command = self.command(launcher, run if folders is None else folders[rank], *words)
            machines.append(Machine(command, self.folder / f"{self.script}-{self.number}-{rank}.log", space))
        return machines

    def command(self, launcher: Sequence[str], run: Path, *words: str) -> list[str]:
        """Of a launcher of some words."""
        script = [str(ROOT / "scripts" / self.script), str(self.recipe), "--output_dir", str(run), *words]
        return [sys.executable, "-m", "torch.distributed.run", *launcher, *script]

    def finish(self, run: Path, *words: str) -> None:
        """Runs it to its end."""
        for machine in self.start(run, *words):
            if (code := machine.end(300)) != 0:
                raise RuntimeError(f"exit code {code}: {machine.log.read_text()[-3000:]}")


def result(run: Path) -> tuple[list[float], dict[str, Any]]:
    """Losses of each step, and the weights."""
    from safetensors.torch import load_file

    history = json.loads((run / "training_history.json").read_text())
    return [entry["loss"] for entry in history if "loss" in entry], load_file(run / "model.safetensors")


def difference(run: Path, other: Path) -> str:
    """Of two runs, in words."""
    import torch

    (losses, weights), (others, expected) = result(run), result(other)
    if losses == others and all(torch.equal(weights[name], tensor) for name, tensor in expected.items()):
        return "bit for bit"
    loss = max(abs(a - b) for a, b in zip(losses, others, strict=True))
    weight = max((weights[name] - tensor).abs().max().item() for name, tensor in expected.items())
    return f"losses within {loss:.1e}, weights within {weight:.1e}"


def newest(run: Path) -> int:
    """Step of the newest checkpoint; 0 if there is none."""
    return max((int(path.name.rpartition("-")[2]) for path in run.glob("checkpoint-*")), default=0)


def reached(run: Path, step: int, machines: Sequence[Machine]) -> None:
    """Waits for the checkpoint of a step."""
    until = time.monotonic() + 200
    while newest(run) < step:
        if time.monotonic() > until or any(machine.process.poll() is not None for machine in machines):
            raise RuntimeError(f"no checkpoint of step {step}: {machines[0].log.read_text()[-3000:]}")
        time.sleep(0.02)


def strike(job: Job, run: Path, how: str, whole: Path) -> dict[str, Any]:
    """Strikes the second machine in the middle of a training, and goes on."""
    machines = job.start(run)
    reached(run, 8, machines)
    began = time.monotonic()
    if how == "killed":
        machines[1].kill()
    elif how == "cable cut":
        subprocess.run(["ip", "-n", SPACES[1], "link", "set", "cable", "down"], check=True)
    else:
        machines[1].process.send_signal(signal.SIGTERM)
    code = machines[0].end(4 * TIMEOUT_S)
    seconds = time.monotonic() - began
    machines[1].end(4 * TIMEOUT_S)
    if how == "cable cut":
        subprocess.run(["ip", "-n", SPACES[1], "link", "set", "cable", "up"], check=True)
    row = {
        "what": f"one machine {how}", "seconds to the other's end": round(seconds, 1), "its exit code": code,
        "it said": " | ".join(machines[0].said).replace(str(job.folder), "RUNS"),
        "no traceback": all(machine.is_traceback_free for machine in machines), "newest checkpoint": newest(run),
    }  # fmt: skip
    job.finish(run, "--resume_from_checkpoint", "true")
    return row | {"gone on with": difference(run, whole)}


def restarted(job: Job, run: Path, whole: Path) -> dict[str, Any]:
    """One of two processes of one machine is killed; its launcher starts both again."""
    words = job.command(["--standalone", "--nproc_per_node=2", "--max_restarts=1"], run)
    # a store that outlives the processes would tell the new ones where the old ones listened (pytorch issue 135712)
    machine = Machine(words, job.folder / "restarted.log", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    reached(run, 8, [machine])
    began = time.monotonic()
    os.kill(machine.pids()[0], signal.SIGKILL)
    code = machine.end(300)
    return {
        "what": "a process killed under torchrun --max_restarts 1", "its exit code": code,
        "seconds to its end": round(time.monotonic() - began, 1), "gone on with": difference(run, whole),
        "went on by itself": "started again by its launcher" in machine.log.read_text(),
    }  # fmt: skip


def jobs_of(folder: Path, dataset: str) -> dict[str, Job]:
    """Labels, and CKA from a small CNN that is trained for it."""
    common = TRAINING | {"dataset_name": dataset}
    teacher = folder / "teacher"
    cnn = common | {"architecture": "resnet18_cifar_w16", "max_steps": 30, "save_strategy": "no", "drop_path_rate": 0.0}
    labels = Job(folder, "train.py", common | DEIT)
    recipe = folder / "teacher.json"
    recipe.write_text(json.dumps(cnn))
    train = [sys.executable, str(ROOT / "scripts" / "train.py"), str(recipe), "--output_dir", str(teacher)]
    subprocess.run(train, check=True, capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    return {"labels": labels, "CKA": Job(folder, "distill.py", common | DEIT | CKA | {"teacher_model": str(teacher)})}


def measured(folder: Path, dataset: str) -> list[dict[str, Any]]:
    """All rows."""
    rows = []

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        print(row, file=sys.stderr)

    for name, job in jobs_of(folder, dataset).items():
        alone, whole = folder / f"{name}-one", folder / f"{name}-two"
        words = job.command(["--standalone", "--nproc_per_node=2"], alone)
        if (code := Machine(words, folder / f"{name}-one.log").end(300)) != 0:
            raise RuntimeError(f"exit code {code}: {(folder / f'{name}-one.log').read_text()[-3000:]}")
        job.finish(whole)
        add({"training": name, "what": "two machines beside one", "gone on with": difference(whole, alone)})
        for how in ("killed", "cable cut", "told to end (SIGTERM)"):
            add({"training": name} | strike(job, folder / f"{name}-{how}", how, whole))
        if name == "labels":
            own = [folder / "own-a", folder / "own-b"]
            machines = job.start(own[0], folders=own)
            codes = [machine.end(120) for machine in machines]
            said = " | ".join(machines[0].said).replace(str(folder), "RUNS")
            add({"training": name, "what": "a folder each", "its exit code": codes[0], "it said": said})
            shutil.rmtree(own[0], ignore_errors=True)
        add({"training": name} | restarted(job, folder / f"{name}-again", alone))
    return rows


def main() -> None:
    """Writes a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", default="sklearn:digits")
    parser.add_argument("--name", default=None, help="Of the results, without ending; printed alone if not given.")
    args = parser.parse_args()
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None:
        print("not run: it needs Linux, root and `ip`")
        return
    begin_with()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, two_networks():
        dataset = args.dataset_name if ":" in args.dataset_name else str(Path(args.dataset_name).resolve())
        rows = measured(Path(folder), dataset)
    columns = ["training", "what", "its exit code", "seconds to the other's end", "newest checkpoint", "gone on with"]
    lines = "\n".join(f"- {row['training']}, {row['what']}: `{row['it said']}`" for row in rows if row.get("it said"))
    text = (
        f"Time-out (`ddp_timeout`) {TIMEOUT_S} s; the exit code is the launcher's.\n\n{table(rows, columns)}\n\n{lines}"
    )
    write(args.name, "Two machines", text, rows, started)


if __name__ == "__main__":
    main()
