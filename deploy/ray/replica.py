"""One verifier replica behind plain HTTP, without Ray: `python replica.py --store FOLDER --model NAME --port 8000`.

An ASGI application of its own: POST and GET /verify (the dialect of rounds), GET /health. Needs the extra `gateway`
(uvicorn).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any

import uvicorn

from ganglion.agent.speculation.http.replica import Replica, ReplicaOptions
from ganglion.agent.speculation.http.round_messages import PATH
from ganglion.wire.errors import Unavailable
from ganglion.wire.limits import HTTP_BODY_BYTES

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class Application:
    """The ASGI application of a replica that runs."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            raise RuntimeError(f"{scope['type']} is not served")
        status, body = await self._answer(scope, receive)
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _answer(self, scope: dict[str, Any], receive: Receive) -> tuple[int, bytes]:
        if (scope["method"], scope["path"]) == ("GET", "/health"):
            try:
                self._replica.check()
            except Unavailable as error:
                return HTTPStatus.SERVICE_UNAVAILABLE, error.message.encode()
            return HTTPStatus.OK, b"{}"
        authorization = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
        if (scope["method"], scope["path"]) == ("GET", PATH):
            return self._replica.rounds.facts(authorization)
        if (scope["method"], scope["path"]) != ("POST", PATH):
            return HTTPStatus.NOT_FOUND, b"{}"
        body = bytearray()
        while True:
            message = await receive()
            body += message.get("body", b"")
            if len(body) > HTTP_BODY_BYTES:
                return HTTPStatus.REQUEST_ENTITY_TOO_LARGE, b"{}"
            if not message.get("more_body"):
                break
        return await self._replica.rounds.answer(bytes(body), authorization)


def options_of(arguments: list[str] | None = None) -> tuple[ReplicaOptions, argparse.Namespace]:
    """What the command line says; the key comes from GANGLION_VERIFIER_KEY, as arguments are seen by every user."""
    parser = argparse.ArgumentParser(description="A verifier of drafted tokens behind HTTP.")
    parser.add_argument("--store", type=Path, required=True, help="folder with pieces and manifests, as an agent's")
    parser.add_argument("--model", required=True, help="the model's name in the store, or the start of its digest")
    parser.add_argument("--executor", default="ort", help="ort, or torch[:cpu|:cuda][:bf16|:fp16|:fp32]")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--context", type=int, default=0)
    parser.add_argument("--sessions", type=int, default=16)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one, which is printed")
    said = parser.parse_args(arguments)
    key = os.environ.get("GANGLION_VERIFIER_KEY", "")
    if said.host not in ("127.0.0.1", "::1", "localhost") and not key:
        parser.error(f"--host {said.host} is reached by others: set GANGLION_VERIFIER_KEY to what they must send")
    options = ReplicaOptions(
        store=said.store,
        model=said.model,
        executor=said.executor,
        threads=said.threads,
        context=said.context,
        sessions=said.sessions,
        key=key,
    )
    return options, said


def family(host: str) -> socket.AddressFamily:
    """Of an address as it is written."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


async def main() -> None:
    """Serve until a signal."""
    options, said = options_of()
    replica = Replica(options)
    replica.start()
    with socket.create_server((said.host, said.port), family=family(said.host)) as listening:
        port = listening.getsockname()[1]
        print(f"{replica.manifest.name} ({replica.numeric_class}) is verified on http://{said.host}:{port}", flush=True)
        server = uvicorn.Server(uvicorn.Config(Application(replica), log_level="warning"))
        await server.serve(sockets=[listening])
    await replica.close()


if __name__ == "__main__":
    asyncio.run(main())
