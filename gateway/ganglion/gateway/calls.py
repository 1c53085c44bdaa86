"""How models write down the calls of tools: one format for each kind of chat template, and a plain one of our own.

A template that knows tools shows its format by the marker in its text. One that does not, or whose format is not in
the table, gets the plain format: tools are described in the conversation, earlier calls and answers become text.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CALLS = 16  # of one answer: a model that likes to call comes to an end
SHORT_ID_CHARACTERS = 9  # what templates with [TOOL_CALLS] insist on


@dataclass(frozen=True)
class CallFormat:
    """How calls are written: `marker`, then {"name": ..., `key`: {...}}, then `closing`.

    `listed`: the marker is followed by a JSON list of calls. `bare`: a call that begins the answer needs no marker.
    `many`: whether several calls can be told apart. `known`: whether the template itself describes tools.
    """

    name: str
    marker: str
    closing: str = ""
    key: str = "arguments"
    listed: bool = False
    bare: bool = False
    many: bool = True
    short_ids: bool = False
    known: bool = True

    def new_id(self) -> str:
        """An id for a call."""
        if not self.short_ids:
            return f"call_{secrets.token_hex(12)}"
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(SHORT_ID_CHARACTERS))


HERMES = CallFormat("hermes", "<tool_call>", "</tool_call>")
MISTRAL = CallFormat("mistral", "[TOOL_CALLS]", listed=True, short_ids=True)
GRANITE = CallFormat("granite", "<|tool_call|>", listed=True)
LLAMA = CallFormat("llama", "<|python_tag|>", key="parameters", bare=True, many=False)
PLAIN = CallFormat("plain", "<tool_call>", "</tool_call>", known=False)


def format_of(template: str) -> CallFormat:
    """The format in which a model with this chat template calls tools."""
    if not re.search(r"\btools\b", template):
        return PLAIN
    if "[TOOL_CALLS]" in template:
        return PLAIN if "[ARGS]" in template else MISTRAL  # a later format, without JSON around the call
    if "<tool_call>" in template:
        return PLAIN if "<function=" in template or "<arg_key>" in template else HERMES  # XML in the same tags
    if "<|python_tag|>" in template or ("ipython" in template and '"parameters"' in template):
        return LLAMA
    return GRANITE if "<|tool_call|>" in template else PLAIN


# --- the conversation in the plain format


def described(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The conversation for a template that knows no tools: earlier calls and their answers as text, tools described.

    No role is used that was not there: the description joins the system message, or else the first message.
    """
    plain: list[dict[str, Any]] = []
    for message in messages:
        text = str(message["content"])
        if message["role"] == "tool":
            answer = f"<tool_response>\n{text}\n</tool_response>"
            if plain and plain[-1].get("answers"):
                plain[-1]["content"] += f"\n{answer}"
            else:
                plain.append({"role": "user", "content": answer, "answers": True})
        else:
            written = [_written(call["function"]) for call in message.get("tool_calls", ())]
            kept = {key: value for key, value in message.items() if key != "tool_calls"}
            plain.append({**kept, "content": "\n".join([*([text] if text or not written else []), *written])})
    for message in plain:
        message.pop("answers", None)
    if tools:
        first = plain[0]
        system = first["role"] == "system"
        first["content"] = "\n\n".join(
            [first["content"], _description(tools)] if system else [_description(tools), first["content"]]
        )
    return plain


def _written(function: Mapping[str, Any]) -> str:
    call = {"name": function["name"], PLAIN.key: function["arguments"]}
    return f"{PLAIN.marker}\n{json.dumps(call, ensure_ascii=False)}\n{PLAIN.closing}"


def _description(tools: Sequence[Mapping[str, Any]]) -> str:
    lines = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    return (
        f"These functions can be called; each line describes one, with the JSON schema of its parameters:\n{lines}\n\n"
        f"To call one, answer with nothing but this for every call:\n"
        f'{PLAIN.marker}\n{{"name": "<name of the function>", "{PLAIN.key}": {{<arguments>}}}}\n{PLAIN.closing}'
    )


# --- the grammar


@dataclass(frozen=True)
class Special:
    """Added tokens of a model: `ids` by their text, and the ids that end an answer."""

    ids: Mapping[str, int]
    ends: frozenset[int]


def call_rules(
    how: CallFormat,
    functions: Sequence[tuple[str, Mapping[str, Any]]],
    special: Special,
    *,
    free: str | None,
    forced: bool,
    parallel: bool,
) -> str:
    """Lark rules with `start`: the calls of `functions` (name and prepared schema of the parameters).

    `forced`: nothing but calls. Otherwise text may be the answer, or come before the calls; where `free` is given it is
    the rule that such an answer obeys instead, and nothing comes before a call.
    """
    marker, text_marker = _spelled(how.marker, special)
    parts = [_BASE, _functions(how, functions), _sequence(how, marker, special, parallel=parallel and how.many)]
    if forced:
        parts.append(f"start: opening calls\nopening: {_opening(how, marker)}")
    elif free is not None:
        parts.append(f"start: answer | opening calls\nanswer: {free}\nopening: {marker}")
    else:
        parts.append(_auto(how, marker, special, in_text=text_marker))
    return "\n".join(parts) + "\n"


_BASE = r"""TEXT: /(?s:.*)/
SPACE: " "
LINE: "\n"
"""


def _spelled(text: str, special: Special) -> tuple[str, bool]:
    """`text` as a rule: its token where it has one (special or not), and whether it is plain text."""
    token = special.ids.get(text)
    return (_literal(text), True) if token is None else (f"<[{token}]>", False)


def _literal(text: str) -> str:
    return json.dumps(text)


def _opening(how: CallFormat, marker: str) -> str:
    return f"{marker}?" if how.bare else marker


def _functions(how: CallFormat, functions: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    lines = ["call: " + " | ".join(f"call_{at}" for at in range(len(functions)))]
    for at, (name, schema) in enumerate(functions):
        lines += [
            f'call_{at}: HEAD_{at} arguments_{at} SPACE? "}}"',
            f'HEAD_{at}: /\\{{ ?"name" ?: ?"{re.escape(name)}" ?, ?"{how.key}" ?: ?/',
            f"arguments_{at}: %json {json.dumps(schema)}",
        ]
    return "\n".join(lines)


def _sequence(how: CallFormat, marker: str, special: Special, *, parallel: bool) -> str:
    """The rule `calls`: what comes after the first marker."""
    closing = _spelled(how.closing, special)[0] if how.closing else ""
    if how.listed:
        return (
            f'calls: SPACE? "[" call {f"(ITEM call){{0,{CALLS - 1}}}" if parallel else ""} "]" {closing}\nITEM: /, ?/'
        )
    if not closing:
        return "calls: call"
    more = f"(LINE? {marker} body){{0,{CALLS - 1}}}" if parallel else ""
    return f"calls: body {more}\nbody: LINE? call LINE? {closing}"


def _auto(how: CallFormat, marker: str, special: Special, *, in_text: bool) -> str:
    """Text, or text that ends where the marker begins, then calls. Other added tokens may be in the text."""
    others = sorted(set(special.ids.values()) - special.ends - {special.ids.get(how.marker, -1)})
    between = f"<[{','.join(map(str, others))}]>" if others else None
    spans = "(TEXT token)*" if between else ""
    lines = [f"token: {between}"] if between else []
    if how.bare:
        # A first character { begins a call, so text begins with another one.
        more = " (token TEXT)* | token (TEXT token)* TEXT" if between else ""
        lines += [f'free: "" | FIRST{more}', r"FIRST: /[^\{](?s:.*)/", f"start: free | {marker}? calls"]
        return "\n".join(lines)
    lines.append(f"free: {spans} TEXT")
    if in_text:
        lines += [f"start: free | {spans} head calls", f"head[lazy]: TEXT {marker}"]
    else:
        lines.append(f"start: free | free {marker} calls")
    return "\n".join(lines)
