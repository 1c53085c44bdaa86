"""The hub over HTTP: what a repository holds at a revision, and byte ranges of its files.

Endpoint, token, cache and offline mode are huggingface_hub's own settings. The requests are ours, because three things
are promised that its downloader does not give: no byte comes from a host that was not allowed (each redirect is
checked; Xet transfers, which bypass the HTTP client, are not used), never more bytes than the metadata says (E7), and
a file that is checked by its digest and goes on where an earlier process stopped.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Final
from urllib.parse import quote

import httpx
import msgspec

from ganglion.partitioner.sources.reference import Repository
from ganglion.wire.errors import (
    Exhausted,
    GanglionError,
    InvalidDocument,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    ProtocolViolation,
    Unauthenticated,
    Unavailable,
    Unreachable,
)

CONNECT_S: Final = 10.0
SILENCE_S: Final = 10.0  # without a byte of an answer, as huggingface_hub has it
ANSWER_BYTES: Final = 64 << 20  # of the listing of a repository
REDIRECTS: Final = 5
# Where huggingface.co sends downloads: cdn-lfs.huggingface.co, cdn-lfs-us-1.hf.co, cas-bridge.xethub.hf.co, ...
CDN_DOMAINS: Final = ("huggingface.co", "hf.co")

Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
Sha1 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{40}$")]
Size = Annotated[int, msgspec.Meta(ge=0, le=2**62)]


class _Lfs(msgspec.Struct, frozen=True):
    sha256: Sha256
    size: Size


class _Sibling(msgspec.Struct, frozen=True, rename="camel"):
    rfilename: str
    size: Size | None = None
    blob_id: Sha1 | None = None
    lfs: _Lfs | None = None


class _Info(msgspec.Struct, frozen=True):
    sha: Sha1
    siblings: list[_Sibling]


@dataclass(frozen=True)
class HubFile:
    """A file as the hub lists it. `digest`: SHA-256 of a large file, else git's SHA-1 of a blob; it names the blob."""

    path: str
    size: int
    digest: str

    @property
    def is_large(self) -> bool:
        """Whether the digest is a SHA-256 of the bytes alone."""
        return len(self.digest) == 64


@dataclass(frozen=True)
class Listing:
    """A repository at a commit."""

    commit: str
    files: dict[str, HubFile]


@dataclass
class Hub:
    """A hub at `endpoint` (scheme, host, port); the token goes there and nowhere else. Close it, or use `with`."""

    endpoint: str
    cache: Path
    token: str | None = None
    offline: bool = False
    pause_s: float = 0.5  # before the first repetition of a request, doubled each time
    _client: httpx.Client = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.endpoint = self.endpoint.rstrip("/")
        try:
            url: httpx.URL | None = httpx.URL(self.endpoint)
        except httpx.InvalidURL:
            url = None
        if url is None or url.scheme not in ("http", "https") or not url.host:
            raise InvalidRequest(
                f"HF_ENDPOINT {self.endpoint!r}: an address such as https://huggingface.co is expected"
            )
        self._client = httpx.Client(
            headers={"user-agent": "ganglion", "accept-encoding": "identity"},
            timeout=httpx.Timeout(SILENCE_S, connect=CONNECT_S),
            follow_redirects=False,
        )

    @classmethod
    def configured(cls) -> Hub:
        """As huggingface_hub is set up: HF_ENDPOINT, HF_HOME, HF_HUB_CACHE, HF_TOKEN or its file, HF_HUB_OFFLINE."""
        from huggingface_hub import constants, get_token

        return cls(
            endpoint=constants.ENDPOINT,
            cache=Path(constants.HF_HUB_CACHE).expanduser(),
            token=get_token(),
            offline=bool(constants.HF_HUB_OFFLINE),
        )

    def __enter__(self) -> Hub:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    @property
    def host(self) -> str:
        """The endpoint's host, for messages."""
        return httpx.URL(self.endpoint).host

    def listing(self, repository: Repository) -> Listing:
        """The files of a repository at its wanted revision, with sizes and digests.

        Raises NotFound, PermissionDenied, Unauthenticated, Exhausted, Unavailable, Unreachable, ProtocolViolation.
        """
        revision = quote(repository.wanted_revision, safe="")
        url = f"{self.endpoint}/api/models/{repository.id}/revision/{revision}?blobs=true"
        body = bytearray()
        try:
            with self.get(url, str(repository)) as answer:
                for chunk in bodies(answer, ANSWER_BYTES, f"the listing of {repository}"):
                    body += chunk
        except httpx.TransportError as error:
            raise self._unreachable(httpx.URL(url), error) from error
        try:
            info = msgspec.json.decode(bytes(body), type=_Info)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ProtocolViolation(
                f"{self.host} does not answer as a Hugging Face hub does about {repository}: {error}; check HF_ENDPOINT"
            ) from error
        files = {}
        for one in info.siblings:
            digest, size = (one.lfs.sha256, one.lfs.size) if one.lfs else (one.blob_id, one.size)
            if digest is not None and size is not None:
                files[one.rfilename] = HubFile(one.rfilename, size, digest)
        return Listing(info.sha, files)

    def file_url(self, repository: Repository, commit: str, path: str) -> str:
        """Where a file of a commit is."""
        return f"{self.endpoint}/{repository.id}/resolve/{commit}/{quote(path)}"

    @contextlib.contextmanager
    def get(self, url: str, what: str, headers: Mapping[str, str] | None = None) -> Iterator[httpx.Response]:
        """GET `url`, following redirects to allowed hosts only; the body is not read yet.

        Raises the error that an answer of 400 and above means for `what` (a reference or a file of one);
        httpx.TransportError where the connection breaks while the body is read.
        """
        if self.offline:
            raise Unavailable(f"{what} is not in the cache {self.cache}, and HF_HUB_OFFLINE forbids to ask {self.host}")
        target = httpx.URL(url)
        for _ in range(REDIRECTS + 1):
            request = self._client.build_request(
                "GET", target, headers=dict(headers or {}) | self._authorization(target)
            )
            try:
                response = self._client.send(request, stream=True)
            except httpx.TransportError as error:
                raise self._unreachable(target, error) from error
            try:
                if response.has_redirect_location:
                    target = self._redirect(target, response.headers["location"])
                    continue
                self._check_status(response, what)
                if response.headers.get("content-encoding", "identity").lower() != "identity":
                    raise ProtocolViolation(f"{target.host} sends {what} compressed, which was not asked for")
                yield response
                return
            finally:
                response.close()
        raise ProtocolViolation(f"{self.host} redirects more than {REDIRECTS} times for {what}")

    def is_allowed(self, url: httpx.URL) -> bool:
        """Whether bytes may come from `url`: the endpoint, or over TLS a host below it or of the hub's own domains."""
        if _origin(url) == _origin(httpx.URL(self.endpoint)):
            return True
        known = url.host in CDN_DOMAINS or url.host.endswith(tuple(f".{name}" for name in (*CDN_DOMAINS, self.host)))
        return url.scheme == "https" and known and url.port is None

    def _redirect(self, source: httpx.URL, location: str) -> httpx.URL:
        try:
            target = source.join(location)
        except httpx.InvalidURL as error:
            raise ProtocolViolation(f"{source.host} redirects to {location[:80]!r}, which is no address") from error
        if not self.is_allowed(target):
            raise ProtocolViolation(
                f"{source.host} redirects to {target.scheme}://{target.host or '?'}, which is not followed; allowed are"
                f" {self.endpoint} and https hosts below {', '.join((self.host, *CDN_DOMAINS))}; HF_ENDPOINT names"
                " another hub"
            )
        return target

    def _authorization(self, url: httpx.URL) -> dict[str, str]:
        if self.token and _origin(url) == _origin(httpx.URL(self.endpoint)):
            return {"authorization": f"Bearer {self.token}"}
        return {}

    def _unreachable(self, url: httpx.URL, error: Exception) -> GanglionError:
        return Unreachable(f"{url.host} does not answer ({_reason(error)}); check the network, a proxy, or HF_ENDPOINT")

    def _check_status(self, response: httpx.Response, what: str) -> None:
        status, code = response.status_code, response.headers.get("x-error-code", "")
        if status in (200, 206):
            return
        repository = re.split(r"[@: ]", what, maxsplit=1)[0]
        login = "set HF_TOKEN, or log in with `hf auth login`"
        if code == "GatedRepo":
            raise PermissionDenied(
                f"{repository} is gated: accept its terms at {self.endpoint}/{repository}, then {login}", param="model"
            )
        if "Invalid credentials" in response.headers.get("x-error-message", ""):
            raise Unauthenticated(f"{self.host} does not accept the token; {login}")
        if code == "RevisionNotFound":
            raise NotFound(f"{repository} has no such revision: {what}", param="model")
        if code == "EntryNotFound":
            raise NotFound(f"{self.host} has no file {what}")
        if status in (401, 404):
            raise NotFound(
                f"{self.host} shows no repository {repository}: check the name; if it is private, {login}",
                param="model",
            )
        if status == 403:
            raise PermissionDenied(f"{self.host} refuses {what} to this token; {login}", param="model")
        if status == 429:
            raise Exhausted(
                f"{self.host} limits how often it is asked; try again in {response.headers.get('retry-after', 'some')}"
                f" s, or {login}"
            )
        if status >= 500:
            raise Unavailable(f"{self.host} answers {status} to {what}; try again later")
        raise ProtocolViolation(f"{self.host} answers {status} to {what}; check HF_ENDPOINT")


def bodies(response: httpx.Response, at_most_bytes: int, what: str) -> Iterator[bytes]:
    """The body in pieces as they come. Raises ProtocolViolation as soon as it is longer than `at_most_bytes`."""
    told = response.headers.get("content-length", "")
    if told and not (told.isascii() and told.isdigit() and len(told) < 20):
        raise ProtocolViolation(f"{what}: a Content-Length of {told[:40]!r}")
    if told and int(told) > at_most_bytes:
        raise ProtocolViolation(f"{what}: the answer has {told} bytes, at most {at_most_bytes} are accepted")
    received = 0
    for chunk in response.iter_raw():
        received += len(chunk)
        if received > at_most_bytes:
            raise ProtocolViolation(f"{what}: the answer goes on after the {at_most_bytes} bytes that are accepted")
        yield chunk


def decode_index(data: bytes, what: str) -> object:
    """The `weight_map` of an index of safetensors files. Raises InvalidDocument."""
    try:
        found = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidDocument(f"{what}: not JSON: {error}") from error
    return found.get("weight_map") if isinstance(found, dict) else None


def _origin(url: httpx.URL) -> tuple[str, str, int]:
    return url.scheme, url.host, url.port or {"http": 80, "https": 443}.get(url.scheme, 0)


def _reason(error: Exception) -> str:
    return str(error).strip() or type(error).__name__
