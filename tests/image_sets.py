"""Small image sets in files, and what they decode to."""

import io

import datasets
import numpy as np
import torch
from PIL import Image

from hf_ihb.config.data import DataArguments
from hf_ihb.data import load_image_data

NAMES = ["cat", "dog", "owl"]


def picture(seed, size=(6, 6), mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def png(image):
    stream = io.BytesIO()
    image.save(stream, "TIFF" if image.mode == "CMYK" else "PNG")
    return stream.getvalue()


def as_bytes(image):
    return {"bytes": image if isinstance(image, bytes) else png(image), "path": None}


def write(folder, images="image", labels="label", class_label=True, features=None, **splits):
    """A folder of parquet files, one a split; a split is a list of (image, label)."""
    folder.mkdir(parents=True, exist_ok=True)
    label = datasets.ClassLabel(names=NAMES) if class_label else datasets.Value("int64")
    features = {images: datasets.Image(), labels: label} | (features or {})
    for name, rows in splits.items():
        columns = {images: [as_bytes(image) for image, _ in rows], labels: [value for _, value in rows]}
        columns |= {extra: [0] * len(rows) for extra in features if extra not in columns}
        split = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        split.to_parquet(folder / f"{name}-00000-of-00001.parquet", batch_size=64)  # it guesses none for no rows
    return str(folder)


def rows(count, start=0, **kwargs):
    return [(picture(start + i, **kwargs), i % 3) for i in range(count)]


def pixels(images):
    return torch.stack([torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) for image in images])


def load(name, **kwargs):
    return load_image_data(DataArguments(dataset_name=str(name), **kwargs))
