"""What the routes ask for: the parts of a gateway, and a request turned into answers."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from ganglion.gateway.answers import ChatWriter, CompletionWriter, Writer
from ganglion.gateway.callparser import CallParser
from ganglion.gateway.choices import Numbered, interleave
from ganglion.gateway.deployments import Deployments, describe
from ganglion.gateway.experts.room import ExpertRoom
from ganglion.gateway.experts.table import class_of
from ganglion.gateway.generation import Sessions
from ganglion.gateway.metrics import Metrics
from ganglion.gateway.parameters import ChatRequest, CompletionRequest
from ganglion.gateway.pieces import Tokenizers
from ganglion.gateway.preparing import Prepared, Preparer
from ganglion.gateway.watch import CoordinatorLink
from ganglion.wire.errors import InvalidRequest, Unavailable


@dataclass(frozen=True)
class Answering:
    """A request on its way: how its answers are made, how many, and how they are written.

    parts: the answers as they are made; closing the generator ends them.
    """

    parts: Callable[[], AsyncGenerator[Numbered, None]]
    choices: int
    writer: Writer


class Service:
    """The parts of a running gateway."""

    def __init__(
        self,
        *,
        link: CoordinatorLink,
        deployments: Deployments,
        tokenizers: Tokenizers,
        preparer: Preparer,
        sessions: Sessions,
        experts: ExpertRoom,
        metrics: Metrics,
    ) -> None:
        self.link = link
        self.deployments = deployments
        self.tokenizers = tokenizers
        self.sessions = sessions
        self.experts = experts
        self.metrics = metrics
        self.stopping = False
        self._preparer = preparer

    @property
    def models(self) -> list[str]:
        """Ids of what can be asked, or will be."""
        return list(dict.fromkeys([*(route.model for route in self.deployments.routes), *self.experts.table.models]))

    async def chat(self, asked: ChatRequest, arrived_s: float, tenant: str) -> Answering:
        """Make a conversation ready; `tenant`: whose it is."""
        if self._to_experts(asked):
            writer = ChatWriter(asked.model, None, -1, asked.include_usage)
            parts = await self.experts.prepare(asked, writer.identifier, arrived_s, tenant)
            return Answering(parts, 1, writer)
        prepared = await self._preparer.chat(asked, tenant)
        writer = ChatWriter(asked.model, prepared.tokenizer, asked.wanted_logprobs, asked.include_usage)
        writer.local_class = prepared.route.local_class
        if prepared.calls is not None and prepared.names:
            writer.parser = partial(CallParser, prepared.calls, prepared.names)
        return self._answering(prepared, writer, arrived_s)

    async def completion(self, asked: CompletionRequest, arrived_s: float, tenant: str) -> Answering:
        """Make a prompt ready; `tenant`: whose it is."""
        if self._to_experts(asked):
            writer = CompletionWriter(asked.model, None, -1, asked.include_usage)
            writer.echo = asked.prompt if asked.echo and isinstance(asked.prompt, str) else ""
            parts = await self.experts.prepare(asked, writer.identifier, arrived_s, tenant)
            return Answering(parts, 1, writer)
        prepared = await self._preparer.completion(asked, tenant)
        writer = CompletionWriter(asked.model, prepared.tokenizer, asked.wanted_logprobs, asked.include_usage)
        writer.local_class = prepared.route.local_class
        writer.echo = prepared.text if asked.echo else ""
        writer.token_ids, writer.timings = asked.return_token_ids, asked.return_timings
        return self._answering(prepared, writer, arrived_s)

    def _answering(self, prepared: Prepared, writer: Writer, arrived_s: float) -> Answering:
        prepared.named(writer.identifier)

        def parts() -> AsyncGenerator[Numbered, None]:
            pairs = zip(prepared.requests, prepared.transcripts, strict=True)
            return interleave([self.sessions.generate(prepared.route, *pair, arrived_s) for pair in pairs])

        return Answering(parts, len(prepared.requests), writer)

    def _to_experts(self, asked: ChatRequest | CompletionRequest) -> bool:
        """Whether the model that is asked for is the edge experts; raises Unavailable or InvalidRequest."""
        if self.stopping:
            raise Unavailable("the gateway is stopping")
        # A deployment that was given such a name answers to it.
        named = any(route.model == asked.model for route in self.deployments.routes)
        if not named and self.deployments.heard and class_of(asked.model) is not None:
            return True
        if asked.experts is not None:
            raise InvalidRequest(
                f"experts is for the models experts and experts:CLASS; {asked.model[:128]!r} is one: leave it out",
                param="experts",
            )
        return False

    def readiness(self) -> tuple[bool, dict[str, Any]]:
        """Whether every wanted deployment can be used, and what is going on with each."""
        rows = []
        ready = self.deployments.heard and not self.stopping
        alone = {route.model for route in self.deployments.routes if route.hybrid}  # they answer while it is away
        for route in self.deployments.routes:
            trouble = None if route.usable else describe(route)
            if trouble is None and route.facts is not None:
                trouble = self.tokenizers.state(route.facts)
            ready = ready and (trouble is None or route.model in alone)
            rows.append(
                {
                    "deployment": route.deployment,
                    "model": route.model,
                    "epoch": route.epoch,
                    "phase": str(route.phase),
                    "ready": trouble is None,
                    "message": trouble or route.message,
                }
            )
        coordinator = {"address": self.link.address, "connected": self.link.connected, "message": self.link.trouble}
        return ready, {"ready": ready, "stopping": self.stopping, "coordinator": coordinator, "deployments": rows}
