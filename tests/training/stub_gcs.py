"""A stand-in for Google Cloud Storage: a server on this machine that keeps objects in memory and answers its JSON API
as far as gcsfs, TensorStore and google-cloud-storage ask it."""

import base64
import email
import email.policy
import functools
import json
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import fsspec
import gcsfs.core
import google_crc32c
import pytest
from etils.epath import backend
from orbax.checkpoint._src.path import gcs_utils


@dataclass(frozen=True)
class Object:
    """An object and its generation."""

    data: bytes
    generation: int
    when: str


@dataclass
class Reply:
    """What is answered."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class StubGCS:
    """The buckets, what was asked, and what is refused."""

    port: int
    objects: dict[str, Object] = field(default_factory=dict)
    """By BUCKET/NAME."""
    uploads: dict[str, tuple[str, bytearray]] = field(default_factory=dict)
    """Resumable ones that have begun: key and what has come."""
    written: list[str] = field(default_factory=list)
    """Keys in the order in which they were written."""
    buckets: tuple[str, ...] = ("bucket",)
    refused: str = ""
    """A part of the keys that may not be written."""
    lock: threading.RLock = field(default_factory=threading.RLock)
    generation: int = 0

    @property
    def url(self) -> str:
        """What STORAGE_EMULATOR_HOST is."""
        return f"http://127.0.0.1:{self.port}"

    def text(self, key: str) -> str:
        """What an object says."""
        return self.objects[key].data.decode()

    def reply(self, method: str, url: str, headers: dict[str, str], body: bytes) -> Reply:
        """What the service answers."""
        parts, query = urlsplit(url), {k: v[-1] for k, v in parse_qs(urlsplit(url).query, True).items()}
        words = parts.path.strip("/").split("/")
        kind, words = ("upload", words[1:]) if words[0] in ("upload", "resumable") else ("", words)
        words = words[1:] if words[0] == "download" else words
        if words[:2] != ["storage", "v1"] or words[2:3] != ["b"]:
            return Reply(404)
        bucket = unquote(words[3]) if len(words) > 3 else ""
        if bucket not in self.buckets:
            return _json({"error": {"code": 404, "message": "no such bucket"}}, 404)
        if len(words) == 4:
            return _json({"kind": "storage#bucket", "name": bucket, "id": bucket})
        if words[4] != "o":
            return Reply(404)
        name = unquote("/".join(words[5:]))
        with self.lock:
            if kind:
                return self._upload(bucket, query, headers, body)
            if "rewriteTo" in words:
                at = words.index("rewriteTo")
                source, target = unquote("/".join(words[5:at])), unquote("/".join(words[at + 4 :]))
                key = f"{unquote(words[at + 2])}/{target}"
                return self._put(key, self.objects[f"{bucket}/{source}"].data, {}, wrap="resource")
            return self._object(method, f"{bucket}/{name}", query, headers) if name else self._list(bucket, query)

    def _object(self, method: str, key: str, query: dict[str, str], headers: dict[str, str]) -> Reply:
        found = self.objects.get(key)
        if found is None:
            return _json({"error": {"code": 404, "message": f"no such object {key}"}}, 404)
        if not _holds(query, found):
            return Reply(304 if "ifGenerationNotMatch" in query else 412)
        if method == "DELETE":
            del self.objects[key]
            return Reply(204)
        if query.get("alt") != "media":
            return _json(_resource(key, found))
        data, stamps = found.data, {"x-goog-generation": str(found.generation), "x-goog-hash": f"crc32c={_crc(found)}"}
        if "range" in headers:
            first, _, last = headers["range"].removeprefix("bytes=").partition("-")
            start = int(first) if first else max(0, len(data) - int(last))
            stop = min(int(last) + 1, len(data)) if first and last else len(data)
            if start >= len(data):
                return Reply(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            return Reply(206, data[start:stop], {**stamps, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})
        return Reply(200, data, stamps)

    def _list(self, bucket: str, query: dict[str, str]) -> Reply:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        items, prefixes = [], set()
        for key in sorted(self.objects):
            where, _, name = key.partition("/")
            is_in = where == bucket and name.startswith(prefix) and name >= query.get("startOffset", "")
            if not is_in or ("endOffset" in query and name >= query["endOffset"]):
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.partition(delimiter)[0] + delimiter)
            else:
                items.append(_resource(key, self.objects[key]))
        return _json({"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)})

    def _upload(self, bucket: str, query: dict[str, str], headers: dict[str, str], body: bytes) -> Reply:
        if "upload_id" in query:
            _, data = self.uploads[query["upload_id"]]
            span, _, size = headers["content-range"].removeprefix("bytes ").partition("/")
            if span != "*":
                data[int(span.partition("-")[0]) :] = body
            if size == "*" or len(data) < int(size):
                return Reply(308, b"", {"Range": f"bytes=0-{len(data) - 1}"} if data else {})
            return self._put(self.uploads.pop(query["upload_id"])[0], bytes(data), {})
        kind = query.get("uploadType")
        if kind == "resumable":
            name = query.get("name") or json.loads(body)["name"]
            ticket = str(len(self.uploads) + self.generation)
            self.uploads[ticket] = (f"{bucket}/{name}", bytearray())
            where = f"{self.url}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={ticket}"
            return Reply(200, b"{}", {"Location": where})
        if kind == "multipart":
            head = f"Content-Type: {headers['content-type']}\r\n\r\n".encode()
            message = email.message_from_bytes(head + body, policy=email.policy.HTTP)
            about, _ = message.get_payload()  # pyright: ignore[reportGeneralTypeIssues]
            # As the parts are separated, not as an email's lines are: data may be anything.
            mark = b"--" + str(message.get_boundary()).encode()
            data = body.split(mark)[2].partition(b"\r\n\r\n" if b"\r\n\r\n" in body else b"\n\n")[2]
            data = data.removesuffix(b"\n").removesuffix(b"\r")
            return self._put(f"{bucket}/{json.loads(about.get_payload())['name']}", data, query)  # pyright: ignore
        return self._put(f"{bucket}/{query['name']}", body, query)

    def _put(self, key: str, data: bytes, query: dict[str, str], *, wrap: str = "") -> Reply:
        if self.refused and self.refused in key:
            return _json({"error": {"code": 403, "message": "does not have storage.objects.create access"}}, 403)
        if not _holds(query, self.objects.get(key)):
            return Reply(412)
        self.generation += 1
        self.objects[key] = Object(data, self.generation, f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%fZ}")
        self.written.append(key)
        resource = _resource(key, self.objects[key])
        return _json({"done": True, wrap: resource} if wrap else resource)


def _holds(query: dict[str, str], found: Object | None) -> bool:
    now = str(0 if found is None else found.generation)
    return query.get("ifGenerationMatch", now) == now and query.get("ifGenerationNotMatch") != now


def _resource(key: str, found: Object) -> dict[str, object]:
    bucket, _, name = key.partition("/")
    return {
        "kind": "storage#object", "name": name, "bucket": bucket, "size": str(len(found.data)), "crc32c": _crc(found),
        "generation": str(found.generation), "metageneration": "1", "updated": found.when, "timeCreated": found.when,
        "id": f"{key}/{found.generation}",
    }  # fmt: skip


def _crc(found: Object) -> str:
    return base64.b64encode(struct.pack(">I", google_crc32c.value(found.data))).decode()


def _json(value: object, status: int = 200) -> Reply:
    return Reply(status, json.dumps(value).encode(), {"Content-Type": "application/json"})


@contextmanager
def serve() -> Iterator[StubGCS]:
    """A running service, on a port that is free."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            reply = stub.reply(self.command, self.path, headers, self._body(headers))
            self.send_response(reply.status)
            for name, value in {**reply.headers, "Content-Length": str(len(reply.body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(reply.body)

        do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815  http.server's names

        def _body(self, headers: dict[str, str]) -> bytes:
            if headers.get("transfer-encoding") != "chunked":
                return self.rfile.read(int(headers.get("content-length", 0)))
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Of clients that have gone, say nothing."""
            if not isinstance(sys.exception(), ConnectionError):
                super().handle_error(request, client_address)

    server = Server(("127.0.0.1", 0), Handler)
    stub = StubGCS(server.server_address[1])
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def pointed_at(stub: StubGCS, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every client of Google Cloud Storage in this process asks the stub."""
    # TensorStore reads its variables when it is first used, so one process has one stub.
    for name, value in {
        "STORAGE_EMULATOR_HOST": stub.url, "TENSORSTORE_GCS_HTTP_URL": stub.url, "GOOGLE_CLOUD_PROJECT": "project",
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "abc", "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "0",
    }.items():  # fmt: skip
        patch.setenv(name, value)
    # Of the two that gcsfs has, the one that asks Google's gRPC services nothing.
    system = functools.partial(gcsfs.core.GCSFileSystem, token="anon", endpoint_url=stub.url)
    known = {"gs": system(), "gcs": system()}
    real = fsspec.filesystem
    patch.setattr(fsspec, "filesystem", lambda protocol, **o: known.get(protocol) or real(protocol, **o))
    backend.fsspec_backend._get_filesystem.cache_clear()
    gcs_utils.get_bucket.cache_clear()
    try:
        yield
    finally:
        backend.fsspec_backend._get_filesystem.cache_clear()
        gcs_utils.get_bucket.cache_clear()
