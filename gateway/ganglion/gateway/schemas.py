"""JSON schemas that clients send, checked by name and made ready for llguidance.

Everything here narrows: an answer that the prepared schema allows is valid under the schema as it was sent. A keyword
that cannot be enforced is refused with its path; only annotations are left out. See docs/api.md, *Structured output*.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from decimal import Decimal
from typing import Any
from urllib.parse import quote, unquote

from ganglion.gateway.keywords import (
    ANNOTATIONS,
    ENFORCED,
    HOLDERS,
    IN_PLACE,
    SCHEMA,
    SCHEMA_LISTS,
    SCHEMA_MAPS,
    is_annotation,
    pointer_part,
    subschemas,
)
from ganglion.gateway.schema_faults import fault_of, refuse
from ganglion.wire.errors import InvalidRequest, Unsupported

SCHEMA_BYTES = 64 << 10
SCHEMA_DEPTH = 64
EXACT_INTEGER = 1 << 53  # beyond it a double, and so the grammar's bounds, is not exact
DECIMALS = 10  # the finest multipleOf that llguidance takes
# What a JSON text cannot hold without a \u escape.
_UNWRITABLE = frozenset(map(chr, range(32))) - set("\b\f\n\r\t")


def prepare(schema: Any, param: str) -> dict[str, Any]:
    """The schema as llguidance shall compile it; raises Unsupported or InvalidRequest naming the keyword and its path.

    `param` is the request's parameter, for example "response_format.json_schema.schema".
    """
    if not isinstance(schema, dict):
        raise InvalidRequest(f"{param} must be a JSON schema, that is an object", param=param)
    size = len(json.dumps(schema, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    if size > SCHEMA_BYTES:
        raise InvalidRequest(f"{param} has {size} bytes; at most {SCHEMA_BYTES} are accepted", param=param)
    _check_depth(schema, param)
    prepared = _Walk(schema, param).whole()
    fault = fault_of(prepared)
    if fault:
        refuse(prepared, fault, param)
    return prepared


class _Walk:
    """One pass over a schema that checks every keyword and returns what is enforced."""

    def __init__(self, root: dict[str, Any], param: str) -> None:
        self._root = root
        self._param = param
        # Closing an object is sound where nothing else is laid over it.
        self._closing = not _composes(root)
        self._tagged: dict[str, dict[str, Any]] = {}  # definitions that this pass adds

    def whole(self) -> dict[str, Any]:
        """The root, prepared."""
        root: dict[str, Any] = self.schema(self._root, "#")
        return {**root, "$defs": {**root.get("$defs", {}), **self._tagged}} if self._tagged else root

    def schema(self, schema: Any, path: str) -> Any:
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise self._invalid(path, "a schema must be an object or a boolean")
        kept: dict[str, Any] = {}
        for name, value in schema.items():
            at = f"{path}/{name}"
            if name in SCHEMA_MAPS:
                kept[name] = {key: self.schema(inner, f"{at}/{key}") for key, inner in self._map(value, at).items()}
            elif name in SCHEMA_LISTS or (name == "items" and isinstance(value, list)):
                kept[name] = [self.schema(inner, f"{at}/{n}") for n, inner in enumerate(self._list(value, at))]
            elif name in SCHEMA:
                kept[name] = self.schema(value, at)
            elif name in ENFORCED:
                self._check_value(name, value, at)
                # As a URI, which a pointer with other letters is not.
                kept[name] = quote(unquote(value), safe="#/~") if name == "$ref" else value
            elif not is_annotation(name) or (name in {"$id", "id"} and path != "#"):  # below, it moves the root of $ref
                raise self._unsupported(at, name)
        self._check_together(kept, path)
        if "oneOf" in kept and "anyOf" not in kept:
            self._tell_apart(kept, path)
        if self._closing:
            _close(kept)
        return _bounded_decimals(kept)

    def _check_value(self, name: str, value: Any, at: str) -> None:
        if name == "$ref":
            self._resolve(value, at)
        elif name in {"const", "enum"}:
            self._check_constant(value, at)
        elif isinstance(value, int | float) and abs(value) > EXACT_INTEGER:
            raise self._invalid(at, f"numbers beyond {EXACT_INTEGER} in size are not exact")

    def _check_constant(self, value: Any, at: str) -> None:
        if isinstance(value, str):
            if not _UNWRITABLE.isdisjoint(value):
                raise self._invalid(at, "control characters other than \\b \\f \\n \\r \\t are not supported")
        elif isinstance(value, int | float):
            if abs(value) > EXACT_INTEGER:
                raise self._invalid(at, f"numbers beyond {EXACT_INTEGER} in size are not exact")
        elif isinstance(value, list):
            for inner in value:
                self._check_constant(inner, at)
        elif isinstance(value, dict):
            for key, inner in value.items():
                self._check_constant(key, at)
                self._check_constant(inner, at)

    def _check_together(self, kept: Mapping[str, Any], path: str) -> None:
        if "prefixItems" in kept and ("additionalItems" in kept or isinstance(kept.get("items"), list)):
            # llguidance would take the older keyword and ignore prefixItems.
            raise self._unsupported(f"{path}/prefixItems", "prefixItems", " beside additionalItems or a list of items")
        for key in kept.get("properties", {}):
            self._check_constant(key, f"{path}/properties")
        least, required = kept.get("minProperties", 0), kept.get("required", [])
        if isinstance(least, int) and isinstance(required, list) and least > len(set(map(str, required))) + 1:
            # The grammar does not keep additional names apart: two equal ones would count as two.
            raise self._unsupported(
                f"{path}/minProperties", "minProperties", f" above {len(required) + 1} (one more than are required)"
            )

    def _tell_apart(self, kept: dict[str, Any], path: str) -> None:
        """Objects that a property with constants tells apart: `oneOf` is then `anyOf` (llguidance sees few of these).

        The property is made required, without which an object could be two of them.
        """
        options: list[Any] = [self._followed(option) for option in kept["oneOf"]]
        if not all(isinstance(option, dict) and option.get("type") == "object" for option in options):
            return
        tags = [{name: _constants(inner) for name, inner in option.get("properties", {}).items()} for option in options]
        for name in tags[0] if tags else ():
            values = [tag.get(name) or [] for tag in tags]
            drawn = [value for found in values for value in found]
            if all(values) and len(set(drawn)) == len(drawn):
                kept["anyOf"] = [self._with_tag(option, name, path) for option in kept.pop("oneOf")]
                return

    def _with_tag(self, option: dict[str, Any], name: str, path: str) -> dict[str, Any]:
        found = self._followed(option)
        required = found.get("required", [])
        if name in required:
            return option
        if set(option) != {"$ref"}:
            return {**option, "required": [*required, name]}
        key = f"{option['$ref']} with {name}"
        if key not in self._tagged:
            self._tagged[key] = {}  # so that a definition may refer to itself
            self._tagged[key] = self.schema({**found, "required": [*required, name]}, path)
        return {"$ref": f"#/$defs/{pointer_part(key)}"}

    def _followed(self, option: Any) -> Any:
        """The schema that `option` is or only refers to, as it was sent where it refers."""
        for _ in range(SCHEMA_DEPTH):
            if not isinstance(option, dict) or set(option) != {"$ref"}:
                return option
            option = self._resolve(option["$ref"], "#")
        return None

    def _resolve(self, reference: Any, at: str) -> Any:
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            raise self._unsupported(at, "$ref", ' unless it points into the same schema ("#/...")')
        found: Any = self._root
        for part in reference.split("/")[1:]:
            key = unquote(part).replace("~1", "/").replace("~0", "~")
            if isinstance(found, dict) and key in found:
                found = found[key]
            elif isinstance(found, list) and key.isdecimal() and int(key) < len(found):
                found = found[int(key)]
            else:
                raise self._invalid(at, f"{reference[:128]} points to nothing")
        return found

    def _map(self, value: Any, at: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self._invalid(at, "must be an object")
        return value

    def _list(self, value: Any, at: str) -> list[Any]:
        if not isinstance(value, list):
            raise self._invalid(at, "must be a list")
        return value

    def _unsupported(self, at: str, name: str, when: str = "") -> Unsupported:
        return Unsupported(
            f"{self._param}: the JSON schema keyword {name[:64]!r} at {at[:256]} is not supported{when}",
            param=self._param,
        )

    def _invalid(self, at: str, why: str) -> InvalidRequest:
        return InvalidRequest(f"{self._param}: {at[:256]}: {why}", param=self._param)


def _constants(schema: Any) -> list[str]:
    """The strings that a schema allows, if these are all; else none."""
    if not isinstance(schema, dict):
        return []
    values = [schema["const"]] if "const" in schema else schema.get("enum", [])
    return values if isinstance(values, list) and all(isinstance(value, str) for value in values) else []


def _check_depth(schema: dict[str, Any], param: str) -> None:
    level: list[Any] = [schema]
    for _ in range(SCHEMA_DEPTH):
        level = [
            inner
            for value in level
            for inner in (value.values() if isinstance(value, dict) else value)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise InvalidRequest(f"{param} is nested deeper than {SCHEMA_DEPTH} levels", param=param)


def _composes(schema: Any) -> bool:
    """Whether anywhere two schemas are laid over one value."""
    if not isinstance(schema, dict):
        return False
    laid = schema.keys() & IN_PLACE
    if "allOf" in laid or (laid and schema.keys() - ANNOTATIONS - HOLDERS - laid) or len(laid) > 1:
        return True
    return any(_composes(inner) for _, inner in subschemas(schema))


def _close(schema: dict[str, Any]) -> None:
    """An object that names its properties gets no others, unless it says what others may be."""
    properties = schema.get("properties")
    others = {"additionalProperties", "patternProperties", "minProperties", "enum", "const"}
    if not properties or schema.keys() & others:
        return
    required = schema.get("required", [])
    if isinstance(required, list) and all(name in properties for name in required):
        schema["additionalProperties"] = False


def _bounded_decimals(schema: dict[str, Any]) -> dict[str, Any]:
    """A number between two bounds, or one of a list, gets an end: at most DECIMALS decimals."""
    if "multipleOf" in schema:
        return schema
    figures: list[Any] = []
    if "const" in schema or "enum" in schema:
        values = schema["enum"] if isinstance(schema.get("enum"), list) else [schema.get("const")]
        if any(isinstance(value, list | dict) and _has_decimals(value) for value in values):
            return _spelled_out(schema)
        figures = [value for value in values if isinstance(value, float)]
    elif {"minimum", "exclusiveMinimum"} & schema.keys() and {"maximum", "exclusiveMaximum"} & schema.keys():
        kinds = schema.get("type", "number")
        if "number" in (kinds if isinstance(kinds, list) else [kinds]):
            names = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")
            figures = [schema[name] for name in names if name in schema]
    if not figures or any(_decimals(figure) > DECIMALS for figure in figures):
        return schema
    return {**schema, "multipleOf": float(f"1e-{DECIMALS}")}


def _decimals(figure: Any) -> int:
    if isinstance(figure, bool) or not isinstance(figure, int | float):
        return 0
    return max(0, -int(Decimal(repr(figure)).normalize().as_tuple().exponent))


def _has_decimals(value: Any) -> bool:
    if isinstance(value, list | dict):
        return any(map(_has_decimals, value.values() if isinstance(value, dict) else value))
    return isinstance(value, float)


def _spelled_out(schema: dict[str, Any]) -> dict[str, Any]:
    """`const` and `enum` with decimals inside of lists or objects, as schemas that bound those."""
    rest = {name: value for name, value in schema.items() if name not in {"const", "enum"}}
    laid = [{"anyOf": [_constant(value) for value in schema["enum"]]}] if "enum" in schema else []
    laid += [_constant(schema["const"])] if "const" in schema else []
    return {**rest, "allOf": [*rest.get("allOf", []), *laid]}


def _constant(value: Any) -> dict[str, Any]:
    if isinstance(value, list):
        return {
            "type": "array",
            "prefixItems": [_constant(inner) for inner in value],
            "items": False,
            "minItems": len(value),
        }
    if isinstance(value, dict):
        return {
            "type": "object",
            "properties": {key: _constant(inner) for key, inner in value.items()},
            "required": list(value),
            "additionalProperties": False,
        }
    return _bounded_decimals({"const": value})
