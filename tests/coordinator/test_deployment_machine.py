# ruff: noqa: N802 - the ids of faults in names of tests are upper case
"""The deployment machine: transcripts of the walks that matter, and random walks that hold the invariants."""

from __future__ import annotations

import textwrap

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from ganglion.coordinator.deployments.events import (
    Again,
    BeginEpoch,
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
from ganglion.coordinator.deployments.machine import FAILURES, REPLAN_S, DeploymentMachine


def shown(command) -> str:
    match command:
        case RequestPlan(attempt, avoid, banned):
            return f"plan {attempt} avoid={','.join(sorted(avoid)) or '-'} banned={','.join(sorted(banned)) or '-'}"
        case BeginEpoch(epoch, devices):
            return f"epoch {epoch} on {','.join(devices)}"
        case SendAssign(node_id, epoch):
            return f"assign {node_id} {epoch}"
        case SendConnect(node_id, epoch):
            return f"connect {node_id} {epoch}"
        case SendRelease(node_id, epoch, _):
            return f"release {node_id} {epoch}"
        case Forget():
            return "forget"
    raise AssertionError(command)


def event_of(words: list[str]):
    match words:
        case ["planned", attempt, *devices]:
            return Planned(int(attempt), tuple(devices))
        case ["unplannable", attempt, code]:
            return Unplannable(int(attempt), code, "nothing fits")
        case ["lost", node_id]:
            return Lost(node_id, "gone")
        case ["joined", node_id]:
            return FleetChanged(node_id)
        case ["failed", node_id, epoch, code]:
            phase = WorkerPhase.FAILED
            return Status(node_id=node_id, epoch=int(epoch), phase=phase, error_code=code, error_message="it broke")
        case [phase, node_id, epoch] if phase.upper() in WorkerPhase.__members__:
            address = "0.0.0.0:1" if phase == "listening" else ""
            return Status(node_id=node_id, epoch=int(epoch), phase=WorkerPhase[phase.upper()], lane_address=address)
        case ["again"]:
            return Again()
        case ["gateways"]:
            return GatewaysChanged()
        case ["stop"]:
            return Stop("stopped")
        case ["tick"]:
            return Tick()
    raise AssertionError(words)


def play(machine: DeploymentMachine, script: str) -> str:
    """Lines `seconds event...` answered by `-> PHASE: commands`."""
    lines = []
    for line in filter(None, map(str.strip, script.splitlines())):
        at, *words = line.split()
        commands = (
            machine.start(float(at))
            if words == ["start"]
            else machine.resume(float(at), tuple(words[1:]))
            if words[0] == "resume"
            else machine.handle(event_of(words), float(at))
        )
        lines += [line, f"-> {machine.phase.value}: {'; '.join(map(shown, commands)) or '.'}"]
    return "\n".join(lines)


def lines_of(transcript: str) -> str:
    return "\n".join(filter(None, textwrap.dedent(transcript).splitlines()))


def check(transcript: str, *, epoch: int = 0) -> None:
    expected = lines_of(transcript)
    script = "\n".join(line for line in expected.splitlines() if not line.startswith("->"))
    assert play(DeploymentMachine(str, epoch=epoch), script) == expected


TO_READY = """
0 start
-> PLANNING: plan 1 avoid=- banned=-
0 planned 1 a b
-> PREPARING: epoch 1 on a,b; assign a 1; assign b 1
1 fetching a 1
-> PREPARING: .
1 listening b 1
-> PREPARING: .
2 listening a 1
-> CONNECTING: connect a 1; connect b 1
3 connected b 1
-> CONNECTING: .
3 connected a 1
-> READY: .
"""


def test_the_walk_to_ready_and_to_a_stop():
    check(
        TO_READY
        + """
4 gateways
-> READY: connect a 1; connect b 1
5 stop
-> STOPPED: forget; release a 1; release b 1
6 lost a
-> STOPPED: .
6 again
-> STOPPED: ."""
    )


def test_D1_a_lost_device_ends_the_epoch_at_once_and_the_survivors_are_planned():
    check(
        TO_READY
        + """
9 lost b
-> REPLANNING: release a 1; plan 2 avoid=- banned=-
9 connected a 1
-> REPLANNING: .
9 planned 2 a
-> PREPARING: epoch 2 on a; assign a 2
9 listening a 1
-> PREPARING: .
9 listening b 2
-> PREPARING: .
10 listening a 2
-> CONNECTING: connect a 2
10 connected a 2
-> READY: ."""
    )


def test_C6_after_the_first_replans_are_five_seconds_apart():
    check(
        TO_READY
        + """
9 lost b
-> REPLANNING: release a 1; plan 2 avoid=- banned=-
9 planned 2 a c
-> PREPARING: epoch 2 on a,c; assign a 2; assign c 2
10 lost c
-> REPLANNING: release a 2
13.9 tick
-> REPLANNING: .
14 tick
-> REPLANNING: plan 3 avoid=- banned=-"""
    )


def test_a_device_that_goes_while_planning_is_not_planned_on():
    check(
        """
0 start
-> PLANNING: plan 1 avoid=- banned=-
1 lost b
-> PLANNING: .
2 planned 1 a b
-> REPLANNING: plan 2 avoid=- banned=-
2 planned 1 a
-> REPLANNING: .
2 planned 2 a
-> PREPARING: epoch 1 on a; assign a 1"""
    )


def test_a_broken_lane_waits_for_its_cause():
    check(
        TO_READY
        + """
9 failed a 1 device_lost
-> REPLANNING: release a 1; release b 1
9.2 failed a 1 device_lost
-> REPLANNING: .
9.3 lost b
-> REPLANNING: plan 2 avoid=- banned=-"""
    )
    check(
        TO_READY
        + """
9 failed a 1 device_lost
-> REPLANNING: release a 1; release b 1
9.3 failed b 1 exhausted
-> REPLANNING: plan 2 avoid=b banned=-"""
    )
    check(
        TO_READY
        + """
9 failed a 1 device_lost
-> REPLANNING: release a 1; release b 1
10.4 tick
-> REPLANNING: .
10.5 tick
-> REPLANNING: plan 2 avoid=- banned=-"""
    )


TO_CONNECTING = TO_READY.partition("3 connected b")[0]


def test_lanes_that_never_came_up_count_when_no_cause_is_found():
    broken = """
3 failed a 1 unreachable
-> REPLANNING: release a 1; release b 1
"""
    check(
        TO_CONNECTING
        + broken
        + """
4.5 tick
-> REPLANNING: plan 2 avoid=a banned=-"""
    )
    check(
        TO_CONNECTING
        + broken
        + """
3.1 lost b
-> REPLANNING: plan 2 avoid=- banned=-"""
    )


def test_a_holder_that_cannot_be_reached_is_not_asked_for_ever():
    check(
        """
0 start
-> PLANNING: plan 1 avoid=- banned=-
0 planned 1 a
-> PREPARING: epoch 1 on a; assign a 1
1 failed a 1 unreachable
-> REPLANNING: release a 1; plan 2 avoid=a banned=-"""
    )


def test_a_worker_that_keeps_failing_is_left_out():
    check(
        """
0 start
-> PLANNING: plan 1 avoid=- banned=-
0 planned 1 a
-> PREPARING: epoch 1 on a; assign a 1
1 failed a 1 internal
-> REPLANNING: release a 1; plan 2 avoid=a banned=-
1 planned 2 a
-> PREPARING: epoch 2 on a; assign a 2
2 failed a 2 internal
-> REPLANNING: release a 2
6 tick
-> REPLANNING: plan 3 avoid=a banned=-
6 planned 3 a
-> PREPARING: epoch 3 on a; assign a 3
12 released a 3
-> REPLANNING: release a 3; plan 4 avoid=- banned=a
12 unplannable 4 unavailable
-> FAILED: .
13 joined a
-> FAILED: .
17 tick
-> FAILED: plan 5 avoid=- banned=-"""
    )


def test_D17_an_agent_that_stops_is_left_out_until_it_joins_again():
    check(
        TO_READY
        + """
9 released b 1
-> REPLANNING: release a 1; release b 1; plan 2 avoid=- banned=b
9 joined b
-> REPLANNING: .
9 planned 2 a
-> PREPARING: epoch 2 on a; assign a 2
9.1 failed a 2 internal
-> REPLANNING: release a 2
14 tick
-> REPLANNING: plan 3 avoid=a banned=-"""
    )


def test_what_no_second_try_mends_is_not_tried_twice():
    machine = DeploymentMachine(lambda node_id: f"<{node_id}>")
    play(machine, "0 start\n0 planned 1 a\n1 failed a 1 unsupported\n1 unplannable 2 unavailable")
    assert machine.phase is Phase.FAILED
    assert machine.error_code == "unsupported"
    assert machine.message == "<a>: it broke; without it: nothing fits"


def test_a_plan_that_nothing_holds_is_tried_again_when_a_device_comes():
    check(
        """
0 start
-> PLANNING: plan 1 avoid=- banned=-
0 unplannable 1 does_not_fit
-> FAILED: .
4 tick
-> FAILED: .
5 joined b
-> FAILED: .
5.5 tick
-> FAILED: plan 2 avoid=- banned=-
5.6 joined c
-> FAILED: .
5.7 unplannable 2 does_not_fit
-> FAILED: .
10.4 tick
-> FAILED: .
10.5 tick
-> FAILED: plan 3 avoid=- banned=-
10.5 planned 3 b c
-> PREPARING: epoch 1 on b,c; assign b 1; assign c 1
11 again
-> PREPARING: ."""
    )


def test_a_person_who_asks_again_is_not_kept_waiting():
    check(
        """
0 start
-> PLANNING: plan 1 avoid=- banned=-
0 unplannable 1 does_not_fit
-> FAILED: .
1 again
-> PLANNING: plan 2 avoid=- banned=-
1 planned 2 a
-> PREPARING: epoch 1 on a; assign a 1"""
    )


def test_D6_after_a_restart_the_devices_of_the_last_plan_are_waited_for():
    check(
        """
0 resume a b
-> REPLANNING: .
1 joined a
-> REPLANNING: .
1 connected a 7
-> REPLANNING: .
2 joined b
-> REPLANNING: .
2.5 tick
-> REPLANNING: plan 1 avoid=- banned=-
2.5 planned 1 a b
-> PREPARING: epoch 8 on a,b; assign a 8; assign b 8""",
        epoch=7,
    )
    check(
        """
0 resume a b
-> REPLANNING: .
1 joined a
-> REPLANNING: .
9.9 tick
-> REPLANNING: .
10 tick
-> REPLANNING: plan 1 avoid=- banned=-""",
        epoch=7,
    )


def test_deadlines_follow_progress():
    machine = DeploymentMachine(str)
    play(machine, "0 start\n0 planned 1 a b\n1 listening b 1")
    for at in range(100, 1000, 100):
        status = Status(node_id="a", epoch=1, phase=WorkerPhase.FETCHING, done_bytes=at, total_bytes=1000)
        machine.handle(status, float(at))
        assert machine.handle(Tick(), at + 99.0) == []
    assert machine.phase is Phase.PREPARING
    reason = "a: no progress for 180 s"
    assert SendRelease("b", 1, reason) in machine.handle(Tick(), 1081.0)
    assert machine.message.startswith(reason)


def test_lanes_that_do_not_meet_end_the_epoch():
    check(
        """
0 start
-> PLANNING: plan 1 avoid=- banned=-
0 planned 1 a b
-> PREPARING: epoch 1 on a,b; assign a 1; assign b 1
1 connected a 1
-> PREPARING: .
1 listening a 1
-> PREPARING: .
1 listening b 1
-> CONNECTING: connect a 1; connect b 1
2 connected a 1
-> CONNECTING: .
31 tick
-> CONNECTING: .
31.1 tick
-> REPLANNING: release a 1; release b 1; plan 2 avoid=b banned=-"""
    )


def test_a_worker_that_listens_nowhere_is_at_fault():
    machine = DeploymentMachine(str)
    play(machine, "0 start\n0 planned 1 a")
    commands = machine.handle(Status(node_id="a", epoch=1, phase=WorkerPhase.LISTENING), 1.0)
    assert [shown(command) for command in commands] == ["release a 1", "plan 2 avoid=a banned=-"]


NODES = ("a", "b", "c", "d")
MODELS = st.lists(st.sampled_from(NODES), min_size=1, max_size=4, unique=True).map(tuple)


class Walk(RuleBasedStateMachine):
    """Any events in any order. What a device would know is kept by the dumbest means: lists of what was sent to it."""

    @initialize()
    def begin(self):
        self.now_s = 0.0
        self.machine = DeploymentMachine(str)
        self.epochs: list[int] = []
        self.open_plan: int | None = None
        self.replans_s: list[float] = []
        self.assigned: dict[int, set[str]] = {}
        self.connected_orders: set[int] = set()
        self.listening: set[tuple[str, int]] = set()
        self.connected: set[tuple[str, int]] = set()
        self.broken: set[tuple[str, int]] = set()
        self.asked_again = False
        self.carry_out(self.machine.start(0.0))

    def carry_out(self, commands):
        for command in commands:
            match command:
                case RequestPlan(attempt, _, banned):
                    assert self.open_plan is None or attempt > self.open_plan
                    self.open_plan, self.banned = attempt, banned
                    if attempt > 1 and not self.asked_again:
                        self.replans_s.append(self.now_s)
                case BeginEpoch(epoch, devices):
                    assert not self.epochs or epoch > self.epochs[-1]
                    self.epochs.append(epoch)
                    self.assigned[epoch] = set(devices)
                case SendAssign(node_id, epoch):
                    assert epoch == self.epochs[-1], "assigned before the epoch was durable"
                    assert node_id in self.assigned[epoch]
                case SendConnect(node_id, epoch):
                    assert epoch == self.epochs[-1]
                    assert {(each, epoch) for each in self.assigned[epoch]} <= self.listening
                    self.connected_orders.add(epoch)
                case SendRelease(node_id, epoch, _):
                    assert epoch <= self.epochs[-1]

    def send(self, event):
        self.asked_again = isinstance(event, Again)
        self.carry_out(self.machine.handle(event, self.now_s))
        self.asked_again = False

    @rule(seconds=st.sampled_from([0.1, 0.6, 2.0, 6.0, 40.0, 200.0]))
    def time_passes(self, seconds: float):
        self.now_s += seconds
        self.send(Tick())

    @rule(devices=MODELS, stale=st.booleans())
    def plan_comes(self, devices: tuple[str, ...], stale: bool):
        if self.open_plan is not None:
            self.send(Planned(self.open_plan - stale, devices))

    @rule()
    def no_plan_comes(self):
        if self.open_plan is not None:
            self.send(Unplannable(self.open_plan, "does_not_fit", "too small"))

    @rule(node_id=st.sampled_from(NODES), back=st.integers(0, 1), phase=st.sampled_from(list(WorkerPhase)[1:]))
    def status_comes(self, node_id: str, back: int, phase: WorkerPhase):
        epoch = (self.epochs[-1] if self.epochs else 1) - back
        in_force = bool(self.epochs) and epoch == self.epochs[-1] and node_id in self.machine.workers
        if in_force and phase is WorkerPhase.LISTENING:
            self.listening.add((node_id, epoch))
        if in_force and phase is WorkerPhase.CONNECTED and epoch in self.connected_orders:
            self.connected.add((node_id, epoch))
        code = "device_lost" if self.now_s % 2 < 1 else "internal"
        self.send(Status(node_id=node_id, epoch=epoch, phase=phase, lane_address="0.0.0.0:1", error_code=code))

    @rule()
    def all_goes_well(self):
        for phase in (WorkerPhase.LISTENING, WorkerPhase.CONNECTED):
            for node_id in tuple(self.machine.workers):
                self.status_comes(node_id, 0, phase)

    @rule(node_id=st.sampled_from(NODES))
    def device_is_lost(self, node_id: str):
        before = self.machine.devices
        self.send(Lost(node_id, "gone"))
        assert node_id not in self.machine.devices
        if node_id in before:
            assert self.machine.phase is Phase.REPLANNING

    @rule(node_id=st.sampled_from(["", *NODES]))
    def fleet_changes(self, node_id: str):
        self.send(FleetChanged(node_id))

    @rule(event=st.sampled_from([Again(), GatewaysChanged()]))
    def something_else(self, event):
        self.send(event)

    @invariant()
    def ready_means_that_every_worker_is_connected(self):
        if self.machine.phase is Phase.READY:
            epoch = self.epochs[-1]
            assert self.machine.epoch == epoch
            assert {(node_id, epoch) for node_id in self.assigned[epoch]} <= self.connected

    @invariant()
    def an_epoch_in_force_is_the_newest(self):
        assert self.machine.epoch == (self.epochs[-1] if self.epochs else 0)
        assert bool(self.machine.devices) == self.machine.is_running
        assert set(self.machine.workers) == set(self.machine.devices)

    @invariant()
    def replans_are_damped(self):
        gaps = [after - before for before, after in zip(self.replans_s, self.replans_s[1:], strict=False)]
        assert all(gap >= REPLAN_S - 1e-9 for gap in gaps)

    @invariant()
    def something_is_always_under_way_or_said(self):
        machine = self.machine
        waits = machine._planning or machine._plan_at_s is not None
        assert waits or machine.is_running or machine.phase is Phase.FAILED
        assert machine.phase is not Phase.FAILED or machine.message


Walk.TestCase.settings = settings(
    max_examples=80, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestWalk = Walk.TestCase


class PrematureReady(DeploymentMachine):
    """A mutant: ready as soon as one worker is connected."""

    def _advance(self, now_s):
        commands = super()._advance(now_s)
        if self.phase is Phase.CONNECTING and max(w.phase for w in self.workers.values()) >= WorkerPhase.CONNECTED:
            self._enter(Phase.READY, now_s, "ready")
        return commands


def test_the_transcript_catches_a_machine_that_is_ready_too_early():
    expected = lines_of(TO_READY)
    script = "\n".join(line for line in expected.splitlines() if not line.startswith("->"))
    assert play(PrematureReady(str), script) != expected


def test_failures_are_forgiven_after_a_minute_of_service():
    machine = DeploymentMachine(str)
    play(machine, "0 start\n0 planned 1 a\n1 failed a 1 internal\n1 planned 2 a\n2 listening a 2\n3 connected a 2")
    machine.handle(Tick(), 64.0)
    commands = machine.handle(Lost("a", "gone"), 65.0)
    assert commands[-1] == RequestPlan(3, frozenset(), frozenset())


@pytest.mark.parametrize("count", range(1, FAILURES + 1))
def test_a_device_is_banned_after_so_many_failures(count: int):
    machine = DeploymentMachine(str)
    play(machine, "0 start\n0 planned 1 a")
    for number in range(1, count + 1):
        at = number * 10.0
        commands = machine.handle(
            Status(node_id="a", epoch=number, phase=WorkerPhase.FAILED, error_code="internal"), at
        )
        machine.handle(Planned(number + 1, ("a",)), at)
    banned = frozenset({"a"}) if count >= FAILURES else frozenset()
    assert commands[-1] == RequestPlan(count + 1, frozenset({"a"}) - banned, banned)
