import platform
import subprocess
from importlib.metadata import PackageNotFoundError

import torch

from hf_ihb.runs import environment as module
from hf_ihb.runs.environment import environment


def test_an_environment_is_told_without_git_and_without_the_package(monkeypatch, tmp_path):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(module, "version", missing)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = environment(torch.device("cpu"))
    assert found["commit"] is None
    assert found["versions"]["hf_ihb"] is None
    assert found["versions"]["python"] == platform.python_version()


def test_the_commit_of_a_checkout_around_installed_code_is_not_its_own(monkeypatch, tmp_path):
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-C", str(tmp_path))
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    for path, expected in (
        ("hf_ihb/runs/environment.py", head),
        ("venv/site-packages/hf_ihb/runs/environment.py", None),
    ):
        (tmp_path / path).parent.mkdir(parents=True)
        monkeypatch.setattr(module, "__file__", str(tmp_path / path))
        assert environment(torch.device("cpu"))["commit"] == expected
