"""What the routes ask for: the parts of a gateway, and a request turned into a session."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from ganglion.gateway.answers import ChatWriter, CompletionWriter, Writer
from ganglion.gateway.callparser import CallParser
from ganglion.gateway.calls import Special, described
from ganglion.gateway.choices import Numbered, interleave
from ganglion.gateway.compiling import Compiler
from ganglion.gateway.deployments import Deployments, ModelFacts, Route, describe
from ganglion.gateway.generation import Sessions
from ganglion.gateway.grammars import answer_grammar, chat_grammar, offered
from ganglion.gateway.metrics import Metrics
from ganglion.gateway.parameters import INT64, ChatRequest, Common, CompletionRequest
from ganglion.gateway.pieces import Tokenizers
from ganglion.gateway.templates import TemplateRenderer, chat_variables
from ganglion.gateway.tokenizing import ChatTemplate, ModelTokenizer
from ganglion.gateway.transcript import Transcript
from ganglion.gateway.watch import CoordinatorLink
from ganglion.proto import lane_pb2
from ganglion.wire.errors import ContextExceeded, InvalidRequest, Unavailable, Unsupported

COMPLETION_TOKENS = 16  # OpenAI's default of /v1/completions
_AWAY: Final[dict[str | None, lane_pb2.Away]] = {
    None: lane_pb2.AWAY_UNSPECIFIED,
    "wait": lane_pb2.AWAY_WAIT,
    "local": lane_pb2.AWAY_LOCAL,
    "fail": lane_pb2.AWAY_FAIL,
}


@dataclass(frozen=True)
class Answering:
    """A request on its way: what is sent to the lead, for each choice, and how its answers are written."""

    route: Route
    requests: tuple[lane_pb2.Open, ...]
    transcripts: tuple[Transcript, ...]
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
        self._compiler = Compiler()

    async def chat(self, asked: ChatRequest, arrived_s: float, tenant: str) -> Answering:
        """Render the conversation, tokenize it, check it against the context; `tenant`: whose conversation it is."""
        route, facts, tokenizer = await self._find(asked.model)
        template = tokenizer.template
        if template is None:
            raise InvalidRequest(
                f"{asked.model} has no chat template, so it holds no conversations; send plain text to /v1/completions",
                param="model",
            )
        how, special = template.calls, Special(tokenizer.added, frozenset(facts.eos_ids))
        grammar = await self._compiler.run(partial(chat_grammar, asked, how, special))
        text = await self.templates.render(asked.model, *_conversation(asked, template))
        # The template writes the special tokens itself.
        prompt = await asyncio.to_thread(tokenizer.encode, text, with_specials=False)
        writer = ChatWriter(asked.model, tokenizer, asked.wanted_logprobs, asked.include_usage)
        writer.local_class = route.local_class
        names = [tool.function.name for tool in offered(asked)]
        shown: Mapping[int, str] = {}
        if names:
            writer.parser = partial(CallParser, how, names)
            shown = tokenizer.hidden(how.marker) | tokenizer.hidden(how.closing)
        requests = _open(
            asked,
            writer.identifier,
            prompt,
            param="messages",
            tenant=tenant,
            route=route,
            facts=facts,
            wanted=asked.answer_tokens,
            default=route.context,
            top_logprobs=asked.wanted_logprobs,
            grammar=grammar,
        )
        transcripts = [Transcript(tokenizer.detokenizer(), asked.stops, facts.eos_ids, shown) for _ in requests]
        return Answering(route, requests, tuple(transcripts), writer, arrived_s)

    async def completion(self, asked: CompletionRequest, arrived_s: float, tenant: str) -> Answering:
        """Tokenize the prompt, check it against the context; `tenant`: whose prompt it is."""
        route, facts, tokenizer = await self._find(asked.model)
        grammar = await self._compiler.run(partial(answer_grammar, asked))
        prompt, text = await _completion_prompt(asked, facts, tokenizer)
        writer = CompletionWriter(asked.model, tokenizer, asked.wanted_logprobs, asked.include_usage)
        writer.local_class = route.local_class
        writer.echo = text if asked.echo else ""
        writer.token_ids, writer.timings = asked.return_token_ids, asked.return_timings
        requests = _open(
            asked,
            writer.identifier,
            prompt,
            param="prompt",
            tenant=tenant,
            route=route,
            facts=facts,
            wanted=asked.max_tokens,
            default=COMPLETION_TOKENS,
            top_logprobs=asked.wanted_logprobs,
            grammar=grammar,
        )
        transcripts = [Transcript(tokenizer.detokenizer(prompt), asked.stops, facts.eos_ids) for _ in requests]
        return Answering(route, requests, tuple(transcripts), writer, arrived_s)

    def parts(self, answering: Answering) -> AsyncGenerator[Numbered, None]:
        """The answers as they are made; closing it cancels their sessions."""
        pairs = zip(answering.requests, answering.transcripts, strict=True)
        generate = self.sessions.generate
        return interleave([generate(answering.route, *pair, answering.arrived_s) for pair in pairs])

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

    async def _find(self, model: str) -> tuple[Route, ModelFacts, ModelTokenizer]:
        if self.stopping:
            raise Unavailable("the gateway is stopping")
        route = self.deployments.find(model)
        if route.facts is None:
            raise Unavailable(f"the coordinator sent no manifest of {model}")
        return route, route.facts, await self.tokenizers.get(route.facts, route.holders)


def _conversation(asked: ChatRequest, template: ChatTemplate) -> tuple[ChatTemplate, dict[str, Any]]:
    """The template to render and its variables; tools that nobody may call are not shown to the model."""
    messages = [message.for_template() for message in asked.messages]
    tools = [tool.for_template() for tool in asked.tools] if offered(asked) else None
    if not template.calls.known:
        messages, tools = described(messages, tools or ()), None
    chosen = template if tools is None else template.for_tools()
    return chosen, chat_variables(messages, asked.chat_template_kwargs, tools)


async def _completion_prompt(
    asked: CompletionRequest, facts: ModelFacts, tokenizer: ModelTokenizer
) -> tuple[list[int], str]:
    """The prompt as ids and as text."""
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
        return await asyncio.to_thread(tokenizer.encode, prompt, with_specials=True), prompt
    ids = [token for token in prompt if isinstance(token, int)]
    beyond = next((at for at, token in enumerate(ids) if token >= facts.vocab), None)
    if beyond is not None:
        raise InvalidRequest(
            f"prompt[{beyond}] is {ids[beyond]}; token ids of {asked.model} go from 0 to {facts.vocab - 1}",
            param="prompt",
        )
    return ids, tokenizer.decode(ids)


def _open(
    asked: Common,
    identifier: str,
    prompt: list[int],
    *,
    param: str,
    tenant: str,
    route: Route,
    facts: ModelFacts,
    wanted: int | None,
    default: int,
    top_logprobs: int,
    grammar: str,
) -> tuple[lane_pb2.Open, ...]:
    """The sessions that are asked for, one for each choice; raises InvalidRequest or ContextExceeded with the figures.

    Choice i of a request with a seed is what a request with one choice and the seed + i gives.
    """
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
    first = secrets.randbits(64) if asked.seed is None else asked.seed
    biases = _biases(asked, facts)
    return tuple(
        lane_pb2.Open(
            request_id=identifier if asked.n == 1 else f"{identifier}-{index}",
            prompt=prompt,
            max_tokens=min(default, rest) if wanted is None else wanted,
            stop_ids=() if asked.ignore_eos else facts.eos_ids,
            sampling=lane_pb2.Sampling(
                temperature=asked.temperature,
                top_k=max(asked.top_k, 0),
                top_p=asked.top_p,
                min_p=asked.min_p,
                seed=(first + index) % (2 * INT64),
                top_logprobs=top_logprobs,
                repetition_penalty=asked.repetition_penalty,
                presence_penalty=asked.presence_penalty,
                frequency_penalty=asked.frequency_penalty,
                logit_bias=biases,
            ),
            grammar=grammar,
            tenant=tenant,
            away=_AWAY[asked.away] if route.hybrid else lane_pb2.AWAY_UNSPECIFIED,
            target=route.model if route.hybrid else "",
        )
        for index in range(asked.n)
    )


def _biases(asked: Common, facts: ModelFacts) -> list[lane_pb2.TokenBias]:
    found = asked.biases
    beyond = next((token for token in found if token >= facts.vocab), None)
    if beyond is not None:
        raise InvalidRequest(
            f"logit_bias names token {beyond}; token ids of {asked.model} go from 0 to {facts.vocab - 1}",
            param="logit_bias",
        )
    return [lane_pb2.TokenBias(id=token, bias=bias) for token, bias in sorted(found.items())]
