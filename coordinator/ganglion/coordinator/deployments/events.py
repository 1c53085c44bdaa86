"""What happens to a deployment (events) and what it wants done (commands): the two sides of its state machine."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Phase(enum.Enum):
    """Where a deployment stands."""

    PLANNING = "PLANNING"
    PREPARING = "PREPARING"
    CONNECTING = "CONNECTING"
    READY = "READY"
    REPLANNING = "REPLANNING"
    FAILED = "FAILED"
    STOPPED = "STOPPED"


class WorkerPhase(enum.IntEnum):
    """Where one worker stands, in the order in which it gets there; the numbers are the protocol's."""

    ASSIGNED = 0
    FETCHING = 1
    LOADING = 2
    LISTENING = 3
    CONNECTED = 4
    FAILED = 5
    RELEASED = 6


@dataclass(frozen=True)
class Planned:
    """The answer to RequestPlan `attempt`: node ids in order of rank."""

    attempt: int
    devices: tuple[str, ...]


@dataclass(frozen=True)
class Unplannable:
    """The answer to RequestPlan `attempt` when nothing holds the model: a code of the error tree, and why."""

    attempt: int
    code: str
    message: str


@dataclass(frozen=True, kw_only=True)
class Status:
    """A worker's AssignmentStatus."""

    node_id: str
    epoch: int
    phase: WorkerPhase
    done_bytes: int = 0
    total_bytes: int = 0
    lane_address: str = ""
    error_code: str = ""
    error_message: str = ""


@dataclass(frozen=True)
class Lost:
    """A device is gone, silent, revoked or no longer trusted as planned."""

    node_id: str
    reason: str


@dataclass(frozen=True)
class FleetChanged:
    """Something that a plan depends on changed for the better; `joined` is the device that came, if one did."""

    joined: str = ""


@dataclass(frozen=True)
class GatewaysChanged:
    """A gateway was enrolled, renewed or revoked."""


@dataclass(frozen=True)
class Again:
    """A person asked for the same deployment once more."""


@dataclass(frozen=True)
class Stop:
    """A person wants it stopped."""

    reason: str


@dataclass(frozen=True)
class Tick:
    """Time passed."""


Event = Planned | Unplannable | Status | Lost | FleetChanged | GatewaysChanged | Again | Stop | Tick


@dataclass(frozen=True)
class RequestPlan:
    """Plan on the devices that are alive; without `avoid` if that is possible, never with `banned`."""

    attempt: int
    avoid: frozenset[str]
    banned: frozenset[str]


@dataclass(frozen=True)
class BeginEpoch:
    """Make the epoch durable before anything of it is sent."""

    epoch: int
    devices: tuple[str, ...]


@dataclass(frozen=True)
class SendAssign:
    """Tell a device to prepare its share."""

    node_id: str
    epoch: int


@dataclass(frozen=True)
class SendConnect:
    """Tell a device every worker's address and which gateways may come."""

    node_id: str
    epoch: int


@dataclass(frozen=True)
class SendRelease:
    """Tell a device that this epoch and all before it are over."""

    node_id: str
    epoch: int
    reason: str


@dataclass(frozen=True)
class Forget:
    """The deployment is no longer wanted."""


Command = RequestPlan | BeginEpoch | SendAssign | SendConnect | SendRelease | Forget
