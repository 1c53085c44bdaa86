"""The messages of a conversation, as clients send them and as chat templates know them."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ganglion.wire.errors import InvalidRequest

FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class Edge(BaseModel):
    """What every part of a request has in common: strict, frozen, no unknown fields."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class TextPart(Edge):
    """A part of a message's content; parts of other types are refused by name."""

    type: Literal["text"]
    text: str


class CalledFunction(Edge):
    """`arguments` is the text of a JSON object."""

    name: FunctionName
    arguments: str
    parsed_arguments: Any = None  # the official client's own, in messages that it gives back


class MadeCall(Edge):
    """A call that the assistant made earlier in the conversation."""

    id: Annotated[str, Field(min_length=1, max_length=128)]
    index: int | None = None  # of a streamed call, in messages put together from deltas
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Edge):
    """One message of a conversation; only an assistant that calls tools may leave its content out."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[MadeCall] = []

    @property
    def text(self) -> str:
        """The content's text, parts joined by line feeds."""
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content or ""

    def check(self, path: str) -> None:
        """What the fields require of each other; raises InvalidRequest naming the field."""
        if self.content is None and not self.tool_calls:
            raise InvalidRequest(f"{path}.content: Field required", param=f"{path}.content")
        if self.tool_calls and self.role != "assistant":
            raise InvalidRequest(f"{path}.tool_calls: only an assistant calls tools", param=f"{path}.tool_calls")
        if self.role == "tool" and self.tool_call_id is None:
            name = f"{path}.tool_call_id"
            raise InvalidRequest(f"{name}: Field required: the id of the call that this answers", param=name)
        for at, call in enumerate(self.tool_calls):
            name = f"{path}.tool_calls[{at}].function.arguments"
            try:
                found = json.loads(call.function.arguments)
            except (ValueError, RecursionError):
                raise InvalidRequest(f"{name}: must be the text of a JSON object", param=name) from None
            if not isinstance(found, dict):
                raise InvalidRequest(f"{name}: must be the text of a JSON object", param=name)

    def for_template(self) -> dict[str, Any]:
        """As chat templates know it: developer called system, the arguments of calls as objects."""
        fields: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": self.text}
        named = {"name": self.name, "tool_call_id": self.tool_call_id}
        fields |= {key: value for key, value in named.items() if value is not None}
        if self.tool_calls:
            fields["tool_calls"] = [
                {
                    "id": call.id,
                    "type": call.type,
                    "function": {"name": call.function.name, "arguments": json.loads(call.function.arguments)},
                }
                for call in self.tool_calls
            ]
        return fields


class Function(Edge):
    """A function that the model may call; `strict` changes nothing, arguments are always constrained."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Edge):
    """A tool; other types than function are refused by name."""

    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        """As transformers passes it: what the client said, without `strict`."""
        function = self.function
        fields: dict[str, Any] = {"name": function.name}
        if function.description is not None:
            fields["description"] = function.description
        if function.parameters is not None:
            fields["parameters"] = function.parameters
        return {"type": "function", "function": fields}


class NamedFunction(Edge):
    """The function of a named choice."""

    name: FunctionName


class NamedChoice(Edge):
    """`tool_choice` that names a function."""

    type: Literal["function"]
    function: NamedFunction
