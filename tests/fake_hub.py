"""A hub on loopback: the two endpoints that downloads use, with ranges, and faults that a test asks for."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".gguf")

Fault = Callable[[BaseHTTPRequestHandler, bytes, int], bool]
"""(request, whole file, first byte asked for); whether it answered."""


@dataclass
class FakeHub:
    """Serves `repositories` (id -> path -> bytes). `faults`: by path of a file, or "listing"."""

    repositories: dict[str, dict[str, bytes]]
    endpoint: str = ""
    faults: dict[str, Fault] = field(default_factory=dict)
    said_sizes: dict[str, int] = field(default_factory=dict)
    token: str | None = None
    asked: list[tuple[str, str | None, str | None]] = field(default_factory=list)  # path, range, authorization

    def listing(self, repository: str) -> bytes:
        siblings = []
        for path, body in self.repositories[repository].items():
            size = self.said_sizes.get(path, len(body))
            git = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
            one: dict[str, object] = {"rfilename": path, "size": size, "blobId": git}
            if path.endswith(LARGE):
                one["lfs"] = {"sha256": hashlib.sha256(body).hexdigest(), "size": size, "pointerSize": 134}
            siblings.append(one)
        return json.dumps({"id": repository, "sha": COMMIT, "siblings": siblings}).encode()

    def files_asked(self) -> list[str]:
        """Paths of the files that were asked for, redirects not counted."""
        return [path.split(f"/resolve/{COMMIT}/")[1] for path, _, _ in self.asked if "/resolve/" in path]


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((path, self.headers.get("range"), self.headers.get("authorization")))
        if self.hub.token and self.headers.get("authorization") != f"Bearer {self.hub.token}":
            return self.refuse(401, "GatedRepo" if "/resolve/" in path else "")
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path):
            repository, revision = match.groups()
            if repository not in self.hub.repositories:
                return self.refuse(401, "RepoNotFound")
            if revision not in ("main", "v1", "refs/pr/1", COMMIT):
                return self.refuse(404, "RevisionNotFound")
            return self.body("listing", self.hub.listing(repository))
        if match := re.fullmatch(rf"/([^/]+/[^/]+)/resolve/{COMMIT}/(.+)", path):
            repository, name = match.groups()
            if name not in self.hub.repositories.get(repository, {}):
                return self.refuse(404, "EntryNotFound")
            if name.endswith(LARGE):  # as the hub does it: large files come from elsewhere
                return self.redirect(f"/cdn/{repository}/{name}")
            return self.body(name, self.hub.repositories[repository][name])
        if match := re.fullmatch(r"/cdn/([^/]+/[^/]+)/(.+)", path):
            return self.body(match[2], self.hub.repositories[match[1]][match[2]])
        return self.refuse(404, "")

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def redirect(self, location: str) -> None:
        self.send_response(302)
        self.send_header("Location", location)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def body(self, name: str, body: bytes) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range", ""))
        start, stop = (int(asked[1]), min(int(asked[2]) + 1, len(body))) if asked else (0, len(body))
        fault = self.hub.faults.get(name)
        if fault is not None and fault(self, body, start):
            return
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(body)}")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        self.wfile.write(body[start:stop])


@contextlib.contextmanager
def serve_hub(repositories: dict[str, dict[str, bytes]]) -> Iterator[FakeHub]:
    """A hub at `endpoint` until the block ends."""
    hub = FakeHub(repositories)
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        serving.start()
        try:
            yield hub
        finally:
            server.shutdown()
            serving.join()


def files_of(folder: Path) -> dict[str, bytes]:
    """The files of a checkpoint's folder, as a repository holds them."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def cut_after(count: int, *, times: int = 1) -> Fault:
    """Send `count` bytes of what was asked for, then close the connection; `times` times."""
    left = [times]

    def fault(request: BaseHTTPRequestHandler, body: bytes, start: int) -> bool:
        if left[0] == 0 or start + count >= len(body):
            return False
        left[0] -= 1
        request.send_response(206)
        request.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        request.send_header("Content-Length", str(len(body) - start))
        request.end_headers()
        request.wfile.write(body[start : start + count])
        request.wfile.flush()
        request.close_connection = True
        return True

    return fault


def redirect_to(location: str) -> Fault:
    """Answer with a redirect."""

    def fault(request: BaseHTTPRequestHandler, body: bytes, start: int) -> bool:
        request.send_response(302)
        request.send_header("Location", location)
        request.send_header("Content-Length", "0")
        request.end_headers()
        return True

    return fault


def answer(status: int, headers: dict[str, str], sent: bytes = b"") -> Fault:
    """Answer with exactly this."""

    def fault(request: BaseHTTPRequestHandler, body: bytes, start: int) -> bool:
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(sent)
        request.close_connection = True
        return True

    return fault


def endless(request: BaseHTTPRequestHandler, body: bytes, start: int) -> bool:
    """Send without end, in chunks of no stated length, until the client goes."""
    request.send_response(200)
    request.send_header("Transfer-Encoding", "chunked")
    request.end_headers()
    block = b"%x\r\n" % 65536 + bytes(65536) + b"\r\n"
    with contextlib.suppress(OSError):
        while True:
            request.wfile.write(block)
    request.close_connection = True
    return True
