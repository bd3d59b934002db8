"""A stand-in for the Hugging Face Hub: a server on this machine that answers as the Hub does and remembers what it was
asked."""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

BIG = (".safetensors", ".msgpack", ".bin")
"""Suffixes of files that the Hub keeps elsewhere, and sends one there for."""


@dataclass(frozen=True)
class Repository:
    """A model repository: a folder for each commit, and names for commits."""

    commits: Mapping[str, Path]
    refs: Mapping[str, str]
    """Branches and tags."""
    token: str = ""
    """Who does not send it is refused."""

    def commit(self, revision: str) -> str | None:
        """The commit that a branch, tag or commit names."""
        found = self.refs.get(revision, revision)
        return found if found in self.commits else None


@dataclass(frozen=True)
class Request:
    """What was asked."""

    method: str
    path: str
    """As it was sent: a slash in a revision is quoted."""
    headers: Mapping[str, str]
    """By lower-case name."""

    @property
    def authorization(self) -> str:
        """What the sender shows for itself."""
        return self.headers.get("authorization", "")


@dataclass
class Reply:
    """What is answered."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass
class StubHub:
    """What the server has, and what it was asked."""

    port: int
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    garbage: bytes | None = None
    """If set, all that is ever answered, as it is."""
    blobs: dict[str, bytes] = field(default_factory=dict)
    """Big files by hash."""

    @property
    def url(self) -> str:
        """What HF_ENDPOINT is."""
        return f"http://127.0.0.1:{self.port}"

    def reset(self) -> None:
        """Forget what was asked and what was to be answered."""
        self.requests.clear()
        self.garbage = None

    def fetched(self) -> set[str]:
        """The files that were asked for, as paths in their repositories."""
        paths = [request.path for request in self.requests if "/resolve/" in request.path]
        # /owner/name/resolve/revision/file
        return {unquote(path.split("/", 5)[5]) for path in paths}

    def reply(self, request: Request) -> Reply:
        """What the Hub answers."""
        words = [unquote(word) for word in request.path.strip("/").split("/")]
        if words[0] == "blobs":
            return Reply(200, body=self.blobs[words[1]])
        if words[:2] == ["api", "models"] and words[4:5] in (["revision"], ["tree"]):
            name, kind, revision, file = "/".join(words[2:4]), words[4], words[5], ""
        elif words[2:3] == ["resolve"]:
            name, kind, revision, file = "/".join(words[:2]), "resolve", words[3], "/".join(words[4:])
        else:
            return _refusal(404, "", "no such page")
        repository = self.repositories.get(name)
        if repository is None:
            return _refusal(404 if request.authorization else 401, "RepoNotFound", "Repository not found")
        if repository.token and request.authorization != f"Bearer {repository.token}":
            said = f"Access to model {name} is restricted"
            return _refusal(403 if request.authorization else 401, "GatedRepo", said)
        commit = repository.commit(revision)
        if commit is None:
            return _refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        folder = repository.commits[commit]
        if kind == "revision":
            return _json({"id": name, "sha": commit, "siblings": [{"rfilename": path} for path in _paths(folder)]})
        if kind == "tree":
            return _json([self._entry(folder, path) for path in _paths(folder)])
        if not (folder / file).is_file():
            return _refusal(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        data = (folder / file).read_bytes()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_sha1(data)}"'}
        if not file.endswith(BIG):
            return Reply(200, headers, data)
        digest = hashlib.sha256(data).hexdigest()
        self.blobs[digest] = data
        linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))}
        # Another host as far as the client can tell.
        return Reply(302, {**headers, **linked, "Location": f"http://localhost:{self.port}/blobs/{digest}"})

    def _entry(self, folder: Path, path: str) -> dict[str, object]:
        data = (folder / path).read_bytes()
        entry: dict[str, object] = {"type": "file", "path": path, "size": len(data), "oid": _sha1(data)}
        if path.endswith(BIG):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return entry


def _paths(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _sha1(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def _json(value: object) -> Reply:
    return Reply(200, {"Content-Type": "application/json"}, json.dumps(value).encode())


def _refusal(status: int, code: str, said: str, headers: Mapping[str, str] | None = None) -> Reply:
    body = json.dumps({"error": said}).encode()
    return Reply(status, {"X-Error-Code": code, "X-Error-Message": quote(said, safe=" :/"), **(headers or {})}, body)


@contextmanager
def serve() -> Iterator[StubHub]:
    """A running hub, on a port that is free."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            asked = Request(
                self.command, urlsplit(self.path).path, {name.lower(): value for name, value in self.headers.items()}
            )
            hub.requests.append(asked)
            if hub.garbage is not None:
                self.close_connection = True
                self.wfile.write(hub.garbage)
                return
            reply = hub.reply(asked)
            self.send_response(reply.status)
            for name, value in {**reply.headers, "Content-Length": str(len(reply.body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(reply.body)

        do_HEAD = do_GET  # noqa: N815  http.server's name

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = StubHub(server.server_address[1])
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
