"""Every test runs offline and in folders of its own; this must happen before `datasets` and `transformers` load."""

import os
import tempfile

_HOME = tempfile.mkdtemp(prefix="hf_ihb_tests_")
os.environ.update(
    HF_HOME=_HOME,
    HF_HUB_CACHE=os.path.join(_HOME, "hub"),
    HF_DATASETS_CACHE=os.path.join(_HOME, "datasets"),
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
)
os.environ.pop("HF_TOKEN", None)

import shutil  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402


def pytest_unconfigure() -> None:
    shutil.rmtree(_HOME, ignore_errors=True)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
