"""How many rows of prompts a step takes beside decoding ones, so that running streams wait a bounded time: a pure core.

A step that also runs prompts may take STALL_FACTOR times what decoding alone takes: that is how long a running stream
waits for its next token while prompts arrive. What steps take is measured by the driver and told here.
"""

from __future__ import annotations

from typing import Final

STALL_FACTOR: Final = 2.0
LEAST_ROWS: Final = 8  # a prompt goes on whatever the figures say
_KEPT: Final = 0.8  # of an estimate, when a new measurement comes in


class Pace:
    """Learns what a decoding step and a row of a prompt take."""

    def __init__(self) -> None:
        self._decode_s = 0.0
        self._row_s = 0.0

    def measured(self, decoding: int, prompt_rows: int, took_s: float) -> None:
        """A step of so many decoding rows and rows of prompts took `took_s`."""
        if not prompt_rows:
            self._decode_s = _mean(self._decode_s, took_s)
        elif decoding and self._decode_s:
            self._row_s = _mean(self._row_s, max(0.0, took_s - self._decode_s) / prompt_rows)
        elif not self._row_s:  # until there was a step of both: too much, as it counts what every step costs
            self._row_s = took_s / prompt_rows

    def prompt_rows(self, most: int) -> int:
        """Rows of prompts in the next step that decodes too, at most `most`."""
        if not self._row_s or not self._decode_s:
            return min(most, LEAST_ROWS)
        rows = int((STALL_FACTOR - 1.0) * self._decode_s / self._row_s)
        return max(min(most, LEAST_ROWS), min(most, rows))


def _mean(before: float, found: float) -> float:
    return found if not before else _KEPT * before + (1.0 - _KEPT) * found
