"""The HTTP surface: routes, and around them the guard, the request's id, the log line and the error shape."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from http import HTTPStatus
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route as Path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ganglion.gateway.answers import Answer, fingerprint
from ganglion.gateway.choices import Numbered
from ganglion.gateway.edge import Refused, read_object
from ganglion.gateway.failures import JSONBody, failure, known
from ganglion.gateway.generation import Began, Ended
from ganglion.gateway.guard import Guard
from ganglion.gateway.metrics import CONTENT_TYPE
from ganglion.gateway.parameters import parse_chat, parse_completion
from ganglion.gateway.service import Answering, Service
from ganglion.gateway.streams import EventStream, Pump, unless_gone
from ganglion.gateway.transcript import Delta
from ganglion.wire.errors import Internal, InvalidRequest, NotFound

ROUTE = "ganglion.route"  # key of the scope: the path as declared
TENANT = "ganglion.tenant"  # and whose request it is
LEFT = 499  # nobody reads it; for the metrics

_log = logging.getLogger(__name__)

Endpoint = Callable[[Request], Awaitable[Response]]


class Api:
    """The endpoints of one gateway."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._created = int(time.time())

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        arrived_s = time.monotonic()
        asked = parse_chat(await read_object(request))
        made = self._service.chat(asked, arrived_s, request.scope[TENANT])
        answering = await unless_gone(request.receive, made)
        return await self._answer(request, answering, stream=asked.stream)

    async def completion(self, request: Request) -> Response:
        """POST /v1/completions."""
        arrived_s = time.monotonic()
        asked = parse_completion(await read_object(request))
        made = self._service.completion(asked, arrived_s, request.scope[TENANT])
        answering = await unless_gone(request.receive, made)
        return await self._answer(request, answering, stream=asked.stream)

    async def models(self, _: Request) -> Response:
        """GET /v1/models: those that can be used or will be."""
        return JSONBody({"object": "list", "data": [self._model(name) for name in self._service.models]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/{id}."""
        name = request.path_params["model"]
        names = sorted(self._service.models)
        if name not in names:
            there = ", ".join(names) or "none"
            raise NotFound(f"no model is called {name[:128]!r}; there are: {there}", param="model")
        return JSONBody(self._model(name))

    async def healthz(self, _: Request) -> Response:
        """GET /healthz: the process lives."""
        return JSONBody({"status": "ok"})

    async def readyz(self, _: Request) -> Response:
        """GET /readyz: 200 when every wanted deployment can be used."""
        ready, body = self._service.readiness()
        return JSONBody(body, HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE)

    async def metrics(self, _: Request) -> Response:
        """GET /metrics."""
        return Response(self._service.metrics.text(), media_type=CONTENT_TYPE)

    def _model(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._created, "owned_by": "ganglion"}

    async def _answer(self, request: Request, answering: Answering, *, stream: bool) -> Response:
        if stream:
            return await self._stream(request, answering)
        return await unless_gone(request.receive, self._whole(answering))

    async def _whole(self, answering: Answering) -> Response:
        answers = [Answer() for _ in range(answering.choices)]
        async with aclosing(answering.parts()) as parts:
            async for index, part in parts:
                if isinstance(part, Began):
                    answering.writer.fingerprint = fingerprint(part.numeric_class)
                elif isinstance(part, Ended):
                    answers[index].end = part
                else:
                    answers[index].add(part)
        if any(answer.end is None for answer in answers):
            raise Internal("the answer ended without a reason")
        return JSONBody(answering.writer.complete(answers))

    async def _stream(self, request: Request, answering: Answering) -> Response:
        """The response, as soon as the lead has taken the session: until then a failure has a status of its own."""
        pump = Pump(answering.parts())
        try:
            first = await unless_gone(request.receive, pump.next())
        except BaseException:
            await pump.close()
            raise
        return EventStream(pump, _chunks(first, pump, answering))


async def _chunks(item: Numbered | None, pump: Pump, answering: Answering) -> AsyncIterator[Any]:
    writer = answering.writer
    if item is not None and isinstance(item[1], Began):
        writer.fingerprint = fingerprint(item[1].numeric_class)
    for chunk in writer.first(answering.choices):
        yield chunk
    ends: list[Ended] = []
    while item is not None:
        index, part = item
        if isinstance(part, Ended):
            ends.append(part)
            if len(ends) == answering.choices:
                writer.drawn(ends)
            for chunk in writer.last(index, part):
                yield chunk
        elif isinstance(part, Delta) and (part.text or part.tokens or (writer.token_ids and part.ids)):
            for chunk in writer.delta(index, part):
                yield chunk
        item = await pump.next()
    if writer.include_usage:
        yield writer.usage_chunk(ends)


def _answered(path: str, endpoint: Endpoint) -> Endpoint:
    """The endpoint with every failure made a response: what reaches the server's own log could hold text."""

    async def answer(request: Request) -> Response:
        request.scope[ROUTE] = path
        try:
            return await endpoint(request)
        except ClientDisconnect:
            return Response(status_code=LEFT)
        except Refused as refused:
            return failure(refused.error, status=refused.status, headers={"connection": "close"})
        except Exception as error:  # noqa: BLE001  (of the tree or made Internal by `known`)
            return failure(known(error))

    return answer


def _routing_failure(request: Request, error: Exception) -> Response:
    """An unknown path or a method that it does not take."""
    if isinstance(error, HTTPException) and error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = (error.headers or {}).get("Allow", "")
        message = f"{request.method[:16]} is not allowed here; use {allowed}"
        return failure(InvalidRequest(message), status=HTTPStatus.METHOD_NOT_ALLOWED, headers=error.headers)
    return failure(NotFound(f"there is nothing at {request.url.path[:128]!r}; the API begins with /v1"))


def routes(service: Service) -> list[Path]:
    """Every route of the gateway; all but /healthz are behind the guard."""
    api = Api(service)
    table: tuple[tuple[str, str, Endpoint], ...] = (
        ("POST", "/v1/chat/completions", api.chat),
        ("POST", "/v1/completions", api.completion),
        ("GET", "/v1/models", api.models),
        ("GET", "/v1/models/{model:path}", api.model),
        ("GET", "/healthz", api.healthz),
        ("GET", "/readyz", api.readyz),
        ("GET", "/metrics", api.metrics),
    )
    return [Path(path, _answered(path, endpoint), methods=[method]) for method, path, endpoint in table]


class Outer:
    """Around everything: the guard, `x-request-id`, one log line and one count for each request, and no exception."""

    def __init__(self, app: ASGIApp, guard: Guard, service: Service) -> None:
        self._app = app
        self._guard = guard
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request (or another kind of connection, which is let fall)."""
        if scope["type"] != "http":
            return
        began_s = time.monotonic()
        identifier = secrets.token_hex(12)
        status = LEFT

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(raw=message["headers"])["x-request-id"] = identifier
            await send(message)

        try:
            await self._guarded(scope, receive, sending)
        except ClientDisconnect:
            pass
        except Exception as error:  # noqa: BLE001  (logged by `known` without its text)
            refusal = failure(known(error))
            if status == LEFT:
                await refusal(scope, receive, sending)
        finally:
            name = scope.get(ROUTE, "other")
            self._service.metrics.answered(name, status)
            _log.info("%s %s %s %d in %.3f s", identifier, scope["method"], name, status, time.monotonic() - began_s)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            scope[TENANT] = self._guard.check(scope["path"], Headers(scope=scope))
        except Exception as error:  # noqa: BLE001  (of the tree, or a keys file that cannot be read)
            await failure(known(error))(scope, receive, send)
            return
        await self._app(scope, receive, send)


def make_app(service: Service, guard: Guard) -> ASGIApp:
    """The ASGI application."""
    app = Starlette(routes=routes(service), exception_handlers={HTTPException: _routing_failure})
    app.router.redirect_slashes = False
    return Outer(app, guard, service)
