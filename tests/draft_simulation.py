"""A drafting device, a link and a verifier in simulated time: the real cores, a scripted target and drafter."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ganglion.agent.speculation.corrections import Corrections
from ganglion.agent.speculation.drafting import Drafting, Limits, without_drafts
from ganglion.agent.speculation.guessing import Guess
from ganglion.agent.speculation.knowledge import Knowledge, Mode
from ganglion.agent.speculation.pilot import Pilot
from ganglion.agent.speculation.queue import DraftQueue
from ganglion.proto import lane_pb2
from ganglion.wire.prefixes import Prefix

VOCAB = 1000


@dataclass(frozen=True)
class Speech:
    """A target, and drafters that agree with it at a rate; what they say depends on the tokens before alone."""

    accept: float = 0.8
    second: float = 0.6  # of the corrections: the drafter's second candidate
    third: float = 0.2
    seed: int = 0

    def _random(self, tokens: Sequence[int], what: str) -> random.Random:
        return random.Random(f"{self.seed} {what} {len(tokens)} {tokens[-4:]}")

    def target(self, tokens: Sequence[int]) -> int:
        return self._random(list(tokens), "target").randrange(VOCAB)

    def guess(self, tokens: Sequence[int], who: str = "device") -> Guess:
        chance, right = self._random(list(tokens), who), self.target(tokens)
        others = [one for one in chance.sample(range(VOCAB), 5) if one != right][:4]
        drawn = chance.random()
        if drawn < self.accept:
            rank = 0
        else:
            part = (drawn - self.accept) / (1 - self.accept)
            rank = 1 if part < self.second else 2 if part < self.second + self.third else 9
        others.insert(rank, right) if rank < 9 else None
        return Guess(tuple(others[:4]), (3.0, 2.0, 1.0, 0.0))


@dataclass
class Told:
    """What a simulated answer took."""

    tokens: list[int] = field(default_factory=list)
    took_s: float = 0.0
    modes: list[Mode] = field(default_factory=list)
    figures: lane_pb2.Speculation = field(default_factory=lane_pb2.Speculation)
    steps: int = 0

    @property
    def ms(self) -> float:
        return 1000 * self.took_s / len(self.tokens)


@dataclass
class Link:
    """Seconds: round trip, a pass, a token of the device's and of the verifier's drafter; own: whether it has one."""

    round_trip_s: float = 0.08
    pass_s: float = 0.05
    row_s: float = 0.0
    draft_s: float = 0.01
    draft_row_s: float = 0.001
    own_s: float = 0.006
    own: bool = True
    own_accept: float = 0.8
    window: int = 5
    credits: int = 128


class Simulation:
    def __init__(
        self, link: Link, speech: Speech, mode: Mode | None, knowledge: Knowledge | None = None, count: int = 600
    ) -> None:
        self.link, self.speech, self.count = link, speech, count
        self.own = Speech(link.own_accept, seed=speech.seed)
        self.now, self._order, self._events = 0.0, 0, list[tuple[float, int, Callable[[], None]]]()
        self.told = Told()
        prompt = [1, 2, 3]
        self.ids = list(prompt)
        self.queue = DraftQueue(Prefix.of(prompt), credits=link.credits, vocab=VOCAB)
        terms = lane_pb2.Terms(
            window_tokens=link.window,
            credits=link.credits,
            drafter="own" if link.own else "",
            prefix=Prefix.of(prompt).name,
        )
        known = knowledge or Knowledge(pass_s=link.pass_s, draft_s=link.draft_s)
        known.opened(2 * link.round_trip_s)
        corrections = known.greedy
        pilot = Pilot(known, corrections, forced=mode, own=link.own, window_tokens=link.window)
        self.miss = without_drafts(mode)
        limits = Limits(len(prompt) + count, 1 << 20)
        self.device = Drafting(prompt, terms, limits, pilot, corrections, said=self.miss)
        self.passing = self.stepping = False
        self.idle_since = 0.0
        self.inbox: list[tuple[lane_pb2.Outcome, list[int]]] = []

    def at(self, after_s: float, then: Callable[[], None]) -> None:
        self._order += 1
        heapq.heappush(self._events, (self.now + after_s, self._order, then))

    def run(self) -> Told:
        self.begin_pass()
        self.device_turn()
        while self._events and len(self.told.tokens) < self.count:
            self.now, _, then = heapq.heappop(self._events)
            then()
        assert len(self.told.tokens) >= self.count, "the two wait for each other"
        self.told.took_s = self.now
        self.told.figures = self.device.figures.message(self.device.pilot.mode)
        return self.told

    # The verifier.

    def begin_pass(self) -> None:
        if self.passing:
            return
        window, own, before_s = self.queue.window(self.link.window), 0, 0.0
        if not window and self.miss == lane_pb2.MISS_WAIT:
            return
        if self.miss == lane_pb2.MISS_DRAFT and self.link.own:
            own = self.link.window - len(window)
            for _ in range(own):
                window.append(self.own.guess(self.ids + window, "own").tokens[0])
            before_s = own * self.link.own_s
        self.passing = True
        pass_s = self.link.pass_s + len(window) * self.link.row_s
        idle_s = self.now + before_s - self.idle_since
        self.at(before_s + pass_s, lambda: self.end_pass(window, own, pass_s, idle_s))

    def end_pass(self, window: list[int], own: int, pass_s: float, idle_s: float) -> None:
        tokens: list[int] = []
        for drafted in [*window, None]:
            tokens.append(self.speech.target(self.ids + tokens))
            if tokens[-1] != drafted:
                break
        self.ids += tokens
        said = self.queue.commit(tokens)
        outcome = lane_pb2.Outcome(
            round=said.round,
            prefix=said.prefix,
            drafted=len(window),
            accepted=len(tokens) - 1,
            credits=said.credits,
            own=own,
            queued=said.queued,
            verify_s=pass_s,
            idle_s=idle_s,
        )
        self.passing, self.idle_since = False, self.now
        self.at(self.link.round_trip_s / 2, lambda: self.arrive(outcome, tokens))
        self.begin_pass()

    def take(self, drafts: lane_pb2.Drafts) -> None:
        self.queue.add(drafts)
        self.miss = drafts.miss or self.miss
        self.begin_pass()

    # The device: one thread, so what comes during a step of the drafter waits for its end.

    def arrive(self, outcome: lane_pb2.Outcome, tokens: list[int]) -> None:
        self.inbox.append((outcome, tokens))
        if not self.stepping:
            self.device_turn()

    def device_turn(self) -> None:
        for outcome, tokens in self.inbox:
            self.device.outcome(outcome, tokens, self.now)
            self.told.tokens += tokens
            self.told.modes.append(self.device.pilot.mode)
        self.inbox.clear()
        while (drafts := self.device.take(self.now)) is not None:
            self.at(self.link.round_trip_s / 2, lambda drafts=drafts: self.take(drafts))
        nodes = self.device.wanted()
        if nodes:
            self.stepping = True
            tree = self.device.tree
            guesses = [self.speech.guess(tree.tokens + tree.path_of(node)) for node in nodes]
            step_s = self.link.draft_s + (len(nodes) - 1) * self.link.draft_row_s
            self.told.steps += 1

            def stepped() -> None:
                self.device.pilot.knowledge.drafts.measured(len(nodes), step_s)
                for node, guess in zip(nodes, guesses, strict=True):
                    self.device.guessed(node, guess)
                self.stepping = False
                self.device_turn()

            self.at(step_s, stepped)


def simulate(
    link: Link, speech: Speech, mode: Mode | None, knowledge: Knowledge | None = None, count: int = 600
) -> Told:
    told = Simulation(link, speech, mode, knowledge, count).run()
    ids = [1, 2, 3]
    for token in told.tokens:
        assert token == speech.target(ids)
        ids.append(token)
    return told


__all__ = ["Corrections", "Link", "Simulation", "Speech", "Told", "simulate"]
