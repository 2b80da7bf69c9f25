"""A student's folder needs nothing of ours to be read."""

import json
import subprocess
import sys

import torch
from transformers import AutoModelForImageClassification

from hf_ihb.config.data import DataArguments
from hf_ihb.data import load_image_data
from hf_ihb.models.processing import pixel_format, student_processor
from tests.invariants.conftest import LOGITS

WITHOUT_US = """
import json, sys
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

images, *folders = sys.argv[1:]
pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in torch.load(images, weights_only=True)]
for folder in folders:
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        logits = model(**processor(pictures, return_tensors="pt")).logits
    scores = pipeline("image-classification", model=folder)(pictures, top_k=logits.shape[1])
    print(json.dumps([type(model).__name__, logits.tolist(), scores]))
assert not any(name.split(".")[0] == "hf_ihb" for name in sys.modules), "the test imported what it must do without"
"""
CLASSES = {
    "deit": "DeiTForImageClassificationWithTeacher",
    "deit_cls": "DeiTForImageClassification",
    "vit": "ViTForImageClassification",
}


def test_student_folders_give_the_same_logits_without_hf_ihb(launch, teacher, tmp_path):
    recipe = {**LOGITS, "teacher_model": teacher, "max_steps": 2, "drop_path_rate": 0.1}
    recipe |= {"per_device_train_batch_size": 16}
    runs = [launch("distill.py", {**recipe, "architecture": architecture}) for architecture in CLASSES]
    for finished in runs:
        assert finished.code == 0, finished.stderr
    data = load_image_data(DataArguments(dataset_name="sklearn:digits", max_train_samples=160, max_eval_samples=60))
    images = data.test.images[:8]
    torch.save(images, tmp_path / "images.pt")
    command = [sys.executable, "-c", WITHOUT_US, str(tmp_path / "images.pt"), *(str(run.folder) for run in runs)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    # what training evaluates: stored pixels, normalised on the device
    pixels = pixel_format(student_processor(*data.train.statistics(), (8, 8))).apply(images.float() / 255)
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    for finished, expected_class, (class_name, logits, scores) in zip(runs, CLASSES.values(), said, strict=True):
        assert class_name == expected_class
        ours = AutoModelForImageClassification.from_pretrained(finished.folder).eval()
        with torch.no_grad():
            expected = ours(pixel_values=pixels).logits
        torch.testing.assert_close(torch.tensor(logits), expected, rtol=0, atol=1e-5)
        for row, found in zip(expected.softmax(-1), scores, strict=True):
            by_name = {entry["label"]: entry["score"] for entry in found}
            by_class = torch.tensor([by_name[name] for name in data.label_names])
            torch.testing.assert_close(by_class, row, rtol=0, atol=1e-4)
