"""A request to one model made ready: rendered, tokenized and checked against the context; what is sent to its lead."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from ganglion.gateway.calls import CallFormat, Special, described
from ganglion.gateway.compiling import Compiler
from ganglion.gateway.deployments import Deployments, ModelFacts, Route
from ganglion.gateway.grammars import answer_grammar, chat_grammar, offered
from ganglion.gateway.parameters import INT64, ChatRequest, Common, CompletionRequest
from ganglion.gateway.pieces import Tokenizers
from ganglion.gateway.templates import TemplateRenderer, chat_variables
from ganglion.gateway.tokenizing import ChatTemplate, ModelTokenizer
from ganglion.gateway.transcript import Transcript
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
class Prepared:
    """A session for each choice, not named yet, and the reader of its tokens.

    text: of the prompt. calls: how the model calls the tools `names` that it was shown.
    """

    route: Route
    tokenizer: ModelTokenizer
    requests: tuple[lane_pb2.Open, ...]
    transcripts: tuple[Transcript, ...]
    text: str
    calls: CallFormat | None = None
    names: Sequence[str] = ()

    def named(self, identifier: str) -> Prepared:
        """Itself, its sessions called by the request's identifier."""
        for index, request in enumerate(self.requests):
            request.request_id = identifier if len(self.requests) == 1 else f"{identifier}-{index}"
        return self


class Preparer:
    """Makes requests ready for the lead of the model that they name."""

    def __init__(self, deployments: Deployments, tokenizers: Tokenizers, templates: TemplateRenderer) -> None:
        self._deployments = deployments
        self._tokenizers = tokenizers
        self._templates = templates
        self._compiler = Compiler()

    async def chat(self, asked: ChatRequest, tenant: str, default: int | None = None) -> Prepared:
        """Render the conversation, tokenize it, check it against the context; `tenant`: whose conversation it is.

        default: tokens of an answer where nothing is asked, as far as the context goes; None: the rest of it.
        """
        route, facts, tokenizer = await self._find(asked.model)
        template = tokenizer.template
        if template is None:
            raise InvalidRequest(
                f"{asked.model} has no chat template, so it holds no conversations; send plain text to /v1/completions",
                param="model",
            )
        how, special = template.calls, Special(tokenizer.added, frozenset(facts.eos_ids))
        grammar = await self._compiler.run(partial(chat_grammar, asked, how, special))
        text = await self._templates.render(asked.model, *_conversation(asked, template))
        # The template writes the special tokens itself.
        prompt = await asyncio.to_thread(tokenizer.encode, text, with_specials=False)
        names = [tool.function.name for tool in offered(asked)]
        shown: Mapping[int, str] = {}
        if names:
            shown = tokenizer.hidden(how.marker) | tokenizer.hidden(how.closing)
        requests = _open(
            asked,
            prompt,
            param="messages",
            tenant=tenant,
            route=route,
            facts=facts,
            wanted=asked.answer_tokens,
            default=route.context if default is None else default,
            top_logprobs=asked.wanted_logprobs,
            grammar=grammar,
        )
        transcripts = [Transcript(tokenizer.detokenizer(), asked.stops, facts.eos_ids, shown) for _ in requests]
        return Prepared(route, tokenizer, requests, tuple(transcripts), text, how, names)

    async def completion(self, asked: CompletionRequest, tenant: str) -> Prepared:
        """Tokenize the prompt, check it against the context; `tenant`: whose prompt it is."""
        route, facts, tokenizer = await self._find(asked.model)
        grammar = await self._compiler.run(partial(answer_grammar, asked))
        prompt, text = await _completion_prompt(asked, facts, tokenizer)
        requests = _open(
            asked,
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
        return Prepared(route, tokenizer, requests, tuple(transcripts), text)

    async def _find(self, model: str) -> tuple[Route, ModelFacts, ModelTokenizer]:
        route = self._deployments.find(model)
        if route.facts is None:
            raise Unavailable(f"the coordinator sent no manifest of {model}")
        return route, route.facts, await self._tokenizers.get(route.facts, route.holders)


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
