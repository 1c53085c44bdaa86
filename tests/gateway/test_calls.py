"""Calls of tools: what the grammar of each format lets a model say, and what is read back from it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import jsonschema
import pytest
from gateway.vocabulary import ByteVocabulary
from hypothesis import given, settings
from hypothesis import strategies as st

from ganglion.gateway.callparser import Arguments, CallParser, Content, Event, Started
from ganglion.gateway.calls import (
    CALLS,
    GRANITE,
    HERMES,
    LLAMA,
    MISTRAL,
    PLAIN,
    CallFormat,
    Special,
    described,
    format_of,
)
from ganglion.gateway.grammars import chat_grammar
from ganglion.gateway.parameters import parse_chat
from ganglion.wire.errors import Unsupported

FORMATS = [HERMES, MISTRAL, GRANITE, LLAMA, PLAIN]
ADDED = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|tool_call|>", "<|python_tag|>", "<think>"]
VOCABULARIES = {
    "special": ByteVocabulary(ADDED),
    "added": ByteVocabulary(ADDED, special=False),
    "text": ByteVocabulary(),
}
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 9}, "days": {"$ref": "#/$defs/days"}},
    "required": ["city"],
    "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 7}},
}
SPAN = {"type": "object", "properties": {"from": {"enum": ["{", '"', "\\", "]}"]}}, "required": ["from"]}
TOOLS: dict[str, Any] = {"weather": CITY, "weather.span": SPAN, "now": None}


def grammar(how: CallFormat, vocabulary: ByteVocabulary, **asked: Any) -> str:
    tools = [{"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in TOOLS.items()]
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "tools": tools} | asked
    return chat_grammar(parse_chat(body), how, Special(vocabulary.ids, frozenset({256})))


def written(how: CallFormat, *calls: tuple[str, Any]) -> str:
    """Calls as models write them."""
    texts = [json.dumps({"name": name, how.key: arguments}) for name, arguments in calls]
    if how.listed:
        return f"{how.marker}[{', '.join(texts)}]"
    if how.bare:
        return texts[0]
    return "\n".join(f"{how.marker}\n{text}\n{how.closing}" for text in texts)


def read(how: CallFormat, text: str) -> tuple[str, list[tuple[str, str]]]:
    """Content, and the calls' names and arguments."""
    parser = CallParser(how, TOOLS)
    return joined([*parser.push(text), *parser.finish()])


def joined(events: Sequence[Event]) -> tuple[str, list[tuple[str, str]]]:
    content, calls = "", []
    for event in events:
        match event:
            case Content(text):
                content += text
            case Started(index, _, name):
                assert index == len(calls)
                calls.append((name, ""))
            case Arguments(index, text):
                assert index == len(calls) - 1
                calls[-1] = (calls[-1][0], calls[-1][1] + text)
    return content, calls


BOTH = pytest.mark.parametrize("vocabulary", list(VOCABULARIES))
EACH = pytest.mark.parametrize("how", FORMATS, ids=lambda how: how.name)


@EACH
@BOTH
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_forced_calls_are_valid(how: CallFormat, vocabulary: str, choice: Any) -> None:
    known = VOCABULARIES[vocabulary]
    single = isinstance(choice, dict)
    rules = grammar(how, known, tool_choice=choice)
    for seed in range(6):
        content, calls = read(how, known.walk(rules, seed))
        assert content == ""
        assert calls
        assert len(calls) == 1 or not (single or not how.many)
        for name, arguments in calls:
            assert name == "weather" or not single
            jsonschema.validate(json.loads(arguments), TOOLS[name] or {"type": "object", "maxProperties": 0})


@EACH
@BOTH
def test_what_a_model_may_say(how: CallFormat, vocabulary: str) -> None:
    known = VOCABULARIES[vocabulary]
    auto, one = grammar(how, known), grammar(how, known, parallel_tool_calls=False)
    none, must = grammar(how, known, tool_choice="none"), grammar(how, known, tool_choice="required")
    call, wrong = ("weather", {"city": "Bern", "days": 2}), ("weather", {"city": "Bern", "days": 9})
    assert none == ""
    for rules in (auto, one, must):
        assert known.allows(rules, written(how, call))
        assert not known.allows(rules, written(how, wrong))
        assert not known.allows(rules, written(how, ("weathers", {"city": "Bern"})))
        assert not known.allows(rules, written(how, call) + "and more")
    assert known.allows(auto, "just text, with < and [ and {")
    assert known.allows(auto, "<think>first</think> text") or vocabulary == "text"
    assert not known.allows(must, "just text")
    assert not known.allows(must, "text " + written(how, call))
    if not how.bare:
        assert known.allows(auto, "text " + written(how, call))
    if how.many:
        assert known.allows(auto, written(how, call, ("now", {})))
        assert known.allows(must, written(how, call, ("now", {})))
        assert not known.allows(one, written(how, call, ("now", {})))
        assert known.allows(must, written(how, *[("now", {})] * CALLS))
        assert not known.allows(must, written(how, *[("now", {})] * (CALLS + 1)))
    if how is LLAMA:
        assert known.allows(must, "<|python_tag|>" + written(how, call))
        assert known.allows(auto, "<|python_tag|>" + written(how, call))


@EACH
@BOTH
def test_calls_or_a_structured_answer(how: CallFormat, vocabulary: str) -> None:
    known = VOCABULARIES[vocabulary]
    layout = {"type": "json_schema", "json_schema": {"name": "a", "schema": CITY}}
    if how.bare:
        with pytest.raises(Unsupported, match="tools or the structured output"):
            grammar(how, known, response_format=layout)
        return
    rules = grammar(how, known, response_format=layout)
    assert known.allows(rules, '{"city": "Bern"}')
    assert known.allows(rules, written(how, ("now", {})))
    assert not known.allows(rules, "text")
    grammars = {"root ::= [a-z]+": "abc", "start: WORD\nWORD: /[a-z]+/": "abc"}
    for text, answer in grammars.items():
        rules = grammar(how, known, guided_grammar=text)
        assert known.allows(rules, answer)
        assert known.allows(rules, written(how, ("now", {})))


# --- reading


NASTY = ["{", "}", '"', "\\", "]", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "é", "\n"]


@settings(max_examples=150, deadline=None)
@given(
    how=st.sampled_from(FORMATS),
    before=st.sampled_from(["", "so: ", "< [ text\n", "<tool_cal", "<tool_call> no call"]),
    values=st.lists(st.lists(st.sampled_from(NASTY), max_size=4).map("".join), min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 400), max_size=8),
    data=st.data(),
)
def test_calls_are_read_in_any_pieces(
    how: CallFormat, before: str, values: list[str], cuts: list[int], data: st.DataObject
) -> None:
    made = [("weather", {"city": value, "more": [{}, {"a": value}]}) for value in values][: None if how.many else 1]
    before = "" if how.bare else before.replace("<tool_call>", how.marker)
    text = before + written(how, *made)
    text = text[: data.draw(st.integers(len(text) // 2, len(text)) | st.just(len(text)))]
    parser, events = CallParser(how, TOOLS), []
    borders = sorted({min(cut, len(text)) for cut in cuts})
    for start, end in zip([0, *borders], [*borders, len(text)], strict=True):
        events += parser.push(text[start:end])
    events += parser.finish()
    assert joined(events) == read(how, text)
    if text == before + written(how, *made) and "no call" not in before:
        content, calls = joined(events)
        assert content == before
        assert [(name, json.loads(arguments)) for name, arguments in calls] == made


def test_identifiers() -> None:
    for how, pattern in ((HERMES, r"call_[0-9a-f]{24}"), (MISTRAL, r"[a-zA-Z0-9]{9}")):
        parser = CallParser(how, TOOLS)
        started = [event for event in parser.push(written(how, ("now", {}), ("now", {}))) if isinstance(event, Started)]
        assert len({event.id for event in started}) == 2
        for event in started:
            assert re.fullmatch(pattern, event.id)


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>",
        "<tool_call> is what I would write",
        '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "now", "arguments": 3}\n</tool_call>',
        '<tool_call>\n{"arguments": {}, "name": "now"}\n</tool_call>',
        "<tool_call>" + " " * 300 + "{",
        "<tool",
    ],
)
def test_what_is_no_call_is_content(text: str) -> None:
    assert read(HERMES, text) == (text, [])
    assert read(HERMES, f"a {text}") == (f"a {text}", [])
    assert read(LLAMA, '{"name": "unknown", "parameters": {}}')[1] == []


def test_a_call_that_is_cut_keeps_what_was_said() -> None:
    text = written(HERMES, ("weather", {"city": "Bern"}))
    cut = text[: text.index("Bern") + 2]
    assert read(HERMES, cut) == ("", [("weather", '{"city": "Be')])
    assert read(HERMES, text + "\nafter") == ("after", [("weather", '{"city": "Bern"}')])


# --- templates


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages }}", PLAIN),
        ("{{ xml_tools }}<tool_call>", PLAIN),
        ("{% for tool in tools %}{{ tool | tojson }}{% endfor %}<tool_call>{name, arguments}</tool_call>", HERMES),
        ("{{ tools }}<tool_call><function=name>", PLAIN),
        ("{{ tools }}[AVAILABLE_TOOLS][TOOL_CALLS]", MISTRAL),
        ("{{ tools }}[TOOL_CALLS]name[ARGS]", PLAIN),
        ("{{ tools }}<|python_tag|>", LLAMA),
        ('{{ tools }}ipython {"name": n, "parameters": p}', LLAMA),
        ("{{ tools }}<|tool_call|>", GRANITE),
        ("{{ tools }}some other way", PLAIN),
    ],
)
def test_format_of_a_template(template: str, expected: CallFormat) -> None:
    assert format_of(template) is expected


def test_the_plain_conversation() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "now", "arguments": {"a": "é"}}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "noon", "tool_call_id": "1"},
        {"role": "tool", "content": "cold", "tool_call_id": "2"},
        {"role": "user", "content": "so?"},
    ]
    tools = [{"type": "function", "function": {"name": "now"}}]
    plain = described(messages, tools)
    assert [message["role"] for message in plain] == ["user", "assistant", "user", "user"]
    assert plain[0]["content"].endswith("\n\nhi")
    assert '{"name": "now"}' in plain[0]["content"]
    assert read(PLAIN, plain[1]["content"]) == ("", [("now", '{"a": "é"}')])
    assert plain[2]["content"] == ("<tool_response>\nnoon\n</tool_response>\n<tool_response>\ncold\n</tool_response>")
    assert set().union(*plain) == {"role", "content"}
    with_system = described([{"role": "system", "content": "be kind"}, *messages], tools)
    assert with_system[0]["content"].startswith("be kind\n\n")
    assert with_system[1]["content"] == "hi"
    assert described(messages[:1], ()) == messages[:1]
