"""Drawing tokens of a step: what the shares of the output matrix are asked, their answers, tokens one after another.

An entry draws from several rows where it runs drafted tokens: row by row, as long as what is drawn is what was drafted.
Where it is not, but a branch begins with it, drawing goes on in that branch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from ganglion.agent.executor.port import StepBatch
from ganglion.agent.lead.candidates import Answer, from_message
from ganglion.agent.lead.choosing import scored
from ganglion.agent.lead.draw import Draw, write_draw
from ganglion.agent.lead.sampler import Drawn, draw_token
from ganglion.agent.lead.scheduler import Entry
from ganglion.agent.lead.session import Session
from ganglion.agent.worker_stage import StageRunner
from ganglion.proto import lane_pb2
from ganglion.wire.errors import GanglionError, Internal, ProtocolViolation
from ganglion.wire.frames import Expectation, Kind
from ganglion.wire.lane import Lane
from ganglion.wire.sampling.adjusting import NO_ADJUSTMENTS, Adjustments, VocabShare


class RowDraw:
    """A row that draws: what its shares are asked, by rank, and the adjustments that they are told now."""

    __slots__ = ("asked", "draws", "newer")

    def __init__(self, asked: Draw, vocab: Mapping[int, VocabShare]) -> None:
        self.asked = asked
        self.draws = dict.fromkeys(vocab, asked)
        self.newer: dict[int, Adjustments] = {}


class EntryDraws:
    """The rows of an entry that draw; all but the first run a token of `window`.

    branches: by (tokens of the window before them, first token). first_token: which the first row of a branch runs.
    """

    __slots__ = ("branches", "entry", "first_token", "rows", "session", "window")

    def __init__(
        self,
        session: Session,
        entry: Entry,
        window: Sequence[int],
        vocab: Mapping[int, VocabShare],
        first_token: int | None = None,
    ) -> None:
        first = entry.start + entry.count - entry.draws + 1
        asked = session.request.draw(first)
        self.session = session
        self.entry = entry
        self.window = window
        self.first_token = first_token
        self.branches: dict[tuple[int, int], EntryDraws] = {}
        self.rows = [
            RowDraw(replace(asked, position=first + row) if row else asked, vocab) for row in range(entry.draws)
        ]
        if session.steering is None:
            return
        for row, told in zip(self.rows, session.steering.ask(vocab, window), strict=False):
            for rank, (adjusting, newer) in told.items():
                row.draws[rank] = replace(row.asked, adjusting=adjusting)
                row.newer[rank] = newer

    @property
    def adjusts(self) -> bool:
        """Whether its shares are told different things."""
        return any(row.newer for row in self.rows)

    def write(self, rank: int | None, vocab: Mapping[int, VocabShare], into: lane_pb2.StepEntry) -> None:
        """What a device is asked; None: any, when nothing is adjusted."""
        for row in self.rows:
            if rank is None or rank not in vocab:
                write_draw(row.asked, NO_ADJUSTMENTS, None, into.draws.add())
            else:
                write_draw(row.draws[rank], row.newer.get(rank, NO_ADJUSTMENTS), vocab[rank], into.draws.add())


@dataclass(frozen=True, slots=True)
class Walk:
    """What was drawn for a session in a step: all but the last as drafted, or an error at last.

    Where the client chooses it is told the distribution instead.
    branch: the entry that it ended in, if it left the window.
    """

    drawn: Sequence[Drawn | lane_pb2.Scored | GanglionError]
    branch: Entry | None = None


class Drawer:
    """Draws the tokens of a step from the answers of every share. `sample_s`: seconds spent on it here so far."""

    def __init__(
        self, runner: StageRunner, lanes: Mapping[int, Lane], names: Sequence[str], vocab: Mapping[int, VocabShare]
    ) -> None:
        self.sample_s = 0.0
        self._runner = runner
        self._lanes = lanes
        self._names = names
        self._vocab = vocab

    def asked(
        self, entries: Sequence[Entry], sessions: Mapping[int, Session], tokens: Callable[[Entry], Sequence[int]]
    ) -> list[EntryDraws]:
        """What the rows of entries that draw ask, in their order. tokens: the drafted ones that an entry runs."""
        before = time.perf_counter()
        found: dict[int, EntryDraws] = {}
        for entry in entries:
            if not entry.draws:
                continue
            drafted = tokens(entry)
            if entry.branch is None or entry.take_from is None:
                found[entry.session] = EntryDraws(sessions[entry.session], entry, drafted, self._vocab)
                continue
            main = found[entry.take_from]
            draws = EntryDraws(main.session, entry, drafted[1:], self._vocab, drafted[0])
            main.branches[entry.start - main.entry.start - 1, drafted[0]] = found[entry.session] = draws
        self.sample_s += time.perf_counter() - before
        return list(found.values())

    @staticmethod
    def places(batch: StepBatch, drawing: Sequence[EntryDraws]) -> list[int]:
        """The rows of the batch that draw, in order of draws."""
        lasts = {placed.session: placed.first + placed.count for placed in batch.entries}
        return [lasts[one.entry.session] - len(one.rows) + index for one in drawing for index in range(len(one.rows))]

    async def draw(self, step: int, drawing: Sequence[EntryDraws]) -> list[Walk]:
        """For each entry that is no branch what was drawn, up to the first token that was not drafted.

        The runner's head has run on `places`.
        """
        rows = [row for one in drawing for row in one.rows]
        replies = {
            rank: await self._replies(rank, step, 0, [row.draws[rank] for row in rows])
            for rank in self._vocab
            if rank != 0
        }
        numbers, number = {}, 0
        for one in drawing:
            numbers[one.entry.session] = number
            number += len(one.rows)
        return [await self._walk(step, one, numbers, replies) for one in drawing if one.entry.branch is None]

    async def _walk(
        self, step: int, one: EntryDraws, numbers: Mapping[int, int], replies: Mapping[int, Sequence[Answer]]
    ) -> Walk:
        """Draw row by row from the entry's first on. numbers: of its first row, by session of an entry."""
        drawn: list[Drawn | lane_pb2.Scored | GanglionError] = []
        index = 0
        while True:
            found = await self._draw_one(step, numbers[one.entry.session] + index, one, index, replies)
            drawn.append(found)
            if not isinstance(found, Drawn):
                break
            if [found.token] == list(one.window[index : index + 1]):
                index += 1
                continue
            branch = one.branches.get((index, found.token))
            if branch is None:
                break
            one, index = branch, 0
        return Walk(drawn, one.entry if one.entry.branch is not None else None)

    async def _replies(self, rank: int, step: int, exchange: int, draws: Sequence[Draw]) -> list[Answer]:
        before = time.perf_counter()
        payload = await self._lanes[rank].receive(Expectation(Kind.CANDIDATES, step, exchange))
        self._runner.meter.exchange_s += time.perf_counter() - before
        entries = self._parse(rank, payload)
        if len(entries) != len(draws):
            raise ProtocolViolation(f"{self._names[rank]} answered {len(entries)} of {len(draws)} draws")
        share = self._vocab[rank]
        return [from_message(message, share, draw) for message, draw in zip(entries, draws, strict=True)]

    def _parse(self, rank: int, payload: bytes) -> Sequence[lane_pb2.Candidates]:
        try:
            return lane_pb2.CandidatesReply.FromString(payload).entries
        except DecodeError:
            raise ProtocolViolation(f"{self._names[rank]} sent candidates that do not parse") from None

    async def _draw_one(
        self, step: int, number: int, one: EntryDraws, index: int, replies: Mapping[int, Sequence[Answer]]
    ) -> Drawn | lane_pb2.Scored | GanglionError:
        """Draw the token of a row, the step's `number`-th, asking for more candidates as long as they do not decide."""
        row, request, rounds = one.rows[index], one.session.request, 0
        draws = row.draws
        before = time.perf_counter()
        answers = {
            rank: self._runner.answer(number, draws[rank]) if rank == 0 else replies[rank][number]
            for rank in self._vocab
        }
        self.sample_s += time.perf_counter() - before
        while True:
            poor = next((rank for rank, reply in answers.items() if reply.numeric_error), None)
            if poor is not None:
                return Internal(
                    f"numeric_error: the logits of device {self._names[poor]} at token {row.asked.position} are not"
                    " finite; the weights or the numeric class overflow"
                )
            if request.choosing is not None:
                return await self._scored(step, number, one.session, row.asked, list(answers.values()))
            before = time.perf_counter()
            found = draw_token(list(answers.values()), request.sampling, row.asked.position)
            self.sample_s += time.perf_counter() - before
            if isinstance(found, Drawn):
                return found
            rounds += 1
            draws = {rank: replace(draw, candidates=found.candidates) for rank, draw in draws.items()}
            answers = await self._ask_again(step, rounds, number, draws)

    async def _scored(
        self, step: int, number: int, session: Session, asked: Draw, answers: Sequence[Answer]
    ) -> lane_pb2.Scored:
        if 0 in self._vocab:
            self._runner.keep(number, session.number)
        before = time.perf_counter()
        told = scored(answers, asked.candidates, asked.position)
        self.sample_s += time.perf_counter() - before
        if not asked.candidates:
            told.logits.extend((await self.kept(step, session.number, None)).tolist())
        return told

    async def kept(self, step: int, session: int, ids: NDArray[np.uint32] | None) -> NDArray[np.float32]:
        """Raw logits of the row that a session's shares keep: of `ids`, or of the whole vocabulary.

        step: the last one. Raises ProtocolViolation, and what lanes raise.
        """
        before = time.perf_counter()
        parts = {}
        for rank, share in self._vocab.items():
            own = None if ids is None else ids[(ids >= share.first) & (ids < share.first + share.count)] - share.first
            if own is not None and not own.size:
                continue
            parts[rank] = own
            if rank != 0:
                more = lane_pb2.MoreCandidates(session=session, ids=[] if own is None else own.tolist())
                await self._lanes[rank].send_message(Kind.MORE, step, more.SerializeToString())
        found = np.empty(sum(share.count for share in self._vocab.values()) if ids is None else ids.size, np.float32)
        for rank, own in parts.items():
            share = self._vocab[rank]
            logits = self._runner.kept(session, own) if rank == 0 else await self._kept_by(rank, step, own)
            where = slice(share.first, share.first + share.count)
            found[where if ids is None else (ids >= where.start) & (ids < where.stop)] = logits
        self._runner.meter.exchange_s += time.perf_counter() - before
        return found

    async def _kept_by(self, rank: int, step: int, own: NDArray[np.uint32] | None) -> NDArray[np.float32]:
        payload = await self._lanes[rank].receive(Expectation(Kind.CANDIDATES, step))
        entries = self._parse(rank, payload)
        wanted = self._vocab[rank].count if own is None else own.size
        logits = np.array(entries[0].logits if len(entries) == 1 else (), np.float32)
        if logits.size != wanted or not np.isfinite(logits).all():
            raise ProtocolViolation(f"{self._names[rank]} sent {logits.size} logits of {wanted}, or not all are finite")
        return logits

    async def _ask_again(self, step: int, rounds: int, number: int, draws: Mapping[int, Draw]) -> dict[int, Answer]:
        candidates = next(iter(draws.values())).candidates
        more = lane_pb2.MoreCandidates(entry=number, candidates=candidates).SerializeToString()
        for rank in self._vocab:
            if rank != 0:
                await self._lanes[rank].send_message(Kind.MORE, step, more, rounds)
        found = {}
        for rank in self._vocab:
            if rank == 0:
                found[rank] = self._runner.answer(number, draws[rank])
            else:
                found[rank] = (await self._replies(rank, step, rounds, [draws[rank]]))[0]
        return found
