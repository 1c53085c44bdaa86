"""What the routes ask for: the parts of a gateway, and a request turned into a session."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from ganglion.gateway.answers import ChatWriter, CompletionWriter, Writer
from ganglion.gateway.deployments import Deployments, ModelFacts, Route, describe
from ganglion.gateway.generation import Part, Sessions
from ganglion.gateway.metrics import Metrics
from ganglion.gateway.parameters import INT64, ChatRequest, Common, CompletionRequest
from ganglion.gateway.pieces import Tokenizers
from ganglion.gateway.templates import TemplateRenderer, chat_variables
from ganglion.gateway.tokenizing import ModelTokenizer
from ganglion.gateway.transcript import Transcript
from ganglion.gateway.watch import CoordinatorLink
from ganglion.proto import lane_pb2
from ganglion.wire.errors import ContextExceeded, InvalidRequest, Unavailable, Unsupported

COMPLETION_TOKENS = 16  # OpenAI's default of /v1/completions


@dataclass(frozen=True)
class Answering:
    """A request on its way: what is sent to the lead and how its answer is written."""

    route: Route
    request: lane_pb2.Open
    transcript: Transcript
    writer: Writer
    arrived_s: float


class Service:
    """The parts of a running gateway."""

    def __init__(
        self,
        *,
        link: CoordinatorLink,
        deployments: Deployments,
        tokenizers: Tokenizers,
        templates: TemplateRenderer,
        sessions: Sessions,
        metrics: Metrics,
    ) -> None:
        self.link = link
        self.deployments = deployments
        self.tokenizers = tokenizers
        self.templates = templates
        self.sessions = sessions
        self.metrics = metrics
        self.stopping = False

    async def chat(self, asked: ChatRequest, arrived_s: float) -> Answering:
        """Render the conversation, tokenize it, check it against the context."""
        route, facts, tokenizer = await self._find(asked.model)
        template = tokenizer.template
        if template is None:
            raise InvalidRequest(
                f"{asked.model} has no chat template, so it holds no conversations; send plain text to /v1/completions",
                param="model",
            )
        variables = chat_variables([message.for_template() for message in asked.messages], asked.chat_template_kwargs)
        text = await self.templates.render(asked.model, template, variables)
        # The template writes the special tokens itself.
        prompt = await asyncio.to_thread(tokenizer.encode, text, with_specials=False)
        writer = ChatWriter(asked.model, tokenizer, asked.wanted_logprobs, asked.include_usage)
        request = _open(
            asked,
            writer.identifier,
            prompt,
            param="messages",
            route=route,
            facts=facts,
            wanted=asked.answer_tokens,
            default=route.context,
            top_logprobs=asked.wanted_logprobs,
        )
        transcript = Transcript(tokenizer.detokenizer(), asked.stops, facts.eos_ids)
        return Answering(route, request, transcript, writer, arrived_s)

    async def completion(self, asked: CompletionRequest, arrived_s: float) -> Answering:
        """Tokenize the prompt, check it against the context."""
        route, facts, tokenizer = await self._find(asked.model)
        prompt = await _completion_prompt(asked, facts, tokenizer)
        writer = CompletionWriter(asked.model, tokenizer, asked.wanted_logprobs, asked.include_usage)
        request = _open(
            asked,
            writer.identifier,
            prompt,
            param="prompt",
            route=route,
            facts=facts,
            wanted=asked.max_tokens,
            default=COMPLETION_TOKENS,
            top_logprobs=asked.wanted_logprobs,
        )
        transcript = Transcript(tokenizer.detokenizer(prompt), asked.stops, facts.eos_ids)
        return Answering(route, request, transcript, writer, arrived_s)

    def parts(self, answering: Answering) -> AsyncGenerator[Part, None]:
        """The answer as it is made; closing it cancels the session."""
        return self.sessions.generate(answering.route, answering.request, answering.transcript, answering.arrived_s)

    def readiness(self) -> tuple[bool, dict[str, Any]]:
        """Whether every wanted deployment can be used, and what is going on with each."""
        rows = []
        ready = self.deployments.heard and not self.stopping
        for route in self.deployments.routes:
            trouble = None if route.usable else describe(route)
            if trouble is None and route.facts is not None:
                trouble = self.tokenizers.state(route.facts)
            ready = ready and trouble is None
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

    async def _find(self, model: str) -> tuple[Route, ModelFacts, ModelTokenizer]:
        if self.stopping:
            raise Unavailable("the gateway is stopping")
        route = self.deployments.find(model)
        if route.facts is None:
            raise Unavailable(f"the coordinator sent no manifest of {model}")
        return route, route.facts, await self.tokenizers.get(route.facts, route.holders)


async def _completion_prompt(asked: CompletionRequest, facts: ModelFacts, tokenizer: ModelTokenizer) -> list[int]:
    prompt: str | list[int] | list[str] | list[list[int]] = asked.prompt
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        if len(prompt) > 1:
            raise Unsupported(
                f"{len(prompt)} prompts in one request are not supported by this release; send one at a time",
                param="prompt",
            )
        prompt = prompt[0]
    if isinstance(prompt, str):
        if not prompt:
            raise InvalidRequest("the prompt is empty; send at least one character", param="prompt")
        return await asyncio.to_thread(tokenizer.encode, prompt, with_specials=True)
    ids = [token for token in prompt if isinstance(token, int)]
    beyond = next((at for at, token in enumerate(ids) if token >= facts.vocab), None)
    if beyond is not None:
        raise InvalidRequest(
            f"prompt[{beyond}] is {ids[beyond]}; token ids of {asked.model} go from 0 to {facts.vocab - 1}",
            param="prompt",
        )
    return ids


def _open(
    asked: Common,
    identifier: str,
    prompt: list[int],
    *,
    param: str,
    route: Route,
    facts: ModelFacts,
    wanted: int | None,
    default: int,
    top_logprobs: int,
) -> lane_pb2.Open:
    """The session that is asked for; raises InvalidRequest or ContextExceeded with the figures."""
    if not prompt:
        raise InvalidRequest(f"{param} give no token at all; send some text", param=param)
    rest = route.context - len(prompt)
    if rest < 1:
        raise ContextExceeded(
            f"the prompt has {len(prompt)} tokens; the context of {asked.model} is {route.context} tokens, prompt and "
            f"answer together: shorten it, or deploy with a larger --context",
            param=param,
        )
    if wanted is not None and wanted > rest:
        raise ContextExceeded(
            f"the prompt has {len(prompt)} tokens and {wanted} are asked for; the context of {asked.model} is "
            f"{route.context} tokens: ask for at most {rest}",
            param="max_tokens",
        )
    seed = secrets.randbits(64) if asked.seed is None else asked.seed % (2 * INT64)
    return lane_pb2.Open(
        request_id=identifier,
        prompt=prompt,
        max_tokens=min(default, rest) if wanted is None else wanted,
        stop_ids=facts.eos_ids,
        sampling=lane_pb2.Sampling(
            temperature=asked.temperature,
            top_k=max(asked.top_k, 0),
            top_p=asked.top_p,
            min_p=asked.min_p,
            seed=seed,
            top_logprobs=top_logprobs,
        ),
    )
