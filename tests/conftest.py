"""Every test runs offline and in folders of its own; this must happen before `datasets` and `transformers` load."""

import os
import socket
import tempfile

# where the tests' Hub listens while one is asked for: the clients read their endpoint once, when they are imported
with socket.create_server(("127.0.0.1", 0)) as reserved:
    HUB_PORT = reserved.getsockname()[1]
_HOME = tempfile.mkdtemp(prefix="hf_ihb_tests_")
os.environ.update(
    HF_ENDPOINT=f"http://127.0.0.1:{HUB_PORT}",
    HF_HOME=_HOME,
    HF_HUB_CACHE=os.path.join(_HOME, "hub"),
    HF_DATASETS_CACHE=os.path.join(_HOME, "datasets"),
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_XET="1",
    TOKENIZERS_PARALLELISM="false",
)
for _name in ("HF_TOKEN", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
    os.environ.pop(_name, None)

import json  # noqa: E402
import runpy  # noqa: E402
import shutil  # noqa: E402
import sys  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from pathlib import Path  # noqa: E402
from types import SimpleNamespace  # noqa: E402

import datasets.config  # noqa: E402
import huggingface_hub.utils._http  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from huggingface_hub import constants  # noqa: E402
from transformers.utils import logging  # noqa: E402

from tests.hub_server import HubServer  # noqa: E402

ROOT = Path(__file__).parents[1]
TOKEN = "hf_" + "canary" * 5  # of the user "me", who writes to namespace "me"


def pytest_unconfigure() -> None:
    shutil.rmtree(_HOME, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files whose tests start processes come first: with one of them last, the other workers have nothing to do."""
    items.sort(key=lambda item: "invariants" not in item.path.parts)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def hub():
    """A Hub at the endpoint that all clients know, with one user."""
    with HubServer(HUB_PORT) as server:
        server.add_user("me", TOKEN)
        yield server
    assert server.leaks == [], "the storage host was shown a token"


@pytest.fixture
def hub_here(hub, tmp_path, monkeypatch):
    """`hub`, for the clients in this process: online, with the user's token and empty caches, without waits."""
    home = tmp_path / "hf_home"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(home / "datasets"))
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", str(home / "datasets" / "downloads"))
    monkeypatch.setattr(datasets.config, "EXTRACTED_DATASETS_PATH", str(home / "datasets" / "extracted"))
    monkeypatch.setattr(datasets.config, "USE_PARQUET_EXPORT", False)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    clock = huggingface_hub.utils._http.time
    no_waits = SimpleNamespace(**{n: getattr(clock, n) for n in dir(clock)} | {"sleep": lambda seconds: None})
    monkeypatch.setattr(huggingface_hub.utils._http, "time", no_waits)
    return hub


@pytest.fixture
def hub_env(hub, tmp_path):
    """Environment of another process: online at the hub, with the user's token and an empty home."""
    dropped = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "PYTHONPATH")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return kept | {"HF_HOME": str(tmp_path / "hf_home_of_a_process"), "HF_TOKEN": TOKEN}


@dataclass
class Done:
    """How a script ended and what it said."""

    code: int
    stdout: str
    stderr: str


@pytest.fixture
def script(tmp_path, monkeypatch, capsys):
    def run(name, recipe, *overrides):
        path = tmp_path / "recipe.json"
        if recipe is not None:
            path.write_text(recipe if isinstance(recipe, str) else json.dumps(recipe))
        first = [] if recipe is None else [str(path)]
        monkeypatch.setattr(sys, "argv", [name, *first, *overrides])
        monkeypatch.chdir(tmp_path)
        logging.set_verbosity_error()
        code = 0
        try:
            runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        return Done(code, *capsys.readouterr())

    return run
