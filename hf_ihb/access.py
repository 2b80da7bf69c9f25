"""Reading from the Hub: the commit a name stands for, files of one commit, and every refusal in one line."""

import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import config as datasets_config
from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    HTTPError,  # of the HTTP library that this version of huggingface_hub uses
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id

from hf_ihb.config.names import BUILT_IN_PREFIX, LOCAL_PREFIX, NAMES
from hf_ihb.config.secrets import masked
from hf_ihb.errors import DataError, HfIhbError, ModelLoadError

logger = logging.getLogger(__name__)

# What reading from the Hub can raise.
HUB_ERRORS = (OSError, ValueError, HTTPError, EntryNotFoundError)
_OFFLINE_KEYS = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
# Names of errors, in the clients' HTTP library and in Python, of a connection that had been there.
_BROKEN = ("ReadError", "WriteError", "RemoteProtocolError", "ConnectionResetError", "BrokenPipeError")
_COMMIT = re.compile(r"[0-9a-f]{40}")
# Commits that the Hub has confirmed to this process; they cannot change, so they are not asked for again.
_confirmed: set[tuple[str, ...]] = set()


def is_local(name: str) -> bool:
    """Whether a name is a path of this machine or built in, rather than an id on the Hub."""
    return name.startswith(BUILT_IN_PREFIX) or Path(name).expanduser().exists()


def is_offline(repo_type: str = "model") -> bool:
    """Whether the environment forbids asking the Hub."""
    return constants.HF_HUB_OFFLINE or (repo_type == "dataset" and datasets_config.HF_HUB_OFFLINE)


def resolve_commit(
    name: str, revision: str | None = None, *, repo_type: str = "model", what: str = "teacher"
) -> str | None:
    """The commit that a name stands for now: one request, and one more where the repo is gated.

    A commit is asked for like a branch, so that a repo that is missing or closed is known before anything is
    downloaded; once it is confirmed, this process does not ask again. Where the Hub must not or cannot be asked, the
    commit that the cache has last seen is taken, and a warning names it.

    Args:
        name: Hub id, folder, or 'sklearn:digits'.
        revision: Branch, tag or commit; the main branch if None.
        repo_type: ``model`` or ``dataset``.
        what: What errors call it.

    Returns:
        40 hexadecimal digits; None for what is not on the Hub.

    Raises:
        ModelLoadError: If a model's repo or revision does not exist, may not be read or cannot be reached.
        DataError: The same of a data set.
    """
    if is_local(name):
        return None
    key = (constants.ENDPOINT, repo_type, name)
    if (*key, revision) in _confirmed:
        return revision
    refusal = DataError if repo_type == "dataset" else ModelLoadError
    if name.startswith(LOCAL_PREFIX):
        raise refusal(f"{what} '{name}': {_not_published(name, repo_type)}")
    try:
        commit = _ask(name, revision, repo_type)
    except HUB_ERRORS as error:
        commit = _cached_commit(name, revision, repo_type) if _is_unreachable(error) else None
        if commit is None:
            raise refusal(explain(error, what, name, revision)) from error
        if commit != revision:
            offline = isinstance(error, OfflineModeIsEnabled)
            why = "offline mode" if offline else explain(error, what, name, revision).partition(": ")[2].split(";")[0]
            logger.warning(
                "%s '%s': going on with commit %s, the last of it that was seen (%s)", what, name, commit, why
            )
        return commit
    _confirmed.add((*key, commit))
    return commit


def pin_revisions(arguments: Sequence[Any]) -> None:
    """Sets the revisions of data set, teacher and weights to the commits that they stand for now.

    The main process asks and tells the others, so that a launch sees one commit; a refusal is raised on all of them.

    Args:
        arguments: Dataclass instances; a name without a revision key beside it is left alone.

    Raises:
        ModelLoadError: If a model's repo or revision does not exist, may not be read or cannot be reached.
        DataError: The same of a data set.
    """
    wanted = []
    for instance in arguments:
        keys = {f.name for f in fields(instance)}
        wanted += [
            (instance, name, *named)
            for name, named in NAMES.items()
            if {name, named.revision} <= keys and getattr(instance, name) is not None
        ]
    state = PartialState()
    outcome: list[Any] = [None]
    if state.is_main_process:
        try:
            outcome[0] = [
                resolve_commit(getattr(instance, name), getattr(instance, revision), repo_type=repo_type, what=what)
                for instance, name, revision, repo_type, what in wanted
            ]
        except HfIhbError as error:
            outcome[0] = error
    if state.num_processes > 1:
        broadcast_object_list(outcome)
    if isinstance(outcome[0], HfIhbError):
        raise outcome[0]
    for (instance, name, revision, repo_type, _), commit in zip(wanted, outcome[0], strict=True):
        if commit is not None:
            setattr(instance, revision, commit)
            _confirmed.add((constants.ENDPOINT, repo_type, getattr(instance, name), commit))


def fetch_file(name: str, filename: str, commit: str, *, what: str, required: bool = False) -> Path | None:
    """A file of a model's repo at one commit, from the cache where it is there.

    Offline, a file that was never asked for is taken for absent, and a warning says so, unless it is required.

    Returns:
        Its path in the cache; None where the repo has no such file.

    Raises:
        ModelLoadError: If it cannot be fetched, or is required and absent.
    """
    known = try_to_load_from_cache(name, filename, revision=commit)
    if isinstance(known, str):
        return Path(known)
    if known is not None and not required:  # known to be absent
        return None
    try:
        return Path(hf_hub_download(name, filename, revision=commit))
    except HUB_ERRORS as error:
        if not required and isinstance(error, LocalEntryNotFoundError) and is_offline():
            logger.warning("%s '%s': %s is not in the cache, and is taken for absent offline", what, name, filename)
            return None
        absent = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
        if absent and not required:
            return None
        raise ModelLoadError(explain(error, what, name, commit)) from error


def explain(error: BaseException, what: str, name: str, revision: str | None = None) -> str:
    """One line for whatever the Hub's clients raised: what failed, why, and what to do; never a token.

    Args:
        error: Its causes are looked at as well.
        what: Kind of thing, such as 'teacher' or 'data set'.
        name: Hub id or folder.
        revision: The one that was asked for.
    """
    chain = list(_chain(error))
    line = " ".join(f"{what} '{name}': {_reason(chain, name, revision)}".split())
    return masked(line, *_sent_tokens(chain))


def _ask(name: str, revision: str | None, repo_type: str) -> str:
    """The commit by the Hub's word, remembered in the cache as its clients do."""
    validate_repo_id(name)
    if is_offline(repo_type):
        raise OfflineModeIsEnabled("offline mode is enabled")
    api = HfApi()
    info = api.repo_info(name, repo_type=repo_type, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    if info.gated:
        api.auth_check(name, repo_type=repo_type)
    if not _COMMIT.fullmatch(info.sha or ""):
        raise ValueError(f"expected a commit from the Hub, found {info.sha!r}")
    if revision != info.sha:
        ref = _cache_folder(name, repo_type) / "refs" / (revision or constants.DEFAULT_REVISION)
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(info.sha)
    return info.sha


def _cached_commit(name: str, revision: str | None, repo_type: str) -> str | None:
    """The commit that the cache has last seen under a revision."""
    folder = _cache_folder(name, repo_type)
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision if (folder / "snapshots" / revision).is_dir() else None
    ref = folder / "refs" / (revision or constants.DEFAULT_REVISION)
    return ref.read_text().strip() if ref.is_file() else None


def _cache_folder(name: str, repo_type: str) -> Path:
    return Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type=repo_type))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, then what caused it, each once."""
    seen, waiting = set(), [error]
    while waiting:
        current = waiting.pop(0)
        if id(current) not in seen:
            seen.add(id(current))
            yield current
            waiting += [e for e in (current.__cause__, current.__context__) if e is not None]


def _response(error: BaseException) -> Any:
    return getattr(error, "response", None) if isinstance(error, HTTPError) else None


def _is_unreachable(error: BaseException) -> bool:
    """Whether the Hub gave no answer, or one that says nothing about the repo."""
    response = _response(error)
    if response is not None:
        return response.status_code >= 500
    return isinstance(error, (HTTPError, ConnectionError, TimeoutError))


def _explains(answered: BaseException, error: BaseException) -> bool:
    """Whether an answer counts: clients ask for what need not be there, and fail of other things later."""
    if _response(answered).status_code == 404:
        while error is not None and error is not answered:
            error = error.__cause__
        return error is answered
    return True


def _reason(chain: list[BaseException], name: str, revision: str | None) -> str:
    answered = next((e for e in chain if _response(e) is not None and _explains(e, chain[0])), None)
    if answered is not None:
        return _answer(answered, name, revision)
    network = next((e for e in chain if _is_unreachable(e)), None)
    uncached = any(isinstance(e, LocalEntryNotFoundError) for e in chain)
    if any(isinstance(e, OfflineModeIsEnabled) for e in chain) or (is_offline("dataset") and (network or uncached)):
        switches = ", ".join(key for key in _OFFLINE_KEYS if os.environ.get(key)) or _OFFLINE_KEYS[0]
        return f"not in the cache, and the Hub may not be asked ({switches}); unset that, or fetch it first"
    if any(isinstance(e, HFValidationError) for e in chain):
        return "expected a folder or a Hub id, found neither"
    if network is not None:
        kind = type(network).__name__
        said = "no answer in time from" if "Timeout" in kind else "no connection to"
        if kind in _BROKEN:
            said = "the connection broke off to"
        return (
            f"{said} {constants.ENDPOINT} ({kind}); check the network and try again, or set "
            "HF_HUB_OFFLINE=1 to use what is in the cache"
        )
    return " ".join(str(chain[0]).split())[:300] or type(chain[0]).__name__


def _answer(error: Any, name: str, revision: str | None) -> str:
    """What the Hub's refusal means and what to do about it."""
    response = error.response
    status, url = response.status_code, response.request.url
    sent = "authorization" in response.request.headers
    login = "mend the token" if sent else "log in with `hf auth login` or HF_TOKEN"
    said = " ".join((getattr(error, "server_message", None) or "").split())[:200]
    if isinstance(error, GatedRepoError):
        kind = "datasets/" if "/datasets/" in url.path else ""
        meaning, remedy = "gated, and access was not granted", f"ask for it at {constants.ENDPOINT}/{kind}{name}"
        remedy += "" if sent else f", then {login}"
    elif isinstance(error, DisabledRepoError):
        meaning, remedy = "the repo is disabled", "take another one"
    elif isinstance(error, RevisionNotFoundError):
        meaning, remedy = f"no branch, tag or commit '{revision or constants.DEFAULT_REVISION}'", "check the revision"
    elif isinstance(error, EntryNotFoundError):
        file = unquote(url.path).partition("/resolve/")[2].partition("/")[2]
        meaning, remedy = f"no file '{file}'", "check that the repo holds what its id promises"
    elif isinstance(error, RepositoryNotFoundError) or status == 404:
        meaning, remedy = "no such repo, or a private one and no access", f"check the id, or {login}"
    elif status == 401:
        meaning, remedy = "the token is not valid", "renew it with `hf auth login`, or mend or unset HF_TOKEN"
    elif status == 403:
        meaning, remedy = f"no right to this: {said or 'forbidden'}", login
    elif status == 429:
        wait = response.headers.get("retry-after")
        meaning = "rate limit" + (f", Retry-After {wait} s" if wait else "")
        remedy = "wait" + ("" if sent else f", or {login} for a higher limit")
    elif status >= 500:
        meaning, remedy = "the Hub is in trouble", "try again later"
    else:
        meaning, remedy = said or response.reason_phrase, "check the request"
    return f"the Hub answered {status} ({meaning}; token sent: {'yes' if sent else 'no'}); {remedy}"


def _sent_tokens(chain: list[BaseException]) -> Iterator[str]:
    """Every token that a request behind these errors has sent."""
    for response in filter(None, map(_response, chain)):
        yield from response.request.headers.get("authorization", "").split()[1:]


def _not_published(name: str, repo_type: str) -> str:
    key = "--dataset_name" if repo_type == "dataset" else "a folder or a Hub id"
    kind = "data set" if repo_type == "dataset" else "model"
    local = name.removeprefix(LOCAL_PREFIX)
    return f"the {kind} was a local folder called '{local}', which was not published; give {key} instead"
