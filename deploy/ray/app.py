"""Verifier replicas under Ray Serve: `serve run app:build store=FOLDER model=NAME` (see README.md beside this file).

A session's rounds go to one replica by the consistent hash of their header `x-session-id`. When that replica is gone,
the next one says that it does not know the session, and the device sends it the whole text.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from starlette.requests import Request
from starlette.responses import Response

from ganglion.agent.speculation.http.replica import Replica, ReplicaOptions
from ganglion.agent.speculation.http.round_messages import PATH
from ganglion.agent.speculation.http.serving import IDLE_S


@serve.deployment(
    name="verifier",
    # A round is one pass: as many wait at a replica as it holds sessions.
    max_ongoing_requests=16,
    health_check_period_s=2,
    health_check_timeout_s=10,
    graceful_shutdown_timeout_s=IDLE_S / 12,
    request_router_config=RequestRouterConfig(
        request_router_class="ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
    ),
)
class Verifier:
    """A replica as Serve runs it."""

    async def __init__(self, options: ReplicaOptions) -> None:
        self._replica = await asyncio.to_thread(Replica, options)
        self._replica.start()

    async def __call__(self, request: Request) -> Response:
        """POST and GET /verify."""
        if request.method not in ("GET", "POST") or not request.url.path.endswith(PATH):
            return Response(status_code=404)
        rounds, authorization = self._replica.rounds, request.headers.get("authorization", "")
        if request.method == "GET":
            status, body = rounds.facts(authorization)
        else:
            status, body = await rounds.answer(await request.body(), authorization)
        return Response(body, status_code=status, media_type="application/json")

    def check_health(self) -> None:
        """Serve starts a replica anew that raises here."""
        self._replica.check()

    def pid(self) -> tuple[str, int]:
        """The replica's name, and the process that it is."""
        return self._replica.name, os.getpid()


def build(args: dict[str, Any]) -> serve.Application:
    """The application of `serve run` and of a config file.

    args: store and model, and as wanted executor, threads, context, sessions; replicas (a number), or at_least and
    at_most, between which Serve chooses by the rounds that are under way; processors and accelerators of each. The key
    that rounds must bear is GANGLION_VERIFIER_KEY where this runs.
    """
    number = {name: int(value) for name, value in args.items() if name not in ("store", "model", "executor")}
    known = {"store", "model", "executor", "threads", "context", "sessions"}
    known |= {"replicas", "at_least", "at_most", "processors", "accelerators"}
    if unknown := sorted(set(args) - known):
        raise ValueError(f"{unknown[0]!r} is not known; there are {', '.join(sorted(known))}")
    sessions = number.get("sessions", 16)
    options = ReplicaOptions(
        store=Path(args["store"]).resolve(),
        model=str(args["model"]),
        executor=str(args.get("executor", "ort")),
        threads=number.get("threads", number.get("processors", 1)),
        context=number.get("context", 0),
        sessions=sessions,
        key=os.environ.get("GANGLION_VERIFIER_KEY", ""),
    )
    wanted: dict[str, Any] = {"num_replicas": number.get("replicas", 2)}
    if "at_most" in number:
        scaled = AutoscalingConfig(
            min_replicas=number.get("at_least", 1),
            max_replicas=number["at_most"],
            # Half of a replica's sessions have a round under way when their devices draft as long as it verifies.
            target_ongoing_requests=max(1, sessions // 2),
        )
        wanted = {"autoscaling_config": scaled}
    resources = {"num_cpus": number.get("processors", 1), "num_gpus": number.get("accelerators", 0)}
    return Verifier.options(max_ongoing_requests=sessions, ray_actor_options=resources, **wanted).bind(options)
