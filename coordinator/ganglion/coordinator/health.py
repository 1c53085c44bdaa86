"""Who is alive: a state machine over connections, messages and time. Pure: time is a parameter, in monotonic seconds.

    (absent) --joined--> alive --SUSPECT_MISSED beats--> suspect --DEAD_MISSED beats--> dead --any message--> alive
                           `-- left, from any state --> (absent)

A device of a deployment that serves has to be heard every ACTIVE_SILENCE_S; beyond it, it is lost *to the deployment*
(event `Silent`), though as a device it may only be suspect. The end of a stream is a loss at once (event `Gone`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from ganglion.wire.limits import ACTIVE_SILENCE_S, DEAD_MISSED, HEARTBEAT_IDLE_S, SUSPECT_MISSED

Health = Literal["alive", "suspect", "dead"]
TICK_S: Final = 0.1  # how often the driver ticks


@dataclass(frozen=True)
class Changed:
    """A device's health is now `health`."""

    node_id: str
    health: Health


@dataclass(frozen=True)
class Silent:
    """A device on which a serving deployment depends was not heard for `silence_s`."""

    node_id: str
    silence_s: float


@dataclass(frozen=True)
class Gone:
    """A device's stream ended."""

    node_id: str
    reason: str


HealthEvent = Changed | Silent | Gone


@dataclass
class _Watched:
    heard_s: float
    health: Health = "alive"
    active_since_s: float | None = None
    reported_silent: bool = False


class HealthTable:
    """Health of every device with a control stream."""

    def __init__(self) -> None:
        self._devices: dict[str, _Watched] = {}
        self._last_tick_s: float | None = None

    def health(self, node_id: str) -> Health | None:
        """The device's health; None when it has no stream."""
        watched = self._devices.get(node_id)
        return watched.health if watched else None

    def heard_s(self, node_id: str) -> float | None:
        """When the device was last heard; None when it has no stream."""
        watched = self._devices.get(node_id)
        return watched.heard_s if watched else None

    def joined(self, node_id: str, now_s: float) -> None:
        """Its control stream began: it is alive."""
        self._devices[node_id] = _Watched(heard_s=now_s)

    def left(self, node_id: str, reason: str) -> list[HealthEvent]:
        """Its control stream ended."""
        return [Gone(node_id, reason)] if self._devices.pop(node_id, None) else []

    def heard(self, node_id: str, now_s: float) -> list[HealthEvent]:
        """A message arrived from it."""
        watched = self._devices.get(node_id)
        if watched is None:
            return []
        watched.heard_s = now_s
        watched.reported_silent = False
        return self._become(node_id, watched, "alive")

    def set_active(self, node_ids: frozenset[str], now_s: float) -> None:
        """These devices, and no others, carry a serving deployment: they are expected to beat fast from now on."""
        for node_id, watched in self._devices.items():
            if node_id not in node_ids:
                watched.active_since_s = None
            elif watched.active_since_s is None:
                watched.active_since_s = now_s
                watched.reported_silent = False

    def tick(self, now_s: float) -> list[HealthEvent]:
        """Time passed. A tick that comes late (this process slept) does not count against the devices."""
        late_s = 0.0 if self._last_tick_s is None else now_s - self._last_tick_s - TICK_S
        self._last_tick_s = now_s
        events: list[HealthEvent] = []
        for node_id, watched in self._devices.items():
            if late_s > TICK_S:
                watched.heard_s = min(now_s, watched.heard_s + late_s)
            silence_s = now_s - watched.heard_s
            if silence_s > DEAD_MISSED * HEARTBEAT_IDLE_S:
                events += self._become(node_id, watched, "dead")
            elif silence_s > SUSPECT_MISSED * HEARTBEAT_IDLE_S:
                events += self._become(node_id, watched, "suspect")
            if watched.active_since_s is not None and not watched.reported_silent:
                unheard_s = now_s - max(watched.heard_s, watched.active_since_s)
                if unheard_s > ACTIVE_SILENCE_S:
                    watched.reported_silent = True
                    events += self._become(node_id, watched, "suspect") if watched.health == "alive" else []
                    events.append(Silent(node_id, unheard_s))
        return events

    def _become(self, node_id: str, watched: _Watched, health: Health) -> list[HealthEvent]:
        if watched.health == health:
            return []
        watched.health = health
        return [Changed(node_id, health)]
