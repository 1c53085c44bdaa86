"""The keywords of JSON schemas that are enforced, those that say nothing, and how llguidance is told to write JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

# At most one space after a comma or a colon: a model that likes white space cannot go on with it for ever.
# No \u escapes: a name then has one spelling, so an additional property cannot be a declared one in disguise.
OPTIONS: Mapping[str, Any] = {
    "whitespace_flexible": False,
    "item_separator": ", ?",
    "key_separator": ": ?",
    "json_allowed_escapes": 'nrbtf\\"',
}

SCHEMA = ("additionalProperties", "additionalItems", "items")
SCHEMA_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
SCHEMA_MAPS = ("$defs", "definitions", "patternProperties", "properties")
# In the order in which one of them is blamed for a fault of their schema.
ENFORCED = (
    *("$ref", "pattern", "format", "minLength", "maxLength", "multipleOf"),
    *("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "minItems", "maxItems"),
    *("minProperties", "maxProperties", "required", "const", "enum"),
    *(*SCHEMA_LISTS, *SCHEMA, *SCHEMA_MAPS, "type"),
)
ANNOTATIONS = frozenset(
    {
        *("$schema", "$id", "id", "$anchor", "$comment", "title", "description", "default", "examples", "example"),
        *("readOnly", "writeOnly", "deprecated", "contentMediaType", "contentEncoding", "discriminator"),
    }
)
IN_PLACE = frozenset({"$ref", "allOf", "anyOf", "oneOf"})
HOLDERS = frozenset({"$defs", "definitions"})


def with_options(prepared: Mapping[str, Any]) -> dict[str, Any]:
    """The schema with llguidance's options in it, as both its JSON grammars and `%json` read them."""
    return {**prepared, "x-guidance": dict(OPTIONS)}


def is_annotation(name: str) -> bool:
    """Whether a keyword says nothing about what is valid."""
    return name in ANNOTATIONS or (name.startswith("x-") and name != "x-guidance")


def subschemas(schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The schemas directly below, each with its JSON pointer from here."""
    for name in (*SCHEMA_MAPS, *SCHEMA_LISTS, *SCHEMA):  # definitions first: a fault is theirs, not of who refers
        if name not in schema:
            continue
        value = schema[name]
        if name in SCHEMA_MAPS and isinstance(value, dict):
            yield from ((f"/{name}/{pointer_part(key)}", inner) for key, inner in value.items())
        elif isinstance(value, list):
            yield from ((f"/{name}/{at}", inner) for at, inner in enumerate(value))
        else:
            yield f"/{name}", value


def pointer_part(key: str) -> str:
    """A key as a part of a JSON pointer in a URI fragment (RFC 6901)."""
    return quote(key.replace("~", "~0").replace("/", "~1"), safe="~")
