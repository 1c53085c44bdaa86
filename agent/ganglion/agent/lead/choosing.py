"""Sessions whose client chooses: the lead tells each distribution and runs what the client says follows it.

The client is told the raw distribution after the prompt and after its latest token, may ask for more of it, and
chooses. While it thinks, the session keeps its key-value state and has no rows in any step; where it is put back and
run anew, the distribution that it was told stands. Every share keeps the row that the distribution is of, so that a
question costs no pass.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ganglion.agent.lead.candidates import Answer
from ganglion.agent.lead.session import Session
from ganglion.proto import lane_pb2
from ganglion.wire.errors import ContextExceeded, Exhausted, GanglionError, InvalidRequest, ProtocolViolation
from ganglion.wire.limits import ASKED_IDS, CHOICE_S
from ganglion.wire.sampling.filters import log_sum_exp

ANSWERS_UNREAD: Final = 4  # of questions: a client that asks on without reading is ended

# the raw logits [n] float32 of ids [n], or of the whole vocabulary (None), in the row that the session's shares keep
Fetch = Callable[[int, NDArray[np.uint32] | None], Awaitable[NDArray[np.float32]]]


def scored(answers: Sequence[Answer], candidates: int, position: int) -> lane_pb2.Scored:
    """The distribution of the token at `position`, from one answer per share: its `candidates` likeliest."""
    ids = np.concatenate([one.ids for one in answers])
    logits = np.concatenate([one.logits for one in answers])
    order = np.lexsort((ids, -logits))[:candidates]
    total = log_sum_exp(np.concatenate([one.log_sum_exp for one in answers]))
    return lane_pb2.Scored(position=position, ids=ids[order].tolist(), logits=logits[order].tolist(), log_sum_exp=total)


class _Chooser:
    """A session whose client chooses. told: the distribution that waits for its choice; None: it is yet to be run.

    asked: a question about it that is not answered yet.
    """

    __slots__ = ("asked", "session", "silence", "told")

    def __init__(self, session: Session) -> None:
        self.session = session
        self.told: lane_pb2.Scored | None = None
        self.asked: lane_pb2.Ask | None = None
        self.silence: asyncio.TimerHandle | None = None


class Choosing:
    """The sessions of one lead whose clients choose. Runs on the event loop, which times their silence."""

    def __init__(self, vocab: int) -> None:
        self._vocab = vocab
        self._by_session: dict[int, _Chooser] = {}

    def __contains__(self, number: int) -> bool:
        return number in self._by_session

    @property
    def asked(self) -> bool:
        """Whether any question waits."""
        return any(one.asked is not None for one in self._by_session.values())

    def open(self, session: Session) -> None:
        """A session begins."""
        self._by_session[session.number] = _Chooser(session)

    def close(self, number: int) -> None:
        """A session is over."""
        chooser = self._by_session.pop(number, None)
        if chooser is not None and chooser.silence is not None:
            chooser.silence.cancel()

    def heard(self, number: int, said: lane_pb2.Choose | lane_pb2.Ask) -> int:
        """What a client says. How many tokens it chose: they are among the session's ids, which has perhaps ended.

        Raises ProtocolViolation for what is out of turn, InvalidRequest and ContextExceeded for ids that cannot be.
        """
        chooser = self._by_session[number]
        kind, at = type(said).__name__, len(chooser.session.ids)
        if chooser.told is None:
            raise ProtocolViolation(f"{kind} of position {said.position}, before the distribution at {at} was told")
        if said.position != at:
            raise ProtocolViolation(f"{kind} of position {said.position}; the distribution that was told is of {at}")
        if chooser.asked is not None:
            raise ProtocolViolation(f"{kind} of position {said.position}, before its last question was answered")
        if isinstance(said, lane_pb2.Ask):
            self._ask(chooser, said)
            return 0
        return self._choose(chooser, said.tokens)

    def _ask(self, chooser: _Chooser, ask: lane_pb2.Ask) -> None:
        if len(ask.ids) > ASKED_IDS:
            raise InvalidRequest(
                f"{len(ask.ids)} ids are asked for, at most {ASKED_IDS}; ask for none to be told all", param="ids"
            )
        self._check_ids(ask.ids, "ids")
        if chooser.session.untold_events >= ANSWERS_UNREAD:
            raise Exhausted(f"the client asks on and has not taken {chooser.session.untold_events} answers")
        chooser.asked = ask
        self._listen(chooser)

    def _choose(self, chooser: _Chooser, tokens: Sequence[int]) -> int:
        session = chooser.session
        if not tokens:
            session.finish(lane_pb2.FINISH_REASON_STOP)
            return 0
        self._check_ids(tokens, "tokens")
        room = session.request.limit_tokens - len(session.ids)
        if len(tokens) > room:
            raise ContextExceeded(
                f"{len(tokens)} tokens are chosen at position {len(session.ids)}, where {room} more fit;"
                " ask for more max_tokens, or deploy with a longer --context",
                param="tokens",
            )
        chooser.told = None
        self._listen(chooser)
        session.ids.extend(tokens)
        if len(tokens) == room:
            session.finish(lane_pb2.FINISH_REASON_LENGTH)
        return len(tokens)

    def _check_ids(self, ids: Sequence[int], param: str) -> None:
        if ids and max(ids) >= self._vocab:
            raise InvalidRequest(f"token id {max(ids)} is named; the vocabulary has {self._vocab}", param=param)

    def awaits(self, number: int, position: int) -> bool:
        """Whether the distribution at `position` is to be told: not again where a session was run anew."""
        chooser = self._by_session[number]
        return chooser.told is None and position == len(chooser.session.ids)

    def tell(self, number: int, told: lane_pb2.Scored) -> None:
        """Tell a client the distribution after its last token; from now on it may choose."""
        chooser = self._by_session[number]
        chooser.told = told
        self._listen(chooser)
        chooser.session.tell(told)

    async def answer(self, fetch: Fetch) -> None:
        """Answer all questions; raises what lanes raise."""
        for number, chooser in list(self._by_session.items()):
            ask, told = chooser.asked, chooser.told
            if ask is None or told is None:
                continue
            ids = np.array(ask.ids, np.uint32) if ask.ids else None
            logits = await fetch(number, ids)
            chooser.asked = None
            self._listen(chooser)
            chooser.session.tell(
                lane_pb2.Scored(
                    position=ask.position,
                    ids=ask.ids,
                    logits=logits.tolist(),
                    log_sum_exp=told.log_sum_exp,
                    asked=True,
                )
            )

    def _listen(self, chooser: _Chooser) -> None:
        """Time a client's silence anew, where it is its turn to speak."""
        if chooser.silence is not None:
            chooser.silence.cancel()
            chooser.silence = None
        if chooser.told is not None and chooser.asked is None:
            loop = asyncio.get_running_loop()
            chooser.silence = loop.call_later(CHOICE_S, self._silent, chooser.session)

    @staticmethod
    def _silent(session: Session) -> None:
        if not session.ended:
            session.fail(_silence(len(session.ids)))


def _silence(position: int) -> GanglionError:
    return Exhausted(
        f"the client has said nothing for {CHOICE_S:g} s about the token at {position}; its session is ended"
    )
