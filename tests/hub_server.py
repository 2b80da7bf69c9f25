"""A Hub of the tests' own on 127.0.0.1: what the clients of models and data sets ask, real commits, faults on demand.

Two ports, as on the real Hub: LFS files lie on a storage host that must never be shown a token.
"""

import base64
import contextlib
import hashlib
import json
import re
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml

NOW = "2026-01-01T00:00:00.000Z"
LFS = re.compile(r"\.(safetensors|bin|pt|png|parquet|arrow|zip)$")
KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}
ERRORS = {
    "RepoNotFound": "Repository not found",
    "RevisionNotFound": "Invalid rev id",
    "EntryNotFound": "Entry not found",
}


@dataclass
class User:
    """Somebody with a token; writes to `namespaces`."""

    name: str
    namespaces: tuple[str, ...]


@dataclass
class Commit:
    """All files of a repo at one point."""

    sha: str
    files: dict[str, bytes]
    message: str
    parent: str | None


@dataclass
class Repo:
    """A repo: its commits, and what branches, tags and pull requests point at."""

    kind: str
    name: str
    private: bool = False
    gated: bool = False
    granted: set[str] = field(default_factory=set)
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    requests: dict[int, dict] = field(default_factory=dict)

    def resolve(self, revision: str) -> Commit | None:
        """The commit that a branch, tag, ref or sha names."""
        for name in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if name in self.refs:
                return self.commits[self.refs[name]]
        return self.commits.get(revision)

    def add(self, files: dict[str, bytes], message: str, ref: str, parent: str | None) -> Commit:
        """A commit on top of another; ref moves to it."""
        seed = f"{self.kind}{self.name}{len(self.commits)}{ref}{message}".encode()
        commit = Commit(hashlib.sha1(seed).hexdigest(), files, message, parent)
        self.commits[commit.sha], self.refs[ref] = commit, commit.sha
        return commit


@dataclass
class Request:
    """What came in."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    host: str


@dataclass
class Fault:
    """What goes wrong with the next `times` requests of a kind; `fired` counts them."""

    method: str
    path: re.Pattern
    times: int
    act: str
    status: int = 503
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b'{"error": "trouble"}'
    seconds: float = 0.0
    fired: int = 0


class Answer(Exception):
    """Ends a request with a status."""

    def __init__(self, status: int, body: object = None, headers: dict[str, str] | None = None) -> None:
        self.status, self.headers = status, dict(headers or {})
        is_bytes = isinstance(body, bytes)
        self.body = body if is_bytes else json.dumps({} if body is None else body).encode()
        self.headers.setdefault("Content-Type", "application/octet-stream" if is_bytes else "application/json")


def refuse(status: int, message: str, code: str | None = None, **headers: str) -> Answer:
    """An error as the Hub words it."""
    found = {"X-Error-Message": message, **headers} | ({"X-Error-Code": code} if code else {})
    return Answer(status, {"error": message}, found)


def git_sha(content: bytes) -> str:
    """The name that git gives a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    """The name that LFS gives it."""
    return hashlib.sha256(content).hexdigest()


def is_lfs(path: str, size: int) -> bool:
    """Whether a file is kept on the storage host."""
    return bool(LFS.search(path)) or size > 10_000_000


def card_of(commit: Commit) -> dict:
    """The metadata of a repo's README."""
    match = re.match(r"---\n(.*?)\n---", commit.files.get("README.md", b"").decode("utf-8", "replace"), re.S)
    with contextlib.suppress(yaml.YAMLError):
        return (yaml.safe_load(match[1]) if match else None) or {}
    return {}


def faults_of(content: str) -> list[str]:
    """What the Hub would refuse of a card's metadata; an approximation."""
    match = re.match(r"---\r?\n(.*?)\r?\n---", content, re.S)
    if not match:
        return []
    try:
        data = yaml.safe_load(match[1]) or {}
    except yaml.YAMLError as error:
        return [f"invalid YAML: {type(error).__name__}"]
    found = [f'"{key}" must be an array' for key in ("metrics", "tags") if not isinstance(data.get(key, []), list)]
    found += [
        f'"{k}" must be a string'
        for k in ("license", "library_name", "pipeline_tag")
        if not isinstance(data.get(k, ""), str)
    ]
    index = data.get("model-index", [])
    for entry in index if isinstance(index, list) else ['"model-index" must be an array']:
        if isinstance(entry, str) or not entry.get("name"):
            found.append('"model-index[0].name" is required')
            continue
        for result in entry.get("results", []):
            if not result.get("task", {}).get("type") or not {"type", "name"} <= result.get("dataset", {}).keys():
                found.append('"model-index[0].results" needs task.type, dataset.type and dataset.name')
            if any(not isinstance(result["dataset"].get(k, ""), str) for k in ("config", "revision", "split")):
                found.append('"model-index[0].results[0].dataset" holds what is not a string')
            for metric in result.get("metrics", []):
                if not metric.get("type") or not isinstance(metric.get("value"), (int, float, str)):
                    found.append('"model-index[0].results[0].metrics" needs type and value')
    return found


class HubServer:
    """The Hub. As a context manager it answers from entering to leaving.

    Args:
        port: Of the hub; any if 0.
    """

    def __init__(self, port: int = 0) -> None:
        self.lock = threading.RLock()
        self.users: dict[str, User] = {}
        self.repos: dict[tuple[str, str], Repo] = {}
        self.stored: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.leaks: list[str] = []
        self.page_size = 1000
        self._servers = [
            _Listener(("127.0.0.1", p), _handler(self, host)) for p, host in ((port, "hub"), (0, "storage"))
        ]
        # two names as well: clients tell a storage host, which is shown no token, by its name or by its port
        hub_port, storage_port = (server.server_address[1] for server in self._servers)
        self.endpoint, self.storage = f"http://127.0.0.1:{hub_port}", f"http://localhost:{storage_port}"

    def __enter__(self) -> "HubServer":
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *details: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()
            server.hang_up()

    # ---- What tests prepare and look at ----

    def add_user(self, name: str, token: str, namespaces: tuple[str, ...] | None = None) -> User:
        """A user who writes to their own namespace, unless others (or none) are given."""
        self.users[token] = User(name, (name,) if namespaces is None else namespaces)
        return self.users[token]

    def add_repo(self, name: str, files: dict[str, bytes] | None = None, repo_type: str = "model", **keys: bool) -> str:
        """A repo with a first commit; returns its sha."""
        repo = self.repos[repo_type, name] = Repo(repo_type, name, **keys)
        first = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"} | (files or {})
        return repo.add(first, "initial commit", "refs/heads/main", None).sha

    def add_folder(self, name: str, folder: Path, repo_type: str = "model", **keys: bool) -> str:
        """A repo with the files of a folder."""
        paths = (path for path in sorted(Path(folder).rglob("*")) if path.is_file())
        return self.add_repo(name, {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}, repo_type, **keys)

    def commit(self, name: str, files: dict[str, bytes | None], repo_type: str = "model", branch: str = "main") -> str:
        """A commit by somebody else; None deletes a file."""
        repo = self.repos[repo_type, name]
        parent = repo.resolve(branch)
        merged = {path: content for path, content in (parent.files | files).items() if content is not None}
        return repo.add(merged, "another commit", f"refs/heads/{branch}", parent.sha).sha

    def files(self, name: str, revision: str = "main", repo_type: str = "model") -> dict[str, bytes]:
        """The files of a repo at a revision."""
        return self.repos[repo_type, name].resolve(revision).files

    def history(self, name: str, revision: str = "main", repo_type: str = "model") -> list[str]:
        """Shas from the newest to the first."""
        repo, found = self.repos[repo_type, name], []
        commit = repo.resolve(revision)
        while commit is not None:
            found.append(commit.sha)
            commit = repo.commits.get(commit.parent)
        return found

    def fail(
        self,
        method: str,
        path: str,
        status: int = 503,
        times: int = 1,
        headers: dict | None = None,
        body: bytes = b'{"error": "trouble"}',
    ) -> Fault:
        """Answers with a status instead."""
        return self._plan(Fault(method, re.compile(path), times, "fail", status, headers or {}, body))

    def drop(self, method: str, path: str, times: int = 1, answered: bool = False) -> Fault:
        """Resets the connection: before anything is done, or (`answered`) when all is done and nothing yet said."""
        return self._plan(Fault(method, re.compile(path), times, "drop after" if answered else "drop"))

    def delay(self, method: str, path: str, seconds: float, times: int = 1) -> Fault:
        """Waits first."""
        return self._plan(Fault(method, re.compile(path), times, "delay", seconds=seconds))

    def _plan(self, fault: Fault) -> Fault:
        self.faults.append(fault)
        return fault

    def next_fault(self, method: str, path: str) -> Fault | None:
        """The fault that this request meets."""
        with self.lock:
            for fault in self.faults:
                if fault.method == method and fault.path.search(path) and fault.fired < fault.times:
                    fault.fired += 1
                    return fault
        return None

    # ---- Answers ----

    def route(self, request: Request) -> Answer:
        """The answer to a request."""
        url = urlsplit(request.path)
        query = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        table = _STORAGE if request.host == "storage" else _ROUTES
        for method, pattern, handler in table:
            if method in (request.method, "*") and (found := pattern.fullmatch(url.path)):
                parts = {name: unquote(value or "") for name, value in found.groupdict().items()}
                with self.lock:
                    try:
                        return handler(self, request, query, **parts)
                    except Answer as answer:
                        return answer
        return refuse(404, f"no such endpoint: {request.method} {url.path}")

    def user_of(self, request: Request) -> User | None:
        """Who asks; a token that nobody has is refused."""
        sent = request.headers.get("authorization", "")
        if not sent:
            return None
        if (user := self.users.get(sent.removeprefix("Bearer "))) is None:
            raise refuse(401, "Invalid credentials in Authorization header")
        return user

    def open(self, request: Request, kind: str, name: str, write: bool = False) -> Repo:
        """A repo that this user may read, or write to."""
        user, repo = self.user_of(request), self.repos.get((kind, name))
        namespace = name.split("/")[0]
        owner = user is not None and namespace in user.namespaces
        if repo is None or (repo.private and not owner and not (user and user.name == namespace)):
            raise refuse(401 if user is None else 404, ERRORS["RepoNotFound"], "RepoNotFound")
        if write and not owner:
            raise refuse(401 if user is None else 403, f"You don't have the rights to write to {name}")
        return repo

    def at(self, repo: Repo, revision: str) -> Commit:
        """A commit that must be there."""
        if (commit := repo.resolve(revision)) is None:
            raise refuse(404, f"{ERRORS['RevisionNotFound']}: {revision}", "RevisionNotFound")
        return commit

    def url(self, repo: Repo) -> str:
        """A repo's page."""
        return f"{self.endpoint}/{'datasets/' if repo.kind == 'dataset' else ''}{repo.name}"

    def whoami(self, request: Request, query: dict) -> Answer:
        user = self.user_of(request)
        if user is None:
            raise refuse(401, "Invalid username or password.")
        orgs = [{"type": "org", "name": n} for n in user.namespaces if n != user.name]
        auth = {"type": "access_token", "accessToken": {"displayName": "t", "role": "write"}}
        named = dict.fromkeys(("id", "name", "fullname"), user.name)
        return Answer(200, {"type": "user", **named, "orgs": orgs, "auth": auth})

    def create(self, request: Request, query: dict) -> Answer:
        user, wanted = self.user_of(request), json.loads(request.body)
        if user is None:
            raise refuse(401, "Invalid username or password.")
        namespace = wanted.get("organization") or user.name
        kind, name = wanted.get("type") or "model", f"{namespace}/{wanted['name']}"
        if namespace not in user.namespaces:
            raise refuse(403, f'You don\'t have the rights to create a {kind} under the namespace "{namespace}"')
        if (kind, name) in self.repos:
            url = self.url(self.repos[kind, name])
            raise Answer(409, {"error": "You already created this repo", "url": url})
        self.add_repo(name, {}, kind, private=wanted.get("private") or wanted.get("visibility") == "private")
        return Answer(200, {"url": self.url(self.repos[kind, name]), "name": name})

    def delete(self, request: Request, query: dict) -> Answer:
        wanted = json.loads(request.body)
        name = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]
        del self.repos[self.open(request, wanted.get("type") or "model", name, write=True).kind, name]
        return Answer(200, {})

    def settings(self, request: Request, query: dict, kinds: str, name: str) -> Answer:
        repo, wanted = self.open(request, KINDS[kinds], name, write=True), json.loads(request.body)
        repo.private = (
            wanted.get("visibility", "private" if wanted.get("private", repo.private) else "public") == "private"
        )
        repo.gated = bool(wanted.get("gated", repo.gated))
        return Answer(200, {})

    def validate(self, request: Request, query: dict) -> Answer:
        errors = [{"message": message} for message in faults_of(json.loads(request.body)["content"])]
        return Answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def info(self, request: Request, query: dict, kinds: str, name: str, revision: str = "main") -> Answer:
        repo = self.open(request, KINDS[kinds], name)
        commit = self.at(repo, revision or "main")
        card = card_of(commit)
        siblings = [
            {"rfilename": p, **(self._blob(p, c) if "blobs" in query else {})} for p, c in sorted(commit.files.items())
        ]
        found = {
            "_id": "0" * 24,
            "id": repo.name,
            "author": repo.name.split("/")[0],
            "sha": commit.sha,
            "private": repo.private,
            "gated": "manual" if repo.gated else False,
            "disabled": False,
            "tags": card.get("tags", []),
            "downloads": 0,
            "likes": 0,
            "createdAt": NOW,
            "lastModified": NOW,
            "siblings": siblings,
            "cardData": card,
        }
        if repo.kind == "model":
            found |= {"modelId": repo.name} | {k: card[k] for k in ("pipeline_tag", "library_name") if k in card}
        return Answer(200, found)

    @staticmethod
    def _blob(path: str, content: bytes) -> dict:
        found = {"size": len(content), "blobId": git_sha(content)}
        lfs = {"sha256": sha256(content), "size": len(content), "pointerSize": 134}
        return found | ({"lfs": lfs} if is_lfs(path, len(content)) else {})

    @staticmethod
    def _entry(path: str, content: bytes) -> dict:
        found = {"type": "file", "path": path, "size": len(content), "oid": git_sha(content)}
        lfs = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
        return found | ({"lfs": lfs} if is_lfs(path, len(content)) else {})

    def tree(self, request: Request, query: dict, kinds: str, name: str, revision: str, path: str = "") -> Answer:
        commit = self.at(self.open(request, KINDS[kinds], name), revision)
        recursive, below = query.get("recursive", "").lower() in ("true", "1"), f"{path}/" if path else ""
        found: dict[str, dict] = {}
        for file, content in sorted(commit.files.items()):
            if not file.startswith(below):
                continue
            parts = file.removeprefix(below).split("/")
            for depth in range(1, len(parts)) if recursive else range(1, min(2, len(parts))):
                folder = below + "/".join(parts[:depth])
                found[folder] = {"type": "directory", "path": folder, "size": 0, "oid": git_sha(folder.encode())}
            if recursive or len(parts) == 1:
                found[file] = self._entry(file, content)
        if path and not found:
            raise refuse(404, ERRORS["EntryNotFound"], "EntryNotFound", **{"X-Repo-Commit": commit.sha})
        start = int(query.get("cursor", 0))
        page, rest = list(found.values())[start : start + self.page_size], len(found) - start - self.page_size
        headers = {}
        if rest > 0:
            here = urlsplit(request.path).path
            more = "&".join(f"{k}={quote(v)}" for k, v in {**query, "cursor": str(start + self.page_size)}.items())
            headers["Link"] = f'<{self.endpoint}{here}?{more}>; rel="next"'
        return Answer(200, page, headers)

    def paths_info(self, request: Request, query: dict, kinds: str, name: str, revision: str) -> Answer:
        commit, body = self.at(self.open(request, KINDS[kinds], name), revision), request.body.decode()
        is_json = "json" in request.headers.get("content-type", "")
        paths = json.loads(body)["paths"] if is_json else parse_qs(body).get("paths", [])
        return Answer(200, [self._entry(p, commit.files[p]) for p in paths if p in commit.files])

    def refs(self, request: Request, query: dict, kinds: str, name: str) -> Answer:
        repo = self.open(request, KINDS[kinds], name)
        listed: dict[str, list] = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
        for ref, sha in repo.refs.items():
            group = (
                "branches"
                if ref.startswith("refs/heads/")
                else "tags"
                if ref.startswith("refs/tags/")
                else "pullRequests"
            )
            listed[group].append({"name": ref.split("/", 2)[2], "ref": ref, "targetCommit": sha})
        if "include_prs" not in query:
            del listed["pullRequests"]
        return Answer(200, listed)

    def commits(self, request: Request, query: dict, kinds: str, name: str, revision: str) -> Answer:
        repo = self.open(request, KINDS[kinds], name)
        shas = self.history(name, self.at(repo, revision).sha, repo.kind)
        return Answer(
            200, [{"id": s, "title": repo.commits[s].message, "message": "", "authors": [], "date": NOW} for s in shas]
        )

    def branch(self, request: Request, query: dict, kinds: str, name: str, ref: str) -> Answer:
        repo, wanted = self.open(request, KINDS[kinds], name, write=True), json.loads(request.body or b"{}")
        return self._ref(repo, f"refs/heads/{ref}", wanted.get("startingPoint") or "main", request.method)

    def tag(self, request: Request, query: dict, kinds: str, name: str, ref: str) -> Answer:
        repo, wanted = self.open(request, KINDS[kinds], name, write=True), json.loads(request.body or b"{}")
        label = ref if request.method == "DELETE" else wanted["tag"]
        return self._ref(repo, f"refs/tags/{label}", ref, request.method)

    def _ref(self, repo: Repo, ref: str, target: str, method: str) -> Answer:
        if method == "DELETE":
            if repo.refs.pop(ref, None) is None:
                raise refuse(404, f"{ERRORS['RevisionNotFound']}: {ref}", "RevisionNotFound")
        elif ref in repo.refs:
            raise refuse(409, f"Reference {ref} already exists")
        else:
            repo.refs[ref] = self.at(repo, target).sha
        return Answer(200, {})

    def preupload(self, request: Request, query: dict, kinds: str, name: str, revision: str) -> Answer:
        repo = self.open(request, KINDS[kinds], name, write="create_pr" not in query)
        files, commit = [], self.at(repo, revision)
        for wanted in json.loads(request.body)["files"]:
            path, lfs = wanted["path"], is_lfs(wanted["path"], wanted["size"])
            known = commit.files.get(path)
            oid = {} if known is None else {"oid": sha256(known) if lfs else git_sha(known)}
            files.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, **oid})
        return Answer(200, {"files": files})

    def lfs_batch(self, request: Request, query: dict, prefix: str, name: str) -> Answer:
        repo = self.open(request, "dataset" if prefix else "model", name)
        objects = []
        for wanted in json.loads(request.body)["objects"]:
            actions = {
                "upload": {"href": f"{self.storage}/upload/{wanted['oid']}"},
                "verify": {"href": f"{self.url(repo)}.git/info/lfs/verify"},
            }
            objects.append(wanted | ({} if wanted["oid"] in self.stored else {"actions": actions}))
        return Answer(200, {"transfer": "basic", "objects": objects})

    def lfs_verify(self, request: Request, query: dict, prefix: str, name: str) -> Answer:
        wanted = json.loads(request.body)
        right = len(self.stored.get(wanted["oid"], b"")) == wanted["size"]
        return Answer(200, {}) if right else refuse(404, "Object was not uploaded")

    def store(self, request: Request, query: dict, oid: str) -> Answer:
        if sha256(request.body) != oid:
            return refuse(400, "content does not match its name")
        self.stored[oid] = request.body
        return Answer(200, {}, {"ETag": f'"{oid}"'})

    def fetch(self, request: Request, query: dict, oid: str) -> Answer:
        return (
            self._content(self.stored[oid], request, {"ETag": f'"{oid}"'})
            if oid in self.stored
            else refuse(404, "gone")
        )

    def make_commit(self, request: Request, query: dict, kinds: str, name: str, revision: str) -> Answer:
        proposes = "create_pr" in query
        repo = self.open(request, KINDS[kinds], name, write=not proposes)
        parent = self.at(repo, revision)
        lines = [json.loads(line) for line in request.body.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit") not in (None, parent.sha):
            raise refuse(412, "A commit has happened since. Please refresh and try again.")
        files = dict(parent.files)
        for line in lines:
            self._apply(files, line["key"], line["value"])
        ref, more = f"refs/heads/{revision}" if not revision.startswith("refs/") else revision, {}
        if proposes:
            number = self._request(repo, header["summary"], "open")
            ref, more = f"refs/pr/{number}", {"pullRequestUrl": f"{self.url(repo)}/discussions/{number}"}
        commit = repo.add(files, header["summary"], ref, parent.sha)
        return Answer(200, {"commitOid": commit.sha, "commitUrl": f"{self.url(repo)}/commit/{commit.sha}", **more})

    def _apply(self, files: dict[str, bytes], kind: str, value: dict) -> None:
        if kind == "file":
            content = value["content"].encode()
            files[value["path"]] = base64.b64decode(content) if value.get("encoding") == "base64" else content
        elif kind == "lfsFile":
            if value["oid"] not in self.stored:
                raise refuse(400, f"LFS object {value['oid']} was not uploaded")
            files[value["path"]] = self.stored[value["oid"]]
        elif kind == "deletedFile":
            files.pop(value["path"], None)
        elif kind == "deletedFolder":
            for path in [p for p in files if p.startswith(value["path"].rstrip("/") + "/")]:
                del files[path]

    def _request(self, repo: Repo, title: str, status: str) -> int:
        number = len(repo.requests) + 1
        repo.requests[number] = {"num": number, "title": title, "status": status, "createdAt": NOW}
        return number

    def discuss(self, request: Request, query: dict, kinds: str, name: str) -> Answer:
        repo, wanted = self.open(request, KINDS[kinds], name), json.loads(request.body)
        number = self._request(repo, wanted["title"], "draft" if wanted.get("pullRequest") else "open")
        if wanted.get("pullRequest"):
            repo.refs[f"refs/pr/{number}"] = repo.refs["refs/heads/main"]
        return Answer(200, {"num": number, "pullRequest": wanted.get("pullRequest")})

    def discussion(self, request: Request, query: dict, kinds: str, name: str, number: str, act: str = "") -> Answer:
        repo = self.open(request, KINDS[kinds], name, write=bool(act))
        found, ref = repo.requests.get(int(number)), f"refs/pr/{number}"
        if found is None:
            return refuse(404, "no such discussion")
        if act == "merge":
            head = repo.commits[repo.refs[ref]]
            repo.add(head.files, found["title"], "refs/heads/main", repo.refs["refs/heads/main"])
        if act:
            found["status"] = "merged" if act == "merge" else json.loads(request.body).get("status", found["status"])
        more = {
            "author": {"name": "somebody"},
            "repo": {"name": repo.name, "type": repo.kind},
            "isPullRequest": ref in repo.refs,
            "changes": {"base": "refs/heads/main"},
            "filesWithConflicts": [],
            "events": [],
            "diff": "",
        }
        return Answer(200, found | more)

    def auth_check(self, request: Request, query: dict, kinds: str, name: str, write: str = "") -> Answer:
        self._check_gate(request, self.open(request, KINDS[kinds], name, write=bool(write)))
        return Answer(200, {})

    def _check_gate(self, request: Request, repo: Repo) -> None:
        user = self.user_of(request)
        if repo.gated and not (user and (user.name in repo.granted or repo.name.split("/")[0] in user.namespaces)):
            status = 401 if user is None else 403
            raise refuse(status, f"Access to {repo.kind} {repo.name} is restricted.", "GatedRepo")

    def resolve(self, request: Request, query: dict, prefix: str, name: str, revision: str, path: str) -> Answer:
        kind = {"": "model", "datasets": "dataset", "spaces": "space"}[prefix.strip("/")]
        repo = self.open(request, kind, name)
        commit = self.at(repo, revision)
        self._check_gate(request, repo)
        if path not in commit.files:
            raise refuse(404, ERRORS["EntryNotFound"], "EntryNotFound", **{"X-Repo-Commit": commit.sha})
        content, headers = commit.files[path], {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
        if not is_lfs(path, len(content)):
            return self._content(content, request, headers | {"ETag": f'"{git_sha(content)}"'})
        oid = sha256(content)
        self.stored[oid] = content
        headers |= {
            "Location": f"{self.storage}/object/{oid}",
            "X-Linked-Etag": f'"{oid}"',
            "X-Linked-Size": str(len(content)),
            "ETag": f'"{git_sha(content)}"',
        }
        return Answer(302, b"", headers)

    @staticmethod
    def _content(content: bytes, request: Request, headers: dict[str, str]) -> Answer:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
        if not wanted:
            return Answer(200, content, headers)
        start, stop = int(wanted[1]), int(wanted[2] or len(content) - 1) + 1
        return Answer(
            206,
            content[start:stop],
            headers | {"Content-Range": f"bytes {start}-{min(stop, len(content)) - 1}/{len(content)}"},
        )


_REPO = r"/api/(?P<kinds>models|datasets|spaces)/(?P<name>[^/]+/[^/]+)"
_FILES = r"/(?P<prefix>datasets/|spaces/|)(?P<name>[^/]+/[^/]+)"
_ROUTES = [
    (method, re.compile(pattern), handler)
    for method, pattern, handler in (
        ("GET", "/api/whoami-v2", HubServer.whoami),
        ("POST", "/api/repos/create", HubServer.create),
        ("DELETE", "/api/repos/delete", HubServer.delete),
        ("POST", "/api/validate-yaml", HubServer.validate),
        ("PUT", _REPO + "/settings", HubServer.settings),
        ("GET", _REPO + "/auth-check(?P<write>/write)?", HubServer.auth_check),
        ("GET", _REPO + "/refs", HubServer.refs),
        ("GET", _REPO + "/commits/(?P<revision>[^/]+)", HubServer.commits),
        ("POST", _REPO + "/branch/(?P<ref>.+)", HubServer.branch),
        ("DELETE", _REPO + "/branch/(?P<ref>.+)", HubServer.branch),
        ("POST", _REPO + "/tag/(?P<ref>.+)", HubServer.tag),
        ("DELETE", _REPO + "/tag/(?P<ref>.+)", HubServer.tag),
        ("GET", _REPO + "/tree/(?P<revision>[^/]+)(/(?P<path>.+))?", HubServer.tree),
        ("POST", _REPO + "/paths-info/(?P<revision>[^/]+)", HubServer.paths_info),
        ("POST", _REPO + "/preupload/(?P<revision>[^/]+)", HubServer.preupload),
        ("POST", _REPO + "/commit/(?P<revision>[^/]+)", HubServer.make_commit),
        ("POST", _REPO + "/discussions", HubServer.discuss),
        ("*", _REPO + r"/discussions/(?P<number>\d+)(/(?P<act>merge|status|comment))?", HubServer.discussion),
        ("GET", _REPO + "(/revision/(?P<revision>[^/]+))?", HubServer.info),
        ("POST", _FILES + r"\.git/info/lfs/objects/batch", HubServer.lfs_batch),
        ("POST", _FILES + r"\.git/info/lfs/verify", HubServer.lfs_verify),
        ("HEAD", _FILES + "/resolve/(?P<revision>[^/]+)/(?P<path>.+)", HubServer.resolve),
        ("GET", _FILES + "/resolve/(?P<revision>[^/]+)/(?P<path>.+)", HubServer.resolve),
    )
]
_STORAGE = [
    ("PUT", re.compile("/upload/(?P<oid>[0-9a-f]{64})"), HubServer.store),
    ("HEAD", re.compile("/object/(?P<oid>[0-9a-f]{64})"), HubServer.fetch),
    ("GET", re.compile("/object/(?P<oid>[0-9a-f]{64})"), HubServer.fetch),
]


class _Listener(ThreadingHTTPServer):
    """Keeps its connections, to close those that clients hold open."""

    daemon_threads, block_on_close, request_queue_size = True, False, 64

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.open_sockets: set[socket.socket] = set()

    def process_request(self, request: socket.socket, client_address: object) -> None:
        self.open_sockets.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: socket.socket) -> None:
        self.open_sockets.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no news."""

    def hang_up(self) -> None:
        for connection in list(self.open_sockets):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def _handler(hub: HubServer, host: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def _read(self) -> bytes:
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def _reset(self) -> None:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True

        def _answer(self) -> None:
            fault = hub.next_fault(self.command, self.path)
            if fault is not None and fault.act == "drop":
                if {"Content-Length", "Transfer-Encoding"} & set(self.headers):  # some of the body has come
                    self.rfile.read1(1024)
                return self._reset()
            request = Request(
                self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, self._read(), host
            )
            hub.requests.append(request)
            if fault is not None and fault.act == "delay":
                time.sleep(fault.seconds)
            if fault is not None and fault.act == "fail":
                answer = Answer(fault.status, fault.body, {"Content-Type": "application/json", **fault.headers})
            elif host == "storage" and "authorization" in request.headers:
                hub.leaks.append(self.path)
                answer = refuse(400, "storage was shown a token")
            else:
                answer = hub.route(request)
            if fault is not None and fault.act == "drop after":
                return self._reset()
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body)
            return None

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _answer

        def log_message(self, *args: object) -> None:
            """Silent: `requests` holds them all."""

    return Handler
