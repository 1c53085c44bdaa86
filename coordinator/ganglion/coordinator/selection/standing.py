"""Whether an expert may be asked: dropped when it fails, back on probation after a pause that grows. Pure.

ready --FAILED of the last LAST answers failed, or NONSENSE were nonsense, or one decisive error--> dropped
dropped --after the pause--> probation --one failure--> dropped, for twice as long
probation --PASSED answers--> ready, and its record is clean
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final, Literal

FAILED: Final = 3
LAST: Final = 5
NONSENSE: Final = 2  # of the last LAST: an answer that cannot be read is no accident
PASSED: Final = 3
PAUSE_S: Final = 30.0
LONGEST_PAUSE_S: Final = 3600.0

# What the request is to blame for, not the expert.
NOT_ITS_FAULT: Final = frozenset({"invalid_request", "invalid_document", "context_length_exceeded"})
# What asking again does not mend.
DECISIVE: Final = frozenset({"unauthenticated", "permission_denied", "not_found", "unsupported"})

State = Literal["ready", "probation", "dropped"]


@dataclass
class Standing:
    """One expert's. why: one line for a person, where it is dropped or was."""

    state: State = "ready"
    why: str = ""
    until_s: float = 0.0
    pause_s: float = PAUSE_S
    passed: int = 0
    recent: deque[str] = field(default_factory=lambda: deque(maxlen=LAST))  # codes; "" for an answer

    def answered(self) -> bool:
        """It answered; returns whether its state changed."""
        self.recent.append("")
        self.passed += 1
        if self.state == "probation" and self.passed >= PASSED:
            self.state, self.why, self.pause_s = "ready", "", PAUSE_S
            self.recent.clear()
            return True
        return False

    def failed(self, code: str, why: str, now_s: float) -> bool:
        """It failed with a code of the error tree, or "nonsense"; returns whether its state changed."""
        if code in NOT_ITS_FAULT or self.state == "dropped":
            return False
        self.recent.append(code)
        failures = [each for each in self.recent if each]
        if self.state == "probation":
            self._drop(f"failed again on probation: {_line(code, why)}", now_s)
        elif code in DECISIVE:
            self._drop(_line(code, why), now_s)
        elif failures.count("nonsense") >= NONSENSE or len(failures) >= FAILED:
            self._drop(f"{len(failures)} of its last {len(self.recent)} answers failed, {_line(code, why)}", now_s)
        else:
            return False
        return True

    def _drop(self, why: str, now_s: float) -> None:
        self.pause_s = min(self.pause_s * 2, LONGEST_PAUSE_S) if self.state == "probation" else self.pause_s
        self.state, self.why, self.until_s, self.passed = "dropped", why, now_s + self.pause_s, 0
        self.recent.clear()

    def tick(self, now_s: float) -> bool:
        """Time passed; returns whether its state changed."""
        if self.state != "dropped" or now_s < self.until_s:
            return False
        self.state, self.passed = "probation", 0
        return True

    def line(self, name: str, now_s: float) -> str:
        """For a person; empty where nothing is to be said."""
        if self.state == "dropped":
            wait_s = max(1.0, self.until_s - now_s)
            return f"{self.why}; tried again in {wait_s:.0f} s, or at once with: ganglion experts add {name}"
        if self.state == "probation":
            return f"on probation: {self.why}"
        return ""


def _line(code: str, why: str) -> str:
    return f"{code}: {why}" if why else code
