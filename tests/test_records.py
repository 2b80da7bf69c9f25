import json
import math
import platform
import subprocess
from importlib.metadata import PackageNotFoundError

import pytest
import torch

from hf_ihb import records
from hf_ihb.errors import DataError, RecipeError
from hf_ihb.records import distinct_names, output_folder, read_json, write_json

CONTENT = {
    "empty": {},
    "row": [1, 2.5, -3e-9],
    "matrix": [[float(i * j) for i in range(12)] for j in range(12)],
    "image": [[[i, j, 255] for i in range(8)] for j in range(8)],
    "nested": [{"name": 'a "quoted" name\n', "values": [None, True]}],
}


def test_what_is_written_is_read_again(tmp_path):
    write_json(tmp_path / "a.json", CONTENT)
    assert read_json(tmp_path / "a.json") == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_rows_of_numbers_and_pixels_take_one_line_each(tmp_path):
    write_json(tmp_path / "a.json", {name: CONTENT[name] for name in ("matrix", "image")})
    assert len((tmp_path / "a.json").read_text("utf-8").splitlines()) == 2 + (12 + 2) + (8 + 2)


def test_numbers_json_does_not_know_become_null(tmp_path):
    write_json(tmp_path / "a.json", {"a": math.nan, "b": [math.inf, (1.0, -math.inf)]})
    assert read_json(tmp_path / "a.json") == {"a": None, "b": [None, [1.0, None]]}


@pytest.mark.parametrize("content", [None, "{", "[1]", b"\xff"])
def test_a_file_that_is_no_json_object_is_named(content, tmp_path):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=r"a\.json: expected a JSON"):
        read_json(path)


def test_a_write_that_breaks_off_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})

    def full_disk(self, text, *args):
        self.write_bytes(text.encode()[:3])
        raise OSError("No space left on device")

    monkeypatch.setattr(type(path), "write_text", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"new": 2})
    assert json.loads(path.read_bytes()) == {"old": 1}


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["out/a/cka"], ["cka"]),
        (["out/cka", "out/gram"], ["cka", "gram"]),
        (["out/a/cka", "out/b/cka", "out/b/gram"], ["a/cka", "b/cka", "b/gram"]),
        (["cka", "out/cka"], ["cka", "out/cka"]),
    ],
)
def test_names_are_as_short_as_they_can_be_told_apart(names, short):
    assert distinct_names(names) == short


def test_the_same_model_twice_is_refused():
    with pytest.raises(DataError, match="found a/b twice"):
        distinct_names(["a/b", "c", "a/b"])


def test_results_go_beside_a_folder_and_to_outputs_for_the_hub(tmp_path):
    assert output_folder(None, str(tmp_path)) == tmp_path
    assert str(output_folder(None, "someone/deit-tiny-cka")) == "outputs/deit-tiny-cka"
    assert str(output_folder("x", str(tmp_path))) == "x"


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    for name in ("file", "file/below"):
        with pytest.raises(
            RecipeError, match=r"key 'output_dir': expected a folder that can be written to, found .*file$"
        ):
            output_folder(str(tmp_path / name), "model")


def test_an_environment_is_told_without_git_and_without_the_package(monkeypatch, tmp_path):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(records, "version", missing)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = records.environment(torch.device("cpu"))
    assert found["commit"] is None
    assert found["versions"]["hf_ihb"] is None
    assert found["versions"]["python"] == platform.python_version()


def test_the_commit_of_a_checkout_around_installed_code_is_not_its_own(monkeypatch, tmp_path):
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-C", str(tmp_path))
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    for path, expected in (("hf_ihb/records.py", head), ("venv/site-packages/hf_ihb/records.py", None)):
        (tmp_path / path).parent.mkdir(parents=True)
        monkeypatch.setattr(records, "__file__", str(tmp_path / path))
        assert records.environment(torch.device("cpu"))["commit"] == expected
