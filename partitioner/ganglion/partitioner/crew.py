"""Cutting on several threads: jobs within a budget of memory, results in order, finished ones in a journal.

A job computes arrays and hands each to the sink, which hashes and writes it: numpy, hashlib and file writes release
the interpreter's lock, so one thread computes while another hashes or waits for the disk.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Final

from ganglion.partitioner.journal import Journal, Pieces

MEMORY_BYTES: Final = 3 << 29  # of jobs that run at once, as they estimate it; one runs whatever it takes


@dataclass(frozen=True)
class Job:
    """A unit of cutting. name: unique, and different when anything that decides its bytes is; memory_bytes: what it
    takes while it runs; read_bytes: of the checkpoint, for progress; run: puts its pieces into the sink."""

    name: str
    memory_bytes: int
    read_bytes: int
    run: Callable[[], Pieces]


def work(
    jobs: Sequence[Job],
    journal: Journal,
    done: Callable[[Job], None],
    *,
    threads: int = 0,
    memory_bytes: int = MEMORY_BYTES,
) -> list[Pieces]:
    """Run what the journal has not got; the pieces of each job in order of `jobs`, whatever the order of running.

    threads: 0 for one more than there are cores, so that one may wait for the disk. `done` is called in this thread
    after each job. Raises what a job raises, once those that run have ended.
    """
    results: dict[int, Pieces] = {}
    running: dict[Future[Pieces], int] = {}
    taken_bytes = 0

    def collect(ended: Iterable[Future[Pieces]]) -> None:
        nonlocal taken_bytes
        for future in ended:
            number = running.pop(future)
            taken_bytes -= jobs[number].memory_bytes
            results[number] = future.result()
            journal.add(jobs[number].name, results[number])
            done(jobs[number])

    threads = threads or _cores() + 1
    with ThreadPoolExecutor(threads, thread_name_prefix="cut") as pool:
        for number, job in enumerate(jobs):
            known = journal.find(job.name)
            if known is not None:
                results[number] = known
                done(job)
                continue
            while running and (len(running) >= threads or taken_bytes + job.memory_bytes > memory_bytes):
                collect(wait(running, return_when=FIRST_COMPLETED).done)
            running[pool.submit(job.run)] = number
            taken_bytes += job.memory_bytes
        while running:
            collect(wait(running, return_when=FIRST_COMPLETED).done)
    return [results[number] for number in range(len(jobs))]


def _cores() -> int:
    count = getattr(os, "sched_getaffinity", None)
    return len(count(0)) if count is not None else os.cpu_count() or 1
