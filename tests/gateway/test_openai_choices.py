"""The official client asking for several answers, penalties, structured answers and calls of tools.

The lead behind it draws at random from what the grammar that it was sent allows.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any, Literal

import openai
import pydantic
import pytest
import pytest_asyncio
from gateway.vocabulary import ByteVocabulary
from tokenizers import AddedToken, Tokenizer

from ganglion.proto import lane_pb2
from ganglion.wire.errors import Exhausted

ASK: list[Any] = [{"role": "user", "content": "hi"}]
MARKERS = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]"]
TOOLS_TEMPLATE = (
    "{{ bos_token }}{% if tools %}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{% endif %}"
    "{% for message in messages %}{{ message.role }}: {{ message.content }}"
    "{% for call in message.tool_calls or [] %}"
    '<tool_call>\n{"name": {{ call.function.name | tojson }}, "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}{{ '\n' }}{% endfor %}assistant: "
)
MISTRAL_TEMPLATE = TOOLS_TEMPLATE.replace("<tool_call>", "[TOOL_CALLS]").replace("</tool_call>", "")
PLAIN_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant: "
LISTED = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": TOOLS_TEMPLATE}]


class Weather(pydantic.BaseModel):
    """The weather of a place."""

    model_config = {"extra": "forbid"}
    city: str = pydantic.Field(max_length=6)
    unit: Literal["c", "f"]


class Report(pydantic.BaseModel):
    model_config = {"extra": "forbid"}
    degrees: int = pydantic.Field(ge=-40, le=40)
    words: list[str] = pydantic.Field(max_length=0)


WEATHER: Any = openai.pydantic_function_tool(Weather)
NOW: Any = {"type": "function", "function": {"name": "now", "strict": True}}
VOCABULARY = ByteVocabulary(["<257>", "<258>", "<259>", *MARKERS])  # as llguidance has it: 256 is the end


def by_seed(request: lane_pb2.Open) -> str:
    return f"{request.sampling.seed % 1000:03}é"


def with_markers(bytes_tokenizer: Tokenizer, template: Any) -> dict[str, bytes]:
    tokenizer = Tokenizer.from_str(bytes_tokenizer.to_str())
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in MARKERS])  # ids 260 and on
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    return {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def tooled(
    tmp_path_factory: pytest.TempPathFactory, bytes_tokenizer: Tokenizer, make_fleet: Any
) -> AsyncIterator[Any]:
    """A gateway with models whose templates know tools, or not."""
    folder: Path = tmp_path_factory.mktemp("tooled")
    async with make_fleet(folder) as fleet:
        templates = {"hermes": TOOLS_TEMPLATE, "mistral": MISTRAL_TEMPLATE, "listed": LISTED, "plain": PLAIN_TEMPLATE}
        for name, template in templates.items():
            fleet.add_model(name, with_markers(bytes_tokenizer, template), vocab=260 + len(MARKERS), context=2048)
        fleet.coordinator.say(*(fleet.state(name) for name in templates))
        await fleet.start()
        await fleet.readyz(200)
        yield fleet


@pytest_asyncio.fixture(loop_scope="session")
async def tools(tooled: Any) -> AsyncIterator[Any]:
    await tooled.quiet()
    yield tooled
    await tooled.quiet()


def client(api: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=api.url, api_key="unused", max_retries=0)


def obeying(api: Any, choose: str | None = None) -> Any:
    """A lead that says `choose`, which must be allowed, or else draws from what the grammar allows."""

    async def script(request: lane_pb2.Open) -> AsyncGenerator[lane_pb2.SessionEvent, None]:
        yield api.accepted()
        assert request.grammar or choose is not None
        text = VOCABULARY.walk(request.grammar, request.sampling.seed) if choose is None else choose
        assert not request.grammar or VOCABULARY.allows(request.grammar, text)
        ids = VOCABULARY.encode(text)
        for token in ids:
            yield api.tokens(token)
        yield api.tokens(257)
        yield api.finished(request, len(ids) + 1)

    return script


def saying_by_seed(api: Any) -> Any:
    async def script(request: lane_pb2.Open) -> AsyncGenerator[lane_pb2.SessionEvent, None]:
        async with contextlib.aclosing(api.scripts["saying"](by_seed(request))(request)) as events:
            async for event in events:
                yield event
                await asyncio.sleep(0)

    return script


# --- several answers


async def test_n_answers(api: Any) -> None:
    api.agent.script = saying_by_seed(api)
    async with client(api) as ai:
        whole = await ai.chat.completions.create(model="tiny", messages=ASK, n=3, seed=-2)
        text = await ai.completions.create(model="tiny", prompt="x", n=2, best_of=2, seed=7)
    sent = {request.request_id: request for request in api.agent.requests}
    assert sorted(sent[f"{whole.id}-{at}"].sampling.seed for at in range(3)) == [0, 2**64 - 2, 2**64 - 1]
    assert [(choice.index, choice.message.content) for choice in whole.choices] == [
        (at, by_seed(sent[f"{whole.id}-{at}"])) for at in range(3)
    ]
    assert [(choice.index, choice.text) for choice in text.choices] == [(0, "007é"), (1, "008é")]
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 3 * 6
    assert whole.usage.prompt_tokens == len(sent[f"{whole.id}-0"].prompt)


async def test_n_answers_streamed(api: Any) -> None:
    api.agent.script = saying_by_seed(api)
    async with client(api) as ai:
        stream = await ai.chat.completions.create(
            model="tiny", messages=ASK, n=4, seed=1, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    usage = chunks.pop().usage
    assert usage is not None
    assert usage.completion_tokens == 4 * 6
    for at in range(4):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == at]
        assert own[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for choice in own) == f"00{1 + at}é"
        assert [choice.finish_reason for choice in own if choice.finish_reason] == ["stop"]
        assert own[-1].finish_reason == "stop"
    order = [chunk.choices[0].index for chunk in chunks if chunk.choices[0].delta.content]
    assert order != sorted(order)  # side by side


async def test_closing_the_stream_ends_every_answer(api: Any) -> None:
    api.agent.script = api.scripts["talking_for_ever"]()
    async with client(api) as ai:
        stream = await ai.completions.create(model="tiny", prompt="x", n=3, stream=True, max_tokens=200)
        async for _ in stream:
            if api.agent.open == 3:
                break
        await stream.close()
    assert len({await api.next_end() for _ in range(3)}) == 3


@pytest.mark.parametrize("stream", [False, True])
async def test_an_error_of_one_answer_fails_the_request(api: Any, stream: bool) -> None:
    fine, broken = api.scripts["stalling"](b"ab"), api.scripts["failing"](Exhausted("no room for this one"), b"a")

    async def script(request: lane_pb2.Open) -> AsyncGenerator[lane_pb2.SessionEvent, None]:
        async with contextlib.aclosing((broken if request.sampling.seed == 2 else fine)(request)) as events:
            async for event in events:
                yield event

    api.agent.script = script
    async with client(api) as ai:
        with pytest.raises(openai.APIError, match="no room for this one"):  # noqa: PT012
            answer: Any = await ai.completions.create(model="tiny", prompt="x", n=3, seed=0, stream=stream)
            async for _ in answer:
                pass
    assert len({await api.next_end() for _ in range(3)}) == 3


# --- parameters of sampling


async def test_penalties_and_biases_go_through(api: Any) -> None:
    async with client(api) as ai:
        await ai.chat.completions.create(model="tiny", messages=ASK)
        await ai.chat.completions.create(
            model="tiny",
            messages=ASK,
            presence_penalty=0.5,
            frequency_penalty=-1.5,
            logit_bias={"7": 100, "0": -2.5},  # type: ignore[dict-item]
            extra_body={"repetition_penalty": 1.25},
        )
    plain, asked = (request.sampling for request in api.agent.requests)
    assert (plain.presence_penalty, plain.frequency_penalty, plain.repetition_penalty) == (0, 0, 1)
    assert not plain.logit_bias
    assert (asked.presence_penalty, asked.frequency_penalty, asked.repetition_penalty) == (0.5, -1.5, 1.25)
    assert [(bias.id, bias.bias) for bias in asked.logit_bias] == [(0, -2.5), (7, 100)]


async def test_echo(api: Any) -> None:
    async with client(api) as ai:
        whole = await ai.completions.create(model="tiny", prompt="Prómpt ", echo=True, n=2)
        ids = await ai.completions.create(model="tiny", prompt=[256, *b"ids "], echo=True)
        stream = await ai.completions.create(model="tiny", prompt="Prómpt ", echo=True, stream=True)
        streamed = "".join([chunk.choices[0].text async for chunk in stream])
        stopped = await ai.completions.create(model="tiny", prompt="hell", echo=True, stop="l")
    assert [choice.text for choice in whole.choices] == ["Prómpt hello"] * 2
    assert ids.choices[0].text == "ids hello"
    assert streamed == "Prómpt hello"
    assert stopped.choices[0].text == "hellhe"  # the prompt is not searched


# --- structured answers


async def test_parsed_answers(api: Any) -> None:
    api.agent.script = obeying(api)
    async with client(api) as ai:
        for seed in range(4):
            found = await ai.chat.completions.parse(model="tiny", messages=ASK, response_format=Report, seed=seed)
            assert isinstance(found.choices[0].message.parsed, Report)
            assert found.choices[0].finish_reason == "stop"
        async with ai.chat.completions.stream(model="tiny", messages=ASK, response_format=Report, seed=9) as stream:
            final = await stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Report)


async def test_other_structures(api: Any) -> None:
    api.agent.script = obeying(api)
    wanted: dict[str, tuple[dict[str, Any], Any]] = {
        "choice": ({"structured_outputs": {"choice": ["yes", 'n"o']}}, lambda text: text in {"yes", 'n"o'}),
        "regex": ({"guided_regex": "[ab]{3}/x"}, lambda text: text[:3].strip("ab") == "" and text[3:] == "/x"),
        "json": ({"guided_json": json.dumps({"const": [1, "é"]})}, lambda text: json.loads(text) == [1, "é"]),
        "grammar": ({"guided_grammar": 'start: "a" B\nB: /b+c/'}, lambda text: text[0] == "a" and text[-1] == "c"),
        "ebnf": ({"structured_outputs": {"grammar": 'root ::= "a" | "b"'}}, lambda text: text in {"a", "b"}),
    }
    async with client(api) as ai:
        for extra, holds in wanted.values():
            answer = await ai.completions.create(model="tiny", prompt="x", max_tokens=200, extra_body=extra)
            assert holds(answer.choices[0].text)


async def test_any_object(api: Any) -> None:
    api.agent.script = obeying(api, '{"a": [1, {"b": null}], "c": "é"}')
    async with client(api) as ai:
        answer = await ai.chat.completions.create(
            model="tiny", messages=ASK, response_format={"type": "json_object"}, n=2
        )
    assert json.loads(answer.choices[1].message.content or "")["a"][1] == {"b": None}


async def test_a_schema_that_cannot_be_enforced(api: Any) -> None:
    async with client(api) as ai:
        schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
        layout: Any = {"type": "json_schema", "json_schema": {"name": "s", "strict": False, "schema": schema}}
        with pytest.raises(openai.BadRequestError, match=r"'uniqueItems' at #/properties/a/uniqueItems") as raised:
            await ai.chat.completions.create(model="tiny", messages=ASK, response_format=layout)
    assert raised.value.param == "response_format.json_schema.schema"
    assert raised.value.code == "unsupported"


# --- tools


def prompt_of(request: lane_pb2.Open) -> str:
    names = [MARKERS[token - 260].encode() if token >= 260 else b"" for token in request.prompt]
    return b"".join(
        name or bytes([token] if token < 256 else []) for token, name in zip(request.prompt, names, strict=True)
    ).decode()


@pytest.mark.parametrize("model", ["hermes", "mistral", "listed", "plain"])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "Weather"}}])
async def test_forced_calls(tools: Any, model: str, choice: Any) -> None:
    tools.agent.script = obeying(tools)
    async with client(tools) as ai:
        answer = await ai.chat.completions.parse(
            model=model, messages=ASK, tools=[WEATHER, NOW], tool_choice=choice, seed=3
        )
        message = answer.choices[0].message
        assert answer.choices[0].finish_reason == "tool_calls"
        assert message.content is None
        for call in message.tool_calls or []:
            assert call.type == "function"
            if call.function.name == "Weather":
                assert isinstance(call.function.parsed_arguments, Weather)
            else:
                assert call.function.arguments == "{}"
            assert call.id.startswith("call_") or model == "mistral"
        assert message.tool_calls
        async with ai.chat.completions.stream(
            model=model, messages=ASK, tools=[WEATHER, NOW], tool_choice=choice, seed=3
        ) as stream:
            deltas = [event async for event in stream if event.type == "tool_calls.function.arguments.delta"]
            final = await stream.get_final_completion()
    assert deltas
    streamed = final.choices[0].message.tool_calls or []
    assert [(call.function.name, call.function.arguments) for call in streamed] == [
        (call.function.name, call.function.arguments) for call in message.tool_calls
    ]
    assert final.choices[0].finish_reason == "tool_calls"
    assert '"Weather"' in prompt_of(tools.agent.requests[0])
    assert "plain" not in prompt_of(tools.agent.requests[0])  # the list's other template


async def test_text_before_calls_and_the_answers_after_them(tools: Any) -> None:
    call = '<tool_call>\n{"name": "Weather", "arguments": {"city": "Bern", "unit": "c"}}\n</tool_call>'
    tools.agent.script = obeying(tools, f"I will look.\n{call}\n{call}")
    async with client(tools) as ai:
        first = await ai.chat.completions.create(model="hermes", messages=ASK, tools=[WEATHER, NOW])
        stream = await ai.chat.completions.create(model="hermes", messages=ASK, tools=[WEATHER, NOW], stream=True)
        chunks = [chunk.choices[0] async for chunk in stream]
        message = first.choices[0].message
        assert message.content == "I will look.\n"
        assert message.tool_calls is not None
        assert len(message.tool_calls) == 2
        answers: list[Any] = [
            {"role": "tool", "tool_call_id": made.id, "content": f"answer {at}"}
            for at, made in enumerate(message.tool_calls)
        ]
        tools.agent.script = obeying(tools, "It is cold.")
        second = await ai.chat.completions.create(
            model="hermes", messages=[*ASK, message, *answers], tools=[WEATHER, NOW]
        )
        parsed = await ai.chat.completions.parse(model="hermes", messages=[*ASK, message, *answers])
        third = await ai.chat.completions.create(model="hermes", messages=[*ASK, parsed.choices[0].message, *ASK])
    assert "".join(choice.delta.content or "" for choice in chunks) == "I will look.\n"
    made = [entry for choice in chunks for entry in choice.delta.tool_calls or []]
    begun = [entry for entry in made if entry.id]
    assert [(entry.index, entry.type, entry.function and entry.function.name) for entry in begun] == [
        (0, "function", "Weather"),
        (1, "function", "Weather"),
    ]
    for index in range(2):
        pieces = [entry.function.arguments or "" for entry in made if entry.index == index and entry.function]
        assert len(pieces) > 3
        assert json.loads("".join(pieces)) == {"city": "Bern", "unit": "c"}
    assert chunks[-1].finish_reason == "tool_calls"
    assert second.choices[0].message.content == "It is cold."
    assert second.choices[0].finish_reason == "stop"
    assert second.choices[0].message.tool_calls is None
    assert third.choices[0].message.content == "It is cold."
    prompt = prompt_of(tools.agent.requests[2])
    assert f"assistant: I will look.\n{call}{call}\ntool" in prompt
    assert prompt.endswith("tool: answer 0\ntool: answer 1\nassistant: ")


async def test_tools_for_a_template_that_knows_none(tools: Any) -> None:
    tools.agent.script = obeying(tools, 'Well. <tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>')
    history: list[Any] = [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "a", "type": "function", "function": {"name": "now", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "a", "content": "noon"},
    ]
    async with client(tools) as ai:
        answer = await ai.chat.completions.create(model="plain", messages=[*ASK, *history], tools=[NOW])
        await ai.chat.completions.create(model="plain", messages=ASK, tools=[NOW], tool_choice="none")
    message = answer.choices[0].message
    assert message.content == "Well. "
    assert message.tool_calls is not None
    prompt = prompt_of(tools.agent.requests[0])
    assert prompt.startswith("user: These functions")
    assert "hi\nassistant: <tool_call>" in prompt
    assert prompt.endswith("user: <tool_response>\nnoon\n</tool_response>\nassistant: ")
    assert prompt_of(tools.agent.requests[1]) == "user: hi\nassistant: "
    assert not tools.agent.requests[1].grammar


async def test_a_call_cut_by_length(tools: Any) -> None:
    async def script(request: lane_pb2.Open) -> AsyncGenerator[lane_pb2.SessionEvent, None]:
        yield tools.accepted()
        ids = VOCABULARY.encode('<tool_call>{"name": "Weather", "arguments": {"city": "Be')
        yield tools.tokens(*ids)
        yield tools.finished(request, len(ids), lane_pb2.FINISH_REASON_LENGTH)

    tools.agent.script = script
    async with client(tools) as ai:
        answer = await ai.chat.completions.create(model="hermes", messages=ASK, tools=[WEATHER], tool_choice="required")
    choice = answer.choices[0]
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls is not None
    call: Any = choice.message.tool_calls[0]
    assert call.function.arguments == '{"city": "Be'
