"""One deployment as a state machine: events in, commands out; no socket, no clock, no planner.

    PLANNING --planned--> PREPARING --all listen--> CONNECTING --all connected--> READY
       | unplannable        |  loss of a device or worker, in any of the three      |
       v                    +------------------------> REPLANNING <-----------------+
     FAILED --the fleet changed, or a person asks again--> (planned) PREPARING

Invariants: one epoch is in force at a time and epochs only rise; a Connect goes out only when every worker of the epoch
listens; READY holds only while every worker of the epoch is connected; what another epoch reports changes nothing.
After the first, replans are at least REPLAN_S apart, so that a device that comes and goes cannot keep
the others loading.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from ganglion.coordinator.deployments.events import (
    Again,
    BeginEpoch,
    Command,
    Event,
    FleetChanged,
    Forget,
    GatewaysChanged,
    Lost,
    Phase,
    Planned,
    RequestPlan,
    SendAssign,
    SendConnect,
    SendRelease,
    Status,
    Stop,
    Tick,
    Unplannable,
    WorkerPhase,
)
from ganglion.wire.errors import (
    DeviceLost,
    InvalidDocument,
    InvalidRequest,
    ProtocolViolation,
    Unavailable,
    Unreachable,
    Unsupported,
)

REPLAN_S: Final = 5.0
GATHER_S: Final = 0.5  # what else changes when one thing does: a device that joins says more in its next messages
SETTLE_S: Final = 1.5  # a broken lane is noticed before its cause: how long the cause may take to be known
NO_PROGRESS_S: Final = 180.0  # fetching and loading: without a byte more
CONNECT_ALL_S: Final = 30.0
RETURN_S: Final = 10.0  # after a restart: how long the devices of the last plan may take to come back
RETURNED_S: Final = 0.1  # for their first messages; what they can do was known before
FORGIVEN_S: Final = 60.0  # of service, after which earlier failures no longer count
FAILURES: Final = 3  # of one device's workers, after which it is left out

# Codes that blame a peer rather than the worker that reports them.
_PEER_CODES: Final = frozenset({DeviceLost.code, Unreachable.code, Unavailable.code})
# Codes that no second try mends.
_HOPELESS_CODES: Final = frozenset({Unsupported.code, InvalidDocument.code, InvalidRequest.code})
_RUNNING: Final = frozenset({Phase.PREPARING, Phase.CONNECTING, Phase.READY})


@dataclass
class Worker:
    """What is known of one device's worker in the present epoch."""

    moved_s: float
    phase: WorkerPhase = WorkerPhase.ASSIGNED
    done_bytes: int = 0
    total_bytes: int = 0
    lane_address: str = ""


class DeploymentMachine:
    """The state of one deployment. `name_of` turns a node id into a name for messages."""

    def __init__(self, name_of: Callable[[str], str], *, epoch: int = 0) -> None:
        self.phase = Phase.PLANNING
        self.epoch = epoch
        self.message = "planning"
        self.error_code = ""
        self.devices: tuple[str, ...] = ()
        self.workers: dict[str, Worker] = {}
        self._name_of = name_of
        self._attempt = 0
        self._planning = False
        self._plan_at_s: float | None = None
        self._replanned_s: float | None = None
        self._settling = False
        self._unexplained: Status | None = None  # the lane that broke, while its cause is waited for
        self._ended: frozenset[str] = frozenset()  # devices of the epoch that ended last
        self._lost_meanwhile: set[str] = set()
        self._changed_meanwhile = False
        self._awaited: set[str] = set()
        self._since_s = 0.0
        self._failures: dict[str, int] = {}
        self._last_failure: tuple[str, str] | None = None

    def start(self, now_s: float) -> list[Command]:
        """Begin: plan at once."""
        self._since_s = now_s
        return self._request_plan(now_s)

    def resume(self, now_s: float, devices: tuple[str, ...]) -> list[Command]:
        """Begin after a restart of the coordinator: wait for the devices of the last plan, then plan anew."""
        self._enter(Phase.REPLANNING, now_s, "the coordinator restarted: waiting for its devices")
        self._awaited = set(devices)
        self._plan_at_s = now_s + (RETURN_S if devices else 0.0)
        return []

    def handle(self, event: Event, now_s: float) -> list[Command]:  # noqa: PLR0911 - one return for each event
        """Take one event at `now_s` (monotonic seconds); the commands are to be carried out in order."""
        if self.phase is Phase.STOPPED:
            return []
        match event:
            case Planned():
                return self._planned(event, now_s)
            case Unplannable():
                return self._unplannable(event, now_s)
            case Status():
                return self._status(event, now_s)
            case Lost():
                return self._lost(event, now_s)
            case FleetChanged():
                return self._fleet_changed(event, now_s)
            case GatewaysChanged():
                return self._connect_all() if self.phase in {Phase.CONNECTING, Phase.READY} else []
            case Again():
                return self._again(now_s)
            case Stop():
                return self._stop(event, now_s)
            case Tick():
                return self._tick(now_s)

    # Planning

    def _enter(self, phase: Phase, now_s: float, message: str, code: str = "") -> None:
        self.phase = phase
        self.message = message
        self.error_code = code
        self._since_s = now_s

    def _request_plan(self, now_s: float) -> list[Command]:
        if self.phase is not Phase.PLANNING:
            self._replanned_s = now_s
        self._attempt += 1
        self._planning = True
        self._plan_at_s = None
        self._settling = False
        self._unexplained = None
        self._lost_meanwhile.clear()
        self._changed_meanwhile = False
        self._awaited.clear()
        banned = frozenset(node_id for node_id, count in self._failures.items() if count >= FAILURES)
        return [RequestPlan(self._attempt, frozenset(self._failures) - banned, banned)]

    def _plan_soon(self, now_s: float, wait_s: float = 0.0) -> list[Command]:
        """Ask for a plan after `wait_s`, or as soon after it as damping allows."""
        due_s = now_s + wait_s
        if self._replanned_s is not None:
            due_s = max(due_s, self._replanned_s + REPLAN_S)
        if due_s <= now_s:
            return self._request_plan(now_s)
        self._plan_at_s = due_s
        return []

    def _planned(self, event: Planned, now_s: float) -> list[Command]:
        if not self.is_current(event.attempt):
            return []
        self._planning = False
        gone = self._lost_meanwhile.intersection(event.devices)
        if gone:
            self._enter(Phase.REPLANNING, now_s, f"{self._names(gone)} went away while planning: planning again")
            return self._plan_soon(now_s)
        self.epoch += 1
        self.devices = event.devices
        self.workers = {node_id: Worker(moved_s=now_s) for node_id in event.devices}
        self._enter(Phase.PREPARING, now_s, f"preparing on {self._names(event.devices)}")
        assigns = [SendAssign(node_id, self.epoch) for node_id in event.devices]
        return [BeginEpoch(self.epoch, event.devices), *assigns]

    def _unplannable(self, event: Unplannable, now_s: float) -> list[Command]:
        if not self.is_current(event.attempt):
            return []
        self._planning = False
        code, message = event.code, event.message
        if self._last_failure is not None:
            code, message = self._last_failure[0], f"{self._last_failure[1]}; without it: {message}"
        self._enter(Phase.FAILED, now_s, message, code)
        return self._plan_soon(now_s, GATHER_S) if self._changed_meanwhile else []

    # Workers

    def _status(self, event: Status, now_s: float) -> list[Command]:
        if event.epoch != self.epoch:
            return []
        if event.node_id not in self.workers:
            return self._status_of_ended(event, now_s)
        worker = self.workers[event.node_id]
        if event.phase in {WorkerPhase.FAILED, WorkerPhase.RELEASED}:
            return self._worker_failed(event, now_s)
        if event.phase < worker.phase or (event.phase is WorkerPhase.CONNECTED and self.phase is Phase.PREPARING):
            return []  # repeated, or answering what was not asked
        if event.phase is WorkerPhase.LISTENING and not event.lane_address:
            self._blame(event.node_id, ProtocolViolation.code, "its worker listens without an address")
            return self._end_epoch(now_s, self.message_of_failure(), frozenset())
        if event.phase > worker.phase or event.done_bytes > worker.done_bytes:
            worker.moved_s = now_s
        worker.phase = event.phase
        worker.done_bytes, worker.total_bytes = event.done_bytes, event.total_bytes
        worker.lane_address = event.lane_address or worker.lane_address
        return self._advance(now_s)

    def _advance(self, now_s: float) -> list[Command]:
        phases = [worker.phase for worker in self.workers.values()]
        if self.phase is Phase.PREPARING and min(phases) >= WorkerPhase.LISTENING:
            self._enter(Phase.CONNECTING, now_s, f"connecting {self._names(self.devices)}")
            return self._connect_all()
        if self.phase is Phase.CONNECTING and min(phases) >= WorkerPhase.CONNECTED:
            self._enter(Phase.READY, now_s, f"ready on {self._names(self.devices)}")
            self._last_failure = None
        return []

    def _connect_all(self) -> list[Command]:
        return [SendConnect(node_id, self.epoch) for node_id in self.devices]

    def _worker_failed(self, event: Status, now_s: float) -> list[Command]:
        name = self._name_of(event.node_id)
        if event.phase is WorkerPhase.RELEASED:
            # Its agent is stopping: it would refuse every order until it joins again.
            self._blame(event.node_id, Unavailable.code, "its agent gave its share up")
            self._failures[event.node_id] = FAILURES
        elif event.error_code not in _PEER_CODES or self.phase is Phase.PREPARING:
            self._blame(event.node_id, event.error_code, event.error_message)
        else:
            # Who reports a broken lane is seldom who broke it. Lanes that never came up are a failure all the same if
            # no other cause is found: the same plan would fail the same way for ever.
            self._unexplained = event if self.phase is Phase.CONNECTING else None
            return self._end_epoch(now_s, f"{name}: {event.error_message}", frozenset(), settle_s=SETTLE_S)
        return self._end_epoch(now_s, self.message_of_failure(), frozenset())

    def _status_of_ended(self, event: Status, now_s: float) -> list[Command]:
        """A worker of the epoch that just ended: its failure may be the cause that is waited for."""
        if not self._settling or event.node_id not in self._ended or event.phase is not WorkerPhase.FAILED:
            return []
        if event.error_code in _PEER_CODES:
            return []
        self._blame(event.node_id, event.error_code, event.error_message)
        self._unexplained = None
        self.message = f"{self.message_of_failure()}: planning again"
        return self._plan_soon(now_s)

    def _blame(self, node_id: str, code: str, message: str) -> None:
        count = FAILURES if code in _HOPELESS_CODES else self._failures.get(node_id, 0) + 1
        self._failures[node_id] = count
        self._last_failure = (code, f"{self._name_of(node_id)}: {message}")

    def message_of_failure(self) -> str:
        """What the last failed worker said, with its device's name; "" when none failed."""
        return self._last_failure[1] if self._last_failure else ""

    # Losses, returns, ends

    def _end_epoch(self, now_s: float, reason: str, lost: frozenset[str], *, settle_s: float = 0.0) -> list[Command]:
        releases: list[Command] = [
            SendRelease(node_id, self.epoch, reason) for node_id in self.devices if node_id not in lost
        ]
        self._ended = frozenset(self.devices)
        self.devices, self.workers = (), {}
        self._settling = settle_s > 0
        self._enter(Phase.REPLANNING, now_s, f"{reason}: planning again")
        return releases + self._plan_soon(now_s, settle_s)

    def _lost(self, event: Lost, now_s: float) -> list[Command]:
        self._lost_meanwhile.add(event.node_id)
        if event.node_id in self.workers:
            reason = f"{self._name_of(event.node_id)} was lost ({event.reason})"
            return self._end_epoch(now_s, reason, frozenset({event.node_id}))
        if self._settling and event.node_id in self._ended:
            self._unexplained = None
            self.message = f"{self._name_of(event.node_id)} was lost ({event.reason}): planning again"
            return self._plan_soon(now_s)
        return []

    def _fleet_changed(self, event: FleetChanged, now_s: float) -> list[Command]:
        self._failures.pop(event.joined, None)
        self._changed_meanwhile = self._planning
        if event.joined in self._awaited:
            self._awaited.discard(event.joined)
            if not self._awaited and self._plan_at_s is not None:
                self._plan_at_s = min(self._plan_at_s, now_s + RETURNED_S)
        if self.phase is Phase.FAILED and not self._planning and self._plan_at_s is None:
            return self._plan_soon(now_s, GATHER_S)
        return []

    def _again(self, now_s: float) -> list[Command]:
        if self.phase is not Phase.FAILED:
            return []
        self._failures.clear()
        self._last_failure = None
        self._enter(Phase.PLANNING, now_s, "planning")
        return self._request_plan(now_s)

    def _stop(self, event: Stop, now_s: float) -> list[Command]:
        releases = [SendRelease(node_id, self.epoch, event.reason) for node_id in self.devices]
        self.devices, self.workers = (), {}
        self._planning, self._plan_at_s = False, None
        self._enter(Phase.STOPPED, now_s, event.reason)
        return [Forget(), *releases]

    def _tick(self, now_s: float) -> list[Command]:
        if self._plan_at_s is not None and now_s >= self._plan_at_s:
            if self._unexplained is not None:
                self._blame(self._unexplained.node_id, self._unexplained.error_code, self._unexplained.error_message)
            return self._request_plan(now_s)
        if self.phase is Phase.PREPARING:
            late = [
                node_id
                for node_id, worker in self.workers.items()
                if worker.phase < WorkerPhase.LISTENING and now_s - worker.moved_s > NO_PROGRESS_S
            ]
            return self._too_late(late, f"no progress for {NO_PROGRESS_S:.0f} s", now_s)
        if self.phase is Phase.CONNECTING and now_s - self._since_s > CONNECT_ALL_S:
            late = [node_id for node_id, worker in self.workers.items() if worker.phase < WorkerPhase.CONNECTED]
            reason = f"no lanes within {CONNECT_ALL_S:.0f} s; look for a firewall between the devices"
            return self._too_late(late, reason, now_s)
        if self.phase is Phase.READY and self._failures and now_s - self._since_s > FORGIVEN_S:
            self._failures.clear()
        return []

    def _too_late(self, late: list[str], reason: str, now_s: float) -> list[Command]:
        if not late:
            return []
        for node_id in late:
            self._blame(node_id, Unavailable.code, reason)
        return self._end_epoch(now_s, f"{self._names(late)}: {reason}", frozenset())

    def _names(self, node_ids: tuple[str, ...] | set[str] | list[str]) -> str:
        return ", ".join(map(self._name_of, sorted(node_ids) if isinstance(node_ids, set) else node_ids))

    def is_current(self, attempt: int) -> bool:
        """Whether this request for a plan is the one that is waited for."""
        return self._planning and attempt == self._attempt

    @property
    def is_running(self) -> bool:
        """Whether an epoch is in force."""
        return self.phase in _RUNNING
