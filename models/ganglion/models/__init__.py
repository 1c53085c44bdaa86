"""The demo models that ship inside the wheel: `demo` and, to draft for it, `demo-drafter`."""

from __future__ import annotations

from pathlib import Path

__all__ = ["DEMO_NAMES", "UnknownDemoError", "demo_path"]

DEMO_NAMES = ("demo", "demo-drafter")


class UnknownDemoError(KeyError):
    """No demo model has this name."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name

    def __str__(self) -> str:
        return f"no demo model is called {self.name!r}; the names are: {', '.join(DEMO_NAMES)}"


def demo_path(name: str) -> Path:
    """The folder of a demo checkpoint, in Hugging Face layout. Raises `UnknownDemoError`."""
    if name not in DEMO_NAMES:
        raise UnknownDemoError(name)
    return Path(__file__).resolve().parent / name
