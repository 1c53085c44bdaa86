"""The sandbox in which a model's chat template runs; it renders what transformers' `apply_chat_template` renders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.utils
from jinja2.sandbox import ImmutableSandboxedEnvironment

OUTPUT_BYTES = 1 << 20


class OutputTooLongError(Exception):
    """The template wrote more than OUTPUT_BYTES."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, which marks an assistant's tokens for training, changes nothing in the text."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_unchanged"), [], [], body).set_lineno(line)

    def _unchanged(self, caller: jinja2.runtime.Macro) -> str:
        return str(caller())


class _Dict:
    """`dict(...)` without the type's own attributes."""

    def __call__(self, *args: Any, **named: Any) -> dict[Any, Any]:
        return dict(*args, **named)


class _Namespace(jinja2.utils.Namespace):
    """`namespace(...)` that refuses names through which Python's internals are reached."""

    def __init__(*args: Any, **named: Any) -> None:
        # `self` is among args, so that a template may call namespace(self=...)
        self, values = args[0], dict(*args[1:], **named)
        for name in values:
            _refuse_hidden(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_hidden(name)
        super().__setitem__(name, value)


def _refuse_hidden(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")


def _raise_exception(message: Any) -> NoReturn:
    raise jinja2.exceptions.TemplateError(str(message))


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # jinja2's own filter escapes HTML characters, which a prompt must not have.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


@lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment.from_string(source)


def render(source: str, variables: Mapping[str, Any]) -> str:
    """Text of the template; raises jinja2.TemplateError, OutputTooLongError, or whatever the template provokes."""
    parts: list[str] = []
    size = 0
    for part in _compiled(source).generate(**variables):
        size += len(part.encode("utf-8", "surrogatepass"))
        if size > OUTPUT_BYTES:
            raise OutputTooLongError
        parts.append(part)
    return "".join(parts)
