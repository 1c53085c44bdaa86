"""What was measured of experts goes to the coordinator, every few seconds: figures and codes, never text.

An expert's own words do not travel, not even its error messages (a server may put the prompt in them): each failure is
told by its code and a sentence of ours.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Protocol

from ganglion.gateway.experts.asking import REQUESTS_OWN
from ganglion.gateway.experts.panel import NONSENSE, Attempt, Stand
from ganglion.gateway.experts.profile import Kind, Profile
from ganglion.gateway.failures import known
from ganglion.proto import admin_pb2
from ganglion.wire.errors import (
    DeviceLost,
    Exhausted,
    GanglionError,
    NotFound,
    PermissionDenied,
    ProtocolViolation,
    Unauthenticated,
    Unavailable,
    Unreachable,
)

REPORT_S: Final = 2.0
LINK_S: Final = 30.0  # between two measurements of one expert's link
PROFILE_S: Final = 60.0  # between two profiles: the coordinator chooses anew by each
OUTCOMES: Final = 256  # of one report; older ones are forgotten while the coordinator is away
_WHY: Final = {
    NONSENSE: "its answer could not be read",
    Unavailable.code: "it did not answer in time",
    Unreachable.code: "it cannot be reached",
    DeviceLost.code: "it was lost in the middle of an answer",
    Exhausted.code: "it takes no more requests",
    Unauthenticated.code: "it does not accept the gateway's key, or its certificate is not accepted",
    PermissionDenied.code: "it refuses the gateway's key",
    NotFound.code: "it does not know the model",
    ProtocolViolation.code: "it broke the protocol",
}

_log = logging.getLogger(__name__)


class Coordinator(Protocol):
    """What reports need of the link."""

    async def report(self, report: admin_pb2.OutcomeReport) -> None:
        """Send; raises errors of the tree."""
        ...


Links = Callable[[], Sequence[tuple[str, Callable[[], Awaitable[float]]]]]
Expected = Callable[[], tuple[Sequence[str], Sequence[Kind]]]


def outcome_of(attempt: Attempt, before_s: float = 0.0) -> admin_pb2.ExpertOutcome | None:
    """What an attempt tells of its expert; None where it tells nothing (the request's fault, or cut early).

    before_s: from the request's arrival until the first expert was asked: who asked waits for that, too.
    """
    name, fault = attempt.member.name, attempt.fault
    if attempt.late_s is not None:
        return _late(attempt, attempt.late_s, before_s)
    if fault is not None and (attempt.stand is Stand.FAILED or attempt.member.foreign):
        if fault.code in REQUESTS_OWN or (fault.code == Exhausted.code and not attempt.member.foreign):
            return None  # a lead's queue is known to the coordinator
        why = _WHY.get(fault.code, "it failed")
        return admin_pb2.ExpertOutcome(expert=name, failed=fault.code, why=why)
    if attempt.first_s is None or attempt.tokens < 1:
        return None
    spread = attempt.tokens - 1
    return admin_pb2.ExpertOutcome(
        expert=name,
        ttft_s=before_s + max(attempt.first_s - attempt.asked_s, 1e-6),
        tpot_s=(attempt.last_s - attempt.first_s) / spread if spread > 0 else 0.0,
        tokens=attempt.tokens,
    )


def _late(attempt: Attempt, late_s: float, before_s: float) -> admin_pb2.ExpertOutcome:
    """Of an answer that was cut short for being late: it takes so long at least. Otherwise nobody would be told."""
    name = attempt.member.name
    if attempt.first_s is None or attempt.tokens < 1:
        return admin_pb2.ExpertOutcome(expert=name, ttft_s=before_s + max(late_s - attempt.asked_s, 1e-6), tokens=1)
    return admin_pb2.ExpertOutcome(
        expert=name,
        ttft_s=before_s + max(attempt.first_s - attempt.asked_s, 1e-6),
        tpot_s=(late_s - attempt.first_s) / attempt.tokens,
        tokens=attempt.tokens + 1,
    )


class Reporter:
    """Collects outcomes, and sends them with the round trips to experts while it runs."""

    def __init__(self, coordinator: Coordinator, links: Links = lambda: (), expected: Expected | None = None) -> None:
        """`links`: of experts that can be asked, by name, what measures the round trip to it.

        expected: every expert, and the kinds of requests before there were any.
        """
        self._coordinator = coordinator
        self._links = links
        self._expected = expected
        self._outcomes: deque[admin_pb2.ExpertOutcome] = deque(maxlen=OUTCOMES)
        self._rtts: dict[str, float] = {}
        self._measured_s: dict[str, float] = {}
        self._woken = asyncio.Event()
        self._profile_s = -math.inf
        self.profile = Profile()

    def add(self, attempts: Sequence[Attempt], arrived_s: float | None = None, within_s: float = math.inf) -> None:
        """Take what the attempts of one request tell. arrived_s: time.monotonic() of the request.

        within_s: its latency budget; that an expert took longer is reported at once, as a failure is.
        """
        before_s = 0.0 if arrived_s is None or not attempts else max(0.0, attempts[0].asked_s - arrived_s)
        found = [outcome for one in attempts if (outcome := outcome_of(one, before_s)) is not None]
        self._outcomes.extend(found)
        if any(one.failed or one.ttft_s + (one.tokens - 1) * one.tpot_s > within_s for one in found):
            self._woken.set()  # the coordinator chooses anew without it

    async def run(self, every_s: float = REPORT_S) -> None:
        """Send until cancelled."""
        while True:
            try:
                async with asyncio.timeout(every_s):
                    await self._woken.wait()
            except TimeoutError:
                pass
            self._woken.clear()
            await self._measure()
            await self.flush()

    async def flush(self) -> None:
        """Send what there is; what the coordinator does not take is kept for the next time."""
        now_s = time.monotonic()
        # In a thread: a gate may be read anew.
        if self._expected is not None and self.profile.begin(*await asyncio.to_thread(self._expected)):
            self._profile_s = -math.inf
        profile = self.profile.message() if now_s - self._profile_s >= PROFILE_S else None
        if not self._outcomes and not self._rtts and profile is None:
            return
        outcomes, rtts = list(self._outcomes), dict(self._rtts)
        report = admin_pb2.OutcomeReport(
            outcomes=outcomes,
            links=[admin_pb2.LinkFigure(expert=name, rtt_s=rtt_s) for name, rtt_s in rtts.items()],
            profile=profile,
        )
        if profile is not None:
            self._profile_s = now_s
        self._outcomes.clear()
        self._rtts.clear()
        try:
            await self._coordinator.report(report)
        except GanglionError as error:
            _log.info("the coordinator took no report of experts: %s", error.message)
            kept = [*outcomes, *self._outcomes]
            self._outcomes = deque(kept, maxlen=OUTCOMES)
            self._rtts = rtts | self._rtts
            self._profile_s = -math.inf

    async def _measure(self) -> None:
        now_s = time.monotonic()
        there = list(self._links())
        before = {name: self._measured_s.get(name, -math.inf) for name, _ in there}
        links = [(name, measure) for name, measure in there if now_s - before[name] >= LINK_S]
        self._measured_s = before | {name: now_s for name, _ in links}
        found = await asyncio.gather(*(measure() for _, measure in links), return_exceptions=True)
        for (name, _), rtt_s in zip(links, found, strict=True):
            if not isinstance(rtt_s, BaseException):
                self._rtts[name] = rtt_s
            elif not isinstance(rtt_s, GanglionError | OSError):  # these say that there is no link now
                known(rtt_s)
