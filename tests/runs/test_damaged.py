"""What a person sees of scripts that read a run whose files are damaged, foreign or cut short."""

import json
import shutil

import pytest

from tests.runs.test_folder import FOREIGN
from tests.test_scripts import QUICK, STUDENT

READERS = {
    "summarize.py": (["run"], ("recipe.json", "evaluation.json")),
    "publish.py": (["run", "--dry_run"], ("config.json", *(name for name in FOREIGN if name != "comparison.json"))),
    "evaluate_model.py": (["run", "--device", "cpu"], ("recipe.json",)),
    "analyze.py": (["run", "--metrics", "cka", *QUICK], ("recipe.json", "analysis.json")),
    "analyze.py --compare": (["--compare", "run", "--metrics", "cka", *QUICK], ("analysis.json", "comparison.json")),
}
DAMAGES = ("cut", "kind", "foreign")
CASES = [(name, file, damage) for name, (_, files) in READERS.items() for file in files for damage in DAMAGES]
CASES.remove(("publish.py", "config.json", "foreign"))  # any object may be the config of some model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tmp_path_factory.mktemp("made")


@pytest.fixture
def run(script, tmp_path, made):
    """A finished, evaluated and analysed run beside a comparison; made once."""
    if not (made / "run").exists():
        assert script("train.py", STUDENT, "--output_dir", "run").code == 0
        for name in ("evaluate_model.py", "analyze.py", "analyze.py --compare"):
            assert script(name.split()[0], None, *READERS[name][0]).code == 0
        for name in ("run", "outputs"):
            shutil.copytree(tmp_path / name, made / name)
    for name in ("run", "outputs"):
        shutil.copytree(made / name, tmp_path / name, dirs_exist_ok=True)
    return tmp_path / "run"


@pytest.mark.parametrize(("name", "file", "damage"), CASES)
def test_a_damaged_file_is_one_line_that_names_it(name, file, damage, script, run, tmp_path):
    path = run / file if file != "comparison.json" else tmp_path / "outputs" / "comparison" / file
    content = path.read_bytes()
    wrong = {
        "cut": content[: len(content) // 2],
        "kind": b"{}" if file == "training_history.json" else b"[]",
        "foreign": json.dumps(FOREIGN.get(file)).encode(),
    }
    path.write_bytes(wrong[damage])
    if file == "analysis.json" and "--compare" in name:  # where it is known already, a model's own file is not needed
        (tmp_path / "outputs" / "comparison" / "comparison.json").unlink()
    done = script(name.split()[0], None, *READERS[name][0])
    lines = done.stderr.strip().splitlines()
    assert done.code in (3, 5), done.stderr
    assert lines[-1].startswith("error: ")
    assert file in lines[-1]
    assert "Traceback" not in done.stderr
    assert path.read_bytes() == wrong[damage]
