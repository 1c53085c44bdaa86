"""Bounded JSON schemas: every value that one of them allows has a longest text, so an answer under it must end.

`bounded()` draws them with everything that is supported: nesting, enums, constants, arrays and strings with lengths,
patterns, numbers with ranges, references, optional properties and alternatives.
"""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

Schema = dict[str, Any]

NAMES = st.sampled_from(["a", "b", "name", "b c", 'q"q', "naïve", "x-y", "$z", "n\nl"])
PATTERNS = ["^[a-z]{2,5}$", "^(red|green|blue)$", "^[A-F0-9]{4}-[0-9]{2}$", "^\\d{1,3}%$", "^\\w{1,4}$"]
FORMATS = ["date", "time", "ipv4", "uuid"]
CONSTANTS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-1000, 1000),
    st.sampled_from([0.5, -2.25, 1e-3]),
    st.text('ab "\\/é\n😀', max_size=6),
)


@st.composite
def _integers(draw: st.DrawFn) -> Schema:
    low = draw(st.integers(-500, 500))
    high = low + draw(st.integers(0, 400))
    exclusive = draw(st.booleans()) and high - low > 1
    bounds = {"exclusiveMinimum": low, "exclusiveMaximum": high} if exclusive else {"minimum": low, "maximum": high}
    return {"type": "integer", **bounds}


@st.composite
def _numbers(draw: st.DrawFn) -> Schema:
    low = draw(st.integers(-400, 400)) / 8
    return {"type": "number", "minimum": low, "maximum": low + draw(st.integers(0, 200)) / 4}


@st.composite
def _strings(draw: st.DrawFn) -> Schema:
    low = draw(st.integers(0, 4))
    return draw(
        st.one_of(
            st.just({"type": "string", "minLength": low, "maxLength": low + draw(st.integers(0, 8))}),
            st.sampled_from(PATTERNS).map(lambda pattern: {"type": "string", "pattern": pattern}),
            st.sampled_from(FORMATS).map(lambda name: {"type": "string", "format": name, "maxLength": 40}),
        )
    )


LEAVES = st.one_of(
    st.sampled_from([{"type": "null"}, {"type": "boolean"}, {"type": ["boolean", "null"]}]),
    _integers(),
    _numbers(),
    _strings(),
    st.lists(CONSTANTS, min_size=1, max_size=4, unique_by=repr).map(lambda values: {"enum": values}),
    CONSTANTS.map(lambda value: {"const": value}),
    st.dictionaries(NAMES, CONSTANTS, max_size=2).map(lambda value: {"const": value}),
)


def _arrays(inner: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    lists = st.tuples(inner, st.integers(0, 2), st.integers(0, 2)).map(
        lambda drawn: {"type": "array", "items": drawn[0], "minItems": drawn[1], "maxItems": drawn[1] + drawn[2]}
    )
    tuples = st.lists(inner, min_size=1, max_size=3).map(
        lambda items: {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
    )
    return lists | tuples


@st.composite
def _objects(draw: st.DrawFn, inner: st.SearchStrategy[Schema]) -> Schema:
    properties = draw(st.dictionaries(NAMES, inner, min_size=1, max_size=4))
    required = [name for name in properties if draw(st.booleans())]
    schema: Schema = {"type": "object", "properties": properties, "required": required}
    # Without it the gateway closes the object.
    return schema | ({"additionalProperties": False} if draw(st.booleans()) else {})


def _alternatives(inner: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    return st.lists(inner, min_size=2, max_size=3).map(lambda options: {"anyOf": options})


def trees(leaves: st.SearchStrategy[Schema], most: int = 6) -> st.SearchStrategy[Schema]:
    """Schemas nested over `leaves`, at most about `most` of these."""
    return st.recursive(
        leaves, lambda inner: st.one_of(_arrays(inner), _objects(inner), _alternatives(inner)), max_leaves=most
    )


@st.composite
def bounded(draw: st.DrawFn) -> Schema:
    """A bounded schema of an object, with definitions that it may refer to."""
    definitions = {f"d{at}": draw(trees(LEAVES, 3)) for at in range(draw(st.integers(0, 2)))}
    references = [{"$ref": f"#/$defs/{name}"} for name in definitions]
    leaves = LEAVES | st.sampled_from(references) if references else LEAVES
    schema = draw(_objects(trees(leaves)))
    return schema | ({"$defs": definitions} if definitions else {})
