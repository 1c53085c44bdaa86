"""What llguidance says against a schema, and which of its keywords is to blame."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import unquote

from llguidance import LLMatcher

from ganglion.gateway.keywords import ENFORCED, subschemas, with_options
from ganglion.wire.errors import InvalidRequest, Unsupported

BLAMED_SCHEMAS = 64  # that are compiled alone to find which one is at fault


def fault_of(schema: Mapping[str, Any]) -> str:
    """llguidance's complaint about a prepared schema; empty when it compiles."""
    grammar = LLMatcher.grammar_from_json_schema(with_options(schema))
    failed, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    if not failed and not messages:
        return ""
    lines = [line.strip() for line in str(messages[0]).splitlines() if line.strip()]
    told = next((line.removeprefix("error:").strip() for line in lines if line.startswith("error:")), lines[0])
    return told[:300]


def refuse(schema: dict[str, Any], fault: str, param: str) -> None:
    """Raise for the deepest schema that shows a fault alone, naming the keyword without which it compiles."""
    path, at = "", schema
    compiled = itertools.count()
    whole = _alone(schema)

    def alone(pointer: str) -> str:
        return whole(pointer) if next(compiled) < BLAMED_SCHEMAS else ""

    while True:
        # What only refers is not to blame: definitions come first.
        below = [
            (pointer, inner) for pointer, inner in subschemas(at) if isinstance(inner, dict) and set(inner) != {"$ref"}
        ]
        found = next(((pointer, inner) for pointer, inner in below if alone(path + pointer)), None)
        if found is None:
            break
        path, at = path + found[0], found[1]
        fault = alone(path) or fault
    blamed = (name for name in ENFORCED if name in at)
    keyword = next((name for name in blamed if not fault_of(_changed(schema, path, name))), None)
    where = f"#{path}" + (f"/{keyword}" if keyword else "")
    named = f"the JSON schema keyword {keyword!r} " if keyword else "the JSON schema "
    kind = InvalidRequest if "nsatisfiable" in fault else Unsupported
    raise kind(f"{param}: {named}at {where[:256]} cannot be enforced: {fault}", param=param)


def _alone(root: dict[str, Any]) -> Callable[[str], str]:
    """The fault of the schema at a pointer into `root`, compiled as if it were the whole."""
    held = {"root": _moved(root)}
    return lambda pointer: fault_of({"$defs": held, "$ref": f"#/$defs/root{pointer}"})


def _moved(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: f"#/$defs/root{inner[1:]}" if key == "$ref" and isinstance(inner, str) else _moved(inner)
            for key, inner in value.items()
        }
    return [_moved(inner) for inner in value] if isinstance(value, list) else value


def _changed(root: dict[str, Any], path: str, name: str) -> dict[str, Any]:
    """A schema that is the one at `path` without the keyword `name`."""
    copy: dict[str, Any] = json.loads(json.dumps(_moved(root)))
    at: Any = copy
    for part in path.split("/")[1:]:
        key = unquote(part).replace("~1", "/").replace("~0", "~")
        at = at[int(key)] if isinstance(at, list) else at[key]
    at.pop(name, None)
    return {"$defs": {"root": copy}, "$ref": f"#/$defs/root{path}"}
