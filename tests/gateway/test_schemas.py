"""JSON schemas: what is refused and how it is named, and that what is allowed is valid under the schema as sent."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import enum
import json
import threading
from typing import Annotated, Any, Literal

import jsonschema
import pydantic
import pytest
from gateway.schemas import bounded
from gateway.vocabulary import ByteVocabulary
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ganglion.gateway import compiling
from ganglion.gateway.compiling import Compiler
from ganglion.gateway.grammars import answer_grammar
from ganglion.gateway.parameters import parse_chat
from ganglion.gateway.schemas import SCHEMA_BYTES, SCHEMA_DEPTH, prepare
from ganglion.wire.errors import Exhausted, InvalidRequest, Unsupported

BYTES = ByteVocabulary()


def grammar_of(schema: Any) -> str:
    body = {"name": "s", "schema": schema}
    asked = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
    return answer_grammar(parse_chat(asked | {"response_format": {"type": "json_schema", "json_schema": body}}))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(schema=bounded(), seed=st.integers(0, 1 << 32))
def test_bounded_schemas_end_in_valid_answers(schema: Any, seed: int) -> None:
    answer = json.loads(BYTES.walk(grammar_of(schema), seed))
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
    validator.validate(answer)


def inside(schema: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"p": {"type": "array", "items": schema}}}


PLACE = "#/properties/p/items"
UNSUPPORTED: list[tuple[Any, str]] = [
    ({"not": {"type": "string"}}, "not"),
    ({"if": {}, "then": {}}, "if"),
    ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    ({"type": "array", "contains": {}}, "contains"),
    ({"type": "object", "dependentRequired": {}}, "dependentRequired"),
    ({"type": "object", "propertyNames": {}}, "propertyNames"),
    ({"type": "object", "unevaluatedProperties": False}, "unevaluatedProperties"),
    ({"type": "string", "nullable": True}, "nullable"),
    ({"type": "string", "minLenght": 3}, "minLenght"),
    ({"type": "string", "format": "zip"}, "format"),
    ({"type": "string", "pattern": "(?=a)b"}, "pattern"),
    ({"type": "string", "pattern": "["}, "pattern"),
    ({"type": "string", "minLength": -1}, "minLength"),
    ({"type": "text"}, "type"),
    ({"x-guidance": {"lenient": True}}, "x-guidance"),
    ({"$ref": "https://example.com/schema"}, "$ref"),
    ({"$dynamicRef": "#a"}, "$dynamicRef"),
    ({"$id": "other", "type": "string"}, "$id"),
    ({"oneOf": [{"type": "string"}, {"enum": ["a"]}]}, "oneOf"),
    ({"type": "object", "minProperties": 2}, "minProperties"),
    ({"type": "array", "items": [{}], "prefixItems": [{}]}, "prefixItems"),
    ({"type": "object", "properties": {"a": {}, "b": {}}, "maxProperties": 1, "minProperties": 0}, "maxProperties"),
]


@pytest.mark.parametrize(("schema", "keyword"), UNSUPPORTED, ids=lambda value: value if isinstance(value, str) else "")
def test_unsupported_keyword_is_named_with_its_path(schema: Any, keyword: str) -> None:
    for whole, path in ((schema, "#"), (inside(schema), PLACE)):
        if keyword == "$id" and whole is schema:
            continue  # of the whole schema it is an annotation
        with pytest.raises(Unsupported) as raised:
            prepare(whole, "the.param")
        assert f"keyword {keyword!r} at {path}/{keyword}" in raised.value.message
        assert raised.value.param == "the.param"


INVALID: list[tuple[Any, str]] = [
    ([], "object"),
    ({"$ref": "#/$defs/none"}, "points to nothing"),
    ({"properties": []}, "#/properties: must be an object"),
    ({"anyOf": {}}, "#/anyOf: must be a list"),
    ({"items": 3}, "#/items"),
    ({"const": 2**53 + 1}, "not exact"),
    ({"type": "integer", "maximum": 1e300}, "not exact"),
    ({"enum": ["a\0"]}, "control characters"),
    ({"properties": {"a\x1b": {}}}, "control characters"),
    ({"type": "integer", "minimum": 3, "maximum": 2}, "nsatisfiable"),
    ({"allOf": [{"type": "string"}, {"type": "null"}]}, "nsatisfiable"),
    ({"enum": []}, "nsatisfiable"),
    ({"description": "x" * SCHEMA_BYTES}, str(SCHEMA_BYTES)),
]


@pytest.mark.parametrize(("schema", "words"), INVALID)
def test_schemas_that_cannot_be(schema: Any, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        prepare(schema, "p")


def test_depth() -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(SCHEMA_DEPTH - 1):
        schema = {"items": schema}
    prepare(schema, "p")
    with pytest.raises(InvalidRequest, match="deeper than 64"):
        prepare({"items": schema}, "p")


ALLOWED: list[tuple[Any, str, bool]] = [
    # white space: at most one space after a comma or a colon
    ({"type": "array", "items": {"type": "integer"}}, "[1, 2,3]", True),
    ({"type": "array", "items": {"type": "integer"}}, "[1,  2]", False),
    ({"type": "array"}, "[ 1]", False),
    ({"type": "array"}, "[1]\n", False),
    # an additional property cannot be a declared one, written otherwise
    ({"properties": {"a": {"type": "null"}}, "additionalProperties": True, "type": "object"}, '{"b":1}', True),
    ({"properties": {"a": {"type": "null"}}, "additionalProperties": True, "type": "object"}, '{"\\u0061":1}', False),
    # an object with properties is closed, unless something is laid over it
    ({"type": "object", "properties": {"a": {"type": "null"}}}, '{"a":null}', True),
    ({"type": "object", "properties": {"a": {"type": "null"}}}, '{"b":null}', False),
    ({"type": "object"}, '{"b":null}', True),
    ({"type": "object", "properties": {"a": {}}, "required": ["b"]}, '{"b":1}', True),
    (
        {
            "allOf": [
                {"type": "object", "properties": {"a": {"type": "null"}}},
                {"type": "object", "properties": {"b": {"type": "null"}}},
            ]
        },
        '{"a":null,"b":null}',
        True,
    ),
    # numbers between bounds end
    ({"type": "number", "minimum": 0, "maximum": 1}, "0.5", True),
    ({"type": "number", "minimum": 0, "maximum": 1}, "0.0123456789", True),
    ({"type": "number", "minimum": 0, "maximum": 1}, "0.01234567891", False),
    ({"const": {"a": [0.25]}}, '{"a":[0.25]}', True),
    ({"const": {"a": [0.25]}}, '{"a":[0.25000000000]}', False),
    ({"enum": [0.25, "x"]}, '"x"', True),
    # annotations say nothing
    (
        {"type": "string", "title": "t", "default": 1, "deprecated": True, "x-order": 3, "$schema": "s", "$id": "i"},
        '"a"',
        True,
    ),
    # disjoint alternatives
    ({"oneOf": [{"type": "string"}, {"type": "integer"}], "discriminator": {"propertyName": "k"}}, "3", True),
    (
        {"oneOf": [{"type": "object", "properties": {"k": {"const": k}, "v": {}}} for k in "ab"]},
        '{"k":"a","v":1}',
        True,
    ),
    ({"oneOf": [{"type": "object", "properties": {"k": {"const": k}, "v": {}}} for k in "ab"]}, '{"v":1}', False),
    # what refers to itself
    ({"$ref": "#/$defs/t", "$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}}}}, "[[],[[]]]", True),
    ({"$ref": "#/$defs/a~1b%25", "$defs": {"a/b%": {"const": "x"}}}, '"x"', True),
    ({"$ref": "#/$defs/ü b", "$defs": {"ü b": {"const": "x"}}}, '"x"', True),
]


@pytest.mark.parametrize(("schema", "text", "expected"), ALLOWED)
def test_what_is_allowed(schema: Any, text: str, expected: bool) -> None:
    assert BYTES.allows(grammar_of(schema), text) is expected


class Kind(enum.Enum):
    SMALL = "small"
    LARGE = "large"


class Leaf(pydantic.BaseModel):
    kind: Literal["leaf"] = "leaf"
    value: float = pydantic.Field(ge=0, le=1, description="a share")


class Branch(pydantic.BaseModel):
    kind: Literal["branch"]
    size: Kind | None = None
    children: list[Annotated[Leaf | Branch, pydantic.Field(discriminator="kind")]] = pydantic.Field(max_length=2)


class Document(pydantic.BaseModel):
    root: Branch
    made: datetime.date
    pair: tuple[int, str] = (1, "a")
    tags: dict[str, int] = {}


def test_schemas_of_pydantic() -> None:
    grammar = grammar_of(Document.model_json_schema())
    valid = (
        '{"root": {"kind": "branch", "size": "small", "children": [{"kind": "leaf", "value": 0.5}]}, '
        '"made": "2026-01-31", "pair": [3, "b"], "tags": {"a": 1}}'
    )
    assert Document.model_validate_json(valid).tags == {"a": 1}
    assert BYTES.allows(grammar, valid)


def chain(links: int) -> dict[str, Any]:
    """References in arrays: llguidance recurses along them."""
    made: dict[str, Any] = {f"d{at}": {"items": {"$ref": f"#/$defs/d{at + 1}"}} for at in range(links)}
    return {"$ref": "#/$defs/d0", "$defs": {**made, f"d{links}": {"type": "string"}}}


async def test_long_chains_fit_the_stack() -> None:
    compiler = Compiler()
    assert await compiler.run(lambda: grammar_of(chain(1300)))
    rules = "start: r0\n" + "".join(f"r{at}: r{at + 1}\n" for at in range(498))
    asked = {"model": "m", "messages": [{"role": "user", "content": "x"}], "guided_grammar": f'{rules}r498: "a"\n'}
    assert await compiler.run(lambda: answer_grammar(parse_chat(asked)))
    with pytest.raises(InvalidRequest, match="at most 500"):
        await compiler.run(
            lambda: answer_grammar(parse_chat(asked | {"guided_grammar": f"{rules}r498: r499\nr499: x"}))
        )


async def test_what_takes_too_long_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "GRAMMAR_COMPILE_S", 0.05)
    compiler, go_on = Compiler(), threading.Event()
    with pytest.raises(InvalidRequest, match=r"0\.05 s"):
        await compiler.run(go_on.wait)
    with pytest.raises(Exhausted, match="still being compiled"):
        await compiler.run(lambda: 1)
    go_on.set()
    async with asyncio.timeout(5):
        while True:
            with contextlib.suppress(Exhausted):
                assert await compiler.run(lambda: 2) == 2
                break
            await asyncio.sleep(0)
    with pytest.raises(ZeroDivisionError):
        await compiler.run(lambda: 1 / 0)
