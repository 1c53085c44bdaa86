"""What a request says its answer must be, as the one grammar (llguidance's JSON) that goes to the lead.

These functions compile: run them in a Compiler. See docs/api.md, *Structured output*.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llguidance import LLMatcher, regex_to_lark
from llguidance.gbnf_to_lark import any_to_lark

from ganglion.gateway.calls import CallFormat, Special, call_rules
from ganglion.gateway.keywords import with_options
from ganglion.gateway.messages import NamedChoice, Tool
from ganglion.gateway.parameters import ChatRequest, Common
from ganglion.gateway.schemas import prepare
from ganglion.wire.errors import InvalidRequest, Unsupported
from ganglion.wire.limits import GRAMMAR_BYTES, GRAMMAR_RULES

_ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
_NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
_ANSWER = "answer"


def answer_grammar(asked: Common) -> str:
    """The grammar of an answer without calls; empty when nothing is asked for. Raises Unsupported or InvalidRequest."""
    rule, side = _answer(asked)
    return "" if rule is None else _wire(f"start: {rule}\n", side)


def chat_grammar(asked: ChatRequest, how: CallFormat, special: Special) -> str:
    """The grammar of an answer that may or must call tools; `how` is the model's format of calls."""
    tools = offered(asked)
    if not tools:
        return answer_grammar(asked)
    functions = [(tool.function.name, _parameters(tool, f"tools[{asked.tools.index(tool)}]")) for tool in tools]
    forced = asked.tool_choice != "auto"
    free, side = _answer(asked)  # checked in any case
    if forced:
        free, side = None, None
    if free is not None and how.bare:
        raise Unsupported(
            f"this model's calls ({how.name}) cannot be told from a structured answer: leave out either tools or the "
            f"structured output, or set tool_choice to required",
            param="response_format",
        )
    rules = call_rules(
        how, functions, special, free=free, forced=forced, parallel=asked.parallel_tool_calls and forced_many(asked)
    )
    return _wire(rules, side)


def offered(asked: ChatRequest) -> Sequence[Tool]:
    """The tools that the answer may call: none, all, or the one that is named."""
    choice = asked.tool_choice
    if choice == "none":
        return ()
    if isinstance(choice, NamedChoice):
        return [tool for tool in asked.tools if tool.function.name == choice.function.name]
    return asked.tools


def forced_many(asked: ChatRequest) -> bool:
    """Whether several calls may come: a named function is called once."""
    return not isinstance(asked.tool_choice, NamedChoice)


def _parameters(tool: Tool, path: str) -> dict[str, Any]:
    schema = tool.function.parameters
    if schema is None or not schema:
        return with_options(_NO_PARAMETERS)
    param = f"{path}.function.parameters"
    if schema.get("type") != "object":
        raise InvalidRequest(f'{param}.type must be "object": arguments are a JSON object', param=param)
    return with_options(prepare(schema, param))


def _answer(asked: Common) -> tuple[str | None, str | None]:
    """A Lark rule body for the answer, and a grammar named `answer` that it refers to; None where there is none."""
    wanted = _wanted(asked)
    if not wanted:
        return None, None
    if len(wanted) > 1:
        raise InvalidRequest(f"{' and '.join(wanted)} cannot be asked for together", param=list(wanted)[1])
    param, (kind, value) = next(iter(wanted.items()))
    if kind == "json":
        return f"%json {json.dumps(with_options(prepare(_document(value, param), param)))}", None
    if kind == "choice":
        if len(set(value)) != len(value) or "" in value:
            raise InvalidRequest(f"{param}: choices must be different and not empty", param=param)
        return " | ".join(json.dumps(choice, ensure_ascii=False) for choice in value), None
    if kind == "regex":
        rule = f"/{regex_to_lark(value)}/"
        _check(f"start: {rule}\n", param)
        return rule, None
    try:
        side = any_to_lark(value)
    except Exception as error:  # noqa: BLE001  (the converter's parser raises what it likes)
        raise InvalidRequest(f"{param} cannot be read as a grammar: {str(error)[:300]}", param=param) from None
    _check(side, param)
    return f"@{_ANSWER}", side


def _wanted(asked: Common) -> dict[str, tuple[str, Any]]:
    """Every constraint of the request: parameter -> (kind, value)."""
    found: dict[str, tuple[str, Any]] = {}
    layout = asked.response_format
    if layout is not None and layout.type == "json_object":
        found["response_format"] = ("json", dict(_ANY_OBJECT))
    if layout is not None and layout.type == "json_schema":
        if layout.json_schema is None:
            name = "response_format.json_schema"
            raise InvalidRequest(f"{name}: Field required", param=name)
        found["response_format.json_schema.schema"] = ("json", layout.json_schema.schema_)
    structured = asked.structured_outputs
    named = {
        "structured_outputs.json": ("json", structured and structured.json_),
        "structured_outputs.regex": ("regex", structured and structured.regex),
        "structured_outputs.choice": ("choice", structured and structured.choice),
        "structured_outputs.grammar": ("grammar", structured and structured.grammar),
        "guided_json": ("json", asked.guided_json),
        "guided_regex": ("regex", asked.guided_regex),
        "guided_choice": ("choice", asked.guided_choice),
        "guided_grammar": ("grammar", asked.guided_grammar),
    }
    found |= {param: (kind, value) for param, (kind, value) in named.items() if value is not None}
    if structured is not None and not any(param.startswith("structured_outputs") for param in found):
        raise InvalidRequest(
            "structured_outputs must hold one of json, regex, choice, grammar", param="structured_outputs"
        )
    return found


def _document(value: Any, param: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise InvalidRequest(f"{param} is not the text of a JSON schema", param=param) from None


def _check(lark: str, param: str) -> None:
    rules = sum(":" in line for line in lark.splitlines())
    if rules > GRAMMAR_RULES:
        raise InvalidRequest(f"{param} has {rules} rules; at most {GRAMMAR_RULES} are compiled", param=param)
    failed, messages = LLMatcher.validate_grammar_with_warnings(LLMatcher.grammar_from_lark(lark))
    if failed or messages:  # the only warning is of a special token, which a client cannot name
        raise InvalidRequest(f"{param} does not compile: {str(messages[0])[:300]}", param=param)


def _wire(lark: str, side: str | None) -> str:
    grammars = [{"lark_grammar": lark}, *([{"name": _ANSWER, "lark_grammar": side}] if side is not None else [])]
    text = json.dumps({"grammars": grammars})
    if len(text) > GRAMMAR_BYTES:
        raise InvalidRequest(
            f"the structure of the answer, tools included, takes {len(text)} bytes; at most {GRAMMAR_BYTES} are sent"
        )
    return text
