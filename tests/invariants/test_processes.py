"""Laws that hold across processes: sharding, kill and resume, and a student that needs nothing of ours."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from hf_ihb.config.data import DataArguments
from hf_ihb.data import load_image_data
from hf_ihb.models.processing import pixel_format, student_processor
from tests.invariants import build_cache, disagree, unused
from tests.invariants.conftest import ROOT, STUDENT

LOGITS = {**STUDENT, "method": "logits", "alpha": 0.6, "temperature": 2.0}
STRUCTURAL = {
    **STUDENT, "method": "structural", "cka_weight": 1.0, "gram_weight": 1.0, "token_weight": 0.5,
    "student_layers": [0, 1], "teacher_layers": [1, 2],
}  # fmt: skip
AUGMENTED = {"random_crop_padding": 1, "horizontal_flip": 0.5, "mixup_alpha": 0.8, "mix_probability": 0.4}
# BatchNorm, whose statistics are each process's own, in an average
AVERAGED = {"ema_decay": 0.9, "conv_stem": True}
RESUMABLE = {**AUGMENTED, "drop_path_rate": 0.2, "max_steps": 8, "save_strategy": "steps", "save_steps": 3}


SHARED_OUT = STRUCTURAL | {
    "cka_weight": 0.0, "gram_weight": 0.0, "token_weight": 0.0, "procrustes_weight": 1.0, "rkd_weight": 1.0,
    "dist_weight": 0.2, "uncertainty_weighting": 2.0,
}  # fmt: skip


@pytest.mark.parametrize("method", ["logits", "structural", "shared out"])
def test_two_processes_train_like_one_on_the_same_global_batch(method, launch, teacher, tmp_path):
    cached = {"center_positions": False, "teacher_cache": "tokens"}
    recipe = {"logits": LOGITS, "structural": {**STRUCTURAL, **cached}, "shared out": SHARED_OUT}[method]
    # SGD: Adam turns rounding noise of tiny gradients into whole steps
    recipe |= {**AUGMENTED, "teacher_model": teacher, "max_steps": 5, "optim": "sgd", "learning_rate": 0.05}
    recipe |= {"weight_decay": 0.01, "weight_decay_scope": "all"}
    folders = [str(tmp_path / name) for name in ("one", "two")]
    one = launch("distill.py", {**recipe, "per_device_train_batch_size": 32, "teacher_cache_dir": folders[0]})
    two = launch(
        "distill.py", {**recipe, "per_device_train_batch_size": 16, "teacher_cache_dir": folders[1]}, processes=2
    )
    assert (one.code, two.code) == (0, 0), one.stderr + two.stderr
    assert [run.json("recipe.json")["environment"]["num_processes"] for run in (one, two)] == [1, 2]
    for run in (one, two):  # a flaw of the published study is named once, whatever the number of processes
        assert run.stderr.count("weight_decay_scope=all repeats a flaw of the published study: norms, biases") == 1
    parts = {
        "logits": ["task_loss", "kd_loss"],
        "structural": ["cka_loss", "gram_loss", "token_loss"],
        "shared out": ["task_weight", "procrustes_loss", "procrustes_weight", "rkd_loss", "dist_loss", "dist_weight"],
    }[method]
    for part in ["loss", *parts]:
        assert two.logged(part) == pytest.approx(one.logged(part), rel=1e-6, abs=1e-5), part
    for name, tensor in one.weights().items():
        torch.testing.assert_close(two.weights()[name], tensor, rtol=0, atol=1e-5)
    assert two.json("evaluation.json")["test"]["accuracy"] == one.json("evaluation.json")["test"]["accuracy"]
    if method == "structural":
        rows = [path.read_bytes() for path in sorted(tmp_path.glob("*/*/rows.bin"))]
        assert len(rows) == 2
        assert rows[0] == rows[1]


def test_a_run_that_its_launcher_starts_again_goes_on_to_the_same_end(launch, teacher):
    recipe = {**LOGITS, **RESUMABLE, "teacher_model": teacher, "per_device_train_batch_size": 32}
    whole = launch("distill.py", recipe)
    again = launch("distill.py", recipe, restarts=1, kill_at_step=7)
    assert (whole.code, again.code) == (0, 0), whole.stderr + again.stderr
    assert "started again by its launcher: going on from the newest checkpoint" in again.stderr
    assert again.logged("loss") == whole.logged("loss")
    for name, tensor in whole.weights().items():
        assert torch.equal(again.weights()[name], tensor), name


@pytest.mark.parametrize(("recipe", "processes"), [(STRUCTURAL, 1), (STRUCTURAL | AVERAGED, 2)])
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(recipe, processes, launch, teacher, tmp_path):
    recipe = {**recipe, **RESUMABLE, "teacher_model": teacher, "per_device_train_batch_size": 32 // processes}
    whole = launch("distill.py", recipe, processes=processes)
    assert whole.code == 0, whole.stderr
    go_on, run, strike = [], tmp_path / "run", {"kill_at_step": 7}
    if processes > 1:  # told to one of them alone, all end in the same step, with its checkpoint
        told = launch("distill.py", recipe, processes=processes, output_dir=run, term_at_step=4)
        assert told.code != 0
        assert told.stderr.count("told to end (SIGTERM); saved in") == processes
        (step,) = set(re.findall(r"step (\d): told to end", told.stderr))
        assert (run / f"checkpoint-{step}").is_dir()
        go_on, strike = ["--resume_from_checkpoint", "true"], {"kill_in_save": 6}
    killed = launch("distill.py", recipe, *go_on, processes=processes, output_dir=run, **strike)
    assert killed.code != 0
    if processes > 1:  # one of them died: the other ends in a line, what was not whole has no name
        assert not (run / "checkpoint-6").exists()
        (line,) = [line for line in killed.stderr.splitlines() if line.startswith("error: ")]
        assert re.search(rf"step 6: another process .* verifies is .*checkpoint-{step}; go on by", line)
        assert f'File "{ROOT / "hf_ihb"}' not in killed.stderr
    assert (killed.folder / "checkpoint-3").is_dir()
    assert not (killed.folder / "model.safetensors").exists()
    resumed = launch(
        "distill.py", recipe, "--resume_from_checkpoint", "true", processes=processes, output_dir=killed.folder
    )
    assert resumed.code == 0, resumed.stderr
    for part in ("loss", "task_loss", "grad_norm"):
        assert resumed.logged(part) == whole.logged(part), part
    for name, tensor in whole.weights().items():
        assert torch.equal(resumed.weights()[name], tensor), name
    test, expected = (run.json("evaluation.json")["test"] for run in (resumed, whole))
    assert test == expected


def stored_views(folder):
    """(epoch, image) -> row, of all files of a cache of views; no view is in two of them."""
    found = {}
    for path in folder.glob("*/*.safetensors"):
        part, epoch = load_file(path), int(path.name.split("-")[0])
        images = np.flatnonzero(np.unpackbits(part["images"].numpy()))
        assert not found.keys() & {(epoch, int(k)) for k in images}
        found |= {(epoch, int(k)): row.view(torch.half) for k, row in zip(images, part["rows"], strict=True)}
    return found


OF_VIEWS = {  # and what another run, of the same rows, differs in
    "scores": (LOGITS, {"temperature": 4.0}),
    "mean tokens": (
        {**STUDENT, "method": "structural", "student_layers": [0, 1], "teacher_layers": [1, 2], "relation_weight": 1.0,
         "teacher_view": "identical"},
        {"relation_weight": 0.0, "sp_weight": 100.0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kept", OF_VIEWS)
def test_processes_share_out_views_and_killed_and_resumed_equals_uninterrupted(kept, launch, teacher, tmp_path):
    settings, changed = OF_VIEWS[kept]
    recipe = {**settings, **RESUMABLE, "teacher_model": teacher, "teacher_cache": "views", "augmentation_seed": 5}

    def run(name, *more, processes=2, **settings):
        words = ["--teacher_cache_dir", str(tmp_path / name), *more]
        images = ["--per_device_train_batch_size", str(48 // processes)]
        return launch("distill.py", recipe, *words, *images, processes=processes, **settings)

    whole = run("whole")
    assert whole.code == 0, whole.stderr
    killed = run("killed", kill_at_step=7)
    assert killed.code != 0
    resumed = run("killed", "--resume_from_checkpoint", "true", output_dir=killed.folder)
    assert resumed.code == 0, resumed.stderr
    assert resumed.logged("loss") == whole.logged("loss")
    for name, tensor in whole.weights().items():
        assert torch.equal(resumed.weights()[name], tensor), name
    rows, again = stored_views(tmp_path / "whole"), stored_views(tmp_path / "killed")
    # three batches of 48 an epoch; what they leave out of 160 is asked for when the second after it begins
    assert sorted(epoch for epoch, _ in rows) == [0] * 160 + [1] * 144 + [2] * 96
    assert rows.keys() == again.keys()
    assert all(torch.equal(again[place], row) for place, row in rows.items())
    # another number of processes, another seed and temperature or loss: the same views, and none is asked for twice
    words = [word for key, value in changed.items() for word in (f"--{key}", str(value))]
    other = run("whole", *words, "--seed", "9", processes=1)
    assert other.code == 0, other.stderr
    after = stored_views(tmp_path / "whole")
    assert all(torch.equal(after[place], row) for place, row in rows.items())
    about = other.json("evaluation.json")["teacher_views"]
    assert about["begun_by"] == whole.folder.name
    assert (tmp_path / "whole" / about["key"]).is_dir()


def test_processes_that_see_other_metrics_stop_together_and_hold_one_average(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(Path(disagree.__file__)), str(tmp_path)], env=environment, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for kind in ("ema", "swa"):
        first, second = (torch.load(tmp_path / kind / f"{rank}.pt", weights_only=True) for rank in (0, 1))
        # the main process's first evaluation is its best, two more end its patience: three epochs of four steps
        assert first["ended"] == second["ended"] == {"step": 12, "best": 0.0, "world": 2}
        for name, tensor in first["state"].items():
            assert torch.equal(second["state"][name], tensor), name
    # both halves of the images are in the statistics of SWA
    images = (disagree.make_split(0).images.double() / 255 - 0.5) / 0.25
    stem = "student.deit.embeddings.patch_embeddings.stem"
    mean = F.conv2d(images, first["state"][f"{stem}.0.weight"].double(), padding=1).mean((0, 2, 3))
    torch.testing.assert_close(first["state"][f"{stem}.1.running_mean"].double(), mean, rtol=1e-4, atol=1e-5)


def test_processes_do_not_wait_for_parameters_that_no_output_depends_on(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(Path(unused.__file__)), str(tmp_path), "2"], env=environment, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "SiglipForImageClassification: not trained, since no output depends on it: vision_model.h" in done.stderr


def test_processes_share_out_a_cache_and_fail_together(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*command, str(Path(build_cache.__file__)), str(tmp_path)], env=environment, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["world"] == second["world"] == 2
    checked = [0, 2, 5, 8, 11, 14, 17, 20]
    blocks = [[n for n in range(21) if n // 4 % 2 == rank] for rank in (0, 1)]
    assert [ended["together"]["asked"] for ended in (first, second)] == [block + checked for block in blocks]
    for ended in (first, second):
        assert ended["together"]["read"] == list(range(21))
        assert "for training image 5;" in ended["broken"]
        assert "expected the same teacher and images on all processes" in ended["different"]
        assert ended["one folder"] is None
        assert ended["again"] == [True, True, False]
        assert re.match(
            "key 'output_dir': expected a folder that all machines see, .* found another .*", ended["two folders"]
        )


WITHOUT_US = """
import json, sys
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

folder, images = sys.argv[1], torch.load(sys.argv[2], weights_only=True)
pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
model = AutoModelForImageClassification.from_pretrained(folder).eval()
processor = AutoImageProcessor.from_pretrained(folder)
with torch.no_grad():
    logits = model(**processor(pictures, return_tensors="pt")).logits
scores = pipeline("image-classification", model=folder)(pictures, top_k=logits.shape[1])
assert not any(name.split(".")[0] == "hf_ihb" for name in sys.modules), "the test imported what it must do without"
print(json.dumps([type(model).__name__, logits.tolist(), scores]))
"""


@pytest.mark.parametrize("architecture", ["deit", "deit_cls", "vit"])
def test_a_student_folder_gives_the_same_logits_without_hf_ihb(architecture, launch, teacher, tmp_path):
    recipe = {**LOGITS, "architecture": architecture, "teacher_model": teacher, "max_steps": 2, "drop_path_rate": 0.1}
    finished = launch("distill.py", {**recipe, "per_device_train_batch_size": 16})
    assert finished.code == 0, finished.stderr
    data = load_image_data(DataArguments(dataset_name="sklearn:digits", max_train_samples=160, max_eval_samples=60))
    images = data.test.images[:8]
    torch.save(images, tmp_path / "images.pt")
    command = [sys.executable, "-c", WITHOUT_US, str(finished.folder), str(tmp_path / "images.pt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    class_name, logits, scores = json.loads(done.stdout.splitlines()[-1])
    expected_class = {
        "deit": "DeiTForImageClassificationWithTeacher", "deit_cls": "DeiTForImageClassification",
        "vit": "ViTForImageClassification",
    }[architecture]  # fmt: skip
    assert class_name == expected_class

    # what training evaluates: stored pixels, normalised on the device
    ours = AutoModelForImageClassification.from_pretrained(finished.folder).eval()
    pixels = pixel_format(student_processor(*data.train.statistics(), (8, 8))).apply(images.float() / 255)
    with torch.no_grad():
        expected = ours(pixel_values=pixels).logits
    torch.testing.assert_close(torch.tensor(logits), expected, rtol=0, atol=1e-5)
    names = data.label_names
    for row, found in zip(expected.softmax(-1), scores, strict=True):
        by_name = {entry["label"]: entry["score"] for entry in found}
        torch.testing.assert_close(torch.tensor([by_name[name] for name in names]), row, rtol=0, atol=1e-4)


def test_two_processes_learn_from_two_teachers_like_one(launch, teacher, tmp_path):
    entries = [
        {"teacher_model": teacher, "alpha": 0.5, "temperature": 2.0},
        {"teacher_model": teacher, "cka_weight": 1.0, "token_weight": 0.5, "student_layers": [0, 1]},
    ]
    recipe = {**STUDENT, **AUGMENTED, "teacher_models": entries, "teacher_dropping": 0.7, "max_steps": 5}
    recipe |= {"optim": "sgd", "learning_rate": 0.05, "teacher_cache_dir": str(tmp_path)}
    one = launch("distill.py", {**recipe, "per_device_train_batch_size": 32})
    two = launch("distill.py", {**recipe, "per_device_train_batch_size": 16}, processes=2)
    assert (one.code, two.code) == (0, 0), one.stderr + two.stderr
    for part in ("loss", "task_loss", "kd_loss_1", "cka_loss_2", "token_loss_2", "teacher_kept_1"):
        assert two.logged(part) == pytest.approx(one.logged(part), abs=1e-5), part
    assert 0 < sum(one.logged("teacher_kept_1")) < 5
    for name, tensor in one.weights().items():
        torch.testing.assert_close(two.weights()[name], tensor, rtol=0, atol=1e-5)
