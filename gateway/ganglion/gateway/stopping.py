"""Stop strings: text goes out only when it can no longer belong to one."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Cuts a growing text at the first completed stop string, whatever the borders of its parts.

    "First completed" means: the smallest end; of several that end there, the longest. So the result is a function of
    the text alone. Invariant: `held` is the longest end of the text that is a proper beginning of a stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self._stopped = False

    @property
    def held(self) -> str:
        """Text taken and not yet given out."""
        return self._held

    @property
    def stopped(self) -> bool:
        """Whether a stop string was completed; nothing comes out after it."""
        return self._stopped

    def push(self, text: str) -> str:
        """Take more text; give out what is certain."""
        if self._stopped:
            return ""
        text = self._held + text
        cut = self._first_cut(text)
        if cut is not None:
            self._stopped, self._held = True, ""
            return text[:cut]
        keep = self._undecided(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """The text has ended: give out what was held."""
        held, self._held = self._held, ""
        return held

    def _first_cut(self, text: str) -> int | None:
        best: tuple[int, int] | None = None  # (end, start)
        for stop in self._stops:
            start = text.find(stop)
            if start >= 0 and (best is None or (start + len(stop), start) < best):
                best = (start + len(stop), start)
        return None if best is None else best[1]

    def _undecided(self, text: str) -> int:
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            end = text[len(text) - length :]
            if any(len(stop) > length and stop.startswith(end) for stop in self._stops):
                return length
        return 0
