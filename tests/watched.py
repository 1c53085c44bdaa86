"""A configuration that notes which of its fields are looked up."""

from __future__ import annotations

from typing import Any


class Watched(dict[str, Any]):
    """A dict that adds every name looked up in it, or in what it is joined with, to `looked_up`."""

    def __init__(self, fields: dict[str, Any], looked_up: set[str]) -> None:
        super().__init__(fields)
        self._looked_up = looked_up

    def get(self, name: str, default: Any = None) -> Any:
        self._looked_up.add(name)
        return super().get(name, default)

    def __getitem__(self, name: str) -> Any:
        self._looked_up.add(name)
        return super().__getitem__(name)

    def __or__(self, other: Any) -> Any:
        return Watched(super().__or__(other), self._looked_up)

    def __ror__(self, other: Any) -> Any:
        return Watched(dict(other) | dict(self), self._looked_up)
