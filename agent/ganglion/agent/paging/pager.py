"""Brings experts into memory by explicit reads: what the computation waits for first, then what is foretold.

    for ready in pager.waves(layer, chosen):   # experts of this layer that are in memory, until all had their turn
        ...run the rows of `ready`...

A layer's experts run as they arrive, so those in memory run while the others are read. One thread reads, in units small
enough that a miss does not wait for a whole expert that was only foretold; decisions are `ExpertCache`'s and
`Forecast`'s. The bytes of experts in memory are at most `memory_bytes`, what always stays included.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ganglion.agent.paging.cache import ExpertCache, Read
from ganglion.agent.paging.pages import Pool, take_away
from ganglion.agent.paging.parts import PagedExperts
from ganglion.agent.paging.predict import NAMES, PATH_ROWS, Forecast
from ganglion.agent.paging.routers import Router
from ganglion.wire.errors import Corrupt, DoesNotFit, GanglionError, Internal

log = logging.getLogger(__name__)

UNIT_BYTES: Final = 512 << 10  # of a read: what a miss may have to wait for
JOIN_S: Final = 10.0
WORTH: Final = 0.4  # of experts read ahead, the share that must have been needed for it to go on
WORTH_READS: Final = 32.0  # after which what came of a read ahead counts 1/e
TRY_STEPS: Final = 16  # where it does not pay, one step in so many tries whether it does by now
LATE_S: Final = 0.002  # that a throttled read may begin after the one before ended and still be counted as its next


@dataclass(slots=True)
class Counts:
    """Since the pager began: experts that were in memory when needed, experts that were not, seconds waited for these,
    bytes read, experts read ahead and those of them that were needed before they were pushed out."""

    hits: int = 0
    misses: int = 0
    waited_s: float = 0.0
    read_bytes: int = 0
    ahead: int = 0
    ahead_used: int = 0

    @property
    def hit_rate(self) -> float:
        """Of the experts that were needed, the share that were in memory."""
        return self.hits / max(1, self.hits + self.misses)


@dataclass(frozen=True, slots=True)
class _Visit:
    layer: int
    chosen: NDArray[np.int64]
    rows: NDArray[np.float32] | None


@dataclass(slots=True)
class Worth:
    """Whether reading ahead pays: by what came of it, and tried from time to time where it did not."""

    useful: float = 0.5  # of experts read ahead, the share that was needed before they were pushed out
    steps: int = 0

    def came(self, *, used: bool) -> None:
        """What became of one."""
        self.useful += (used - self.useful) / WORTH_READS

    @property
    def pays(self) -> bool:
        """Whether to read ahead in this step."""
        return self.useful >= WORTH or self.steps % TRY_STEPS == 0


@dataclass(slots=True)
class _Job:
    read: Read
    views: list[memoryview]
    size: int
    done: int = 0


class Pager:
    """The experts of `layers`, of which up to `memory_bytes` are in memory. One thread computes with it.

    routers: of the layers, where the next one is to be asked ahead. ahead: whether it reads what is foretold.
    disk_bytes_per_s: reads no faster, for benchmarks. Raises DoesNotFit where not even one expert fits.
    """

    def __init__(
        self,
        layers: Sequence[PagedExperts],
        memory_bytes: int,
        *,
        routers: Sequence[Router | None] = (),
        ahead: bool = True,
        disk_bytes_per_s: float | None = None,
        cache: type[ExpertCache] = ExpertCache,
    ) -> None:
        self._layers = layers
        record = max(one.index.record_bytes for one in layers)
        held = sum(one.resident_bytes for one in layers)
        experts = max(one.layout.experts for one in layers)
        slots = min((memory_bytes - held) // record, sum(one.layout.experts for one in layers))
        if slots < 1:
            raise DoesNotFit(
                f"experts: {memory_bytes} bytes of memory hold none of {record} bytes beside {held} that always stay; "
                f"--expert-memory must be at least {held + record} bytes"
            )
        self.slots = slots
        self.counts = Counts()
        self._routers = routers
        self._may_read_ahead = ahead
        self._worth = Worth()
        self._rate = disk_bytes_per_s
        self._free_at_s = 0.0
        self._pool = Pool(slots, record)
        self._cache = cache(len(layers), experts, slots)
        for number, one in enumerate(layers):
            self._cache.limit(number, one.layout.experts)
        self._forecast = Forecast(len(layers), experts)  # the reading thread's
        self._seen: deque[_Visit] = deque(maxlen=2 * len(layers))  # that it has not taken in yet
        self._foretold: set[tuple[int, int]] = set()  # read ahead, and not needed yet
        self._jobs: list[_Job] = []  # begun, the one to go on with last
        self._error: GanglionError | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._serve, name="experts", daemon=True)
        self._thread.start()

    def waves(
        self, layer: int, chosen: NDArray[np.int64], rows: NDArray[np.float32] | None = None
    ) -> Iterator[list[int]]:
        """The experts that rows take, chosen int64 [rows, k] of the layer-th paged layer, in parts, as they can run.

        An expert is in memory from when it is given until the next is asked for. rows: [rows, hidden], what experts
        take, for the next layer's router. Raises Corrupt for a file that is not what was written or cannot be read.
        """
        counts = np.bincount(chosen.ravel(), minlength=self._layers[layer].layout.experts)
        hottest = [int(one) for one in np.argsort(-counts, kind="stable")[: int((counts > 0).sum())]]
        with self._changed:
            self._raise()
            self._worth.steps += layer == 0
            few = rows[:PATH_ROWS].copy() if rows is not None and self._ahead else None
            self._seen.append(_Visit(layer, chosen.copy(), few))
            self._cache.arrive(layer, hottest)
            if self._count(layer, hottest) or self._behind():
                self._changed.notify_all()
        try:
            left, elsewhere = len(hottest), False
            while left:
                ready = self._wait()
                yield ready
                left -= len(ready)
                with self._changed:
                    self._raise()
                    self._cache.ran(ready)
                    if left or self._ahead:
                        self._changed.notify_all()  # their slots can be had
                    elsewhere = not left and self._layers[layer].read_elsewhere
            if elsewhere:
                raise Internal(f"experts of {self._layers[layer].name}: kernels read weights that are not in memory")
        finally:
            with self._changed:
                self._cache.leave()

    @property
    def precision(self) -> NDArray[np.float64]:
        """Of each predictor (`predict.NAMES`) the share of its foretold experts that rows took."""
        return self._forecast.precision

    def close(self) -> None:
        """Stop reading. What is in memory stays there until the sessions go."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        self._thread.join(JOIN_S)
        if self._thread.is_alive():
            log.warning("experts: a read has not ended for %g s; its file is left open", JOIN_S)
            return
        for layer in self._layers:
            layer.close()
        self._pool.close()
        counts, precision = self.counts, zip(NAMES, self.precision, strict=True)
        log.info(
            "experts: of %d needed %.3f were in memory, %.1f s waited, %d MB read; ahead %d, used %d; right: %s",
            counts.hits + counts.misses,
            counts.hit_rate,
            counts.waited_s,
            counts.read_bytes // 10**6,
            counts.ahead,
            counts.ahead_used,
            ", ".join(f"{name} {right:.2f}" for name, right in precision),
        )

    @property
    def _ahead(self) -> bool:
        return self._may_read_ahead and self._worth.pays

    def _behind(self) -> bool:
        """Whether to take in where the computation is: at once for what is read ahead, else in larger parts."""
        return len(self._seen) >= (1 if self._ahead else max(1, len(self._layers) // 2))

    def _learn(self, visits: Sequence[_Visit], *, paths: bool) -> NDArray[np.float32]:
        """Take in where the computation was; the layers until each expert's next use."""
        for visit in visits:
            self._forecast.visit(visit.layer, visit.chosen, paths=paths)
        layer, rows = visits[-1].layer, visits[-1].rows
        if rows is not None and layer + 1 < len(self._routers):
            before, router = self._routers[layer], self._routers[layer + 1]
            if before is not None and router is not None:
                self._forecast.hint(layer + 1, router.rates(rows, before.norm))
        return self._forecast.expected()

    def _count(self, layer: int, needed: Sequence[int]) -> int:
        """Count what was there and what was not; how many were not."""
        missing = set(self._cache.awaited())
        self.counts.hits += len(needed) - len(missing)
        self.counts.misses += len(missing)
        for expert in needed:
            if (layer, expert) in self._foretold:
                self._foretold.discard((layer, expert))
                self._worth.came(used=True)
                self.counts.ahead_used += 1
        return len(missing)

    def _wait(self) -> list[int]:
        """The experts that can run, at least one."""
        with self._changed:
            ready = self._cache.ready()
            if not ready:
                before = time.perf_counter()
                while not (ready := self._cache.ready()):
                    self._raise()
                    self._changed.wait()
                self.counts.waited_s += time.perf_counter() - before
            return ready

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
        if self._closed:
            raise Internal("experts: the pager is closed")

    def _serve(self) -> None:
        try:
            while (job := self._next()) is not None:
                self._go_on(job)
        except GanglionError as error:
            self._fail(error)
        except OSError as error:
            self._fail(Corrupt(f"experts cannot be read: {error}"))
        except Exception:  # the computation must not wait for a thread that is gone
            log.exception("experts: reading ended")
            self._fail(Internal("experts: reading ended; the log of the process has the details"))

    def _fail(self, error: GanglionError) -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def _next(self) -> _Job | None:
        """The job to go on with; None when the pager is closed.

        What is awaited goes first, then taking in where the computation is, which overlaps with it, then what is begun.
        """
        with self._changed:
            while not self._closed:
                read = self._cache.next_read(ahead=False)
                if read is not None:
                    break
                awaited = [job for job in self._jobs if self._cache.is_awaited(job.read.key)]
                if awaited:
                    return awaited[-1]
                if self._behind():
                    visits, paths = list(self._seen), self._ahead
                    self._seen.clear()
                    self._changed.release()
                    try:
                        expected = self._learn(visits, paths=paths)
                    finally:
                        self._changed.acquire()
                    if not self._seen:
                        self._cache.expect(expected)
                    continue
                if self._jobs:
                    return self._jobs[-1]
                # One that is only foretold at a time: what comes after it is decided when its turn is there.
                read = self._cache.next_read() if self._ahead else None
                if read is not None:
                    break
                self._changed.wait()
            else:
                return None
            if read.evicted in self._foretold:
                self._foretold.discard(read.evicted)
                self._worth.came(used=False)
            if not read.awaited:
                self.counts.ahead += 1
                self._foretold.add(read.key)
        if read.evicted is not None:
            _take_pages(self._layers[read.evicted[0]], read.evicted[1])
        views = self._pool.views(read.slot, [length for _, length in self._layers[read.key[0]].pages(read.key[1])])
        job = _Job(read, views, sum(len(one) for one in views))
        self._jobs.append(job)
        return job

    def _go_on(self, job: _Job) -> None:
        layer, expert = job.read.key
        if job.done < job.size:
            size = min(UNIT_BYTES, job.size - job.done)
            begun_s = time.perf_counter()
            self._layers[layer].read(expert, job.views, job.done, size)
            self._throttle(size, begun_s)
            job.done += size
            self.counts.read_bytes += size
        if job.done < job.size:
            return
        self._layers[layer].check(expert, job.views)
        self._pool.show(job.read.slot, self._layers[layer].pages(expert))
        self._jobs.remove(job)
        with self._changed:
            self._cache.finished(job.read.key)
            self._changed.notify_all()

    def _throttle(self, size: int, begun_s: float) -> None:
        if self._rate is None:
            return
        late = begun_s - self._free_at_s
        self._free_at_s = (begun_s if late > LATE_S else self._free_at_s) + size / self._rate
        time.sleep(max(0.0, self._free_at_s - time.perf_counter()))


def _take_pages(layer: PagedExperts, expert: int) -> None:
    for address, length in layer.pages(expert):
        take_away(address, length)
