"""What a request may say: pydantic models of the two generating endpoints, and what is refused by name.

A parameter that this release does not support is accepted while it asks for nothing (null, or its neutral value, as
the official client and common user interfaces send it) and refused by name otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from ganglion.wire.errors import InvalidRequest, Unsupported
from ganglion.wire.limits import STOP_STRING_CHARACTERS, STOP_STRINGS, TOP_LOGPROBS

INT64 = 1 << 63
TOKENS_MAX = 1 << 31

StopString = Annotated[str, Field(min_length=1, max_length=STOP_STRING_CHARACTERS)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 32)]


class _Edge(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class StreamOptions(_Edge):
    """`include_usage`: one more chunk with the usage, at the end. Obfuscation is a padding that we never add."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Common(_Edge):
    """What both endpoints share; defaults are OpenAI's, and 0 (or 1 for top_p) switches a filter off."""

    model: Annotated[str, Field(min_length=1, max_length=512)]
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, le=TOKENS_MAX)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, le=TOKENS_MAX)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=STOP_STRINGS)] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that holds the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class TextPart(_Edge):
    """A part of a message's content; parts of other types are refused by name."""

    type: Literal["text"]
    text: str


class Message(_Edge):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart]
    name: str | None = None
    tool_call_id: str | None = None

    def for_template(self) -> dict[str, str]:
        """As chat templates know it: text parts joined by line feeds, developer called system."""
        content = self.content
        text = content if isinstance(content, str) else "\n".join(part.text for part in content)
        fields = {"role": "system" if self.role == "developer" else self.role, "content": text}
        named = {"name": self.name, "tool_call_id": self.tool_call_id}
        return fields | {key: value for key, value in named.items() if value is not None}


class ChatRequest(Common):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=TOKENS_MAX)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS)] | None = None
    chat_template_kwargs: dict[str, Any] = {}

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
    "n": _is(1),
    "presence_penalty": _is(0),
    "frequency_penalty": _is(0),
    "repetition_penalty": _is(1),
    "logit_bias": _is({}),
    "user": _any,
    "metadata": _any,
}

_NEUTRAL_CHAT: Mapping[str, Neutral] = {
    **_NEUTRAL_COMMON,
    "store": _is(False),
    "tools": _is([]),
    "tool_choice": _is("none", "auto"),
    "parallel_tool_calls": _is(True, False),
    "functions": _is([]),
    "function_call": _is("none", "auto"),
    "response_format": _is({"type": "text"}),
    "service_tier": _is("auto", "default"),
    "modalities": _is(["text"]),
    "verbosity": _is("medium"),
    "safety_identifier": _any,
    "prompt_cache_key": _any,
}

_NEUTRAL_COMPLETION: Mapping[str, Neutral] = {
    **_NEUTRAL_COMMON,
    "best_of": _is(1),
    "echo": _is(False),
    "suffix": _is(""),
}

_NEUTRAL_MESSAGE: Mapping[str, Neutral] = {
    "tool_calls": _is([]),
    "annotations": _is([]),
}

R = TypeVar("R", bound=Common)


def parse_chat(body: dict[str, Any]) -> ChatRequest:
    """The request, checked; raises Unsupported or InvalidRequest with the parameter's name."""
    supported = _supported(ChatRequest, _NEUTRAL_CHAT, body, "")
    messages = supported.get("messages")
    if isinstance(messages, list):
        supported["messages"] = [_message(message, f"messages[{at}]") for at, message in enumerate(messages)]
    request = _validated(ChatRequest, supported)
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
    return _checked(request)


def parse_completion(body: dict[str, Any]) -> CompletionRequest:
    """The request, checked; raises Unsupported or InvalidRequest with the parameter's name."""
    return _checked(_validated(CompletionRequest, _supported(CompletionRequest, _NEUTRAL_COMPLETION, body, "")))


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
            raise Unsupported(
                f"the parameter {param} is not supported{only} by this release; leave it out", param=param
            )
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
