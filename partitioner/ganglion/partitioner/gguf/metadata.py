"""A GGUF file's metadata as typed look-ups: what is missing or of another type is named with the file and the key."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ganglion.partitioner.gguf.header import Value
from ganglion.wire.errors import InvalidDocument, Unsupported


@dataclass(frozen=True)
class Metadata:
    """Values by key; a key that begins with a dot is the architecture's own. Every look-up raises InvalidDocument."""

    path: Path
    values: dict[str, Value]
    architecture: str

    def has(self, key: str) -> bool:
        """Whether the key is there."""
        return self._key(key) in self.values

    def whole(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """An integer from `least` to 2^31 - 1; of an array (one for each layer) the one that all of them are."""
        value = self._value(key, default)
        if isinstance(value, np.ndarray):
            different = sorted(set(value.tolist()))
            if len(different) != 1:
                raise Unsupported(f"{self.path}: {self._key(key)} differs from layer to layer ({different[:4]})")
            value = different[0]
        if type(value) is not int or not least <= value < 2**31:
            raise self._wrong(key, value, f"an integer from {least} to {2**31 - 1}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number; of a float32 the shortest decimal that it is, which is what a config.json said."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self._wrong(key, value, "a number")
        short = float(str(np.float32(value)))
        return short if np.float32(value) == value else float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, value, "a string")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """An array of strings, empty when absent."""
        value = self._value(key, ())
        if isinstance(value, np.ndarray) and not value.size:
            return ()
        if not isinstance(value, tuple):
            raise self._wrong(key, value, "an array of strings")
        return value

    def numbers(self, key: str) -> list[float]:
        """An array of finite numbers, empty when absent."""
        value = self._value(key, np.empty(0))
        if not isinstance(value, np.ndarray) or not np.isfinite(value).all():
            raise self._wrong(key, value, "an array of numbers")
        numbers: list[float] = value.tolist()
        return numbers

    def wholes(self, key: str) -> list[int]:
        """An array of integers, empty when absent."""
        value = self._value(key, np.empty(0, np.int32))
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu":
            raise self._wrong(key, value, "an array of integers")
        wholes: list[int] = value.tolist()
        return wholes

    def positive(self, key: str, default: float | None = None) -> float:
        """A number above 0."""
        value = self.number(key, default)
        if value <= 0:
            raise self._wrong(key, value, "a number above 0")
        return value

    def _key(self, key: str) -> str:
        return f"{self.architecture}{key}" if key.startswith(".") else key

    def _value(self, key: str, default: Value | None) -> Value:
        value = self.values.get(self._key(key), default)
        if value is None:
            raise InvalidDocument(f"{self.path}: metadata {self._key(key)} is missing")
        return value

    def _wrong(self, key: str, value: object, expected: str) -> InvalidDocument:
        return InvalidDocument(f"{self.path}: metadata {self._key(key)} is {str(value)[:80]!r}, {expected} is expected")
