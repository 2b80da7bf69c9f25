"""The whole way: a distilled student goes to the Hub with its evidence, and comes back the same to anyone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import evaluate
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoModelForImageClassification, BitImageProcessor, Dinov2Config, Dinov2Model

from hf_ihb.config.data import DataArguments
from hf_ihb.data import load_image_split
from hf_ihb.metrics import Accuracy
from tests.conftest import ROOT, TOKEN
from tests.test_scripts import STUDENT

REPO = "me/student"
SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size")
TAUGHT = {**STUDENT, "max_eval_samples": None, "method": "logits", "teacher_model": "teacher", "max_steps": 60,
          "max_train_samples": 640, "learning_rate": 3e-3}  # fmt: skip
PUSH = ("--push_to_hub", "true", "--hub_model_id", REPO, "--analyses_after_training", "attention,cka")
PULL = """
import json, sys
sys.modules["hf_ihb"] = None  # an import of it fails
from PIL import Image
from transformers import pipeline
classifier = pipeline("image-classification", model=sys.argv[1])
images = [Image.open(path) for path in sys.argv[2:]]
found = [{a["label"]: a["score"] for a in row} for row in classifier(images, function_to_apply="none", top_k=10)]
print(json.dumps(found))
"""


@pytest.fixture
def pushed(hub_here, script, tmp_path):
    """A run of digits that has been pushed, and what the script said."""
    teacher = {key: value for key, value in STUDENT.items() if key not in SHAPE} | {
        "architecture": "resnet18_cifar_w16"
    }
    made = script(
        "train.py",
        {**teacher, "max_train_samples": 640, "max_steps": 40, "learning_rate": 3e-3},
        "--output_dir",
        "teacher",
    )
    assert made.code == 0, made.stderr
    assert script("train.py", STUDENT, "--output_dir", "control").code == 0
    done = script("distill.py", TAUGHT, "--output_dir", "run", "--baseline_model", "control", *PUSH)
    assert done.code == 0, done.stderr
    return done


def read(path):
    return json.loads(Path(path).read_text("utf-8"))


def test_a_student_goes_to_the_hub_and_comes_back_the_same(pushed, hub, hub_env, script, tmp_path):
    run, files = tmp_path / "run", hub.files(REPO)
    assert files["model.safetensors"] == (run / "model.safetensors").read_bytes()
    metrics, analysis = read(run / "metrics.json"), read(run / "analysis.json")
    accuracy = metrics["heads"]["averaged"]["accuracy"]

    # the card's numbers are those of the JSON files
    results = {
        (r.metric_type, (r.metric_args or {}).get("layer")): r.metric_value
        for r in ModelCard.load(REPO).data.eval_results
    }
    layers = {
        ("mean_attention_distance", entry["layer"]): entry["distance"] for entry in analysis["attention"]["layers"]
    }
    assert results == {("accuracy", None): accuracy} | layers

    # another process, without hf_ihb and with an empty cache, gets the same logits
    split, _ = load_image_split(DataArguments(dataset_name="sklearn:digits"), "test")
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in split.images]
    paths = [tmp_path / f"{row}.png" for row in range(4)]
    for picture, path in zip(pictures, paths, strict=False):
        picture.save(path)
    pulled = subprocess.run(
        [sys.executable, "-c", PULL, REPO, *map(str, paths)],
        env=hub_env,
        cwd="/",
        capture_output=True,
        text=True,
        check=True,
    )
    student = AutoModelForImageClassification.from_pretrained(run).eval()
    processor = read(run / "preprocessor_config.json")
    mean, std = (torch.tensor(processor[key]).view(3, 1, 1) for key in ("image_mean", "image_std"))
    with torch.no_grad():
        logits = student(pixel_values=(split.images[:4].float() / 255 - mean) / std).logits
    names = [student.config.id2label[i] for i in range(10)]
    found = torch.tensor([[row[name] for name in names] for row in json.loads(pulled.stdout.splitlines()[-1])])
    torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-5)

    # the accuracy is found again, exactly, by our command and by the stock evaluator
    again = script("evaluate_model.py", None, REPO, "--device", "cpu")
    assert again.code == 0, again.stderr
    evaluated = read(tmp_path / "outputs" / "student" / "metrics.json")
    assert evaluated["heads"]["averaged"]["accuracy"] == accuracy
    assert evaluated["model"]["revision"] == hub.history(REPO)[0]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    data = datasets.Dataset.from_dict({"image": pictures, "label": split.labels.tolist()}, features=features)
    stock = evaluate.evaluator("image-classification").compute(
        REPO, data, metric=Accuracy(), input_column="image", label_mapping=student.config.label2id
    )
    assert stock["accuracy"] == accuracy


def test_a_push_carries_the_evidence_and_nothing_of_the_machine(pushed, hub, tmp_path):
    files = hub.files(REPO)
    shown = "attention_distance attention_statistics attention_maps cka_linear cka_rbf confusion_matrix"
    plots = {f"plots/{name}.png" for name in shown.split()}
    kept = "config preprocessor_config recipe training_history evaluation metrics analysis"
    records = {f"{name}.json" for name in kept.split()}
    assert files.keys() == plots | records | {".gitattributes", "README.md", "model.safetensors"}
    card = files["README.md"].decode()
    for part in ("matched control", "## Attention distance", "plots/cka_linear.png", "`teacher`"):
        assert part in card
    text = b"".join(files.values()) + b"".join(r.body + r.path.encode() for r in hub.requests)
    for canary in (TOKEN, str(tmp_path), str(Path.home()), str(ROOT)):
        assert canary.encode() not in text, canary
        assert canary == str(tmp_path) or canary not in pushed.stdout + pushed.stderr
    assert f"pushed to {hub.endpoint}/{REPO}/commit/{hub.history(REPO)[0]}" in pushed.stdout


def test_a_push_that_fails_keeps_the_run_and_ends_with_the_command(hub_here, script, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_ihb.hub.pushing.time.sleep", lambda seconds: None)
    hub_here.fail("POST", "/commit/", status=503, times=1000)
    done = script("train.py", STUDENT, "--output_dir", "run", *PUSH, "--hub_strategy", "end")
    assert done.code == 5
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert last.endswith(f"python scripts/publish.py run --hub_model_id {REPO}")
    assert {"model.safetensors", "evaluation.json", "metrics.json", "README.md"} <= {
        p.name for p in Path("run").iterdir()
    }
    assert TOKEN not in done.stdout + done.stderr
    hub_here.faults.clear()
    command = last.partition("python scripts/publish.py ")[2].split()
    assert script("publish.py", None, *command).code == 0
    assert hub_here.files(REPO)["model.safetensors"] == Path("run/model.safetensors").read_bytes()


def image_set(count, seed):
    generator = np.random.default_rng(seed)
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    images = [Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(count)]
    return datasets.Dataset.from_dict({"img": images, "label": [i % 10 for i in range(count)]}, features=features)


def test_the_main_command_runs_against_a_hub_and_pins_what_it_resolved(hub, hub_env, tmp_path):
    files = {}
    for name, count in (("train", 200), ("test", 20)):
        image_set(count, seed=count).to_parquet(tmp_path / f"{name}.parquet")
        files[f"plain_text/{name}-00000-of-00001.parquet"] = (tmp_path / f"{name}.parquet").read_bytes()
    data = hub.add_repo("uoft-cs/cifar10", files, repo_type="dataset")
    shape = {"hidden_size": 24, "num_hidden_layers": 12, "num_attention_heads": 2, "patch_size": 14, "image_size": 224}
    Dinov2Model(Dinov2Config(**shape)).save_pretrained(tmp_path / "dinov2")
    size = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}
    BitImageProcessor(**size).save_pretrained(tmp_path / "dinov2")
    teacher = hub.add_folder("facebook/dinov2-small", tmp_path / "dinov2")

    command = ["accelerate", "launch", "--cpu", "scripts/distill.py", "recipes/cka.json", "--max_steps", "20"]
    command += ["--use_cpu", "true", "--per_device_train_batch_size", "8", "--output_dir", str(tmp_path / "run")]
    command += ["--report_to", "none", "--hidden_size", "24", "--num_attention_heads", "2"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{hub_env['PATH']}"
    done = subprocess.run(
        command,
        env={**hub_env, "PATH": path, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    recipe = read(tmp_path / "run" / "recipe.json")
    assert (recipe["dataset"]["name"], recipe["dataset"]["revision"]) == ("uoft-cs/cifar10", data)
    assert recipe["teacher"] == {"name": "facebook/dinov2-small", "revision": teacher}
    assert recipe["keys"]["dataset_revision"] == data
    assert recipe["keys"]["teacher_revision"] == teacher
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.datasets == ["uoft-cs/cifar10"]
    assert card.data.to_dict()["teacher_revision"] == teacher
    assert data in card.text
