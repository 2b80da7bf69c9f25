import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
LAUNCH = Path(__file__).parent / "launch.py"
TRAINING = {
    "dataset_name": "sklearn:digits",
    "max_train_samples": 160,
    "max_eval_samples": 60,
    "per_device_eval_batch_size": 64,
    "learning_rate": 0.003,
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "analyses_after_training": "none",
}
STUDENT = {
    **TRAINING, "architecture": "deit", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "patch_size": 2,
}  # fmt: skip

LOGITS = {**STUDENT, "method": "logits", "alpha": 0.6, "temperature": 2.0}
STRUCTURAL = {
    **STUDENT, "method": "structural", "cka_weight": 1.0, "gram_weight": 1.0, "token_weight": 0.5,
    "student_layers": [0, 1], "teacher_layers": [1, 2],
}  # fmt: skip
AUGMENTED = {"random_crop_padding": 1, "horizontal_flip": 0.5, "mixup_alpha": 0.8, "mix_probability": 0.4}
# BatchNorm, whose statistics are each process's own, in an average
AVERAGED = {"ema_decay": 0.9, "conv_stem": True}
RESUMABLE = {**AUGMENTED, "drop_path_rate": 0.2, "max_steps": 8, "save_strategy": "steps", "save_steps": 3}


@dataclass
class Finished:
    """A script that ended."""

    code: int
    stderr: str
    folder: Path

    def __post_init__(self):
        self.stderr = "\n".join(line for line in self.stderr.splitlines() if "OMP_NUM_THREADS" not in line)

    def json(self, name):
        return json.loads((self.folder / name).read_text())

    def weights(self):
        return load_file(self.folder / "model.safetensors")

    def logged(self, key):
        return [entry[key] for entry in self.json("training_history.json") if key in entry]


@pytest.fixture(scope="session")
def launch(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launches")

    def run(script, recipe, *overrides, processes=1, restarts=0, output_dir=None, **strikes):
        number = len(list(folder.iterdir()))
        path = folder / f"{number}.json"
        path.write_text(json.dumps(recipe))
        output_dir = Path(output_dir or folder / f"{number}")
        command = [sys.executable]
        if processes > 1 or restarts:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
            command += [f"--max_restarts={restarts}"]
        command += [str(LAUNCH), str(ROOT / "scripts" / script), str(path), "--output_dir", str(output_dir), *overrides]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        environment |= {name.upper(): str(step) for name, step in strikes.items()}  # see launch.py
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)
        return Finished(done.returncode, done.stderr, output_dir)

    return run


@pytest.fixture(scope="session")
def teacher(launch):
    """A CNN that knows its digits, as `scripts/train.py` leaves it."""
    recipe = {**TRAINING, "architecture": "resnet18_cifar_w16", "max_train_samples": None, "max_steps": 40}
    finished = launch("train.py", {**recipe, "per_device_train_batch_size": 64})
    assert finished.code == 0, finished.stderr
    assert finished.json("evaluation.json")["test"]["accuracy"] > 0.5
    return str(finished.folder)
