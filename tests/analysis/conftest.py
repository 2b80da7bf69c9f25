"""A small ViT, a small CNN and images of noise to look at them with."""

import pytest
import torch
from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher, ResNetConfig, ResNetForImageClassification

from hf_ihb.analysis import AnalysisArguments, analyze
from hf_ihb.data import ImageSplit
from hf_ihb.models.pretrained import Pretrained
from hf_ihb.models.processing import PixelFormat

NAMES = ["cat", "dog", "owl"]
LABELS = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
SHAPE = {"image_size": 12, "patch_size": 4, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
PIXELS = PixelFormat((0.5,) * 3, (0.25,) * 3, (12, 12))
DATA = {"name": "noise", "revision": None}


@pytest.fixture
def split(generator):
    images = torch.randint(0, 256, (24, 3, 12, 12), generator=generator, dtype=torch.uint8)
    return ImageSplit(images, torch.arange(24) % 3, NAMES)


def subject(model, pixels=PIXELS):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return Pretrained(model.eval(), pixels, type(model).__name__, None)


@pytest.fixture
def student():
    return subject(DeiTForImageClassificationWithTeacher(DeiTConfig(**SHAPE, intermediate_size=8, **LABELS)))


@pytest.fixture
def cnn():
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8, 8], depths=[1, 1, 1], layer_type="basic", **LABELS)
    return subject(ResNetForImageClassification(config))


def measure(student, split, metrics, teacher=None, previous=None, keep=lambda result: None, **kwargs):
    defaults = {"max_probes": 3, "lanczos_steps": 4, "lanczos_starts": 2, "hessian_dtype": "float64", "num_maps": 2}
    args = AnalysisArguments(metrics=metrics, **(defaults | kwargs))
    return analyze(student, split, args, data=DATA, teacher=teacher, previous=previous, keep=keep)
