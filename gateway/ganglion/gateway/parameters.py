"""What a request may say: pydantic models of the two generating endpoints, and what is refused by name.

A parameter that this release does not support is accepted while it asks for nothing (null, or its neutral value, as
the official client and common user interfaces send it) and refused by name otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import BaseModel, Field

from ganglion.gateway.messages import Edge, Message, NamedChoice, Tool
from ganglion.wire.errors import InvalidRequest, Unsupported
from ganglion.wire.limits import STOP_STRING_CHARACTERS, STOP_STRINGS, TOP_LOGPROBS

INT64 = 1 << 63
TOKENS_MAX = 1 << 31
CHOICES = 8  # of one request
LOGIT_BIASES = 1024
TOOLS = 128
EXPERT_ANSWERS = 32  # of one request to edge experts
CHOICE_STRINGS = 1024  # of a structured output
GRAMMAR_CHARACTERS = 64 << 10  # of a regular expression or a grammar that a client sends

StopString = Annotated[str, Field(min_length=1, max_length=STOP_STRING_CHARACTERS)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 32)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Pattern = Annotated[str, Field(min_length=1, max_length=GRAMMAR_CHARACTERS)]
Alternatives = Annotated[list[str], Field(min_length=1, max_length=CHOICE_STRINGS)]


class StreamOptions(Edge):
    """`include_usage`: one more chunk with the usage, at the end. Obfuscation is a padding that we never add."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class JsonSchema(Edge):
    """A named schema; `strict` changes nothing, the answer is always constrained."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Edge):
    """OpenAI's way to say what the answer must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Edge):
    """vLLM's way: one of these."""

    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    regex: Pattern | None = None
    choice: Alternatives | None = None
    grammar: Pattern | None = None


class Experts(Edge):
    """Of a request to edge experts: what it has otherwise than its class. `n`: answers, of which one is kept."""

    class_: Annotated[str | None, Field(alias="class", pattern=r"^[a-z0-9][a-z0-9-]{0,30}$")] = None
    combine: Literal["best", "vote", "rerank", "blend"] | None = None
    latency_s: Annotated[float, Field(gt=0, le=3600)] | None = None
    energy_j: Annotated[float, Field(gt=0, le=1e9)] | None = None
    most: Annotated[int, Field(ge=1, le=64)] | None = None
    n: Annotated[int, Field(ge=1, le=EXPERT_ANSWERS)] | Literal["auto"] | None = None
    private: bool | None = None


class Common(Edge):
    """What both endpoints share; defaults are OpenAI's, and 0 (or 1 for top_p) switches a filter off."""

    model: Annotated[str, Field(min_length=1, max_length=512)]
    n: Annotated[int, Field(ge=1, le=CHOICES)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, le=TOKENS_MAX)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, le=TOKENS_MAX)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=STOP_STRINGS)] | None = None
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] = 1.0
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field({}, max_length=LOGIT_BIASES)
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: Pattern | None = None
    guided_choice: Alternatives | None = None
    guided_grammar: Pattern | None = None
    ignore_eos: bool = False
    away: Literal["wait", "local", "fail"] | None = None
    experts: Experts | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def biases(self) -> dict[int, float]:
        """`logit_bias` by token id; raises InvalidRequest for a key that is no id."""
        found: dict[int, float] = {}
        for key, bias in self.logit_bias.items():
            if not re.fullmatch(r"0|[1-9][0-9]{0,9}", key, re.ASCII):
                raise InvalidRequest(f"logit_bias: {key[:32]!r} is not a token id", param="logit_bias")
            found[int(key)] = bias
        return found

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that holds the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(Common):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=TOKENS_MAX)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS)] | None = None
    tools: list[Tool] = Field([], max_length=TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedChoice = "auto"
    parallel_tool_calls: bool = True
    chat_template_kwargs: dict[str, Any] = Field({})

    @property
    def answer_tokens(self) -> int | None:
        """The most tokens of an answer; None: the rest of the context."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def wanted_logprobs(self) -> int:
        """As the session's `top_logprobs`: -1 for none."""
        return (self.top_logprobs or 0) if self.logprobs else -1


class CompletionRequest(Common):
    """POST /v1/completions."""

    prompt: str | list[TokenId] | list[str] | list[list[TokenId]]
    logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS)] | None = None
    echo: bool = False
    best_of: Annotated[int, Field(ge=1)] | None = None
    return_token_ids: bool = False
    return_timings: bool = False

    @property
    def wanted_logprobs(self) -> int:
        """As the session's `top_logprobs`: -1 for none."""
        return -1 if self.logprobs is None else self.logprobs


Neutral = Callable[[Any], bool]


def _is(*values: Any) -> Neutral:
    # 0 and False are equal in Python, and are not in JSON.
    return lambda value: any(
        value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in values
    )


def _any(_: Any) -> bool:
    return True


_NEUTRAL_COMMON: Mapping[str, Neutral] = {
    "user": _any,
    "metadata": _any,
}

_NEUTRAL_CHAT: Mapping[str, Neutral] = {
    **_NEUTRAL_COMMON,
    "store": _is(False),
    "functions": _is([]),
    "function_call": _is("none", "auto"),
    "service_tier": _is("auto", "default"),
    "modalities": _is(["text"]),
    "verbosity": _is("medium"),
    "safety_identifier": _any,
    "prompt_cache_key": _any,
}

_NEUTRAL_COMPLETION: Mapping[str, Neutral] = {
    **_NEUTRAL_COMMON,
    "suffix": _is(""),
}

_NEUTRAL_MESSAGE: Mapping[str, Neutral] = {
    "annotations": _is([]),
    "parsed": _any,  # the official client's own, in messages that it gives back
}
_INSTEAD = {"functions": "tools", "function_call": "tool_choice"}

R = TypeVar("R", bound=Common)


def parse_chat(body: dict[str, Any]) -> ChatRequest:
    """The request, checked; raises Unsupported or InvalidRequest with the parameter's name."""
    supported = _supported(ChatRequest, _NEUTRAL_CHAT, body, "")
    messages = supported.get("messages")
    if isinstance(messages, list):
        supported["messages"] = [_message(message, f"messages[{at}]") for at, message in enumerate(messages)]
    _only_functions(supported)
    request = _validated(ChatRequest, supported)
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
    for at, message in enumerate(request.messages):
        message.check(f"messages[{at}]")
    names = [tool.function.name for tool in request.tools]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InvalidRequest(f"tools: two functions are called {twice!r}", param="tools")
    choice = request.tool_choice
    wanted = choice.function.name if isinstance(choice, NamedChoice) else None
    if (wanted is not None or choice == "required") and not names:
        raise InvalidRequest("tool_choice asks for a call, and tools are empty", param="tool_choice")
    if wanted is not None and wanted not in names:
        raise InvalidRequest(f"tool_choice names {wanted!r}; tools are: {', '.join(names)}", param="tool_choice")
    return _checked(request)


def parse_completion(body: dict[str, Any]) -> CompletionRequest:
    """The request, checked; raises Unsupported or InvalidRequest with the parameter's name."""
    request = _checked(_validated(CompletionRequest, _supported(CompletionRequest, _NEUTRAL_COMPLETION, body, "")))
    if request.best_of not in {None, request.n}:
        raise Unsupported(
            f"best_of is {request.best_of} and n {request.n}: choosing among more answers than are returned is not "
            f"supported by this release; leave it out",
            param="best_of",
        )
    if request.echo and request.logprobs is not None:
        raise Unsupported("echo with logprobs is not supported by this release; ask for one of them", param="echo")
    return request


def _checked(request: R) -> R:
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("stream_options needs stream to be true", param="stream_options")
    return request


def _message(message: Any, path: str) -> Any:
    if not isinstance(message, dict):
        return message
    content = message.get("content")
    if isinstance(content, list):
        for at, part in enumerate(content):
            if isinstance(part, dict) and isinstance(part.get("type"), str) and part["type"] != "text":
                name = f"{path}.content[{at}].type"
                raise Unsupported(
                    f"{name}: parts of type {part['type'][:64]!r} are not supported; send text", param=name
                )
    return _supported(Message, _NEUTRAL_MESSAGE, message, f"{path}.")


def _only_functions(body: dict[str, Any]) -> None:
    """Tools and choices of other kinds than function, refused by name."""
    tools = body.get("tools")
    named = [(f"tools[{at}].type", tool) for at, tool in enumerate(tools)] if isinstance(tools, list) else []
    for param, value in [*named, ("tool_choice.type", body.get("tool_choice"))]:
        kind = value.get("type") if isinstance(value, dict) else None
        if isinstance(kind, str) and kind != "function":
            raise Unsupported(f"{param}: {kind[:64]!r} is not supported; send functions", param=param)


def _supported(
    model: type[BaseModel], neutral: Mapping[str, Neutral], body: dict[str, Any], path: str
) -> dict[str, Any]:
    """`body` without nulls and neutral values; raises Unsupported for what is left and not a field of `model`."""
    kept: dict[str, Any] = {}
    for name, value in body.items():
        if name in model.model_fields:
            if value is not None:
                kept[name] = value
        elif value is not None and not neutral.get(name, _never)(value):
            param = f"{path}{name[:64]}"
            only = " with this value" if name in neutral else ""
            instead = f"use {_INSTEAD[name]}" if name in _INSTEAD else "leave it out"
            raise Unsupported(f"the parameter {param} is not supported{only} by this release; {instead}", param=param)
    return kept


def _never(_: Any) -> bool:
    return False


def _validated(model: type[R], body: dict[str, Any]) -> R:
    try:
        return model.model_validate(body)
    except pydantic.ValidationError as error:
        # Of a union every member complains: the deepest complaint is about the member that was meant.
        found = max(error.errors(include_url=False, include_context=False), key=lambda entry: len(entry["loc"]))
        param = _path(found["loc"])
        given = found.get("input")
        figure = f" (got {given})" if isinstance(given, int | float) and abs(given) < 1e20 else ""
        raise InvalidRequest(f"{param}: {found['msg']}{figure}", param=param) from None


def _path(loc: tuple[int | str, ...]) -> str:
    """`messages[0].content` of pydantic's location; names of union members are left out."""
    text = ""
    for part in loc:
        if isinstance(part, int):
            text += f"[{part}]"
        elif re.fullmatch(r"[a-z_]+", part) and part not in {"str", "int"}:
            text += f".{part}" if text else part
    return text
