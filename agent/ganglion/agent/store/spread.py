"""Which holder brings which piece: a queue that idle holders take from. Pure: events in, moves out.

A piece waits, comes from one holder, or is here. A holder that brings faster comes back for more sooner, so pieces
spread by measured rate without a forecast. At the end, when nothing waits, an idle holder takes over what a much slower
or silent one still brings, from the byte where that one stopped.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from ganglion.wire.errors import Corrupt, Exhausted, GanglionError, NotFound, Unavailable
from ganglion.wire.nouns import PieceRef

ROUNDS: Final = 3  # failures in a row after which a holder is set aside; times that it is asked for what it lacks
PAUSE_S: Final = 0.3  # after a failure, doubled each time, with jitter
MISSES: Final = 4  # pieces in a row that a holder lacks before it is asked more rarely
LONGEST_PAUSE_S: Final = 4.0
LOOK_S: Final = 0.25  # between two looks at what others still bring
STALL_S: Final = 2.0  # without a byte, after which an idle holder takes over
SLOWER: Final = 2.0  # times slower than the idle holder
WORTH_S: Final = 1.0  # of waiting that a takeover must save


@dataclass(slots=True)
class HolderCount:
    """What one holder gave in one fetch; `aside` says why it is asked no more, "" while it is."""

    pieces: int = 0
    received_bytes: int = 0
    busy_s: float = 0.0
    lacked: int = 0
    failed: int = 0
    lied: int = 0
    overtaken: int = 0
    aside: str = ""

    @property
    def bytes_per_s(self) -> float:
        """Of one transfer, over the time that transfers took; 0 before the first byte."""
        return self.received_bytes / self.busy_s if self.busy_s > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Take:
    """Bring `ref`; `overtakes`: it still comes from elsewhere, end that first."""

    ref: PieceRef
    overtakes: bool = False


@dataclass(frozen=True, slots=True)
class Wait:
    """Ask again at `until_s`, or when anything changed."""

    until_s: float


@dataclass(slots=True)
class _Holder:
    count: HolderCount = field(default_factory=HolderCount)
    reason: GanglionError | None = None  # why it was set aside
    paused_until_s: float = 0.0
    strikes: int = 0
    struck_s: float = float("-inf")
    misses: int = 0


@dataclass(slots=True)
class _Coming:
    ref: PieceRef
    holder: str
    began_s: float
    moved_s: float
    from_bytes: int = 0
    at_bytes: int = 0


@dataclass(slots=True)
class _Lack:
    times: int = 0
    until_s: float = 0.0


class Spread:
    """One fetch: `pieces` to bring, `holders` (any unique names) that may have them. `seed` makes the order."""

    def __init__(self, pieces: Iterable[PieceRef], holders: Iterable[str], *, seed: int | None = None) -> None:
        self._random = random.Random(seed)  # noqa: S311 - order and jitter
        order = list(pieces)
        # Devices that fetch the same pieces at once begin elsewhere, so that they soon have something for each other.
        self._random.shuffle(order)
        self._waiting = OrderedDict((ref.digest, ref) for ref in order)
        self._later_s: dict[str, float] = {}
        self._coming: dict[str, _Coming] = {}
        self._holders = {name: _Holder() for name in holders}
        self._lacks: dict[tuple[str, str], _Lack] = {}
        self.lost: PieceRef | None = None
        """A piece that no holder can give any more: the fetch has failed."""

    def counts(self) -> dict[str, HolderCount]:
        """What each holder gave."""
        return {name: holder.count for name, holder in self._holders.items()}

    def next_move(self, name: str, now_s: float) -> Take | Wait | None:
        """What holder `name` should do now; None: nothing any more in this fetch."""
        holder = self._holders[name]
        if holder.reason is not None or not (self._waiting or self._coming):
            return None
        if holder.paused_until_s > now_s:
            return Wait(holder.paused_until_s)
        soonest_s = now_s + LONGEST_PAUSE_S
        for digest, ref in self._waiting.items():
            free_s = max(self._later_s.get(digest, 0.0), self._asked_again_s(digest, name))
            if free_s <= now_s:
                del self._waiting[digest]
                self._coming[digest] = _Coming(ref, name, now_s, now_s)
                return Take(ref)
            soonest_s = min(soonest_s, free_s)
        slow = self._slowest(name, holder, now_s)
        if slow is not None:
            self._overtake(slow, name, now_s)
            return Take(slow.ref, overtakes=True)
        return Wait(min(soonest_s, now_s + LOOK_S) if self._coming else soonest_s)

    def began(self, name: str, ref: PieceRef, from_bytes: int) -> None:
        """The transfer starts at byte `from_bytes`; again when it starts over."""
        coming = self._mine(name, ref)
        if coming is not None:
            coming.from_bytes = coming.at_bytes = from_bytes

    def moved(self, name: str, ref: PieceRef, at_bytes: int, now_s: float) -> None:
        """The first `at_bytes` bytes of the piece are here."""
        coming = self._mine(name, ref)
        if coming is None:
            return
        holder = self._holders[name]
        holder.count.received_bytes += at_bytes - coming.at_bytes
        holder.count.busy_s += now_s - coming.moved_s
        holder.strikes = 0
        coming.at_bytes, coming.moved_s = at_bytes, now_s

    def brought(self, name: str, ref: PieceRef) -> None:
        """The piece is here, verified."""
        if self._mine(name, ref) is not None:
            holder = self._holders[name]
            holder.count.pieces += 1
            holder.misses = 0
        self._waiting.pop(ref.digest, None)
        self._coming.pop(ref.digest, None)

    def postponed(self, name: str, ref: PieceRef, until_s: float) -> None:
        """Another fetch of this device brings the piece already: look again at `until_s`."""
        self._later_s[ref.digest] = until_s
        self._back(name, ref)

    def lacked(self, name: str, ref: PieceRef, now_s: float) -> None:
        """The holder has no such piece; it may later, since it may be fetching too."""
        holder = self._holders[name]
        holder.count.lacked += 1
        holder.misses += 1
        if holder.misses >= MISSES:
            holder.paused_until_s = now_s + _growing(holder.misses - MISSES)
        lack = self._lacks.setdefault((ref.digest, name), _Lack())
        lack.times += 1
        lack.until_s = now_s + _growing(lack.times - 1)
        self._back(name, ref)

    def failed(self, name: str, ref: PieceRef, reason: GanglionError, now_s: float) -> None:
        """The transfer broke: what may pass is tried again after a pause, anything else sets the holder aside."""
        holder, coming = self._holders[name], self._mine(name, ref)
        holder.count.failed += 1
        if isinstance(reason, Unavailable | Exhausted):
            self._strike(holder, reason, coming.began_s if coming is not None else now_s, now_s)
        else:
            self._set_aside(holder, reason)
        self._back(name, ref)

    def lied(self, name: str, ref: PieceRef, reason: Corrupt) -> None:
        """The holder alone sent the whole piece, and its bytes are wrong: it is asked no more."""
        self._holders[name].count.lied += 1
        self._set_aside(self._holders[name], reason)
        self._back(name, ref)

    def refusal(self, ref: PieceRef) -> GanglionError:
        """Why nobody gave `ref`: Unavailable if any holder was, else Corrupt, else what the last one said."""
        reasons = {
            name: holder.reason if holder.reason is not None else NotFound("it does not hold this piece")
            for name, holder in self._holders.items()
        }
        told = "; ".join(f"{name}: {reason.message}" for name, reason in reasons.items())
        kinds = [type(reason) for reason in reasons.values()]
        kind = next((kind for kind in (Unavailable, Corrupt) if any(issubclass(k, kind) for k in kinds)), kinds[-1])
        return kind(f"piece {ref.digest[:12]} ({ref.size} bytes) came from no holder: {told}")

    # Inside

    def _mine(self, name: str, ref: PieceRef) -> _Coming | None:
        coming = self._coming.get(ref.digest)
        return coming if coming is not None and coming.holder == name else None

    def _asked_again_s(self, digest: str, name: str) -> float:
        lack = self._lacks.get((digest, name))
        if lack is None:
            return 0.0
        return float("inf") if lack.times >= ROUNDS else lack.until_s

    def _back(self, name: str, ref: PieceRef) -> None:
        """The piece waits again, before the others, unless another holder brings it by now."""
        if self._mine(name, ref) is not None:
            del self._coming[ref.digest]
            self._waiting[ref.digest] = ref
            self._waiting.move_to_end(ref.digest, last=False)
            self._judge(ref)

    def _slowest(self, name: str, holder: _Holder, now_s: float) -> _Coming | None:
        """The transfer of another holder that `name` should take over; a silent one first."""
        rate = holder.count.bytes_per_s
        found, saves_s = None, 0.0
        for coming in self._coming.values():
            if coming.holder == name or self._asked_again_s(coming.ref.digest, name) > now_s:
                continue
            if now_s - coming.moved_s >= STALL_S:
                return coming
            passed_s, rest = now_s - coming.began_s, coming.ref.size - coming.at_bytes
            if rate <= 0 or passed_s < WORTH_S:
                continue
            theirs_s = rest * passed_s / max(1, coming.at_bytes - coming.from_bytes)
            if theirs_s - SLOWER * rest / rate > max(WORTH_S, saves_s):
                found, saves_s = coming, theirs_s - SLOWER * rest / rate
        return found

    def _overtake(self, coming: _Coming, name: str, now_s: float) -> None:
        slow = self._holders[coming.holder]
        slow.count.overtaken += 1
        if now_s - coming.moved_s >= STALL_S or coming.at_bytes == coming.from_bytes:
            reason = Unavailable(f"it sent nothing for {now_s - coming.moved_s:.0f} s")
            self._strike(slow, reason, coming.began_s, now_s)
        self._coming[coming.ref.digest] = _Coming(coming.ref, name, now_s, now_s)

    def _strike(self, holder: _Holder, reason: GanglionError, began_s: float, now_s: float) -> None:
        if began_s <= holder.struck_s:
            return  # the same outage, seen by another transfer
        holder.strikes += 1
        holder.struck_s = now_s
        holder.paused_until_s = now_s + _growing(holder.strikes - 1) * self._random.uniform(0.5, 1.0)
        if holder.strikes >= ROUNDS:
            self._set_aside(holder, reason)

    def _set_aside(self, holder: _Holder, reason: GanglionError) -> None:
        if holder.reason is None:
            holder.reason, holder.count.aside = reason, reason.message
            for ref in self._waiting.values():
                self._judge(ref)

    def _judge(self, ref: PieceRef) -> None:
        """Find out whether anybody is left who may give `ref`."""
        if self.lost is None and ref.digest in self._waiting:
            given_up = (
                holder.reason is not None or self._asked_again_s(ref.digest, name) == float("inf")
                for name, holder in self._holders.items()
            )
            self.lost = ref if all(given_up) else None


def _growing(times: int) -> float:
    return min(LONGEST_PAUSE_S, PAUSE_S * 2.0 ** min(times, 16))
