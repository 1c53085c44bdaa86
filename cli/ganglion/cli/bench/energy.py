"""Energy where the machine counts it: RAPL's counters, or what a battery gives. Never guessed.

Linux only: `/sys/class/powercap` (often readable by root alone) and `/sys/class/power_supply`.
"""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

SYS: Final = Path("/sys/class")
NONE: Final = "not readable here"
SAMPLE_S: Final = 0.25


@dataclass(frozen=True)
class Counter:
    """One RAPL domain of a whole processor; its count begins again after `range_uj`."""

    name: str
    path: Path
    range_uj: int

    def read_uj(self) -> int:
        """Microjoules so far."""
        return _whole(self.path / "energy_uj")

    def between_j(self, before_uj: int, after_uj: int) -> float:
        """Joules between two readings less than one turn of the counter apart."""
        return (after_uj - before_uj if after_uj >= before_uj else after_uj - before_uj + self.range_uj) / 1e6


def counters(sys: Path = SYS) -> list[Counter]:
    """The processors' own domains that can be read; subdomains are part of them and left out."""
    found = []
    for path in sorted((sys / "powercap").glob("intel-rapl:*")):
        with contextlib.suppress(OSError, ValueError):
            name = (path / "name").read_text().strip()
            if path.name.count(":") == 1 and name.startswith("package"):
                _whole(path / "energy_uj")
                found.append(Counter(name, path, _whole(path / "max_energy_range_uj")))
    return found


def battery_w(sys: Path = SYS) -> float | None:
    """What the batteries give now, in watts; None where none is there, or none gives anything."""
    total = None
    for path in sorted((sys / "power_supply").glob("*")):
        with contextlib.suppress(OSError, ValueError):
            if (path / "type").read_text().strip() != "Battery":
                continue
            if (path / "status").read_text().strip() != "Discharging":
                continue
            if (path / "power_now").exists():
                watts = _whole(path / "power_now") / 1e6
            else:
                watts = _whole(path / "current_now") * _whole(path / "voltage_now") / 1e12
            total = (total or 0.0) + watts
    return total


class Meter:
    """Joules between `start` and `stop`. `source` says what was read; without one `stop` gives None."""

    def __init__(self, sys: Path = SYS) -> None:
        self._sys = sys
        self._counters = counters(sys)
        self._battery = not self._counters and battery_w(sys) is not None
        self._before: list[int] = []
        self._samples: list[float] = []
        self._began_s = 0.0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def source(self) -> str:
        """Of the figures, for people."""
        if self._counters:
            return f"RAPL: {', '.join(each.name for each in self._counters)} (the whole processor)"
        return "battery (the whole machine)" if self._battery else NONE

    def start(self) -> None:
        """Begin to count."""
        self._before = [each.read_uj() for each in self._counters]
        self._began_s = time.monotonic()
        if self._battery:
            self._samples, self._stop = [], threading.Event()
            self._thread = threading.Thread(target=self._sample, name="energy", daemon=True)
            self._thread.start()

    def stop(self) -> float | None:
        """Joules since `start`; of a battery, its mean power times the time."""
        if self._counters:
            pairs = zip(self._counters, self._before, strict=True)
            return sum(each.between_j(before, each.read_uj()) for each, before in pairs)
        if self._thread is None:
            return None
        took_s = time.monotonic() - self._began_s
        self._stop.set()
        self._thread.join()
        self._thread = None
        return took_s * sum(self._samples) / len(self._samples) if self._samples else None

    def _sample(self) -> None:
        while True:
            if (watts := battery_w(self._sys)) is not None:
                self._samples.append(watts)
            if self._stop.wait(SAMPLE_S):
                return


def _whole(path: Path) -> int:
    return int(path.read_text())
