"""A Hub on 127.0.0.1 for the real huggingface_hub and timm: repositories in memory, large files on a second origin.

Faults are injected with `hub.fault(pattern, action)`: the action sees every request whose "METHOD /path" the pattern
finds, and may answer it, delay it, or spoil what is answered.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKENS = {"hf_aliceSecretToken": "alice", "hf_bobSecretToken": "bob"}
INVALID_TOKEN = "Invalid credentials in Authorization header"


@dataclass
class Blob:
    data: bytes
    lfs: bool

    @cached_property  # of 1.7 GB it takes seconds, and every answer about the file has it twice
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def oid(self) -> str:
        data = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0%s" % (len(data), data)).hexdigest()

    @property
    def pointer(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()

    def describe(self) -> dict[str, Any]:
        size = len(self.data)
        lfs = {"lfs": {"sha256": self.sha256, "size": size, "pointerSize": len(self.pointer)}} if self.lfs else {}
        return {"size": size, "blobId": self.oid, **lfs}


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)

    def commit(self, ref: str, files: dict[str, Blob], message: str) -> str:
        sha = hashlib.sha1(f"{ref} {len(self.commits)} {sorted((p, b.oid) for p, b in files.items())}".encode())
        self.commits[sha.hexdigest()] = files
        self.refs[ref] = sha.hexdigest()
        self.log.append(message)
        return sha.hexdigest()

    def files(self, ref: str = "main") -> dict[str, bytes]:
        return {path: blob.data for path, blob in self.commits[self.refs.get(ref, ref)].items()}


class Answer(Exception):
    """An answer given from anywhere: raised, so that nothing else is done with the request."""

    def __init__(self, status: int, body: Any = None, **headers: str):
        self.status, self.body = status, body
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def refuse(status: int, code: str = "", message: str = "") -> Answer:
    headers = {"X_Error_Code": code, "X_Error_Message": message}
    return Answer(status, {"error": message}, **{k: v for k, v in headers.items() if v})


Action = Callable[["Handler"], None]


def answer(status: int, code: str = "", message: str = "", **headers: str) -> Action:
    def act(handler: "Handler") -> None:
        refusal = refuse(status, code, message)
        refusal.headers |= {name.replace("_", "-"): value for name, value in headers.items()}
        raise refusal

    return act


def cut(handler: "Handler") -> None:
    """Close the connection in the middle of the body."""
    handler.spoil = lambda body: body[: len(body) // 2]


def flip(handler: "Handler") -> None:
    """One byte of the body is another one, at the same length."""
    handler.spoil = lambda body: body[:-1] + bytes([body[-1] ^ 1])


class Hub:
    """The server's state, and what the tests ask and tell it."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.stored: dict[str, bytes] = {}  # large files, by sha256
        self.parts: dict[tuple[str, int], bytes] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []  # of this origin, "METHOD /path?query" and headers
        self.storage_requests: list[tuple[str, dict[str, str]]] = []  # of the other one
        self.faults: list[list[Any]] = []
        self.regular = False  # all files inside the commit, none by LFS
        self.drop_commit = False  # as a proxy that passes on no header of the Hub's own
        self.ignore_case = False  # answer a name in another case about the repository that is meant
        self.redirect = False  # large files are downloaded from the other origin
        self.part_size: int | None = None  # of multipart uploads
        self.lock = threading.RLock()
        self.url = self.storage_url = ""
        self.stop: Callable[[], None]
        self.slept: list[float] = []  # how long the client would have waited before it tried again

    def fault(self, pattern: str, action: Action, times: int = 1) -> None:
        self.faults.append([re.compile(pattern), action, times])

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, line)) for line, _ in self.requests)

    def publish(self, repo_id: str, files: dict[str, bytes], ref: str = "main", **kwargs: bool) -> str:
        """A commit that did not come through the server; the id of the commit."""
        repo = self.repos.setdefault(repo_id, Repo(**kwargs))
        blobs = {path: Blob(data, self.is_large(path)) for path, data in files.items()}
        return repo.commit(ref, blobs, "published by the test")

    def is_large(self, path: str) -> bool:
        return path.endswith((".safetensors", ".bin")) and not self.regular


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub
    storage = False  # whether this is the other origin, which keeps the large files

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle_any(self) -> None:
        hub, self.spoil, self.extra = self.hub, None, {}
        self.content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        line = f"{self.command} {self.path}"
        (hub.storage_requests if self.storage else hub.requests).append((line, dict(self.headers)))
        try:
            with hub.lock:
                due = [fault for fault in hub.faults if fault[2] > 0 and fault[0].search(line)]
                for fault in due:
                    fault[2] -= 1
            for fault in due:
                fault[1](self)
            url = urlsplit(self.path)
            self.query = {name: values[0] for name, values in parse_qs(url.query).items()}
            for method, pattern, name in STORAGE_ROUTES if self.storage else ROUTES:
                if self.command in method.split("|") and (match := re.fullmatch(pattern, url.path)):
                    with hub.lock:
                        getattr(self, name)(**{k: unquote(v) for k, v in match.groupdict().items()})
            raise Answer(404, {"error": f"no route for {line}"})
        except Answer as answer:
            self.send(answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def send(self, answer: Answer) -> None:
        body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        length = len(body)
        if self.spoil:
            body = self.spoil(body)
            self.close_connection = len(body) != length
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(length), **answer.headers, **self.extra}.items():
            if not (self.hub.drop_commit and name == "X-Repo-Commit"):
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    # -- who asks, and for what ------------------------------------------------------------------------------------

    def user(self) -> str | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        if (user := TOKENS.get(header.removeprefix("Bearer "))) is None:
            raise refuse(401, message=INVALID_TOKEN)
        return user

    def repo(self, repo_id: str, write: bool = False, content: bool = False) -> Repo:
        user, repo = self.user(), self.hub.repos.get(repo_id)
        owns = user is not None and repo_id.startswith(f"{user}/")
        if repo is None or (repo.private and not owns):
            raise refuse(401 if user is None else 404, "RepoNotFound", "Repository not found")
        if content and repo.gated and not owns:
            raise refuse(401 if user is None else 403, "GatedRepo", f"Access to model {repo_id} is restricted")
        if write and not owns:
            raise refuse(401 if user is None else 403, message="You don't have the rights for this")
        return repo

    def tree(self, repo: Repo, rev: str) -> tuple[str, dict[str, Blob]]:
        sha = repo.refs.get(rev, rev)
        if sha not in repo.commits:
            raise refuse(404, "RevisionNotFound", f"Invalid rev id: {rev}")
        return sha, repo.commits[sha]

    # -- the API ---------------------------------------------------------------------------------------------------

    def whoami(self) -> None:
        user = self.user()
        if user is None:
            raise refuse(401, message=INVALID_TOKEN)
        raise Answer(200, {"type": "user", "name": user, "orgs": [], "auth": {}})

    def create(self) -> None:
        asked, user = json.loads(self.content), self.user()
        if user is None:
            raise refuse(401, message=INVALID_TOKEN)
        owner = asked.get("organization") or user
        repo_id = f"{owner}/{asked['name']}"
        body = {"url": f"{self.hub.url}/{repo_id}"}
        if repo_id in self.hub.repos:
            raise Answer(409, body | {"error": "You already created this model repo"})
        if owner != user:
            raise refuse(403, message=f"You don't have the rights to create a model under the namespace {owner}")
        repo = self.hub.repos[repo_id] = Repo(private=asked.get("visibility") == "private")
        repo.commit("main", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)}, "initial commit")
        raise Answer(200, body)

    def validate_yaml(self) -> None:
        bad = [] if "license: " in json.loads(self.content)["content"] else [{"message": '"license" is required'}]
        raise Answer(400 if bad else 200, {"errors": bad, "warnings": []})

    def info(self, repo: str, rev: str = "main") -> None:
        if self.hub.ignore_case:
            repo = {name.lower(): name for name in self.hub.repos}.get(repo.lower(), repo)
        found = self.repo(repo)
        sha, files = self.tree(found, rev)
        siblings = [{"rfilename": path, **blob.describe()} for path, blob in files.items()]
        raise Answer(200, {"id": repo, "sha": sha, "private": found.private, "gated": found.gated, "siblings": siblings,
                           "lastModified": "2026-01-01T00:00:00.000Z", "tags": []})  # fmt: skip

    def branch(self, repo: str, name: str) -> None:
        found = self.repo(repo, write=True)
        if name.startswith("refs/"):
            raise refuse(400, message=f"Invalid reference for a branch: {name}")
        if name in found.refs:
            raise refuse(409, message="Reference already exists")
        asked = json.loads(self.content or b"{}")
        found.refs[name], _ = self.tree(found, asked.get("startingPoint", "main"))
        raise Answer(200, {})

    def preupload(self, repo: str, rev: str) -> None:
        pr = "create_pr" in self.query
        _, files = self.tree(self.repo(repo, write=not (pr or rev.startswith("refs/pr/"))), rev)
        modes = []
        for path in (file["path"] for file in json.loads(self.content)["files"]):
            mode = {"path": path, "uploadMode": "lfs" if self.hub.is_large(path) else "regular", "shouldIgnore": False}
            if path in files:
                mode["oid"] = files[path].sha256 if files[path].lfs else files[path].oid
            modes.append(mode)
        raise Answer(200, {"files": modes})

    def lfs_batch(self, repo: str) -> None:
        self.repo(repo)
        asked = json.loads(self.content)["objects"]
        raise Answer(200, {"transfer": "basic", "objects": [self.lfs_actions(repo, **object) for object in asked]})

    def lfs_actions(self, repo: str, oid: str, size: int) -> dict[str, Any]:
        if oid in self.hub.stored:
            return {"oid": oid, "size": size}
        header: dict[str, str] = {}
        href = f"{self.hub.storage_url}/{oid}"
        if self.hub.part_size:
            header = {"chunk_size": str(self.hub.part_size)}
            header |= {str(i + 1): f"{href}/{i + 1}" for i in range(-(-size // self.hub.part_size))}
            href = f"{self.hub.url}/complete/{oid}"
        verify = {"href": f"{self.hub.url}/{repo}.git/info/lfs/verify"}
        return {"oid": oid, "size": size, "actions": {"upload": {"href": href, "header": header}, "verify": verify}}

    def lfs_complete(self, oid: str) -> None:
        parts = [part["partNumber"] for part in json.loads(self.content)["parts"]]
        self.store(oid, b"".join(self.hub.parts.pop((oid, number)) for number in parts))

    def lfs_verify(self, repo: str) -> None:
        asked = json.loads(self.content)
        ok = len(self.hub.stored.get(asked["oid"], b"")) == asked["size"]
        raise Answer(200, {}) if ok else refuse(422, message="the file did not arrive")

    def commit(self, repo: str, rev: str) -> None:
        pr = "create_pr" in self.query
        found = self.repo(repo, write=not (pr or rev.startswith("refs/pr/")))
        sha, files = self.tree(found, rev)
        files, message = dict(files), ""
        for line in self.content.splitlines():
            key, value = (entry := json.loads(line))["key"], entry["value"]
            if key == "header":
                message = value["summary"]
                if value.get("parentCommit") not in (None, sha):
                    raise refuse(412, message="A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                if value["oid"] not in self.hub.stored:
                    raise refuse(400, message=f"no large file {value['oid']}")
                files[value["path"]] = Blob(self.hub.stored[value["oid"]], True)
            elif key == "deletedFile":
                del files[value["path"]]
        number = 1 + sum(ref.startswith("refs/pr/") for ref in found.refs)
        oid = found.commit(f"refs/pr/{number}" if pr else rev, files, message)
        body = {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}"}
        if pr:
            body["pullRequestUrl"] = f"{self.hub.url}/{repo}/discussions/{number}"
        raise Answer(200, body)

    def resolve(self, repo: str, rev: str, path: str) -> None:
        sha, files = self.tree(self.repo(repo, content=True), rev)
        if path not in files:
            raise Answer(404, {}, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found", X_Repo_Commit=sha)
        blob = files[path]
        headers = {"X_Repo_Commit": sha, "ETag": f'"{blob.sha256 if blob.lfs else blob.oid}"'}
        if blob.lfs:
            headers |= {"X_Linked_Etag": f'"{blob.sha256}"', "X_Linked_Size": str(len(blob.data))}
            if self.hub.redirect:
                self.hub.stored[blob.sha256] = blob.data
                raise Answer(302, b"", Location=f"{self.hub.storage_url}/{blob.sha256}", **headers)
        self.send_bytes(blob.data, **headers)

    def send_bytes(self, data: bytes, **headers: str) -> None:
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(match[1]), int(match[2] or len(data) - 1)
            headers["Content_Range"] = f"bytes {start}-{end}/{len(data)}"
            raise Answer(206, data[start : end + 1], **headers)
        raise Answer(200, data, **headers)

    # -- the other origin ------------------------------------------------------------------------------------------

    def store(self, oid: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != oid:
            raise refuse(400, message="the content is not what its name says")
        self.hub.stored[oid] = data
        raise Answer(200, {})

    def put(self, oid: str) -> None:
        self.store(oid, self.content)

    def put_part(self, oid: str, part: str) -> None:
        self.hub.parts[oid, int(part)] = self.content
        raise Answer(200, {}, ETag=f'"{hashlib.md5(self.content).hexdigest()}"')

    def get(self, oid: str) -> None:
        self.send_bytes(self.hub.stored[oid], ETag=f'"{oid}"')


_REPO = r"(?P<repo>[^/]+/[^/]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", "whoami"),
    ("POST", "/api/repos/create", "create"),
    ("POST", "/api/validate-yaml", "validate_yaml"),
    ("GET", f"/api/models/{_REPO}", "info"),
    ("GET", f"/api/models/{_REPO}/revision/(?P<rev>[^/]+)", "info"),
    ("POST", f"/api/models/{_REPO}/branch/(?P<name>[^/]+)", "branch"),
    ("POST", f"/api/models/{_REPO}/preupload/(?P<rev>[^/]+)", "preupload"),
    ("POST", f"/api/models/{_REPO}/commit/(?P<rev>[^/]+)", "commit"),
    ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
    ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/verify", "lfs_verify"),
    ("POST", "/complete/(?P<oid>[0-9a-f]+)", "lfs_complete"),
    ("GET|HEAD", f"/{_REPO}/resolve/(?P<rev>[^/]+)/(?P<path>.+)", "resolve"),
]
STORAGE_ROUTES = [
    ("PUT", "/(?P<oid>[0-9a-f]+)", "put"),
    ("PUT", "/(?P<oid>[0-9a-f]+)/(?P<part>[0-9]+)", "put_part"),
    ("GET|HEAD", "/(?P<oid>[0-9a-f]+)", "get"),
]


class Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that is gone; what the server should not raise fails the client's request


@contextmanager
def running():
    """A Hub that answers, and that has stopped afterwards."""
    hub, servers = Hub(), []

    def stop() -> None:
        while servers:
            servers[-1].shutdown()
            servers.pop().server_close()

    for storage in (False, True):
        handler = type("BoundHandler", (Handler,), {"hub": hub, "storage": storage})
        servers.append(Server(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    hub.stop = stop
    # Two names, as the Hub's client tells origins apart by them.
    hub.url, hub.storage_url = (
        f"http://{name}:{server.server_address[1]}"
        for name, server in zip(("127.0.0.1", "localhost"), servers, strict=True)
    )
    try:
        yield hub
    finally:
        stop()
