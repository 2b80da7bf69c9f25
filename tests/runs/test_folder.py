import json

import pytest

from hf_ihb.errors import DataError, RecipeError
from hf_ihb.model_card import PLOTS
from hf_ihb.runs.folder import RECORDS, RunFolder, distinct_names, output_folder

RECIPE = {"keys": {}, "dataset": {}, "teacher": None, "environment": {}}
FOREIGN = {
    "recipe.json": {"flour": 500},
    "training_history.json": ["flour"],
    "evaluation.json": {"flour": 500},
    "metrics.json": {"flour": 500},
    "analysis.json": {"flour": 500},
    "comparison.json": {"cake": {"flour": 500}},
}


@pytest.fixture
def run(tmp_path):
    """The folder of a run with its recipe."""
    path = tmp_path / "run"
    path.mkdir()
    (path / "recipe.json").write_text(json.dumps(RECIPE))
    return RunFolder(path)


def test_every_record_of_a_run_is_tried():
    assert FOREIGN.keys() - {"comparison.json"} == set(RECORDS)


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize(
    "content", [None, b"", b'{"keys": {"a', b"\xff{}", b"3", b"[" * 10**5, "wrong kind", "foreign"]
)
def test_a_file_that_is_not_what_its_name_says_is_one_line_that_names_it(run, name, content):
    if content == "wrong kind":
        content = b"{}" if isinstance(FOREIGN[name], list) else b"[]"
    elif content == "foreign":
        content = json.dumps(FOREIGN[name]).encode()
    (run.path / name).unlink(missing_ok=True)
    if content is not None:
        (run.path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"^\S+/run/{name}: ") as error:
        run.read(name)
    assert "expected" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("recipe.json", RECIPE | {"keys": []}, "key 'keys': expected an object, found list"),
        ("recipe.json", RECIPE | {"teacher": "x"}, "key 'teacher': expected an object or null, found str"),
        ("metrics.json", {"model": {}, "data": {}}, "expected 'heads', found model, data"),
        ("analysis.json", {"model": {}, "data": {}, "cka": 3}, "key 'cka': expected an object or null, found int"),
        ("comparison.json", {"a": {"model": {}}}, "key 'a': expected 'data', found model"),
        ("comparison.json", {"a": 3}, "key 'a': expected an object, found int"),
        ("evaluation.json", {}, "expected 'validation', found nothing"),
    ],
)
def test_what_is_wrong_within_a_file_is_said(run, name, content, says):
    (run.path / name).write_text(json.dumps(content))
    with pytest.raises(DataError, match=f"{name}: {says}$"):
        run.read(name)


def test_a_run_is_known_by_its_record(run, tmp_path):
    assert run.is_ours
    assert not RunFolder(tmp_path).is_ours
    (run.path / "recipe.json").write_text('{"keys": 3, "environment": {}}')
    assert not run.is_ours


def test_a_run_that_is_neither_resumed_nor_replaced_is_kept(run):
    run.check_writable(goes_on=False, replaces=False)  # nothing was saved yet
    (run.path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(RecipeError, match=r"found an earlier run in .*--overwrite_output_dir true"):
        run.check_writable(goes_on=False, replaces=False)
    run.check_writable(goes_on=True, replaces=False)
    run.check_writable(goes_on=False, replaces=True)


def test_a_folder_of_something_else_is_not_written_to(run, tmp_path):
    RunFolder(tmp_path / "new" / "one").check_writable(goes_on=False, replaces=False)
    for path, says in (
        (tmp_path, "with other content"),
        (run.path / "recipe.json", "expected a folder, found the file"),
    ):
        with pytest.raises(RecipeError, match=says):
            RunFolder(path).check_writable(goes_on=False, replaces=True)


def test_clearing_removes_what_a_run_wrote_and_nothing_else(run):
    ours = [*RECORDS, "README.md", *PLOTS, "model.safetensors", "checkpoint-3/x", "distillation/x", "hub/x"]
    others = ["notes.txt", "plots/mine.png", "comparison.json"]
    for name in ours + others:
        (run.path / name).parent.mkdir(exist_ok=True)
        (run.path / name).write_text("x")
    run.clear(PLOTS)
    assert sorted(str(p.relative_to(run.path)) for p in run.path.rglob("*") if p.is_file()) == sorted(others)


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
