"""A client of the OpenAI-compatible API, for `run`, `chat` and `bench`: streams text, maps errors back to the tree."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx

from ganglion.cli.owner import gateway_home
from ganglion.cli.serving import read_serving
from ganglion.wire.errors import ErrorBody, Internal, ProtocolViolation, Unavailable, Unreachable, from_body

API_KEY: Final = "GANGLION_API_KEY"
CONNECT_S: Final = 5.0
SILENCE_S: Final = 600.0  # a long prompt on a slow device says nothing until its first token


@dataclass(frozen=True)
class Chunk:
    """Some text of the answer; `finish` is set in the last one, `usage` and `timings` in the one after it.

    ids: of its tokens, where `return_token_ids` was asked for; timings: where `return_timings` was.
    """

    text: str = ""
    finish: str | None = None
    usage: dict[str, Any] | None = None
    ids: tuple[int, ...] = ()
    timings: dict[str, Any] | None = None


def api_address(root: Path) -> str | None:
    """The base address of the gateway that runs under `root`, as in "http://127.0.0.1:7460"; None when none does."""
    serving = read_serving(gateway_home(root))
    return None if serving is None else str(serving["api"])


def require_api(root: Path, given: str | None) -> str:
    """`given`, or the address of the gateway of `root`. Raises Unavailable when there is neither."""
    address = given or api_address(root)
    if address is None:
        raise Unavailable(
            "no gateway runs here; start Ganglion with `ganglion up`, or name the API with --api http://host:port"
        )
    return address.rstrip("/").removesuffix("/v1")


def open_client(connections: int = 100) -> httpx.AsyncClient:
    """A client for several requests, with the key of the environment; to be closed."""
    key = os.environ.get(API_KEY)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    timeout = httpx.Timeout(SILENCE_S, connect=CONNECT_S)
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    return httpx.AsyncClient(timeout=timeout, headers=headers, limits=limits, trust_env=False)


async def stream(base: str, path: str, body: dict[str, Any]) -> AsyncGenerator[Chunk]:
    """POST `body` to `/v1/{path}` and yield what comes. Raises the error that the gateway names, or Unreachable."""
    async with open_client() as client:
        async for chunk in stream_of(client, base, path, body):
            yield chunk


async def stream_of(client: httpx.AsyncClient, base: str, path: str, body: dict[str, Any]) -> AsyncGenerator[Chunk]:
    """The same over a client that is kept: its second request finds a connection."""
    request = {**body, "stream": True, "stream_options": {"include_usage": True}}
    try:
        async with client.stream("POST", f"{base}/v1/{path}", json=request) as response:
            if response.status_code != httpx.codes.OK:
                raise error_of(response.status_code, await response.aread())
            async for line in response.aiter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    yield chunk_of(line.removeprefix("data: "))
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise Unreachable(f"the API at {base} does not answer ({error}); is `ganglion up` running there?") from error
    except httpx.HTTPError as error:
        raise Unavailable(f"the API at {base} broke off: {type(error).__name__} {error}".rstrip()) from error


def chunk_of(data: str) -> Chunk:
    """One event of a stream, of either endpoint. Raises the error that it carries, or ProtocolViolation."""
    try:
        event = json.loads(data)
        if "error" in event:
            raise error_of(None, data.encode())
        choices = event["choices"]
        if not choices:
            return Chunk(usage=event.get("usage"), timings=event.get("timings"))
        first = choices[0]
        text = first["delta"].get("content") if "delta" in first else first.get("text")
        return Chunk(text or "", first.get("finish_reason"), event.get("usage"), tuple(first.get("token_ids") or ()))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ProtocolViolation(f"the API sent an event that is none: {data[:200]!r}") from error


def error_of(status: int | None, body: bytes) -> Exception:
    """The error of the tree in an OpenAI-shaped error body."""
    try:
        error = json.loads(body)["error"]
        return from_body(ErrorBody(str(error.get("code") or Internal.code), str(error["message"]), error.get("param")))
    except (ValueError, KeyError, TypeError, AttributeError):
        return ProtocolViolation(f"the API answered {status} with {body[:200]!r}")
