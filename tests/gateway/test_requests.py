"""What comes in at the edge: parameters by name, malformed bodies, limits; refusals have OpenAI's error shape."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ganglion.gateway.edge import parse_object
from ganglion.gateway.parameters import parse_chat, parse_completion
from ganglion.wire.errors import InvalidRequest

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
ASK = [{"role": "user", "content": "hi"}]


def chat(**more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": ASK} | more


def text(**more: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "hi"} | more


async def post(api: Any, path: str, body: Any, **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with httpx.AsyncClient(base_url=api.base) as client:
        return await client.post(path, content=content, headers={"content-type": "application/json"} | headers)


def refusal(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The error of an answer, which must have exactly OpenAI's shape."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    found: dict[str, Any] = body["error"]
    assert found["message"]
    return found


TOOL = {"type": "function", "function": {"name": "f"}}


def calling(arguments: str) -> list[dict[str, Any]]:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return [*ASK, {"role": "assistant", "tool_calls": [call]}]


def structured(**schema: Any) -> dict[str, Any]:
    return chat(response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": schema}})


REFUSED = [
    (CHAT, chat(tools=[{"type": "custom", "custom": {"name": "f"}}]), "tools[0].type"),
    (CHAT, chat(tools=[TOOL], tool_choice={"type": "allowed_tools"}), "tool_choice.type"),
    (CHAT, chat(functions=[{"name": "f"}]), "functions"),
    (CHAT, chat(function_call={"name": "f"}), "function_call"),
    (CHAT, chat(best_of=2), "best_of"),
    (CHAT, chat(store=True), "store"),
    (CHAT, chat(reasoning_effort="high"), "reasoning_effort"),
    (CHAT, chat(nonsense=1), "nonsense"),
    (CHAT, chat(modalities=["audio"]), "modalities"),
    (CHAT, chat(echo=False), "echo"),
    (CHAT, chat(messages=[{"role": "assistant", "content": "x", "function_call": {}}]), "messages[0].function_call"),
    (CHAT, chat(messages=[*ASK, {"role": "user", "content": "x", "shoe": 1}]), "messages[1].shoe"),
    (
        CHAT,
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        "messages[0].content[0].type",
    ),
    (TEXT, text(echo=True, logprobs=1), "echo"),
    (TEXT, text(suffix="x"), "suffix"),
    (TEXT, text(best_of=2), "best_of"),
    (TEXT, text(best_of=1, n=2), "best_of"),
    (TEXT, text(tools=[]) | {"tools": [TOOL]}, "tools"),
    (TEXT, text(prompt=["a", "b"]), "prompt"),
    (TEXT, text(prompt=[[1], [2]]), "prompt"),
    (TEXT, text(max_completion_tokens=3), "max_completion_tokens"),
]


@pytest.mark.parametrize(("path", "body", "param"), REFUSED)
async def test_unsupported_parameter_is_refused_by_name(api: Any, path: str, body: Any, param: str) -> None:
    error = refusal(await post(api, path, body), 400)
    assert (error["code"], error["type"], error["param"]) == ("unsupported", "invalid_request_error", param)
    assert not api.agent.requests


INVALID = [
    (CHAT, {"messages": ASK}, "model"),
    (CHAT, {"model": "tiny"}, "messages"),
    (CHAT, chat(messages=[]), "messages"),
    (CHAT, chat(messages="hi"), "messages"),
    (CHAT, chat(messages=[1]), "messages[0]"),
    (CHAT, chat(messages=[{"role": "robot", "content": "x"}]), "messages[0].role"),
    (CHAT, chat(messages=[{"role": "user"}]), "messages[0].content"),
    (CHAT, chat(messages=[{"role": "user", "content": 5}]), "messages[0].content"),
    (CHAT, chat(messages=[{"role": "user", "content": [{"type": "text"}]}]), "messages[0].content[0].text"),
    (CHAT, chat(messages=[{"role": "tool", "content": "x"}]), "messages[0].tool_call_id"),
    (CHAT, chat(messages=[ASK[0] | {"tool_calls": calling("{}")[1]["tool_calls"]}]), "messages[0].tool_calls"),
    (CHAT, chat(messages=calling("{")), "messages[1].tool_calls[0].function.arguments"),
    (CHAT, chat(messages=calling("[]")), "messages[1].tool_calls[0].function.arguments"),
    (CHAT, chat(n=0), "n"),
    (CHAT, chat(n=9), "n"),
    (CHAT, chat(n=True), "n"),
    (CHAT, chat(presence_penalty=2.1), "presence_penalty"),
    (CHAT, chat(frequency_penalty=True), "frequency_penalty"),
    (CHAT, chat(frequency_penalty=-2.1), "frequency_penalty"),
    (CHAT, chat(repetition_penalty=0), "repetition_penalty"),
    (CHAT, chat(logit_bias={"5": 101}), "logit_bias"),
    (CHAT, chat(logit_bias={"five": 1}), "logit_bias"),
    (CHAT, chat(logit_bias={"05": 1}), "logit_bias"),
    (CHAT, chat(logit_bias={"-1": 1}), "logit_bias"),
    (CHAT, chat(logit_bias={"260": 1}), "logit_bias"),
    (CHAT, chat(logit_bias=[1]), "logit_bias"),
    (CHAT, chat(logit_bias={str(at): 1 for at in range(1025)}), "logit_bias"),
    (CHAT, chat(tools=[{"type": "function"}]), "tools[0].function"),
    (CHAT, chat(tools=[{"type": "function", "function": {"name": "a b"}}]), "tools[0].function.name"),
    (CHAT, chat(tools=[TOOL, TOOL]), "tools"),
    (CHAT, chat(tools=[TOOL] * 129), "tools"),
    (CHAT, chat(tool_choice="required"), "tool_choice"),
    (CHAT, chat(tool_choice="sometimes"), "tool_choice"),
    (CHAT, chat(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "g"}}), "tool_choice"),
    (
        CHAT,
        chat(tools=[{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]),
        "tools[0].function.parameters",
    ),
    (CHAT, chat(response_format={"type": "xml"}), "response_format.type"),
    (CHAT, chat(response_format={"type": "json_schema"}), "response_format.json_schema"),
    (
        CHAT,
        chat(response_format={"type": "json_schema", "json_schema": {"name": "s"}}),
        "response_format.json_schema.schema",
    ),
    (CHAT, structured(type="integer", minimum=5, maximum=3), "response_format.json_schema.schema"),
    (CHAT, structured(**{"$ref": "#/nowhere"}), "response_format.json_schema.schema"),
    (CHAT, structured(enum=["x" * 65536]), "response_format.json_schema.schema"),
    (CHAT, chat(structured_outputs={}), "structured_outputs"),
    (CHAT, chat(structured_outputs={"regex": "a", "choice": ["a"]}), "structured_outputs.choice"),
    (CHAT, chat(guided_regex="(a"), "guided_regex"),
    (CHAT, chat(guided_regex="a", response_format={"type": "json_object"}), "guided_regex"),
    (CHAT, chat(guided_choice=[]), "guided_choice"),
    (CHAT, chat(guided_choice=["a", "a"]), "guided_choice"),
    (CHAT, chat(guided_json="{"), "guided_json"),
    (CHAT, chat(guided_json="[]"), "guided_json"),
    (CHAT, chat(guided_grammar="start: nothing"), "guided_grammar"),
    (CHAT, chat(guided_grammar="start: <[7]>"), "guided_grammar"),
    (CHAT, chat(guided_grammar="root ::= " + "(" * 20000), "guided_grammar"),
    (TEXT, text(guided_regex="x" * 65537), "guided_regex"),
    (CHAT, chat(temperature=2.1), "temperature"),
    (CHAT, chat(temperature=-0.1), "temperature"),
    (CHAT, chat(temperature="1"), "temperature"),
    (CHAT, chat(temperature=True), "temperature"),
    (CHAT, chat(top_p=0), "top_p"),
    (CHAT, chat(top_p=1.5), "top_p"),
    (CHAT, chat(top_k=-2), "top_k"),
    (CHAT, chat(top_k=1.5), "top_k"),
    (CHAT, chat(min_p=1.1), "min_p"),
    (CHAT, chat(seed=2**63), "seed"),
    (CHAT, chat(seed=0.5), "seed"),
    (CHAT, chat(max_tokens=0), "max_tokens"),
    (CHAT, chat(max_completion_tokens=-1), "max_completion_tokens"),
    (CHAT, chat(stop=""), "stop"),
    (CHAT, chat(stop=["x" * 257]), "stop[0]"),
    (CHAT, chat(stop=["x"] * 17), "stop"),
    (CHAT, chat(logprobs=True, top_logprobs=21), "top_logprobs"),
    (CHAT, chat(top_logprobs=2), "top_logprobs"),
    (CHAT, chat(logprobs=1), "logprobs"),
    (CHAT, chat(stream="yes"), "stream"),
    (CHAT, chat(stream_options={"include_usage": True}), "stream_options"),
    (TEXT, {"model": "tiny"}, "prompt"),
    (TEXT, text(prompt=""), "prompt"),
    (TEXT, text(prompt=[]), "prompt"),
    (TEXT, text(prompt=[""]), "prompt"),
    (TEXT, text(prompt=[260]), "prompt"),
    (TEXT, text(prompt=[-1]), "prompt"),
    (TEXT, text(prompt=[1, "a"]), "prompt"),
    (TEXT, text(prompt={"a": 1}), "prompt"),
    (TEXT, text(logprobs=21), "logprobs"),
    (TEXT, text(logprobs=True), "logprobs"),
]


@pytest.mark.parametrize(("path", "body", "param"), INVALID)
async def test_invalid_parameter_is_named(api: Any, path: str, body: Any, param: str) -> None:
    error = refusal(await post(api, path, body), 400)
    assert error["code"] == "invalid_request"
    found = error["param"]
    assert found == param or (param == "prompt" and found.startswith("prompt["))
    assert not api.agent.requests


HARMLESS_CHAT = {
    "n": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "logit_bias": {},
    "user": "me",
    "store": False,
    "metadata": {"a": "b"},
    "tools": [],
    "functions": [],
    "tool_choice": "none",
    "parallel_tool_calls": True,
    "response_format": {"type": "text"},
    "service_tier": "auto",
    "reasoning_effort": None,
    "stop": None,
    "seed": None,
    "max_tokens": None,
    "top_logprobs": None,
    "logprobs": False,
    "nonsense": None,
    "top_k": -1,
    "messages": [
        {"role": "developer", "content": "a"},
        {"role": "user", "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]},
        {"role": "assistant", "content": "d", "refusal": None, "tool_calls": None, "annotations": [], "audio": None},
        {"role": "user", "content": "e", "name": "f"},
    ],
}


async def test_what_clients_send_by_default_is_accepted(api: Any) -> None:
    answer = await post(api, CHAT, chat(**HARMLESS_CHAT))
    assert answer.status_code == 200, answer.text
    prompt = bytes(token for token in api.agent.requests[0].prompt if token < 256)
    assert prompt == b"system: a\nuser: b\nc\nassistant: d\nuser: e\nassistant: "
    assert api.agent.requests[0].sampling.top_k == 0


async def test_c9_context(api: Any) -> None:
    """At exactly the context one token is left; above it both figures are said."""
    assert (await post(api, TEXT, text(prompt=[7] * 255))).json()["usage"]["completion_tokens"] == 1
    assert api.agent.requests[0].max_tokens == 1  # the default of 16 is at most what is left
    error = refusal(await post(api, TEXT, text(prompt=[7] * 256)), 400)
    assert error["code"] == "context_length_exceeded"
    assert error["message"].count("256") == 2
    error = refusal(await post(api, TEXT, text(prompt=[7] * 200, max_tokens=57)), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "max_tokens")
    assert "at most 56" in error["message"]
    error = refusal(await post(api, CHAT, chat(messages=[{"role": "user", "content": "x" * 5000}])), 400)
    assert error["code"] == "context_length_exceeded"
    assert (await post(api, TEXT, text(prompt=[256]))).status_code == 200  # only BOS


MALFORMED = [
    b"",
    b"{",
    b"nonsense",
    b"[]",
    b'"text"',
    b"null",
    b"\xff\xfe{}",
    b"\xef\xbb\xbf{}",
    b'{"model": "tiny", "model": "tiny"}',
    b'{"model": "\\ud800", "prompt": "x"}',
    b'{"model": "tiny", "prompt": "a\\u0000b"}',
    b'{"model": "tiny", "prompt": "a\x00b"}',
    b'{"model": "tiny", "\\udfff": 1}',
    b'{"temperature": NaN}',
    b'{"temperature": Infinity}',
    b'{"seed": ' + b"9" * 5000 + b"}",
    b'{"a":' * 97 + b"1" + b"}" * 97,
    b'{"a":' + b"[" * 200000,
    b"[" * 200000,
]


@pytest.mark.parametrize("body", MALFORMED, ids=range(len(MALFORMED)))
async def test_a14_malformed_body(api: Any, body: bytes) -> None:
    for path in (CHAT, TEXT):
        assert refusal(await post(api, path, body), 400)["type"] == "invalid_request_error"


async def test_depth_at_the_limit_passes(api: Any) -> None:
    deep: Any = "x"
    for _ in range(94):
        deep = [deep]
    assert (await post(api, TEXT, text(metadata=[deep]))).status_code == 200  # the object, its list, and 94 more
    refusal(await post(api, TEXT, text(metadata=[[deep]])), 400)


async def test_body_too_long(api: Any) -> None:
    error = refusal(await post(api, TEXT, text(prompt="x" * (8 << 20))), 413)
    assert "8388608" in error["message"]

    async def parts() -> Any:
        for _ in range(9):
            yield b"x" * (1 << 20)

    async with httpx.AsyncClient(base_url=api.base) as client:
        answer = await client.post(TEXT, content=parts(), headers={"content-type": "application/json"})
    refusal(answer, 413)


async def test_content_type(api: Any) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        refusal(await post(api, TEXT, text(), **{"content-type": kind}), 415)
    assert (await post(api, TEXT, text(), **{"content-type": "application/json; charset=utf-8"})).status_code == 200


async def test_unknown_paths_and_methods(api: Any) -> None:
    async with httpx.AsyncClient(base_url=api.base) as client:
        assert refusal(await client.get("/"), 404)["code"] == "not_found"
        refusal(await client.post("/v1/embeddings", json={}), 404)
        refusal(await client.get("/v1/models/"), 404)
        answer = await client.get(CHAT)
        refusal(answer, 405)
        assert "POST" in answer.headers["allow"]
        refusal(await client.delete("/v1/models"), 405)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.sampled_from(
    [
        *("model", "messages", "prompt", "stop", "seed", "top_p", "logprobs", "n", "stream_options", "logit_bias"),
        *("chat_template_kwargs", "tools", "tool_choice", "response_format", "structured_outputs", "guided_json"),
    ]
)


@settings(max_examples=120, deadline=None)
@given(body=st.dictionaries(FIELDS | st.text(max_size=8), JSON, max_size=6))
def test_a13_any_json_is_parsed_or_refused(body: dict[str, Any]) -> None:
    for parse in (parse_chat, parse_completion):
        with contextlib.suppress(InvalidRequest):  # and nothing else
            parse(parse_object(json.dumps(body).encode("utf-8", "surrogatepass")))


@settings(max_examples=120, deadline=None)
@given(body=st.binary(max_size=64) | st.text('{}[]",:\\u0123dfnulltrue eE+-.', max_size=40).map(str.encode))
def test_a13_any_bytes_are_parsed_or_refused(body: bytes) -> None:
    try:
        found = parse_object(body)
    except InvalidRequest:
        return
    assert found == json.loads(body)
