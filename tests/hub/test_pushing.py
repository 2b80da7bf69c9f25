"""What is staged of a run and how it gets to the Hub: one commit or none, whatever the Hub does meanwhile."""

import json
import logging
import shlex
import zlib
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageClassification,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    DeiTImageProcessor,
)

from hf_ihb.errors import HubPushError, RecipeError
from hf_ihb.hub import (
    Patience,
    again,
    check_push,
    ensure_repo,
    push_run,
    push_staged,
    render_folder,
    run_card,
    stage_run,
)
from hf_ihb.redaction import find_leaks, machine_folders
from tests.conftest import TOKEN
from tests.model_card.records import records
from tests.test_redaction import chunk

REPO = "me/student"
PLOTS = ("attention_distance", "cka_linear", "confusion_matrix")
PNG = b"\x89PNG\r\n\x1a\n" + chunk(b"IEND", b"")
CREATE, COMMIT, CARD, INFO = "/api/repos/create", "/commit/main", "/api/validate-yaml", f"/api/models/{REPO}\\?"


def make_run(folder):
    """A finished run with a tiny student, made in `folder`, with everything beside it that must not leave."""
    (folder / "plots").mkdir(parents=True)
    labels = {"id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}}
    shape = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = DeiTConfig(**shape, **labels, image_size=8, patch_size=4)
    torch.manual_seed(0)
    DeiTForImageClassificationWithTeacher(config).save_pretrained(folder)
    DeiTImageProcessor(size={"height": 8, "width": 8}, do_center_crop=False).save_pretrained(folder)
    files = records()
    files["recipe.json"]["keys"] |= {"output_dir": str(folder), "teacher_model": str(folder.parent / "teacher")}
    files["recipe.json"]["teacher"] = {"name": str(folder.parent / "teacher"), "revision": None}
    for name in ("metrics.json", "analysis.json"):
        files[name]["model"]["name"] = str(folder)
        files[name]["teacher"] |= files["recipe.json"]["teacher"]
    for name in ("recipe.json", "training_history.json", "evaluation.json", "metrics.json", "analysis.json"):
        (folder / name).write_text(json.dumps(files[name]))
    for name in PLOTS:
        (folder / "plots" / f"{name}.png").write_bytes(PNG)
    return folder


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "path-canary" / "student")


@pytest.fixture
def waits():
    return []


@pytest.fixture
def push(hub_here, run, waits):
    """Pushes the run, without waiting."""
    return lambda repo_id=REPO, **options: push_run(run, repo_id, patience=Patience(sleep=waits.append), **options)


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def made(hub, revision="main"):
    """Commits beside the one that a repo begins with."""
    return len(hub.history(REPO, revision)) - 1


def assert_holds(hub, staged, revision="main"):
    held = {name: content for name, content in hub.files(REPO, revision).items() if name != ".gitattributes"}
    assert held == {str(p.relative_to(staged)): p.read_bytes() for p in staged.rglob("*") if p.is_file()}


# ---- What is staged ----


def test_named_files_and_nothing_else_are_staged(run, tmp_path):
    for path in (
        "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "distillation/heads.safetensors", "x.py",
        "pytorch_model.bin", ".env", "plots/mine.png", "checkpoint-7/model.safetensors", "hub/README.md", "notes.json",
        "model.safetensors.bak", "tokenizer.json", "README.md", "trainer_state.json", "comparison.json", "runs/events",
    ):  # fmt: skip
        (run / path).parent.mkdir(exist_ok=True)
        (run / path).write_bytes(b"canary")
    expected = {
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "recipe.json",
        "analysis.json",
    }
    expected |= {"training_history.json", "evaluation.json", "metrics.json"} | {f"plots/{name}.png" for name in PLOTS}
    names = stage_run(run, tmp_path / "staged", repo_id=REPO)
    assert names == sorted(expected)
    staged = {str(p.relative_to(tmp_path / "staged")): p for p in (tmp_path / "staged").rglob("*") if p.is_file()}
    assert staged.keys() == expected
    assert not any(path.read_bytes() == b"canary" for path in staged.values())
    for name in ("model.safetensors", "config.json", "preprocessor_config.json", "evaluation.json"):
        assert staged[name].read_bytes() == (run / name).read_bytes()
    assert REPO in staged["README.md"].read_text()
    assert json.loads(staged["metrics.json"].read_text())["model"]["name"] == REPO
    assert json.loads(staged["recipe.json"].read_text())["keys"]["teacher_model"] == "local:teacher"


def test_the_license_and_other_options_reach_the_card(run, tmp_path):
    stage_run(run, tmp_path / "staged", repo_id=None, license="cc0-1.0", card={"tags": ["mine"]})
    card = ModelCard.load(tmp_path / "staged" / "README.md")
    assert card.data.license == "cc0-1.0"
    assert "mine" in card.data.tags


def test_a_checkpoint_is_staged_without_the_evidence_of_other_weights(run, tmp_path):
    average = run / "checkpoint-7" / "average"
    average.mkdir(parents=True)
    tensors = {name: tensor + 1 for name, tensor in load_file(run / "model.safetensors").items()}
    save_file(tensors, average / "model.safetensors", metadata={"format": "pt"})
    (average / "config.json").write_bytes((run / "config.json").read_bytes())
    (run / "preprocessor_config.json").rename(run / "checkpoint-7" / "preprocessor_config.json")
    names = stage_run(run, tmp_path / "staged", repo_id=REPO, weights=average)
    student = ["config.json", "model.safetensors", "preprocessor_config.json"]
    assert names == ["README.md", *student, "recipe.json", "training_history.json"]
    found = load_file(tmp_path / "staged" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_shards_and_code_that_are_named_are_staged(run, tmp_path):
    tensors = load_file(run / "model.safetensors")
    (run / "model.safetensors").unlink()
    shards = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(shards.values()):
        save_file({n: tensors[n] for n in tensors if shards[n] == file}, run / file, metadata={"format": "pt"})
    (run / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    edit(run / "config.json", lambda c: c.update(auto_map={"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}))
    (run / "mine.py").write_text("x = 1")
    (run / "other.py").write_text("x = 1")
    names = stage_run(run, tmp_path / "staged", repo_id=REPO)
    assert {*shards.values(), "model.safetensors.index.json", "mine.py"} <= set(names)
    assert "other.py" not in names


@pytest.mark.parametrize("target", ["../../secret.json", "/etc/hostname", "checkpoint-7/optimizer.pt", "nowhere"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "metrics.json", "plots/cka_linear.png", "plots"])
def test_no_link_is_followed(run, tmp_path, name, target):
    (run.parent.parent / "secret.json").write_text("{}")
    (run / "checkpoint-7").mkdir()
    (run / "checkpoint-7" / "optimizer.pt").write_bytes(b"canary")
    path = run / name
    path.rename(run.parent / "moved")
    path.symlink_to(run.parent / "moved" if name == "plots" else target)
    with pytest.raises(HubPushError, match=r"expected a file of the run itself, found a link"):
        stage_run(run, tmp_path / "staged", repo_id=REPO)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x", ".env", "optimizer.pt", "a/b.safetensors", "", None, 3])
def test_an_index_names_shards_alone(run, tmp_path, name):
    (run / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(HubPushError, match=r"index\.json: expected shards such as"):
        stage_run(run, tmp_path / "staged", repo_id=REPO)


@pytest.mark.parametrize("name", ["../x.Model", "/etc/x.Model", "other/repo--mine.Model", ".env", "a.b.C", "mine", 3])
def test_a_config_names_modules_alone(run, tmp_path, name):
    (run.parent / "x.py").write_text("x = 1")
    edit(run / "config.json", lambda config: config.update(auto_map={"AutoModel": name}))
    with pytest.raises(HubPushError, match=r"key 'auto_map': expected module\.Class"):
        stage_run(run, tmp_path / "staged", repo_id=REPO)


@pytest.mark.parametrize("repo_id", [REPO, None])
def test_the_card_of_the_run_is_the_one_that_is_staged(run, tmp_path, repo_id):
    stage_run(run, tmp_path / "staged", repo_id=repo_id, license="mit")
    text = run_card(run, repo_id=repo_id, license="mit")
    assert (tmp_path / "staged" / "README.md").read_text("utf-8") == text
    assert f"\n# {(repo_id or run.name).rpartition('/')[2]}\n" in text
    assert find_leaks(text.encode(), secrets=[TOKEN], paths=machine_folders(run)) == []


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("model.safetensors", None, "expected a run with its student, found no model.safetensors"),
        ("config.json", None, "found no config.json"),
        ("recipe.json", None, "found no recipe.json"),
        ("recipe.json", b'{"keys": {}}', "recipe.json: expected 'dataset', found keys"),
        ("metrics.json", b"{", "metrics.json: expected a JSON file"),
        ("model.safetensors", b"PK\3\4 pickle", "model.safetensors: expected whole safetensors"),
    ],
)
def test_a_folder_that_is_no_whole_run_is_refused(run, tmp_path, name, content, says):
    (run / name).unlink() if content is None else (run / name).write_bytes(content)
    with pytest.raises(HubPushError, match=says) as error:
        stage_run(run, tmp_path / "staged", repo_id=REPO)
    assert "\n" not in str(error.value)


def test_weights_that_are_cut_short_are_refused(run, tmp_path):
    whole = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(HubPushError, match="expected whole safetensors"):
        stage_run(run, tmp_path / "staged", repo_id=REPO)


def in_safetensors(run, canary):
    save_file(load_file(run / "model.safetensors"), run / "model.safetensors", metadata={"from": canary})


def in_png(run, canary):
    (run / "plots" / "cka_linear.png").write_bytes(PNG[:8] + chunk(b"tEXt", b"Source\0" + canary.encode()) + PNG[8:])


def in_packed_png(run, canary):
    text = chunk(b"zTXt", b"Source\0\0" + zlib.compress(canary.encode()))
    (run / "plots" / "cka_linear.png").write_bytes(PNG[:8] + text + PNG[8:])


def in_code(run, canary):
    edit(run / "config.json", lambda config: config.update(auto_map={"AutoModel": "mine.Model"}))
    (run / "mine.py").write_text(f"# {canary}")


def in_history(run, canary):
    (run / "training_history.json").write_text(json.dumps([{"loss": 1.0, "note": f"x\n{canary}"}]))


@pytest.mark.parametrize("plant", [in_safetensors, in_png, in_packed_png, in_code, in_history])
def test_a_token_anywhere_stops_the_push_and_is_not_shown(push, run, hub_here, plant):
    plant(run, TOKEN)
    with pytest.raises(HubPushError, match=r"expected nothing of this machine, found a secret") as error:
        push()
    assert TOKEN not in str(error.value)
    assert not hub_here.requests


@pytest.mark.parametrize("plant", [in_safetensors, in_png, in_packed_png, in_code])
def test_a_path_where_it_cannot_be_replaced_stops_the_push(push, run, hub_here, plant):
    plant(run, str(run))
    with pytest.raises(HubPushError, match=r"found the path of a folder of this machine"):
        push()
    assert not hub_here.requests


def test_a_given_token_is_looked_for(run, tmp_path):
    in_history(run, "opensesame")
    stage_run(run, tmp_path / "one", repo_id=REPO)
    with pytest.raises(HubPushError, match="found a secret"):
        stage_run(run, tmp_path / "two", repo_id=REPO, token="opensesame")


def test_no_canary_leaves(push, run, hub_here, monkeypatch, capfd, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("HOME", str(run.parents[1]))
    monkeypatch.chdir(run)
    (run / "training_args.bin").write_text(TOKEN)
    (run / "checkpoint-3").mkdir()
    (run / "checkpoint-3" / "config.json").write_text(f"{TOKEN} {run}")

    def plant(recipe):
        recipe["keys"] |= {
            "logging_dir": str(run),
            "optim_args": f"cache={run}",
            "run_name": str(run),
            "hub_token": TOKEN,
        }
        recipe["recipe"] = str(run / "recipes" / "cka.json")
        recipe["keys"]["baseline_model"] = "~/path-canary/ce"

    edit(run / "recipe.json", plant)
    hub_here.fail("POST", CREATE)
    hub_here.fail("POST", COMMIT, 429, headers={"Retry-After": "1"})
    push()
    sent = b"".join(r.body + r.path.encode() for r in hub_here.requests)
    sent += b"".join(hub_here.files(REPO).values()) + b"".join(hub_here.stored.values())
    said = "".join(capfd.readouterr()) + caplog.text
    for canary in (TOKEN, "path-canary"):
        assert canary.encode() not in sent
        assert canary not in said
    for request in hub_here.requests:
        shown = {name for name, value in request.headers.items() if TOKEN in value}
        assert shown <= ({"authorization"} if request.host == "hub" else set())


# ---- Rendering into a folder ----


def test_an_earlier_rendering_is_replaced_and_nothing_else_is(run, tmp_path):
    target = run / "hub"
    render_folder(run, target, repo_id=None)
    (run / "plots" / "cka_linear.png").unlink()
    render_folder(run, target, repo_id=REPO)
    assert not (target / "plots" / "cka_linear.png").exists()
    assert not list(run.glob(".hub-*"))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for other in (run, run.parent, target / "README.md", run / "plots"):
        with pytest.raises(RecipeError, match="key 'output_dir': expected"):
            render_folder(run, other, repo_id=None)
    (target / "mine.txt").write_text("x")
    with pytest.raises(RecipeError, match="with other content"):
        render_folder(run, target, repo_id=None)
    (target / "mine.txt").unlink()
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_rendering_that_fails_leaves_the_earlier_one(run):
    render_folder(run, run / "hub", repo_id=None)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    in_history(run, "hf_" + "a1" * 10)
    before[run / "training_history.json"] = (run / "training_history.json").read_bytes()
    with pytest.raises(HubPushError):
        render_folder(run, run / "hub", repo_id=None)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


# ---- Pushing ----


def test_a_push_is_one_commit_of_exactly_what_was_staged(push, run, hub_here, tmp_path):
    stage_run(run, tmp_path / "staged", repo_id=REPO)
    commit = push(commit_message="first")
    assert made(hub_here) == 1
    assert commit.oid == hub_here.history(REPO)[0]
    assert commit.commit_url == f"{hub_here.endpoint}/{REPO}/commit/{commit.oid}"
    assert hub_here.repos["model", REPO].commits[commit.oid].message == "first"
    assert_holds(hub_here, tmp_path / "staged")
    card = ModelCard.load(REPO)
    assert card.data.library_name == "transformers"
    assert card.data.eval_results


def test_what_was_pushed_loads_with_the_same_logits(push, run, hub_here):
    push()
    pixels = torch.rand(3, 3, 8, 8)
    with torch.no_grad():
        found = AutoModelForImageClassification.from_pretrained(REPO)(pixels).logits
        expected = DeiTForImageClassificationWithTeacher.from_pretrained(run)(pixels).logits
    assert torch.equal(found, expected)


def test_a_second_push_changes_nothing(push, hub_here):
    first = push()
    hub_here.requests.clear()
    second = push()
    assert (second.oid, made(hub_here)) == (first.oid, 1)
    assert "already" in second.commit_description
    assert not first.commit_description
    assert not any(request.method == "POST" and request.path != CREATE for request in hub_here.requests)


def test_a_later_push_removes_what_is_stale_and_keeps_what_is_others(push, run, hub_here, tmp_path):
    edit(run / "config.json", lambda config: config.update(auto_map={"AutoModel": "mine.Model"}))
    (run / "mine.py").write_text("x = 1")
    push()
    hub_here.commit(REPO, {"LICENSE": b"mit", "notes.txt": b"x", "plots/others.png": b"x", "others.py": b"x"})
    api = HfApi(token=TOKEN)
    api.create_tag(REPO, tag="v1")
    edit(run / "config.json", lambda config: config.pop("auto_map"))
    for name in ("plots/confusion_matrix.png", "analysis.json"):
        (run / name).unlink()
    edit(run / "evaluation.json", lambda content: content["test"].update(accuracy=0.4))
    stage_run(run, tmp_path / "staged", repo_id=REPO)
    for name in ("LICENSE", "notes.txt", "plots/others.png", "others.py"):
        (tmp_path / "staged" / name).write_bytes(hub_here.files(REPO)[name])
    tagged, before = hub_here.files(REPO, "v1"), made(hub_here)
    push()
    assert made(hub_here) == before + 1
    assert_holds(hub_here, tmp_path / "staged")
    assert hub_here.files(REPO, "v1") == tagged


def test_weights_in_another_layout_do_not_stay_beside_the_new_ones(push, hub_here):
    stale = {"model-00001-of-00002.safetensors": b"x", "model.safetensors.index.json": b"{}"}
    hub_here.add_repo(REPO, {**stale, "plots/cka_rbf.png": b"x", "pytorch_model.bin": b"x"})
    push(overwrite=True)
    assert not stale.keys() & hub_here.files(REPO).keys()
    assert {"plots/cka_rbf.png", "pytorch_model.bin"} <= hub_here.files(REPO).keys()  # of somebody else's model


@pytest.mark.parametrize("private", [True, False, None])
def test_a_new_repo_is_as_private_as_asked_and_an_old_one_stays_as_it_is(push, run, hub_here, private):
    push(private=private)
    assert hub_here.repos["model", REPO].private is bool(private)
    push(private=not private)
    assert hub_here.repos["model", REPO].private is bool(private)


def test_a_branch_is_made_where_it_is_missing(push, run, hub_here, tmp_path):
    stage_run(run, tmp_path / "staged", repo_id=REPO)
    push(revision="trial/1")
    assert made(hub_here) == 0
    assert_holds(hub_here, tmp_path / "staged", "trial/1")
    push(revision="trial/1")
    assert made(hub_here, "trial/1") == 1


def test_a_pull_request_leaves_the_main_branch_alone_and_is_not_opened_twice(push, run, hub_here, tmp_path):
    stage_run(run, tmp_path / "staged", repo_id=REPO)
    first = push(create_pr=True)
    assert first.pr_url == f"{hub_here.endpoint}/{REPO}/discussions/1"
    assert made(hub_here) == 0
    assert_holds(hub_here, tmp_path / "staged", "refs/pr/1")
    assert push(create_pr=True).pr_url == first.pr_url
    assert len(hub_here.repos["model", REPO].requests) == 1
    hub_here.repos["model", REPO].requests[1]["status"] = "closed"
    assert push(create_pr=True).pr_num == 2


def test_a_pull_request_needs_no_right_to_write(push, hub_here):
    hub_here.add_repo("them/student")
    with pytest.raises(HubPushError, match="the Hub answered 403"):
        push("them/student")
    push("them/student", create_pr=True)
    assert len(hub_here.history("them/student")) == 1
    assert "model.safetensors" in hub_here.files("them/student", "refs/pr/1")


def test_a_repo_of_something_else_is_not_overwritten_unless_asked(push, hub_here):
    hub_here.add_repo(REPO, {"README.md": b"theirs", "config.json": b"{}", "recipe.json": b'{"flour": 500}'})
    before = hub_here.files(REPO)
    with pytest.raises(HubPushError, match=r"found other files, config\.json first; .* --overwrite") as error:
        push()
    assert (made(hub_here), hub_here.files(REPO)) == (0, before)
    assert "--overwrite" not in str(error.value).partition("to push it again")[2]
    push(overwrite=True)
    assert b"theirs" not in hub_here.files(REPO)["README.md"]


@pytest.mark.parametrize("files", [{}, {"README.md": b"hello"}, {"LICENSE": b"x", "LICENSE.md": b"x"}])
def test_a_repo_with_a_card_alone_is_new(push, hub_here, files):
    hub_here.add_repo(REPO, files)
    push()
    assert made(hub_here) == 1


def test_a_name_alone_is_in_the_users_namespace(push, hub_here):
    push("student")
    assert REPO in hub_here.files(REPO)["README.md"].decode()
    assert json.loads(hub_here.files(REPO)["metrics.json"])["model"]["name"] == REPO


# ---- Refusals ----


@pytest.mark.parametrize(
    ("token", "repo_id", "says"),
    [
        ("hf_" + "nobody" * 5, REPO, r"the Hub answered 401 .*token sent: yes"),
        (False, REPO, r"the Hub answered 401 .*token sent: no"),
        ("hf_" + "reader" * 5, REPO, r"the Hub answered 403 .*token sent: yes"),
        ("hf_" + "reader" * 5, "me/new", r"the Hub answered 403"),
        (None, "them/student", r"the Hub answered 403"),
        (None, "nobody/student", r"the Hub answered 403"),
        (None, "them/closed", r"the Hub answered 40[34]"),
    ],
)
def test_no_right_to_write_is_known_before_training(hub_here, waits, token, repo_id, says):
    hub_here.add_user("reader", "hf_" + "reader" * 5, ())
    hub_here.add_repo(REPO)
    hub_here.add_repo("them/student")
    hub_here.add_repo("them/closed", private=True)
    with pytest.raises(HubPushError, match=says) as error:
        ensure_repo(repo_id, token=token, patience=Patience(sleep=waits.append))
    assert repo_id in str(error.value)
    assert "\n" not in str(error.value)
    assert not any(secret in str(error.value) for secret in (TOKEN, "nobody" * 5, "reader" * 5))
    assert not waits


def test_a_repo_that_may_be_written_is_named_in_full(hub_here):
    assert ensure_repo("student") == REPO == ensure_repo(REPO)


def test_offline_is_said_in_one_line_and_at_once(hub_here, waits, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubPushError, match="HF_HUB_OFFLINE"):
        ensure_repo(REPO, patience=Patience(sleep=waits.append))
    assert not waits
    assert not hub_here.requests


def test_no_network_is_said_in_one_line(waits, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(HubPushError, match=r"no connection to http://127\.0\.0\.1:\d+ \(ConnectError\)") as error:
        ensure_repo(REPO, patience=Patience(sleep=waits.append))  # nobody listens: there is no `hub` here
    assert "\n" not in str(error.value)
    assert waits == [1, 2, 4, 8, 16]


@pytest.mark.parametrize("repo_id", ["a/b/c", "a b", "", "../x", "me/", "x--y", "x" * 97])
def test_what_is_no_id_is_a_mistake_of_the_command_line(repo_id):
    with pytest.raises(RecipeError, match="key 'hub_model_id': expected namespace/name"):
        check_push(repo_id)


def test_a_pull_request_and_a_branch_contradict(push):
    with pytest.raises(RecipeError, match="keys 'create_pr' and 'revision' contradict"):
        push(create_pr=True, revision="x")


def test_a_card_that_the_hub_refuses_is_one_line(push, hub_here, waits):
    hub_here.fail(
        "POST", CARD, 400, body=json.dumps({"errors": [{"message": "bad\nlicense"}], "warnings": []}).encode()
    )
    with pytest.raises(HubPushError, match=r"the Hub refused the card: .* bad license;") as error:
        push()
    assert "\n" not in str(error.value)
    assert not waits


# ---- Troubles ----


@pytest.mark.parametrize("path", [CREATE, CARD, COMMIT])
@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_trouble_that_passes_is_waited_for(push, hub_here, waits, path, status):
    hub_here.fail("POST", path, status, times=2)
    push()
    assert made(hub_here) == 1
    assert waits == [1, 2]


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", INFO), ("GET", "/auth-check/write"), ("POST", COMMIT), ("POST", CREATE), ("POST", CARD)],
)
@pytest.mark.parametrize("answered", [False, True])
def test_a_connection_that_breaks_off_is_made_again(push, hub_here, waits, method, path, answered):
    hub_here.drop(method, path, answered=answered)
    push()
    assert made(hub_here) == 1
    assert waits == [1]


def test_a_commit_that_landed_is_not_made_again(push, run, hub_here, tmp_path):
    push()
    (run / "plots" / "cka_linear.png").unlink()
    edit(run / "evaluation.json", lambda content: content["test"].update(accuracy=0.4))
    stage_run(run, tmp_path / "staged", repo_id=REPO)
    lost = hub_here.drop("POST", COMMIT, answered=True)
    commit = push()
    assert (lost.fired, made(hub_here)) == (1, 2)
    assert commit.oid == hub_here.history(REPO)[0]
    assert_holds(hub_here, tmp_path / "staged")


def test_a_pull_request_that_landed_is_not_opened_again(push, hub_here):
    lost = hub_here.drop("POST", COMMIT, answered=True)
    assert push(create_pr=True).pr_num == 1
    assert (lost.fired, len(hub_here.repos["model", REPO].requests)) == (1, 1)


def test_an_upload_that_breaks_off_is_gone_on_with(push, run, hub_here, tmp_path):
    stage_run(run, tmp_path / "staged", repo_id=REPO)
    lost = hub_here.drop("PUT", "/upload/", times=2)
    push()
    assert (lost.fired, made(hub_here)) == (2, 1)
    assert_holds(hub_here, tmp_path / "staged")


@pytest.mark.parametrize(
    ("status", "headers", "expected"),
    [
        (429, {"Retry-After": "7"}, [7]),
        (503, {"Retry-After": "7"}, [7]),
        (429, {"RateLimit": '"api";r=0;t=55'}, [55]),
        (429, {"RateLimit": '"api";r=3;t=55'}, [1]),
        (429, {"Retry-After": "soon"}, [1]),
    ],
)
def test_the_hub_is_waited_for_as_long_as_it_asks(push, hub_here, waits, status, headers, expected):
    hub_here.fail("POST", COMMIT, status, headers=headers)
    push()
    assert waits == expected


def test_the_hub_is_not_waited_for_without_end(push, hub_here, waits):
    fault = hub_here.fail("POST", COMMIT, 429, times=1000, headers={"Retry-After": "301"})
    with pytest.raises(HubPushError, match="rate limit, Retry-After 301 s"):
        push()
    assert (fault.fired, waits) == (1, [])


def test_a_page_of_a_gateway_is_a_trouble_too(push, hub_here, waits):
    hub_here.fail("POST", CARD, 502, body=b"<html>Bad gateway</html>")
    push()
    assert waits == [1]


@pytest.mark.parametrize("path", [CREATE, COMMIT])
def test_a_trouble_that_stays_ends_with_the_command_and_keeps_the_run(push, run, hub_here, waits, path):
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    fault = hub_here.fail("POST", path, 503, times=1000)
    with pytest.raises(HubPushError, match="the Hub answered 503") as error:
        push()
    assert (fault.fired, waits) == (6, [1, 2, 4, 8, 16])
    assert str(error.value).endswith(f"python scripts/publish.py {shlex.quote(str(run))} --hub_model_id {REPO}")
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


def test_what_the_client_repeats_is_not_repeated_again(push, hub_here, waits):
    fault = hub_here.fail("POST", "/preupload/", 503, times=1000)
    with pytest.raises(HubPushError, match="the Hub answered 503"):
        push()
    assert (fault.fired, waits) == (6, [])


def test_a_busy_repo_is_waited_for(push, hub_here, waits):
    hub_here.fail("POST", COMMIT, 409)
    push()
    assert (made(hub_here), waits) == (1, [1])


def test_a_head_that_moved_is_not_written_over(push, run, hub_here, monkeypatch):
    push()
    edit(run / "evaluation.json", lambda content: content["test"].update(accuracy=0.4))
    create_commit = HfApi.create_commit

    def after_somebody_else(self, *args, **kwargs):
        if made(hub_here) == 1:
            hub_here.commit(REPO, {"config.json": b"theirs"})
        return create_commit(self, *args, **kwargs)

    monkeypatch.setattr(HfApi, "create_commit", after_somebody_else)
    with pytest.raises(HubPushError, match=r"somebody else has pushed meanwhile; look at it, then push again"):
        push()
    assert made(hub_here) == 2
    assert hub_here.files(REPO)["config.json"] == b"theirs"


def test_a_push_that_was_killed_is_gone_on_with(push, run, hub_here, monkeypatch):
    """What was stored before stays stored, and is not sent again."""

    def die(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub._commit_api._prepare_commit_payload", die)
        with pytest.raises(KeyboardInterrupt):
            push()
    assert made(hub_here) == 0
    hub_here.requests.clear()
    push()
    assert made(hub_here) == 1
    assert not any(request.method == "PUT" for request in hub_here.requests)


def test_a_folder_can_be_pushed_by_itself(run, hub_here, tmp_path):
    stage_run(run, tmp_path / "staged", repo_id=REPO)
    push_staged(tmp_path / "staged", REPO, commit_message="x", token=TOKEN)
    assert_holds(hub_here, tmp_path / "staged")


def test_the_command_says_all_that_was_asked():
    command = again(
        Path("out puts/x"), REPO, private=True, revision="a b", create_pr=False, overwrite=True, license=None
    )
    assert shlex.split(command) == [
        "python", "scripts/publish.py", "out puts/x", "--hub_model_id", REPO, "--private", "true", "--revision", "a b",
        "--overwrite", "true",
    ]  # fmt: skip
    assert shlex.split(again(Path("x"), REPO, private=False, create_pr=True))[5:] == [
        "--private",
        "false",
        "--create_pr",
        "true",
    ]
