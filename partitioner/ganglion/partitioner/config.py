"""config.json as typed look-ups: what is missing or of another type is named with the file and the field."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ganglion.wire.errors import InvalidDocument


@dataclass(frozen=True)
class Config:
    """The fields of one JSON object; `where` names it in messages. Every look-up raises InvalidDocument."""

    fields: dict[str, Any]
    where: str

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.fields.get(name) is not None

    def whole(self, name: str, default: int | None = None, *, at_most: int = 2**31 - 1) -> int:
        """A positive integer."""
        value = self._value(name, default)
        if type(value) is not int or not 1 <= value <= at_most:
            raise self._wrong(name, value, f"an integer from 1 to {at_most}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise self._wrong(name, value, "a number above 0")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """A string."""
        value = self._value(name, default)
        if not isinstance(value, str):
            raise self._wrong(name, value, "a string")
        return value

    def ids(self, name: str) -> tuple[int, ...]:
        """Token ids: a number, a list of numbers, or nothing."""
        value = self.fields.get(name)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(one) is int and 0 <= one < 2**31 for one in values):
            raise self._wrong(name, value, "a token id or a list of token ids")
        return tuple(values)

    def object(self, name: str) -> Config | None:
        """A nested object, None when absent or null."""
        value = self.fields.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self._wrong(name, value, "an object")
        return Config(value, f"{self.where}: {name}")

    def names(self, name: str) -> tuple[str, ...]:
        """A list of strings, empty when absent."""
        value = self.fields.get(name, [])
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise self._wrong(name, value, "a list of strings")
        return tuple(value)

    def _value(self, name: str, default: Any) -> Any:
        value = self.fields.get(name)
        if value is None:
            value = default
        if value is None:
            raise InvalidDocument(f"{self.where}: {name} is missing", param=name)
        return value

    def _wrong(self, name: str, value: Any, expected: str) -> InvalidDocument:
        return InvalidDocument(f"{self.where}: {name} is {str(value)[:80]!r}, {expected} is expected", param=name)
