"""A small model on one device that guesses tokens: slots whose key-value rows are caches of token sequences.

    engine = DraftEngine(manifest, shard, store.open, embedding, slots=4, context=2048)
    guess, = engine.step([Ask(0, ids, sampling, top=3)])   # runs what slot 0 lacks of `ids`, then the head

A slot goes by what it holds: an ask that shares a beginning with that runs the rest only, so a rejected draft costs
nothing and needs no call. Nothing here has to be equal bit for bit: a wrong guess costs time, never a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ganglion.agent.executor.embedding import EmbeddingTable
from ganglion.agent.executor.executor import Batch, Executor
from ganglion.agent.executor.loader import Shard, load_shard
from ganglion.agent.executor.prepacked import Prepacked
from ganglion.agent.roles import Role
from ganglion.agent.speculation.guessing import NO_GUESS, Ask, Guess, guess
from ganglion.wire.errors import Internal, InvalidDocument
from ganglion.wire.nouns import Manifest, Plan, Range, Stage, digest, kv_capacity_tokens
from ganglion.wire.sampling.adjusting import VocabShare
from ganglion.wire.shares import OpenPiece, whole_share

__all__ = ["Ask", "DraftEngine", "Guess", "draft_plan", "load_engine"]

_HERE: Final = "a" * 26  # the only device of a drafter's plan
CHUNK: Final = 128
_PROMPT_ROWS: Final = 16  # where formats mix: so many missing rows, and they run in the format of prompts


def draft_plan(manifest: Manifest, *, slots: int, context: int, chunk: int = CHUNK) -> Plan:
    """A plan that puts all of `manifest` on one device: `slots` sessions of `context` tokens, at most the model's own.

    chunk: rows of a pass at most, at least `slots`.
    """
    geometry = manifest.geometry
    context = min(context, geometry.context)
    layers = Range(0, geometry.layers)
    return Plan(
        manifest_digest=digest(manifest),
        numeric_class=manifest.numeric_class,
        context=context,
        sessions=slots,
        kv_tokens=slots * kv_capacity_tokens(context),
        chunk=max(chunk, slots),
        stages=(Stage(layers=layers, shares=(whole_share(manifest, _HERE, layers),), topology="mesh"),),
        threads={},
    )


def load_engine(
    manifest: Manifest,
    open_piece: OpenPiece,
    folder: Path,
    *,
    slots: int,
    context: int,
    chunk: int = CHUNK,
    progress: Callable[[int, int], None] = lambda done_bytes, total_bytes: None,
    prepacked: Prepacked | None = None,
) -> DraftEngine:
    """Load a drafter of its own, whose runtime has been started; raises what `load_shard` raises."""
    (stage,) = draft_plan(manifest, slots=slots, context=context, chunk=chunk).stages
    (share,) = stage.shares
    shard = load_shard(
        manifest, stage, share, open_piece=open_piece, folder=folder, progress=progress, prepacked=prepacked
    )
    embedding = EmbeddingTable(manifest, open_piece)
    return DraftEngine(manifest, shard, open_piece, embedding, slots=slots, context=context, chunk=chunk)


@dataclass(slots=True)
class _Missing:
    """Rows start..stop-1 of the ask's slot are to be run; the last one draws."""

    ask: Ask
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


class DraftEngine:
    """A loaded drafter with its buffers and slots; one thread uses it.

    Invariant: `_ids` of a slot are the tokens of the rows that the executor holds of it, or the first of them.
    """

    def __init__(
        self,
        manifest: Manifest,
        shard: Shard,
        open_piece: OpenPiece,
        embedding: EmbeddingTable,
        *,
        slots: int,
        context: int,
        chunk: int = CHUNK,
    ) -> None:
        """`shard`: of the whole model on this device, which others may run as well: an engine adds buffers only."""
        if shard.head is None or len(shard.segments) != sum(len(layer.segments) for layer in manifest.layers):
            raise InvalidDocument(f"drafter {manifest.name}: this device has a part of it, and a drafter is whole")
        plan = draft_plan(manifest, slots=slots, context=context, chunk=chunk)
        self.name = manifest.name
        self.slots = slots
        self.context = plan.context
        self.vocab = manifest.geometry.vocab
        self.eos_ids = frozenset(manifest.eos_ids)
        self.ran_rows = 0  # by the last step
        self._chunk = plan.chunk
        self._executor = Executor(manifest, plan, shard, open_piece)
        self._embedding = embedding
        self._share = VocabShare(0, self.vocab, manifest.geometry.vocab_group_rows)
        self._mixed = bool(manifest.numeric_class.prompt)
        self._ids = [list[int]() for _ in range(slots)]

    @property
    def kv_bytes(self) -> int:
        """Bytes of key-value state that the slots hold now."""
        return self._executor.kv_bytes

    def step(self, asks: Sequence[Ask]) -> list[Guess]:
        """A guess for each ask, all in one pass; rows that slots lack beyond a chunk run in passes before it.

        Raises Internal for asks that are none: slots that do not exist or are named twice, no tokens, no guess wanted.
        """
        missing, guesses = self._missing(asks), [NO_GUESS] * len(asks)
        self.ran_rows = sum(one.rows for one in missing.values())
        self._fill(list(missing.values()), self.ran_rows)
        if missing:
            batch = self._run([(one, one.rows) for one in missing.values()], "generated" if self._mixed else "any")
            drawing = [placed.first + placed.count - 1 for placed in batch.entries]
            for number, row in zip(missing, self._executor.logits(batch, drawing), strict=True):
                guesses[number] = guess(row[: self.vocab], self._share, asks[number])
        return guesses

    def lead_in(self, asks: Sequence[Ask], rows: int) -> int:
        """Run at most `rows` (at least one) of the rows that a step with `asks` would run before it draws; those left.

        So that a long prompt can be run bit by bit, between other things.
        """
        missing = list(self._missing(asks).values())
        left = sum(one.rows - 1 for one in missing)
        role: Role = "prompt" if self._mixed else "any"
        room, entries = min(max(rows, 1), self._chunk), []
        for one in missing:
            count = min(room, one.rows - 1)
            if count:
                entries.append((one, count))
                room -= count
        if entries:
            self._run(entries, role)
        return left - sum(count for _, count in entries)

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Let `target` hold what `source` holds of its first `tokens` tokens; only rows that differ are copied."""
        self._check(source)
        self._check(target)
        given = self._ids[source][:tokens]
        same = common_length(self._ids[target], given)
        if same == len(given):
            return
        kept = self._ids[target]
        del kept[same:]
        self._executor.copy(source, target, same, len(given))
        kept += given[same:]

    def held(self, slot: int, tokens: Sequence[int]) -> int:
        """How many of `tokens` a slot holds: an ask for what follows them runs the others, and at least the last."""
        self._check(slot)
        return common_length(self._ids[slot], tokens)

    def forget(self, slot: int) -> None:
        """Drop what a slot holds, and its memory."""
        self._check(slot)
        self._ids[slot].clear()
        self._executor.close(slot)

    def _check(self, slot: int) -> None:
        if not 0 <= slot < self.slots:
            raise Internal(f"slot {slot} of a drafter that has {self.slots}")

    def _missing(self, asks: Sequence[Ask]) -> dict[int, _Missing]:
        """By number of the ask, what is to be run for it; those that the drafter cannot guess for are left out."""
        found = {}
        if len({ask.slot for ask in asks}) != len(asks):
            raise Internal(f"a step of a drafter with {len(asks)} asks names a slot twice")
        for number, ask in enumerate(asks):
            self._check(ask.slot)
            if not ask.tokens or ask.top < 1:
                raise Internal(f"slot {ask.slot}: {ask.top} guesses of what follows {len(ask.tokens)} tokens")
            if len(ask.tokens) >= self.context:
                continue
            start = min(common_length(self._ids[ask.slot], ask.tokens), len(ask.tokens) - 1)
            if max(ask.tokens[start:]) < self.vocab:
                found[number] = _Missing(ask, start, len(ask.tokens))
        return found

    def _fill(self, missing: Sequence[_Missing], total: int) -> None:
        """Run rows that do not draw, until what is left fits one pass."""
        spare = max(0, total - self._chunk)
        if self._mixed:
            spare = max(spare, sum(one.rows - 1 for one in missing if one.rows > _PROMPT_ROWS))
        role: Role = "prompt" if self._mixed else "any"
        for one in sorted(missing, key=lambda one: one.rows, reverse=True):
            while spare > 0 and one.rows > 1:
                count = min(spare, one.rows - 1, self._chunk)
                self._run([(one, count)], role)
                spare -= count

    def _run(self, entries: Sequence[tuple[_Missing, int]], role: Role) -> Batch:
        """Run the next so many rows of each; raises what the executor raises, and then those slots hold nothing."""
        executor, tokens = self._executor, list[int]()
        try:
            batch = executor.begin([(one.ask.slot, one.start, count) for one, count in entries], role)
            for one, count in entries:
                tokens += one.ask.tokens[one.start : one.start + count]
            self._embedding.rows(tokens, executor.residual(batch))
            for index in range(executor.segments):
                executor.run(batch, index)
        except BaseException:
            for one, _ in entries:
                self.forget(one.ask.slot)
            raise
        for (one, count), placed in zip(entries, batch.entries, strict=True):
            self._ids[one.ask.slot][one.start :] = tokens[placed.first : placed.first + count]
            one.start += count
        return batch


def common_length(held: list[int], tokens: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike; compared in slices, as they are long and mostly alike."""
    low, high = 0, min(len(held), len(tokens))
    if held[:high] == list(tokens[:high]):
        return high
    while high - low > 1:  # invariant: alike up to `low`, and not up to `high`
        middle = (low + high) // 2
        if held[low:middle] == list(tokens[low:middle]):
            low = middle
        else:
            high = middle
    return low
