"""What a person sees of publish.py: what would go, what went, and one line for a mistake."""

import pytest

from tests.test_scripts import STUDENT

REPO = "me/student"


@pytest.fixture
def publish(script):
    """A finished run in the folder `run`, and the script that publishes it."""
    assert script("train.py", STUDENT, "--output_dir", "run").code == 0
    return lambda *words: script("publish.py", None, *words)


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_dry_run_needs_no_hub_and_shows_all_that_would_go(publish, tmp_path):
    before = contents(tmp_path / "run")
    done = publish("run", "--dry_run")
    assert done.code == 0, done.stderr
    rendered = contents(tmp_path / "run" / "hub")
    assert {"README.md", "config.json", "model.safetensors", "recipe.json"} <= rendered.keys()
    for name, content in rendered.items():
        assert f"{len(content):,} bytes  {name}" in done.stdout
    assert {k: v for k, v in contents(tmp_path / "run").items() if not k.startswith("hub/")} == before


def test_what_is_pushed_is_what_a_dry_run_showed(publish, hub_here, tmp_path):
    assert publish("run", "--dry_run", "--hub_model_id", REPO).code == 0
    done = publish("run", "--hub_model_id", REPO)
    assert done.code == 0, done.stderr
    found = hub_here.files(REPO)
    del found[".gitattributes"]
    assert found == contents(tmp_path / "run" / "hub")
    assert hub_here.history(REPO)[0] in done.stdout
    again = publish("run", "--hub_model_id", REPO)
    assert again.code == 0
    assert len(hub_here.history(REPO)) == 2


def test_a_pull_request_leaves_the_main_branch_and_a_private_repo_is_private(publish, hub_here):
    done = publish("run", "--hub_model_id", REPO, "--private", "--create_pr")
    assert done.code == 0, done.stderr
    assert hub_here.files(REPO).keys() == {".gitattributes"}
    assert "model.safetensors" in hub_here.files(REPO, "refs/pr/1")
    assert hub_here.repos["model", REPO].private
    assert f"{REPO}/discussions/1" in done.stdout


def test_a_license_of_the_command_line_is_the_cards(publish, tmp_path):
    assert publish("run", "--dry_run", "--license", "mit").code == 0
    assert "\nlicense: mit\n" in (tmp_path / "run" / "hub" / "README.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["run"], 2, "hub_model_id"),
        (["run", "--hub_model_id", "a/b/c"], 2, "'hub_model_id': expected namespace/name"),
        (["nowhere", "--dry_run"], 3, "nowhere: expected a finished run"),
        (["run", "--dry_run", "--output_dir", "."], 2, "'output_dir': expected an empty or new folder"),
        (["run", "--hub_model_id", REPO, "--create_pr", "--revision", "b"], 2, "'create_pr' and 'revision' contradict"),
        (["run", "--dry_runs"], 2, "did you mean 'dry_run'?"),
        ([], 2, "expected"),
    ],
)
def test_a_mistake_is_one_line(publish, words, code, says, tmp_path):
    before = contents(tmp_path)
    done = publish(*words)
    assert (done.code, "Traceback" in done.stderr) == (code, False), done.stderr
    assert says in done.stderr.strip().splitlines()[-1]
    assert contents(tmp_path) == before


def test_a_refusal_of_the_hub_ends_with_the_command(publish, hub_here):
    hub_here.add_repo("them/model", {"theirs.txt": b"x"})
    done = publish("run", "--hub_model_id", "them/model")
    assert done.code == 5
    last = done.stderr.strip().splitlines()[-1]
    assert "403" in last
    assert "to push it again: python scripts/publish.py run --hub_model_id them/model" in last
    assert hub_here.files("them/model").keys() == {".gitattributes", "theirs.txt"}
