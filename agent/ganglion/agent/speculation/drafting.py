"""One answer at a drafting device: what to guess next, what to send, what an outcome changes. A pure core.

The driver asks `wanted`, has the drafter guess there, tells `guessed`; asks `take` for what to send after a guess and
after an outcome; and tells `outcome`. Time is a parameter, in seconds of any clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from ganglion.agent.speculation.corrections import Corrections
from ganglion.agent.speculation.guessing import Guess
from ganglion.agent.speculation.knowledge import Mode
from ganglion.agent.speculation.pilot import WAITING, Pilot, hidden
from ganglion.agent.speculation.tree import DraftTree, Node
from ganglion.proto import lane_pb2
from ganglion.wire.errors import ProtocolViolation
from ganglion.wire.prefixes import Prefix

LEAST_PATH: Final = 0.01  # nothing less likely is drafted from, or sent
MOST_NODES: Final = 192  # drafted from at a time
DEEPEST: Final = 64  # tokens below the tip
MOST_WINDOW: Final = 4096  # tokens of a verifier's window
STEP_NODES: Final = 8  # in one step of the drafter at most
_SHADOW_ROUNDS: Final = 8  # in a mode without drafts, so often one guess is made to know the acceptance


@dataclass(frozen=True, slots=True)
class Limits:
    """tokens: prompt and answer at most. context: of the drafter; it guesses from fewer tokens. 0: there is none."""

    tokens: int
    context: int
    stop_ids: frozenset[int] = frozenset()


class Drafting:
    """Of one verify session, from its Accepted to its end. Raises ProtocolViolation for another prompt's Terms."""

    def __init__(
        self,
        prompt: Sequence[int],
        terms: lane_pb2.Terms,
        limits: Limits,
        pilot: Pilot,
        corrections: Corrections,
        *,
        said: lane_pb2.Miss,
        figures: Figures | None = None,
    ) -> None:
        """`said`: the miss of the contract. `figures`: of the answer, where other verify sessions came before."""
        if Prefix.of(prompt).name != terms.prefix:
            raise ProtocolViolation("the verifier's terms are of another prompt: its prefix is not that of ours")
        if terms.window_tokens > MOST_WINDOW:
            raise ProtocolViolation(f"the verifier's windows have {terms.window_tokens} tokens, at most {MOST_WINDOW}")
        self.tree = DraftTree(prompt, terms.credits, corrections=corrections, stop_ids=limits.stop_ids)
        self.pilot = pilot
        self.figures = figures or Figures()
        self._terms = terms
        self._limits = limits
        self._said = said
        self._queued = 0  # left at the verifier after the last outcome
        self._sent_at: float | None = None  # of a window that the verifier waited for

    # What to guess.

    def wanted(self, width: int = STEP_NODES) -> list[Node]:
        """Where the drafter is to guess next, at most `width` nodes for one step; none: wait for an outcome."""
        if self._deepest <= 0:
            return []
        if self.pilot.mode in {"edge", "branch"}:
            return self._wanted_branches(width)
        end = self._wanted_chain()
        return [end] if end is not None else []

    def _wanted_chain(self) -> Node | None:
        tree, mode = self.tree, self.pilot.mode
        if mode in {"plain", "own"}:
            shadow = self.pilot.forced is None and tree.rounds % _SHADOW_ROUNDS == 1
            return tree.tip if shadow and tree.tip.guess is None else None
        if mode == "sync" and tree.flying:
            return None
        end = tree.chain_end(self._deepest)
        return end if end is not None and (mode == "sync" or end.path >= LEAST_PATH) else None

    def _wanted_branches(self, width: int) -> list[Node]:
        tree, deepest = self.tree, self._deepest
        end = tree.chain_end(deepest) if self.pilot.mode == "edge" and not tree.flying else None
        if tree.expanded >= MOST_NODES:
            return [end] if end is not None else []
        found = tree.frontier(deepest, LEAST_PATH, self.pilot.knowledge.drafts.seconds, width)
        if end is not None and end not in found:
            found = [end, *found[: width - 1]]  # the verifier waits for it
        return found

    def stop_drafting(self) -> None:
        """The drafter cannot go on: the verifier answers without it."""
        self._limits = replace(self._limits, context=0)

    @property
    def _deepest(self) -> int:
        """How many tokens below the tip may be drafted: within the answer, and the drafter's context."""
        held = len(self.tree.tokens)
        return min(self._room, self._limits.context - held, DEEPEST)

    @property
    def _room(self) -> int:
        """Drafted tokens that the next pass may accept: the last one of a pass is never a drafted one."""
        return self._limits.tokens - len(self.tree.tokens) - 1

    def guessed(self, node: Node, guess: Guess) -> None:
        """The drafter's guess at a node of `wanted`, with no outcome in between."""
        self.tree.expand(node, guess)

    # What to send.

    def take(self, now: float) -> lane_pb2.Drafts | None:
        """What to send now, counted as sent; None: nothing."""
        held_still = self._said == lane_pb2.MISS_WAIT and not self.tree.flying
        branches = self._branches()
        miss = self._miss()
        if not branches and miss == self._said:
            return None
        drafts = lane_pb2.Drafts(round=self.tree.rounds, branches=branches)
        if miss != self._said:
            self._said = drafts.miss = miss
        self._sent_at = now if branches and held_still and miss == lane_pb2.MISS_WAIT else self._sent_at
        self.figures.sent_bytes += lane_pb2.SessionRequest(drafts=drafts).ByteSize()
        return drafts

    def _branches(self) -> list[lane_pb2.Branch]:
        tree, mode, window = self.tree, self.pilot.mode, self.pilot.window
        if mode == "branch":
            return tree.take_branches(LEAST_PATH, self._deepest)
        waiting = [node for node in tree.chain() if not node.sent] if mode in WAITING else []
        if not waiting:
            return []
        ended = tree.chain_end(self._deepest) is None
        if tree.flying:
            further = mode == "ahead" and (len(waiting) > window or ended)
            return tree.take_chain(window + 1) if further else []  # the first of them is the pass's own token
        count = min(len(waiting), window)
        ready = ended or self.pilot.enough(count, waiting[count - 1].path)
        return tree.take_chain(window) if ready else []

    def _miss(self) -> lane_pb2.Miss:
        """What the verifier is to do where nothing is at hand: to wait only where the device has, or will have, drafts.

        Not before its first guess: a drafter takes its time for a prompt. Then at once, or it might never catch up.
        """
        tree = self.tree
        empty = tree.tip.guess is not None and not tree.chain()  # the drafter has no guess
        stuck = not tree.flying and (self._deepest <= 0 or empty or tree.credits == 0)
        begun = self._said == lane_pb2.MISS_WAIT or bool(tree.chain())
        if self.pilot.mode in WAITING and begun and not stuck and self._room > 0:
            return lane_pb2.MISS_WAIT
        return without_drafts(self.pilot.mode)

    # What comes back.

    def outcome(self, outcome: lane_pb2.Outcome, tokens: Sequence[int], now: float) -> None:
        """Take a pass; raises ProtocolViolation for what no verifier may say."""
        mode, known = self.pilot.mode, self.pilot.knowledge
        tree, hit, device = self.tree, self._queued > 0, outcome.drafted - outcome.own - outcome.beside
        first = tree.rounds == 0
        if outcome.drafted > self._terms.window_tokens:
            raise ProtocolViolation(
                f"a window of {outcome.drafted} tokens, where the terms allow {self._terms.window_tokens}"
            )
        tree.outcome(outcome, tokens)
        if outcome.queued > tree.queued:
            raise ProtocolViolation(
                f"the verifier has {outcome.queued} drafted tokens left of {tree.queued} that we sent"
            )
        self._queued = outcome.queued
        self.figures.passed(outcome, hit=hit)
        if not first:  # the first pass is the prompt's
            known.passes.measured(outcome.drafted + 1, outcome.verify_s)
            if outcome.own and not outcome.branched:
                took_s = outcome.idle_s if not device and not hit else None
                known.drafted_own(outcome.own, max(0, outcome.accepted - device), took_s)
        if self._sent_at is not None:
            if device:
                known.went_round(now - self._sent_at - outcome.verify_s)
            self._sent_at = None
        if not first and (kind := hidden(mode)) is not None:
            ready = min(1.0, len(tree.chain()) / self.pilot.window) if kind == "edge" else float(outcome.queued > 0)
            known.hit(kind, ready)
        self.pilot.passed(len(tokens), now)


def without_drafts(mode: Mode | None) -> lane_pb2.Miss:
    """What the verifier does in a mode where the device has nothing for it; None: the mode is yet to be chosen."""
    return lane_pb2.MISS_RUN if mode == "plain" else lane_pb2.MISS_DRAFT


class Figures:
    """What was drafted for one answer, over all its verify sessions. Bytes are of drafts and outcomes."""

    def __init__(self) -> None:
        self.passes = self.drafted = self.accepted = self.hits = 0
        self.accepted_counts: list[int] = []
        self.sent_bytes = self.received_bytes = 0

    def passed(self, outcome: lane_pb2.Outcome, *, hit: bool) -> None:
        """Count a pass; hit: its window was at hand when the one before ended."""
        self.passes += 1
        self.drafted += outcome.drafted
        self.accepted += outcome.accepted
        self.hits += hit
        self.accepted_counts += [0] * (outcome.accepted + 1 - len(self.accepted_counts))
        self.accepted_counts[outcome.accepted] += 1

    def message(self, mode: Mode) -> lane_pb2.Speculation:
        """As Finished has it."""
        return lane_pb2.Speculation(
            passes=self.passes,
            drafted=self.drafted,
            accepted=self.accepted,
            hits=self.hits,
            accepted_counts=self.accepted_counts,
            sent_bytes=self.sent_bytes,
            received_bytes=self.received_bytes,
            mode=mode,
        )
