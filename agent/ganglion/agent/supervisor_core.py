"""The assignments of one device as a state machine: events in, commands out; no socket, no clock, no process.

    Assigned -> FETCHING -Fetched-> LOADING -Listening-> LISTENING -ConnectAsked-> CONNECTING -Connected-> CONNECTED
                    |                  |                     |                        |                      |
                    +------------------+------- failure or release, from any of them -+----------------------+-> (gone)

Invariants: a deployment has one epoch here at a time and epochs only rise, an order of an older epoch is refused; what
a worker or a fetch of another epoch says changes nothing; an assignment that ends is reported once, FAILED or RELEASED.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from ganglion.agent import control
from ganglion.wire.errors import Conflict, DeviceLost, ErrorBody, GanglionError, Internal, ProtocolViolation, to_body


class Phase(Enum):
    """Where an assignment stands."""

    FETCHING = "fetching"
    LOADING = "loading"
    LISTENING = "listening"
    CONNECTING = "connecting"
    CONNECTED = "connected"
    FAILED = "failed"
    RELEASED = "released"


@dataclass(frozen=True, slots=True)
class Key:
    """A deployment in one of its epochs."""

    deployment: str
    epoch: int


# Events


@dataclass(frozen=True, slots=True)
class Assigned:
    """The coordinator assigns a share; it parsed, and every record in it was verified."""

    key: Key
    gateways: tuple[control.PeerEntry, ...]


@dataclass(frozen=True, slots=True)
class Refused:
    """An order of the coordinator that cannot be carried out, and why."""

    key: Key
    error: GanglionError


@dataclass(frozen=True, slots=True)
class ConnectAsked:
    """Every worker of the epoch listens; peers in order of rank. Again for the same epoch: other gateways."""

    key: Key
    peers: tuple[control.PeerEntry, ...]
    gateways: tuple[control.PeerEntry, ...]


@dataclass(frozen=True, slots=True)
class VerifierTold:
    """Who verifies for what is drafted here, from now on."""

    key: Key
    verifier: control.Verifier


@dataclass(frozen=True, slots=True)
class ReleaseAsked:
    """This epoch and all before it are over."""

    key: Key


@dataclass(frozen=True, slots=True)
class Fetching:
    """Progress, in bytes."""

    key: Key
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Fetched:
    """The store holds what the share needs."""

    key: Key


@dataclass(frozen=True, slots=True)
class GaveUp:
    """The assignment cannot go on: missing pieces, a worker that does not start, a peer that is not who it claims."""

    key: Key
    error: GanglionError


@dataclass(frozen=True, slots=True)
class WorkerSaid:
    """A line of the worker."""

    key: Key
    event: control.Event


@dataclass(frozen=True, slots=True)
class WorkerExited:
    """The worker is gone: its exit code (negative: a signal) and the last line of its log."""

    key: Key
    code: int
    last_line: str


@dataclass(frozen=True, slots=True)
class StreamUp:
    """A new control stream: the coordinator may know nothing of what runs here."""


@dataclass(frozen=True, slots=True)
class Drain:
    """The supervisor stops."""


Event = (
    Assigned
    | Refused
    | ConnectAsked
    | VerifierTold
    | ReleaseAsked
    | Fetching
    | Fetched
    | GaveUp
    | WorkerSaid
    | WorkerExited
    | StreamUp
    | Drain
)

# Commands


@dataclass(frozen=True, slots=True)
class StartFetch:
    """Bring the pieces of the share here."""

    key: Key


@dataclass(frozen=True, slots=True)
class Spawn:
    """Start the worker and tell it to load."""

    key: Key


@dataclass(frozen=True, slots=True)
class Tell:
    """Pass a command to the worker."""

    key: Key
    command: control.Command


@dataclass(frozen=True, slots=True)
class End:
    """End whatever runs for this key: fetch, worker, run folder."""

    key: Key


@dataclass(frozen=True, slots=True)
class Report:
    """Tell the coordinator."""

    key: Key
    phase: Phase
    done_bytes: int = 0
    total_bytes: int = 0
    port: int = 0
    error: ErrorBody | None = None


Command = StartFetch | Spawn | Tell | End | Report

EPOCHS_KNOWN: Final = 1024  # deployments whose highest epoch is remembered: what a coordinator can make us hold
_STARTED: Final = {Phase.LOADING, Phase.LISTENING, Phase.CONNECTING, Phase.CONNECTED}


@dataclass(slots=True)
class _Assignment:
    key: Key
    gateways: tuple[control.PeerEntry, ...]
    phase: Phase = Phase.FETCHING
    done_bytes: int = 0
    total_bytes: int = 0
    port: int = 0
    verifier: control.Verifier | None = None

    def report(self) -> Report:
        # CONNECTING is a matter of this side: for the coordinator the worker listens until it is connected.
        phase = Phase.LISTENING if self.phase is Phase.CONNECTING else self.phase
        return Report(self.key, phase, self.done_bytes, self.total_bytes, self.port)


@dataclass(slots=True)
class Assignments:
    """Every assignment of this device."""

    _current: dict[str, _Assignment] = field(default_factory=dict)
    _known: dict[str, int] = field(default_factory=dict)  # the highest epoch ever heard of, by deployment
    _draining: bool = False

    @property
    def active(self) -> tuple[Key, ...]:
        """What is assigned here now."""
        return tuple(assignment.key for assignment in self._current.values())

    @property
    def running(self) -> tuple[Key, ...]:
        """Those that have a worker."""
        return tuple(assignment.key for assignment in self._current.values() if assignment.phase in _STARTED)

    def handle(self, event: Event) -> list[Command]:  # noqa: PLR0911, PLR0912 - one for each kind of event
        """Take one event; the commands are to be carried out in order."""
        match event:
            case StreamUp():
                return [assignment.report() for assignment in self._current.values()]
            case Drain():
                self._draining = True
                return [command for key in self.active for command in self._end(key.deployment, Phase.RELEASED)]
            case Assigned():
                return self._assigned(event)
            case Refused(key, error):
                return [_failed(key, error)]
            case ConnectAsked():
                return self._connect(event)
            case ReleaseAsked(key):
                return self._release(key)
        assignment = self._current.get(event.key.deployment)
        if assignment is None or assignment.key != event.key:
            return []
        match event:
            case Fetching(_, done_bytes, total_bytes):
                return self._progress(assignment, Phase.FETCHING, done_bytes, total_bytes)
            case Fetched():
                return self._fetched(assignment)
            case VerifierTold(_, verifier):
                return self._verifier(assignment, verifier)
            case GaveUp(_, error):
                return self._fail(assignment, error)
            case WorkerExited(_, code, last_line):
                return self._fail(assignment, _exit_error(assignment.phase, code, last_line))
            case WorkerSaid(_, said):
                return self._said(assignment, said)

    def _assigned(self, event: Assigned) -> list[Command]:
        key = event.key
        known = self._known.get(key.deployment, -1)
        current = self._current.get(key.deployment)
        if self._draining:
            return [_failed(key, Conflict("this agent is stopping and takes no more work"))]
        if key.epoch == known and current is not None:
            return [*self._admit(current, event.gateways), current.report()]
        if key.epoch <= known:
            return [
                _failed(key, Conflict(f"epoch {key.epoch} of {key.deployment} is over, epoch {known} was seen here"))
            ]
        ended = self._end(key.deployment, Phase.RELEASED) if current else []
        self._learn(key)
        made = self._current[key.deployment] = _Assignment(key, event.gateways)
        return [*ended, made.report(), StartFetch(key)]

    def _connect(self, event: ConnectAsked) -> list[Command]:
        current = self._current.get(event.key.deployment)
        if current is None or current.key != event.key:
            return [
                _failed(event.key, Conflict(f"epoch {event.key.epoch} of {event.key.deployment} does not run here"))
            ]
        if current.phase is Phase.LISTENING:
            current.phase = Phase.CONNECTING
            current.gateways = event.gateways
            told: list[Command] = [Tell(current.key, control.Connect(peers=event.peers, gateways=event.gateways))]
            return [*told, Tell(current.key, current.verifier)] if current.verifier is not None else told
        if current.phase in {Phase.CONNECTING, Phase.CONNECTED}:
            return self._admit(current, event.gateways)
        return self._fail(current, Conflict(f"asked to connect while {current.phase.value}"))

    def _admit(self, current: _Assignment, gateways: tuple[control.PeerEntry, ...]) -> list[Command]:
        if gateways == current.gateways:
            return []
        current.gateways = gateways
        connected = current.phase in {Phase.CONNECTING, Phase.CONNECTED}
        return [Tell(current.key, control.Gateways(gateways=gateways))] if connected else []

    def _verifier(self, current: _Assignment, verifier: control.Verifier) -> list[Command]:
        if verifier == current.verifier:
            return []
        current.verifier = verifier
        connected = current.phase in {Phase.CONNECTING, Phase.CONNECTED}
        return [Tell(current.key, verifier)] if connected else []

    def _release(self, key: Key) -> list[Command]:
        self._learn(key)
        current = self._current.get(key.deployment)
        if current is None or current.key.epoch > key.epoch:
            return []
        return self._end(key.deployment, Phase.RELEASED)

    def _learn(self, key: Key) -> None:
        """Remember the highest epoch, the deployments heard of last at the end."""
        self._known[key.deployment] = max(self._known.pop(key.deployment, -1), key.epoch)
        while len(self._known) > EPOCHS_KNOWN:
            del self._known[next(iter(self._known))]

    def _fetched(self, assignment: _Assignment) -> list[Command]:
        if assignment.phase is not Phase.FETCHING:
            return []
        assignment.phase = Phase.LOADING
        assignment.done_bytes = assignment.total_bytes = 0
        return [assignment.report(), Spawn(assignment.key)]

    def _progress(self, assignment: _Assignment, phase: Phase, done_bytes: int, total_bytes: int) -> list[Command]:
        if assignment.phase is not phase:
            return []
        assignment.done_bytes, assignment.total_bytes = done_bytes, total_bytes
        return [assignment.report()]

    def _said(self, assignment: _Assignment, said: control.Event) -> list[Command]:  # noqa: PLR0911 - one each
        match said:
            case control.Loading(done_bytes=done_bytes, total_bytes=total_bytes):
                return self._progress(assignment, Phase.LOADING, done_bytes, total_bytes)
            case control.Listening(port=port) if assignment.phase is Phase.LOADING:
                assignment.phase, assignment.port = Phase.LISTENING, port
                assignment.done_bytes = assignment.total_bytes
                return [assignment.report()]
            case control.Connected() if assignment.phase is Phase.CONNECTING:
                assignment.phase = Phase.CONNECTED
                return [assignment.report()]
            case control.Routes():
                return []  # no matter of where the assignment stands
            case control.PeerLost(node_id=node_id, reason=reason):
                return self._fail(assignment, DeviceLost(f"the lane to {node_id} broke: {reason}"))
            case control.Failed(error=body):
                return [*self._end(assignment.key.deployment, Phase.FAILED, body)]
            case _:
                name = type(said).__name__.lower()
                return self._fail(
                    assignment, ProtocolViolation(f"the worker said {name} while {assignment.phase.value}")
                )

    def _fail(self, assignment: _Assignment, error: GanglionError) -> list[Command]:
        return self._end(assignment.key.deployment, Phase.FAILED, to_body(error))

    def _end(self, deployment: str, phase: Phase, error: ErrorBody | None = None) -> list[Command]:
        ended = self._current.pop(deployment)
        return [End(ended.key), Report(ended.key, phase, error=error)]


def _failed(key: Key, error: GanglionError) -> Report:
    return Report(key, Phase.FAILED, error=to_body(error))


def _exit_error(phase: Phase, code: int, last_line: str) -> GanglionError:
    how = f"was ended by signal {-code}" if code < 0 else f"exited with code {code}"
    hint = " (out of memory?)" if code == -9 else ""
    said = f"; its log ends: {last_line}" if last_line else ""
    return Internal(f"the worker {how}{hint} while {phase.value}{said}")
