"""The queue of a fetch, against a small model of a network: rates, losses, lies, and holders with parts."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ganglion.agent.store.spread import ROUNDS, STALL_S, Spread, Take, Wait
from ganglion.wire.errors import Corrupt, NotFound, PermissionDenied, Unavailable, Unreachable
from ganglion.wire.nouns import PieceRef

STEP_S = 0.05
SILENCE_S = 10.0  # after which the driver ends a transfer


def pieces(*sizes: int) -> list[PieceRef]:
    return [PieceRef(f"{number:064x}", size) for number, size in enumerate(sizes)]


@dataclass
class Peer:
    """A holder of the model: bytes a second, what it lacks, when it falls silent or breaks, whether it lies."""

    rate: float
    lacks: frozenset[str] = frozenset()
    silent_after_s: float = float("inf")
    dead_after_s: float = float("inf")
    lies: bool = False
    begins: int = 0
    began_s: float = 0.0
    coming: tuple[PieceRef, float] | None = field(default=None)


def play(spread: Spread, peers: dict[str, Peer], deadline_s: float = 600.0) -> tuple[float, dict[str, str]]:
    """Run until nothing moves any more: (seconds, digest -> who brought it). Bytes of a takeover are kept."""
    brought: dict[str, str] = {}
    received: dict[str, float] = {}
    now_s = 0.0
    while now_s < deadline_s and spread.lost is None:
        over = True
        for name, peer in peers.items():
            if peer.coming is None:
                move = spread.next_move(name, now_s)
                over = over and move is None
                if isinstance(move, Take):
                    assert move.ref.digest not in brought
                    for other in peers.values():
                        if other.coming is not None and other.coming[0] == move.ref:
                            assert move.overtakes
                            other.coming = None
                    peer.coming = (move.ref, received.setdefault(move.ref.digest, 0.0))
                    peer.begins += 1
                    peer.began_s = now_s
                    spread.began(name, move.ref, int(peer.coming[1]))
                continue
            over = False
            ref, at = peer.coming
            if now_s >= peer.dead_after_s:
                peer.coming = None
                spread.failed(name, ref, Unreachable("the cable was cut"), now_s)
            elif ref.digest in peer.lacks:
                peer.coming = None
                spread.lacked(name, ref, now_s)
            elif now_s >= max(peer.silent_after_s, peer.began_s) + SILENCE_S:
                peer.coming = None
                spread.failed(name, ref, Unavailable(f"it sent nothing for {SILENCE_S:.0f} s"), now_s)
            elif now_s < peer.silent_after_s:
                at = min(float(ref.size), at + peer.rate * STEP_S)
                peer.coming, received[ref.digest] = (ref, at), at
                spread.moved(name, ref, int(at), now_s)
                if at >= ref.size:
                    peer.coming = None
                    if peer.lies:
                        received[ref.digest] = 0.0
                        spread.lied(name, ref, Corrupt("other bytes"))
                    else:
                        brought[ref.digest] = name
                        spread.brought(name, ref)
        if over:
            return now_s, brought
        now_s += STEP_S
    return now_s, brought


def test_pieces_spread_by_the_rate_of_their_holders():
    refs = pieces(*[1_000_000] * 100)
    peers = {"fast": Peer(10e6), "slow": Peer(1e6)}
    spread = Spread(refs, peers, seed=1)
    seconds, brought = play(spread, peers)
    assert brought.keys() == {ref.digest for ref in refs}
    ideal_s = 100 / 11  # all at work until the end; halves would take 50 s
    assert seconds < 1.6 * ideal_s + 1
    counts = spread.counts()
    assert counts["fast"].pieces > 5 * counts["slow"].pieces
    assert counts["fast"].bytes_per_s == pytest.approx(10e6, rel=0.2)


def test_the_rest_of_a_piece_is_taken_over_from_a_much_slower_holder():
    refs = pieces(*[1_000_000] * 20, 60_000_000)
    for seed in range(6):
        peers = {"fast": Peer(20e6), "slow": Peer(0.2e6)}
        spread = Spread(refs, peers, seed=seed)
        seconds, brought = play(spread, peers)
        assert len(brought) == len(refs)
        assert seconds < 12  # the slow one would need 300 s for the large piece, 5 s for a small one
        assert spread.counts()["slow"].aside == ""


def test_a_silent_holder_does_not_hold_up_the_rest_and_is_set_aside_in_the_end():
    refs = pieces(*[100_000] * 50)
    peers = {"good": Peer(1e6), "silent": Peer(1e6, silent_after_s=0.3)}
    spread = Spread(refs, peers, seed=3)
    seconds, brought = play(spread, peers)
    assert len(brought) == len(refs)
    assert seconds < 5.0 + 2 * STALL_S
    assert spread.counts()["silent"].overtaken >= 1
    peers = {"one": Peer(1e6, silent_after_s=0.0), "two": Peer(1e6, silent_after_s=0.0)}
    spread = Spread(refs[:1], peers, seed=3)
    play(spread, peers)
    assert spread.lost == refs[0]
    assert "sent nothing" in " ".join(count.aside for count in spread.counts().values())


def test_a_liar_is_asked_no_more():
    refs = pieces(*[10_000] * 30)
    peers = {"liar": Peer(5e6, lies=True), "good": Peer(1e5)}
    spread = Spread(refs, peers, seed=4)
    _, brought = play(spread, peers)
    assert set(brought.values()) == {"good"}
    assert len(brought) == 30
    assert peers["liar"].begins == 1
    assert spread.counts()["liar"].lied == 1
    assert spread.counts()["liar"].aside == "other bytes"


def test_one_outage_is_one_strike_however_many_transfers_it_ends():
    first, second, third, fourth = pieces(1, 1, 1, 1)
    spread = Spread([first, second, third, fourth], ["a"], seed=0)
    taken = [spread.next_move("a", 0.0).ref for _ in range(4)]
    for ref in taken:
        spread.failed("a", ref, Unavailable("gone"), 1.0)
    assert spread.counts()["a"].failed == 4
    assert spread.counts()["a"].aside == ""
    now_s = 1.0
    for _ in range(ROUNDS - 1):
        move = spread.next_move("a", now_s)
        assert isinstance(move, Wait)
        now_s = move.until_s
        take = spread.next_move("a", now_s)
        now_s += 1
        spread.failed("a", take.ref, Unavailable("gone"), now_s)
    assert spread.next_move("a", now_s) is None
    assert spread.lost is not None
    assert isinstance(spread.refusal(spread.lost), Unavailable)
    assert "a: gone" in spread.refusal(spread.lost).message


def test_what_no_second_try_mends_sets_a_holder_aside_at_once():
    (ref,) = pieces(5)
    spread = Spread([ref], ["a", "b"], seed=0)
    spread.next_move("a", 0.0)
    spread.failed("a", ref, PermissionDenied("not for you"), 0.0)
    assert spread.next_move("a", 0.0) is None
    assert spread.lost is None
    assert spread.next_move("b", 0.0) == Take(ref)
    spread.lacked("b", ref, 0.0)
    assert spread.lost is None  # it may fetch it just now
    for _ in range(ROUNDS - 1):
        wait = spread.next_move("b", 0.0)
        assert isinstance(wait, Wait)
        assert spread.next_move("b", wait.until_s) == Take(ref)
        spread.lacked("b", ref, 0.0)
    assert spread.lost == ref
    assert isinstance(spread.refusal(ref), NotFound)


def test_a_piece_that_another_fetch_brings_waits_its_time():
    (ref,) = pieces(5)
    spread = Spread([ref], ["a"], seed=0)
    spread.next_move("a", 0.0)
    spread.postponed("a", ref, 2.0)
    assert spread.next_move("a", 1.0) == Wait(2.0)
    assert spread.next_move("a", 2.0) == Take(ref)
    spread.brought("a", ref)
    assert spread.next_move("a", 3.0) is None


def test_a_holder_with_few_of_the_pieces_is_asked_ever_more_rarely():
    refs = pieces(*[100_000] * 400)
    peers = {"all": Peer(2e6), "few": Peer(2e6, lacks=frozenset(ref.digest for ref in refs[:398]))}
    spread = Spread(refs, peers, seed=9)
    _, brought = play(spread, peers)
    assert len(brought) == 400
    assert spread.counts()["few"].lacked < 40


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 100_000))
@example(7432)  # two that fell silent took the same piece from each other for ever
def test_what_a_good_holder_has_is_brought_whatever_the_others_do(seed):
    rng = random.Random(seed)
    refs = pieces(*[rng.choice([0, 1, 50_000, 400_000]) for _ in range(rng.randint(1, 12))])
    peers = {}
    for number in range(rng.randint(1, 4)):
        peers[f"p{number}"] = Peer(
            rng.choice([1e5, 1e6]),
            lacks=frozenset(ref.digest for ref in refs if rng.random() < rng.choice([0, 0.5])),
            dead_after_s=rng.choice([float("inf"), 0.5]),
            silent_after_s=rng.choice([float("inf"), 0.5]),
            lies=rng.random() < 0.2,
        )
    never = float("inf")
    good = [peer for peer in peers.values() if not peer.lies and peer.dead_after_s == peer.silent_after_s == never]
    here = {ref.digest for ref in refs if any(ref.digest not in peer.lacks for peer in good)}
    spread = Spread(refs, peers, seed=seed)
    _, brought = play(spread, peers, deadline_s=120.0)
    if here == {ref.digest for ref in refs}:
        assert brought.keys() == here
        assert spread.lost is None
    assert sum(count.pieces for count in spread.counts().values()) == len(brought)
