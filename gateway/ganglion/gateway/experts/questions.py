"""Pure: a request to edge experts as each of them is asked it, and what such a request may not say."""

from __future__ import annotations

from typing import Any, Final

from ganglion.gateway.experts.external import Question
from ganglion.gateway.experts.table import Budget, Combining
from ganglion.gateway.grammars import offered
from ganglion.gateway.messages import Message
from ganglion.gateway.parameters import ChatRequest, CompletionRequest
from ganglion.gateway.preparing import COMPLETION_TOKENS
from ganglion.wire.errors import InvalidRequest, Unsupported

Request = ChatRequest | CompletionRequest
_SEEDS: Final = 1 << 31  # servers take seeds of 32 bits, with or without a sign
_EXTRAS: Final[
    dict[str, Any]
] = {  # OpenAI has them not; sent, as vLLM and llama.cpp name them, when they are asked for
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "ignore_eos": False,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


def check(asked: Request) -> None:
    """Raises InvalidRequest or Unsupported, by name, for what several models cannot be asked together."""
    refused = {
        "n": (asked.n > 1, "experts give one answer; experts.n asks for several, of which one is kept"),
        "logprobs": (
            asked.wanted_logprobs >= 0,
            "the tokens of one expert are not another's; ask one model by its name",
        ),
        "logit_bias": (bool(asked.logit_bias), "token ids are of one model; ask one model by its name"),
    }
    if isinstance(asked, ChatRequest):
        refused["tools"] = (bool(offered(asked)), "calls of tools are one model's; ask one model by its name")
    else:
        text = isinstance(asked.prompt, str) or (len(asked.prompt) == 1 and isinstance(asked.prompt[0], str))
        refused["prompt"] = (
            not text,
            "token ids are of one model, and one prompt is answered at a time; send one text",
        )
        refused["return_token_ids"] = (asked.return_token_ids, "token ids are of one model; leave it out")
        refused["return_timings"] = (asked.return_timings, "timings are of one lead; ask one model by its name")
    for name, (unwanted, why) in refused.items():
        if unwanted:
            raise Unsupported(f"{name} is not supported with the model {asked.model}: {why}", param=name)
    if not text_of(asked):
        raise InvalidRequest("the prompt is empty; send at least one character", param="prompt")


def check_combining(asked: Request, how: Combining) -> None:
    """Likewise, once it is known how answers are combined."""
    wanted = asked.experts.n if asked.experts is not None else None
    if wanted not in {None, 1} and how not in {"vote", "rerank"}:
        raise InvalidRequest(
            f"experts.n keeps one of several answers by vote or rerank, and answers are combined by {how} here; set "
            f"experts.combine, or leave it out",
            param="experts.n",
        )
    if how == "blend" and is_structured(asked):
        raise Unsupported(
            "a structured answer is drawn by one model; with experts.combine blend leave response_format out",
            param="response_format",
        )


def is_structured(asked: Request) -> bool:
    """Whether the answer is held to a grammar."""
    formatted = asked.response_format is not None and asked.response_format.type != "text"
    guided = (
        asked.guided_json,
        asked.guided_regex,
        asked.guided_choice,
        asked.guided_grammar,
        asked.structured_outputs,
    )
    return formatted or any(one is not None for one in guided)


def text_of(asked: Request) -> str:
    """What the gate is given: the prompt, or the conversation's messages in order."""
    if isinstance(asked, ChatRequest):
        return "\n".join(message.text for message in asked.messages)
    prompt = asked.prompt
    if isinstance(prompt, list):
        return next((part for part in prompt if isinstance(part, str)), "")
    return prompt


def tokens_of(asked: Request, budget: Budget) -> int:
    """The most tokens of an answer: what is asked for, else OpenAI's default, of a chat what its class counts on."""
    if isinstance(asked, ChatRequest):
        return asked.answer_tokens or budget.tokens
    return asked.max_tokens or COMPLETION_TOKENS


def for_model(asked: Request, name: str, seed: int, *, scored: bool) -> Request:
    """The request to one deployment; scored: with the log-probability of every token."""
    changes: dict[str, Any] = {"model": name, "seed": seed, "experts": None, "stream": False, "stream_options": None}
    if scored:
        changes |= {"logprobs": True} if isinstance(asked, ChatRequest) else {"logprobs": 0}
    return asked.model_copy(update=changes)


def for_server(asked: Request, model: str, seed: int, tokens: int, *, scored: bool) -> Question:
    """The request to one server."""
    document: dict[str, Any] = {
        "model": model,
        "max_tokens": tokens,
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "seed": seed % _SEEDS,
    }
    document |= {name: found for name, neutral in _EXTRAS.items() if (found := getattr(asked, name)) != neutral}
    if asked.stops:
        document["stop"] = list(asked.stops)
    if isinstance(asked, ChatRequest):
        document["messages"] = [_message(message) for message in asked.messages]
        if scored:
            document["logprobs"] = True
        return Question("/chat/completions", document, asked.stops, tokens)
    document["prompt"] = text_of(asked)
    if scored:
        document["logprobs"] = 1  # 0 is none to some
    return Question("/completions", document, asked.stops, tokens)


def _message(message: Message) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": message.text,
    }
    named = {"name": message.name, "tool_call_id": message.tool_call_id}
    fields |= {key: value for key, value in named.items() if value is not None}
    if message.tool_calls:
        fields["tool_calls"] = [
            {
                "id": call.id,
                "type": call.type,
                "function": {"name": call.function.name, "arguments": call.function.arguments},
            }
            for call in message.tool_calls
        ]
    return fields
