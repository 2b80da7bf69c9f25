import datasets
import numpy as np
import pytest

from hf_ihb.data import decoded_cache
from hf_ihb.data.decode import EncodedImages
from tests.image_sets import as_bytes, picture


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "set"


@pytest.fixture
def small_blocks(monkeypatch):
    """Files of several blocks: nine images of 6 x 6 px each."""
    monkeypatch.setattr(decoded_cache, "_BLOCK_BYTES", 9 * 3 * 36)


@pytest.fixture
def encode():
    """Encoded images, of pictures or of bytes as they stand."""

    def make(images, size=(6, 6), mode="RGB", identity=("set",), resizes=True):
        column = {"image": [as_bytes(image) for image in images]}
        table = datasets.Dataset.from_dict(column, features=datasets.Features({"image": datasets.Image(decode=False)}))
        return EncodedImages(table, "image", np.arange(len(images)), size, resizes, mode, "here", True, identity)

    return make


@pytest.fixture
def encoded(encode):
    return encode([picture(i) for i in range(40)])
