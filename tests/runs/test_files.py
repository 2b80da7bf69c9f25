import json
import math

import pytest

from hf_ihb.errors import DataError
from hf_ihb.runs.files import read_json, write_json

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
    with pytest.raises(DataError, match=r"a\.json: expected (a JSON file|an object in JSON), found"):
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
