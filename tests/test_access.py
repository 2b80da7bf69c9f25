"""Reading from the Hub: the commit that is read, and what a refusal says."""

import importlib
import pickle
import socket
from types import SimpleNamespace

import datasets.config
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError, Response

from hf_ihb import access
from hf_ihb.access import explain, fetch_file, pin_revisions, resolve_commit
from hf_ihb.analysis import AnalysisArguments
from hf_ihb.config.data import DataArguments
from hf_ihb.config.model import ModelArguments, TeacherArguments
from hf_ihb.errors import DataError, ModelLoadError
from tests.conftest import TOKEN

KINDS = {"model": ("teacher", ModelLoadError), "dataset": ("data set", DataError)}
NO_REPO, GATED = "no such repo, or a private one and no access", "gated, and access was not granted"
DISABLED = "Access to this resource is disabled."


@pytest.fixture(autouse=True)
def _nothing_confirmed():
    access._confirmed.clear()


@pytest.fixture
def repos(hub_here):
    """Repos of somebody else: open, private, gated."""
    for kind in KINDS:
        hub_here.add_repo("other/open", {"a.json": b"{}"}, kind)
        hub_here.add_repo("other/private", {}, kind, private=True)
        hub_here.add_repo("other/gated", {"a.json": b"{}"}, kind, gated=True)
    return hub_here


def refused(name, revision=None, kind="model"):
    """The line of a refusal, after what holds of all of them."""
    what, error_class = KINDS[kind]
    with pytest.raises(error_class) as error:
        resolve_commit(name, revision, repo_type=kind, what=what)
    line = str(error.value)
    assert line.startswith(f"{what} '{name}': ")
    assert len(line.splitlines()) == 1
    assert "canary" not in line
    return line


def offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


# ---- What the Hub answers ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("token", "name", "revision", "says"),
    [
        (None, "other/none", None, "401 ({NO_REPO}; token sent: no); check the id, or log in with `hf auth login` or"),
        (TOKEN, "other/none", None, "404 ({NO_REPO}; token sent: yes); check the id, or mend the token"),
        (None, "other/private", None, "401 ({NO_REPO}; token sent: no)"),
        (TOKEN, "other/private", None, "404 ({NO_REPO}; token sent: yes)"),
        ("hf_canarynobody", "other/open", None, "401 (the token is not valid; token sent: yes); renew it"),
        (None, "other/open", "v9", "404 (no branch, tag or commit 'v9'; token sent: no); check the revision"),
        (None, "other/open", "0" * 40, f"404 (no branch, tag or commit '{'0' * 40}'"),
        (None, "other/gated", None, "401 ({GATED}; token sent: no); ask for it at {page}, then log in"),
        (TOKEN, "other/gated", None, "403 ({GATED}; token sent: yes); ask for it at {page}"),
        (TOKEN, "other/a/b", None, "expected a folder or a Hub id, found neither"),
        (TOKEN, "../other", None, "expected a folder or a Hub id, found neither"),
    ],
)  # fmt: skip
def test_a_refusal_names_repo_status_and_remedy(repos, monkeypatch, kind, token, name, revision, says):
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    page = f"{repos.endpoint}/{'datasets/' * (kind == 'dataset')}{name}"
    says = says.format(page=page, NO_REPO=NO_REPO, GATED=GATED)
    line = refused(name, revision, kind)
    assert says in line
    assert "the Hub answered" in line or "found neither" in line


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("status", "headers", "says"),
    [
        (403, {"X-Error-Message": f"{TOKEN} may not"}, "403 (no right to this: *** may not; token sent: yes); mend"),
        (403, {"X-Error-Message": DISABLED}, "403 (the repo is disabled; token sent: yes)"),
        (429, {"Retry-After": "17"}, "429 (rate limit, Retry-After 17 s; token sent: yes); wait"),
        (429, {}, "429 (rate limit; token sent: yes)"),
        (500, {}, "500 (the Hub is in trouble; token sent: yes); try again later"),
        (503, {"X-Error-Message": TOKEN}, "503 (the Hub is in trouble; token sent: yes); try again later"),
        (418, {"X-Error-Message": f"no coffee for {TOKEN}"}, "418 (no coffee for ***; token sent: yes)"),
    ],
)  # fmt: skip
def test_a_status_is_said_with_its_meaning(repos, kind, status, headers, says):
    repos.fail(
        "GET", "/api/", status, headers=headers, body=f'{{"error": "{headers.get("X-Error-Message", "")}"}}'.encode()
    )
    assert says in refused("other/open", kind=kind)


def test_whoever_was_granted_access_gets_the_commit(repos):
    repos.repos["model", "other/gated"].granted.add("me")
    assert [resolve_commit("other/gated")] == repos.history("other/gated")
    assert [r.path for r in repos.requests] == ["/api/models/other/gated", "/api/models/other/gated/auth-check"]


def test_a_token_of_the_login_is_never_shown(repos, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    stored = tmp_path / "token"
    stored.write_text("plaincanarytoken\n")  # does not look like a token
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(stored))
    repos.fail("GET", "/api/", 403, headers={"X-Error-Message": "not with plaincanarytoken"})
    assert "no right to this: not with ***" in refused("other/open")
    assert repos.requests[0].headers["authorization"] == "Bearer plaincanarytoken"
    assert explain(OSError("no plaincanarytoken"), "teacher", "me/x") == "teacher 'me/x': no ***"


def test_a_hub_that_is_not_there_is_said_to_be_so(repos, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    assert f"no connection to {endpoint} (ConnectError); check the network" in refused("other/open")


def test_a_connection_that_breaks_off_is_said_to_have(repos):
    repos.drop("GET", "/api/", answered=True)
    assert f"the connection broke off to {repos.endpoint} (Re" in refused("other/open")


def test_a_hub_that_does_not_answer_is_not_waited_for(repos, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.1)
    repos.delay("GET", "/api/", 0.4)
    assert f"no answer in time from {repos.endpoint} (ReadTimeout)" in refused("other/open")


@pytest.mark.parametrize("kind", KINDS)
def test_offline_what_is_not_in_the_cache_names_the_switch(repos, monkeypatch, kind):
    offline(monkeypatch)
    for revision in (None, "v9", "0" * 40):
        assert "not in the cache, and the Hub may not be asked (HF_HUB_OFFLINE)" in refused(
            "other/open", revision, kind
        )
    assert not repos.requests


def test_data_sets_have_a_switch_of_their_own(repos, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    assert "may not be asked (HF_DATASETS_OFFLINE)" in refused("other/open", kind="dataset")
    assert [resolve_commit("other/open")] == repos.history("other/open")


# ---- Errors of the clients, wrapped by others ----


def http_error(status, token=None, error_class=HfHubHTTPError, headers=None, path="api/models/me/x"):
    http = importlib.import_module(Response.__module__.partition(".")[0])  # of this version of huggingface_hub
    sent = {"authorization": f"Bearer {token}"} if token else {}
    request = http.Request("GET", f"http://hub/{path}", headers=sent)
    return error_class("x", response=Response(status, request=request, headers=headers))


@pytest.mark.parametrize("linked", ["cause", "context", "twice"])
def test_the_hubs_answer_is_found_below_what_wraps_it(linked):
    error, inner = OSError("We couldn't connect"), http_error(503)
    if linked == "cause":
        error.__cause__ = inner
    else:
        error.__context__ = inner
    if linked == "twice":
        outer = RuntimeError("wrapped again")
        outer.__cause__, error = error, outer
    assert "the Hub answered 503 (the Hub is in trouble; token sent: no)" in explain(error, "teacher", "me/x")


def test_the_last_answer_counts():
    error = http_error(429)
    error.__context__ = http_error(503)
    error.__context__.__context__ = error  # and a circle ends
    assert "answered 429" in explain(error, "teacher", "me/x")


def test_a_file_that_need_not_be_there_explains_nothing():
    headers = {"X-Error-Code": "EntryNotFound"}
    absent = http_error(404, error_class=RemoteEntryNotFoundError, headers=headers, path="me/x/resolve/main/x.py")
    assert "404 (no file 'x.py'; token sent: no)" in explain(absent, "data set", "me/x")
    error = ValueError("the card is broken")
    error.__context__ = absent
    assert explain(error, "data set", "me/x") == "data set 'me/x': the card is broken"
    error.__cause__ = absent
    assert "no file 'x.py'" in explain(error, "data set", "me/x")


def test_anything_else_is_one_short_line_without_secrets(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "canary-of-any-form")
    text = "first\n  second canary-of-any-form hf_canarycanary https://me:canary@host/x Bearer canary.jwt " + "x" * 500
    line = explain(ValueError(text), "data set", "me/x")
    assert line.startswith("data set 'me/x': first second *** *** https://***@host/x Bearer *** xxx")
    assert len(line) < 340
    assert "canary" not in line
    assert explain(KeyboardInterrupt(), "teacher", "x") == "teacher 'x': KeyboardInterrupt"


def test_a_token_that_was_sent_is_masked_wherever_it_came_from():
    error = http_error(418, token="canary.of.a.form.of.its.own")
    error.server_message = "what is canary.of.a.form.of.its.own?"
    assert "(what is ***?; token sent: yes)" in explain(error, "teacher", "me/x")


# ---- Which commit ----


def test_what_is_not_on_the_hub_has_no_commit(repos, tmp_path):
    assert resolve_commit(str(tmp_path)) is None
    assert resolve_commit("sklearn:digits", repo_type="dataset", what="data set") is None
    assert not repos.requests


@pytest.mark.parametrize("kind", KINDS)
def test_branches_tags_and_commits_are_those_of_the_hub(repos, kind):
    first = repos.history("other/open", repo_type=kind)[0]
    repo = repos.repos[kind, "other/open"]
    repo.refs |= {"refs/tags/v1": first, "refs/heads/some/branch": first}
    second = repos.commit("other/open", {"b": b"b"}, kind)
    found = {r: resolve_commit("other/open", r, repo_type=kind) for r in (None, "main", "v1", "some/branch", first)}
    assert found == {None: second, "main": second, "v1": first, "some/branch": first, first: first}
    assert len(repos.requests) == 4  # the first commit is known by the tag that named it


def test_a_branch_is_asked_for_again_and_a_commit_is_not(repos):
    first = resolve_commit("other/open")
    second = repos.commit("other/open", {"b": b"b"})
    assert resolve_commit("other/open") == second != first
    repos.requests.clear()
    assert resolve_commit("other/open", first) == first
    assert not repos.requests


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("revision", [None, "v1"])
def test_offline_the_commit_that_was_seen_last_is_taken_and_named(repos, monkeypatch, caplog, kind, revision):
    repos.repos[kind, "other/open"].refs["refs/tags/v1"] = repos.history("other/open", repo_type=kind)[0]
    commit = resolve_commit("other/open", revision, repo_type=kind)
    repos.commit("other/open", {"b": b"b"}, kind)
    assert not caplog.messages
    offline(monkeypatch)
    assert resolve_commit("other/open", revision, repo_type=kind) == commit
    assert [f"'other/open': going on with commit {commit}" in message for message in caplog.messages] == [True]
    assert "offline mode" in caplog.text


@pytest.mark.parametrize("trouble", ["503", "drop"])
def test_a_hub_in_trouble_is_named_where_the_cache_stands_in(repos, caplog, trouble):
    commit = resolve_commit("other/open")
    repos.fail("GET", "/api/", 503) if trouble == "503" else repos.drop("GET", "/api/", answered=True)
    assert resolve_commit("other/open") == commit
    (message,) = caplog.messages
    assert message.startswith(f"teacher 'other/open': going on with commit {commit}")
    assert ("the Hub answered 503" if trouble == "503" else "the connection broke off") in message


@pytest.mark.parametrize("status", [401, 403, 404, 429])
def test_the_cache_never_stands_in_for_a_refusal(repos, status):
    resolve_commit("other/open")
    repos.fail("GET", "/api/", status)
    assert f"the Hub answered {status}" in refused("other/open")


def test_a_published_local_name_is_refused_for_what_it_is(repos):
    assert "the model was a local folder called 'resnet18', which was not published" in refused("local:resnet18")
    line = refused("local:cifar_png", kind="dataset")
    assert "the data set was a local folder called 'cifar_png'" in line
    assert "give --dataset_name" in line
    assert not repos.requests


# ---- All of a run at once ----


@pytest.fixture
def run(repos, tmp_path):
    """The arguments of a run with everything on the Hub."""
    return [
        DataArguments(dataset_name="other/open"),
        TeacherArguments(teacher_model="other/open", teacher_control="untrained"),
        ModelArguments(model_name_or_path="other/open", model_revision="main"),
    ]


def revisions(run):
    return [run[0].dataset_revision, run[1].teacher_revision, run[2].model_revision]


def test_all_names_of_a_run_are_pinned(run, repos):
    commits = [repos.history("other/open", repo_type=kind)[0] for kind in ("dataset", "model", "model")]
    pin_revisions(run)
    assert revisions(run) == commits
    repos.requests.clear()
    pin_revisions(run)
    assert not repos.requests


def test_only_a_revision_beside_its_name_is_pinned(repos, tmp_path):
    args = AnalysisArguments(teacher_model="other/open", model_revision="v1")
    rest = [DataArguments(dataset_name=str(tmp_path), dataset_revision="v2"), ModelArguments()]
    pin_revisions([args, *rest])
    assert args.model_revision == "v1"
    assert [args.teacher_revision] == repos.history("other/open")
    assert (rest[0].dataset_revision, rest[1].model_revision) == ("v2", None)


def as_process(monkeypatch, is_main, message):
    """Makes this process one of two; what the main one says goes through `message`."""
    state = SimpleNamespace(is_main_process=is_main, num_processes=2)
    monkeypatch.setattr(access, "PartialState", lambda: state)

    def broadcast(objects):
        if is_main:
            message[:] = pickle.loads(pickle.dumps(objects))
        else:
            objects[:] = message

    monkeypatch.setattr(access, "broadcast_object_list", broadcast)


def test_every_process_takes_the_main_ones_commits(run, repos, monkeypatch):
    message = []
    as_process(monkeypatch, True, message)
    pin_revisions(run)
    commits = revisions(run)
    repos.commit("other/open", {"b": b"b"})
    repos.requests.clear()
    access._confirmed.clear()
    for instance in run:
        for name in ("dataset_revision", "teacher_revision", "model_revision"):
            if hasattr(instance, name):
                setattr(instance, name, None)
    as_process(monkeypatch, False, message)
    pin_revisions(run)
    assert revisions(run) == commits
    assert resolve_commit("other/open", commits[1]) == commits[1]
    assert not repos.requests


def test_a_refusal_ends_every_process(run, repos, monkeypatch):
    run[1].teacher_model, message = "other/private", []
    lines = []
    for is_main in (True, False):
        as_process(monkeypatch, is_main, message)
        with pytest.raises(ModelLoadError, match=r"^teacher 'other/private': the Hub answered 404") as error:
            pin_revisions(run)
        lines.append(str(error.value))
    assert lines[0] == lines[1]
    assert revisions(run) == [None, None, "main"]


# ---- Single files ----


def test_a_file_is_fetched_once_and_an_absent_one_is_asked_for_once(repos):
    commit = resolve_commit("other/open")
    for _ in range(2):
        assert fetch_file("other/open", "a.json", commit, what="model").read_bytes() == b"{}"
        assert fetch_file("other/open", "b.json", commit, what="model") is None
    assert sum("resolve" in request.path for request in repos.requests) == 3
    with pytest.raises(
        ModelLoadError, match=r"model 'other/open': the Hub answered 404 \(no file 'b.json'; token sent"
    ):
        fetch_file("other/open", "b.json", commit, what="model", required=True)


def test_trouble_is_not_taken_for_absence(repos):
    commit = resolve_commit("other/open")
    repos.fail("HEAD", "/b.json", 503, times=99)
    with pytest.raises(ModelLoadError, match="the Hub answered 503"):
        fetch_file("other/open", "b.json", commit, what="model")


def test_offline_what_was_never_asked_for_is_taken_for_absent_aloud(repos, monkeypatch, caplog):
    commit = resolve_commit("other/open")
    offline(monkeypatch)
    assert fetch_file("other/open", "b.json", commit, what="model") is None
    assert caplog.messages == ["model 'other/open': b.json is not in the cache, and is taken for absent offline"]
    with pytest.raises(ModelLoadError, match=r"not in the cache, and the Hub may not be asked \(HF_HUB_OFFLINE\)"):
        fetch_file("other/open", "b.json", commit, what="model", required=True)
