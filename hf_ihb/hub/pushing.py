"""One commit that holds a staged run: waited for where the Hub is in trouble, never made twice, never over others'."""

import hashlib
import json
import logging
import re
import shlex
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo
from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled, RevisionNotFoundError
from huggingface_hub.utils import parse_ratelimit_headers, validate_repo_id
from transformers.utils import CONFIG_NAME

from hf_ihb.access import explain
from hf_ihb.config.run import PublishArguments
from hf_ihb.errors import HubPushError, RecipeError
from hf_ihb.hub.staging import is_weights, owned_names, stage_run
from hf_ihb.runs.folder import CARD_FILE, RECIPE_FILE, is_record

logger = logging.getLogger(__name__)

# What the clients raise: answers and connections (HTTPError), offline mode and Xet (OSError, RuntimeError), a card
# that is refused or an answer that is no JSON (ValueError).
_CLIENT_ERRORS = (HTTPError, OSError, RuntimeError, ValueError)
# Requests that the clients repeat by themselves, for 23 seconds; doing so again would take minutes.
_REPEATED = re.compile(r"/preupload/|/info/lfs/|/xet-(read|write)-token/")
_PULL_REQUESTS = 10  # the newest that are looked at for one that holds the same already

Result = TypeVar("Result")


@dataclass(frozen=True)
class Patience:
    """How long a trouble that may pass is waited for.

    Attributes:
        retries: Further attempts.
        first_s: Wait before the first of them, in seconds; each is twice the one before.
        longest_s: No wait is longer, unless the Hub asks for it.
        limit_s: Where the Hub asks for more than this, there are no further attempts.
        sleep: Waits; `time.sleep` if None.
    """

    retries: int = 5
    first_s: float = 1.0
    longest_s: float = 16.0
    limit_s: float = 300.0
    sleep: Callable[[float], None] | None = None

    def call(self, action: Callable[[], Result], repo_id: str) -> Result:
        """The result of an action that is repeated while its errors may pass; the last one is raised."""
        for attempt in range(self.retries):
            try:
                return action()
            except _CLIENT_ERRORS as error:
                wait = min(self.first_s * 2**attempt, self.longest_s) if (asked := _asked(error)) is None else asked
                if not _may_pass(error) or wait > self.limit_s:
                    raise
                logger.warning("%s; trying again in %g s", explain(error, "repo", repo_id), wait)
            (self.sleep or time.sleep)(wait)
        return action()


def check_push(repo_id: str | None, revision: str | None = None, create_pr: bool = False) -> None:
    """Refuses what no push can mean, before anything is read or asked.

    Raises:
        RecipeError: If the id is none, or both a branch and a pull request are asked for.
    """
    try:
        if repo_id is not None:
            validate_repo_id(repo_id)
    except HFValidationError as error:
        raise RecipeError(
            "key 'hub_model_id': expected namespace/name of letters, digits, '-', '_' and '.', at most 96, found "
            f"'{repo_id}'"
        ) from error
    if create_pr and revision is not None:
        raise RecipeError(
            f"keys 'create_pr' and 'revision' contradict: a pull request goes to the main branch, found '{revision}'"
        )


def ensure_repo(
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    create_pr: bool = False,
    patience: Patience = Patience(),
) -> str:
    """Makes a repo where there is none, and checks the right to write to it.

    Args:
        repo_id: With or without a namespace; the user's own if without.
        private: Of a repo that is made; the owner's default if None.
        token: The one of the environment or the login if None.
        create_pr: A pull request will be opened, which takes no more than the right to read.
        patience: How long a trouble of the Hub is waited for.

    Returns:
        The id with its namespace.

    Raises:
        RecipeError: If the id is none.
        HubPushError: If it cannot be made or written to, or the Hub cannot be reached.
    """
    check_push(repo_id)
    api = HfApi(token=token, library_name="hf_ihb")
    with _one_line(repo_id):
        url = patience.call(lambda: api.create_repo(repo_id, private=private, exist_ok=True), repo_id)
        if not create_pr:
            # the client takes a foreign repo that can be read for one that exists already
            patience.call(lambda: api.auth_check(url.repo_id, write=True), url.repo_id)
    return url.repo_id


def push_staged(
    folder: Path,
    repo_id: str,
    *,
    commit_message: str,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    overwrite: bool = False,
    patience: Patience = Patience(),
) -> CommitInfo:
    """Makes a branch of a repo hold a staged run, by one commit or none.

    Files of ours that an earlier push left and this one does not have are deleted by the same commit; others' files
    stay. A commit that landed while its answer was lost is found and not made again.

    Args:
        folder: What `stage_run` wrote.
        repo_id: The repo; made where there is none.
        commit_message: First line of the commit, or the title of the pull request.
        token: The one of the environment or the login if None.
        private: Of a repo that is made; the owner's default if None.
        revision: Branch, made from the main branch where there is none; the main branch if None.
        create_pr: Open a pull request to the main branch.
        overwrite: Go on where the repo holds something other than a run of ours.
        patience: How long a trouble of the Hub is waited for.

    Returns:
        The commit; that of the branch as it stands, with a description that says so, where nothing had to change.

    Raises:
        RecipeError: If the id is none, or both a branch and a pull request are asked for.
        HubPushError: If the Hub refuses, cannot be reached, or somebody else committed in between.
    """
    check_push(repo_id, revision, create_pr)
    repo_id = ensure_repo(repo_id, private=private, token=token, create_pr=create_pr, patience=patience)
    push = _Push(HfApi(token=token, library_name="hf_ihb"), repo_id, folder, commit_message, revision, create_pr)
    with _one_line(repo_id):
        patience.call(lambda: push.look(overwrite), repo_id)
        return patience.call(push.commit, repo_id)


def push_run(
    run: Path,
    repo_id: str,
    *,
    commit_message: str = PublishArguments.commit_message,
    license: str | None = None,
    weights: Path | None = None,
    card: dict[str, Any] | None = None,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    overwrite: bool = False,
    patience: Patience = Patience(),
) -> CommitInfo:
    """Stages a run into a folder of its own, pushes it, and removes the folder.

    Args:
        run: A run folder; it is not changed.
        repo_id: The repo; made where there is none.
        commit_message: First line of the commit, or the title of the pull request.
        license: Of the model; the run's if None.
        weights: Folder to take the student from instead (see `stage_run`).
        card: More arguments of the card.
        token: The one of the environment or the login if None.
        private: Of a repo that is made; the owner's default if None.
        revision: Branch, made from the main branch where there is none; the main branch if None.
        create_pr: Open a pull request to the main branch.
        overwrite: Go on where the repo holds something other than a run of ours.
        patience: How long a trouble of the Hub is waited for.

    Returns:
        The commit; that of the branch as it stands, with a description that says so, where nothing had to change.

    Raises:
        RecipeError: If the id is none, or both a branch and a pull request are asked for.
        HubPushError: If the run cannot be staged or the Hub does not take it; it ends with the command that pushes
            again.
    """
    check_push(repo_id, revision, create_pr)
    where = {"private": private, "revision": revision, "create_pr": create_pr}
    how = {"repo_id": repo_id, "license": license, "weights": weights, "card": card, "token": token}
    try:
        with tempfile.TemporaryDirectory(prefix="hf_ihb_push_") as parent:
            staged = Path(parent, "staged")
            stage_run(run, staged, **how)  # before anything is made on the Hub
            if "/" not in repo_id:
                repo_id = ensure_repo(repo_id, private=private, token=token, create_pr=create_pr, patience=patience)
                staged = Path(parent, "named")
                stage_run(run, staged, **how | {"repo_id": repo_id})
            return push_staged(
                staged,
                repo_id,
                commit_message=commit_message,
                token=token,
                overwrite=overwrite,
                patience=patience,
                **where,
            )
    except HubPushError as error:
        message = None if commit_message == PublishArguments.commit_message else commit_message
        more = {"license": license, "overwrite": overwrite, "commit_message": message}
        command = again(run, repo_id, **where, **more)
        raise HubPushError(f"{error}; the run is kept; to push it again: {command}") from error


def again(
    run: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    **more: Any,
) -> str:
    """The command that pushes a run; `more` are other keys of `PublishArguments`, left out where None or False."""
    keys = {"hub_model_id": repo_id, "private": private, "revision": revision, "create_pr": create_pr or None, **more}
    given = {name: value for name, value in keys.items() if value is not None and not (name in more and not value)}
    words = [word for name, value in given.items() for word in (f"--{name}", _word(value))]
    return shlex.join(["python", "scripts/publish.py", str(run), *words])


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


class _Push:
    """A staged folder and the branch that is to hold it."""

    def __init__(
        self, api: HfApi, repo_id: str, folder: Path, message: str, revision: str | None, create_pr: bool
    ) -> None:
        self._api, self._repo_id, self._message = api, repo_id, message
        self._revision, self._create_pr = revision, create_pr
        self._files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
        self._digests: dict[tuple[str, str], str] = {}
        self._stale: set[str] = set()
        self._parent: str | None = None

    def look(self, overwrite: bool) -> None:
        """Finds what the branch holds, and refuses to write over what is not ours."""
        head = self._head(make=True)
        names = {file.rfilename for file in head.siblings or []}
        ours = is_record(self._fetch(RECIPE_FILE, names, head))
        others = {n for n in names if n not in (".gitattributes", CARD_FILE) and not n.upper().startswith("LICENSE")}
        if others and not ours and not overwrite:
            raise HubPushError(
                f"repo '{self._repo_id}': expected a new repo or an earlier run of ours, found other files, "
                f"{min(others)} first; choose another --hub_model_id, or give --overwrite true"
            )
        if ours:
            self._stale = owned_names(names, self._fetch(CONFIG_NAME, names, head)) - self._files.keys()
        else:  # weights in another layout would be read in place of ours
            self._stale = set(filter(is_weights, names)) - self._files.keys()
        self._parent = head.sha

    def commit(self) -> CommitInfo:
        """One attempt: nothing where everything is there already, which is so where a lost commit has landed."""
        head = self._head()
        operations = self._operations(head)
        if not operations:
            return self._found(head.sha)
        if head.sha != self._parent:
            raise HubPushError(
                f"repo '{self._repo_id}': expected commit {self._parent} at the head of '{self._revision or 'main'}', "
                f"found {head.sha}: somebody else has pushed meanwhile; look at it, then push again"
            )
        if self._create_pr and (found := self._open_pull_request()):
            return found
        return self._api.create_commit(
            self._repo_id,
            operations,
            commit_message=self._message,
            revision=self._revision,
            create_pr=self._create_pr,
            parent_commit=head.sha,
        )

    def _head(self, make: bool = False) -> ModelInfo:
        try:
            return self._info(self._revision)
        except RevisionNotFoundError:
            if not make:
                raise
        self._api.create_branch(self._repo_id, branch=self._revision, exist_ok=True)
        return self._info(self._revision)

    def _info(self, revision: str | None) -> ModelInfo:
        return self._api.model_info(self._repo_id, revision=revision, files_metadata=True)

    def _fetch(self, name: str, names: set[str], head: ModelInfo) -> Any:
        """A JSON file of the repo; None where there is none, or it is no JSON."""
        if name not in names:
            return None
        with tempfile.TemporaryDirectory(prefix="hf_ihb_") as folder:
            path = self._api.hf_hub_download(self._repo_id, name, revision=head.sha, local_dir=folder)
            try:
                return json.loads(Path(path).read_text("utf-8"))
            except (ValueError, RecursionError):
                return None

    def _operations(self, head: ModelInfo) -> list[CommitOperationAdd | CommitOperationDelete]:
        """What makes a branch hold the staged files."""
        held = {file.rfilename: file for file in head.siblings or []}
        additions = [
            CommitOperationAdd(name, str(path))
            for name, path in self._files.items()
            if name not in held or not self._holds(held[name], name)
        ]
        return additions + [CommitOperationDelete(name) for name in sorted(self._stale & held.keys())]

    def _holds(self, file: Any, name: str) -> bool:
        if file.lfs is not None:
            return file.lfs.sha256 == self._digest(name, "sha256")
        return file.blob_id == self._digest(name, "sha1")

    def _digest(self, name: str, kind: str) -> str:
        """SHA-256 of a file, or the SHA-1 that git gives it."""
        if (name, kind) not in self._digests:
            path = self._files[name]
            digest = hashlib.new(kind, b"blob %d\0" % path.stat().st_size if kind == "sha1" else b"")
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
            self._digests[name, kind] = digest.hexdigest()
        return self._digests[name, kind]

    def _found(self, commit: str, number: int | None = None) -> CommitInfo:
        """What was asked for and is there already."""
        url = f"{self._api.endpoint}/{self._repo_id}"
        return CommitInfo(
            commit_url=f"{url}/commit/{commit}",
            commit_message=self._message,
            commit_description="the repo holds all of it already",
            oid=commit,
            pr_url=None if number is None else f"{url}/discussions/{number}",
        )

    def _open_pull_request(self) -> CommitInfo | None:
        """An open pull request that holds the staged files, such as one whose answer was lost."""
        refs = self._api.list_repo_refs(self._repo_id, include_pull_requests=True).pull_requests or []
        numbers = sorted((int(ref.ref.rpartition("/")[2]) for ref in refs), reverse=True)
        for number in numbers[:_PULL_REQUESTS]:
            info = self._info(f"refs/pr/{number}")
            if self._operations(info):
                continue
            if self._api.get_discussion_details(self._repo_id, number).status in ("open", "draft"):
                return self._found(info.sha, number)
        return None


@contextmanager
def _one_line(repo_id: str):
    """Turns whatever the clients raise into a `HubPushError` of one line."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise HubPushError(f"repo '{repo_id}': the Hub may not be asked (HF_HUB_OFFLINE); unset that") from error
    except _CLIENT_ERRORS as error:
        if str(error).startswith("Invalid metadata in README.md"):
            raise HubPushError(f"repo '{repo_id}': the Hub refused the card: {' '.join(str(error).split())}") from error
        raise HubPushError(explain(error, "repo", repo_id)) from error


def _may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed later, and the client has not tried that itself."""
    if not isinstance(error, HTTPError):
        return isinstance(error, json.JSONDecodeError)  # a gateway's page in place of an answer
    response = getattr(error, "response", None)
    # an error of huggingface_hub's own has its request in the answer alone, one of a connection may have none
    request = getattr(error, "_request", None) if response is None else response.request
    path = "" if request is None else request.url.path
    if request is not None and (request.method == "PUT" or _REPEATED.search(path)):
        return False
    if response is None:  # the connection failed or broke off
        return True
    # 409: another commit is being made; 412: the head has moved, and the next attempt sees whether by our own commit
    return (
        response.status_code in (408, 429)
        or response.status_code >= 500
        or (response.status_code in (409, 412) and "/commit/" in path)
    )


def _asked(error: BaseException) -> float | None:
    """Seconds that the Hub asks to wait."""
    response = getattr(error, "response", None)
    if response is None:
        return None
    limit = parse_ratelimit_headers(response.headers)
    if response.status_code == 429 and limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    asked = response.headers.get("retry-after", "").strip()
    return float(asked) if asked.isdigit() else None
