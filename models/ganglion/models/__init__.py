"""The demo models that ship inside the wheel, and held-out text of each domain they were trained on."""

from __future__ import annotations

from pathlib import Path

__all__ = ["DEMO_NAMES", "DOMAINS", "UnknownDemoError", "UnknownDomainError", "demo_path", "heldout_path"]

DEMO_NAMES = ("demo", "demo-drafter", "demo-c", "demo-javascript", "demo-english", "demo-mixture")
DOMAINS = ("python", "c", "javascript", "english")

_HERE = Path(__file__).resolve().parent


class UnknownDemoError(KeyError):
    """No demo model has this name."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name

    def __str__(self) -> str:
        return f"no demo model is called {self.name!r}; the names are: {', '.join(DEMO_NAMES)}"


class UnknownDomainError(KeyError):
    """No demo model was trained on a domain of this name."""

    def __init__(self, domain: str) -> None:
        super().__init__(domain)
        self.domain = domain

    def __str__(self) -> str:
        return f"there is no text of a domain {self.domain!r}; the domains are: {', '.join(DOMAINS)}"


def demo_path(name: str) -> Path:
    """The folder of a demo checkpoint, in Hugging Face layout. Raises `UnknownDemoError`."""
    if name not in DEMO_NAMES:
        raise UnknownDemoError(name)
    return _HERE / name


def heldout_path(domain: str) -> Path:
    """A UTF-8 file of about 24 kB that no demo model was trained on. Raises `UnknownDomainError`."""
    if domain not in DOMAINS:
        raise UnknownDomainError(domain)
    return _HERE / "heldout" / f"{domain}.txt"
