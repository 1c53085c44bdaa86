"""How often somebody may do something: a token bucket. Pure: time is a parameter, in monotonic seconds."""

from __future__ import annotations

from ganglion.wire.errors import ProtocolViolation


class Allowance:
    """A token bucket: `rate_per_s` on the long run, `burst` at once."""

    def __init__(self, rate_per_s: float, burst: int) -> None:
        self._rate_per_s = rate_per_s
        self._burst = burst
        self._left = float(burst)
        self._at_s: float | None = None

    def take(self, now_s: float, what: str) -> None:
        """Take one; raises ProtocolViolation when none is left."""
        if self._at_s is not None:
            self._left = min(self._burst, self._left + (now_s - self._at_s) * self._rate_per_s)
        self._at_s = now_s
        if self._left < 1:
            raise ProtocolViolation(f"more than {self._rate_per_s:g} {what} a second (at once {self._burst})")
        self._left -= 1
