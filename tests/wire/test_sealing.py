"""Sealing: the handshake against an independent derivation, and frames under every kind of damage."""

# ruff: noqa: N802 - test names carry the case ids of shared/notes/faults.md

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from ganglion.wire.errors import ProtocolViolation, Unauthenticated
from ganglion.wire.sealing import (
    KEY_BYTES,
    TAG_BYTES,
    Initiator,
    Opener,
    Sealer,
    check_confirmation,
    confirmation,
    make_prologue,
    respond,
)

PROLOGUE = make_prologue("lane", "demo", 3, "near", "far")
KEY = bytes(range(32))


def private(number: int) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(hashlib.sha256(bytes([number])).digest())


def public(key: X25519PrivateKey) -> bytes:
    return key.public_key().public_bytes_raw()


INITIATOR, RESPONDER = private(1), private(2)


def dumb_noise_kk(prologue: bytes, payloads: tuple[bytes, bytes]) -> tuple[bytes, bytes, bytes, bytes]:
    """Section 5 and 7.5 of the Noise specification, line by line: both messages and both transport keys."""
    e_i, e_r = private(3), private(4)

    def dh(key: X25519PrivateKey, other: X25519PrivateKey) -> bytes:
        return key.exchange(X25519PublicKey.from_public_bytes(public(other)))

    def hkdf(chain: bytes, material: bytes) -> tuple[bytes, bytes]:
        temp = hmac.new(chain, material, hashlib.sha256).digest()
        one = hmac.new(temp, b"\x01", hashlib.sha256).digest()
        return one, hmac.new(temp, one + b"\x02", hashlib.sha256).digest()

    def sha(*parts: bytes) -> bytes:
        return hashlib.sha256(b"".join(parts)).digest()

    h = ck = b"Noise_KK_25519_AESGCM_SHA256" + bytes(4)
    h = sha(h, prologue)
    h = sha(h, public(INITIATOR))
    h = sha(h, public(RESPONDER))
    h = sha(h, public(e_i))
    ck, _ = hkdf(ck, dh(e_i, RESPONDER))  # es
    ck, k = hkdf(ck, dh(INITIATOR, RESPONDER))  # ss
    first = AESGCM(k).encrypt(bytes(12), payloads[0], h)
    h = sha(h, first)
    h = sha(h, public(e_r))
    ck, _ = hkdf(ck, dh(e_r, e_i))  # ee
    ck, k = hkdf(ck, dh(e_r, INITIATOR))  # se
    second = AESGCM(k).encrypt(bytes(12), payloads[1], h)
    outward, inward = hkdf(ck, b"")
    return public(e_i) + first, public(e_r) + second, outward, inward


def test_the_handshake_is_noise_kk() -> None:
    message1, message2, outward, inward = dumb_noise_kk(PROLOGUE, (b"hello from one", b"hello from two"))
    initiator = Initiator(INITIATOR, public(RESPONDER), PROLOGUE, ephemeral=private(3))
    assert initiator.start(b"hello from one") == message1
    got, answer, sealer, opener = respond(
        RESPONDER, public(INITIATOR), PROLOGUE, message1, b"hello from two", ephemeral=private(4)
    )
    assert (got, answer) == (b"hello from one", message2)
    payload, near_sealer, near_opener = initiator.finish(message2)
    assert payload == b"hello from two"
    nonce = bytes(12)
    assert near_sealer.seal(b"a", b"x") == AESGCM(outward).encrypt(nonce, b"x", b"a")
    assert sealer.seal(b"a", b"y") == AESGCM(inward).encrypt(nonce, b"y", b"a")
    assert opener.open(b"a", AESGCM(outward).encrypt(nonce, b"x", b"a")) == b"x"
    assert near_opener.open(b"a", AESGCM(inward).encrypt(nonce, b"y", b"a")) == b"y"


def test_the_confirmation_is_required_to_be_the_initiators() -> None:
    initiator = Initiator(INITIATOR, public(RESPONDER), PROLOGUE)
    _, answer, _, opener = respond(RESPONDER, public(INITIATOR), PROLOGUE, initiator.start())
    _, sealer, _ = initiator.finish(answer)
    check_confirmation(opener, confirmation(sealer))
    assert opener.open(b"", sealer.seal(b"", b"next")) == b"next"

    # A replayed first message: whoever sends it cannot answer the fresh second one.
    replayed = Initiator(INITIATOR, public(RESPONDER), PROLOGUE).start()
    _, _, _, opener = respond(RESPONDER, public(INITIATOR), PROLOGUE, replayed)
    with pytest.raises(ProtocolViolation):
        check_confirmation(opener, bytes(TAG_BYTES))


@pytest.mark.parametrize(
    "prologue",
    [
        make_prologue("session", "demo", 3, "near", "far"),
        make_prologue("lane", "demo2", 3, "near", "far"),
        make_prologue("lane", "demo", 4, "near", "far"),
        make_prologue("lane", "demo", 3, "far", "near"),
        make_prologue("lane", "demo", 3, "nea", "rfar"),
    ],
)
def test_B8_another_prologue_is_refused(prologue: bytes) -> None:
    message = Initiator(INITIATOR, public(RESPONDER), prologue).start()
    with pytest.raises(Unauthenticated):
        respond(RESPONDER, public(INITIATOR), PROLOGUE, message)


def test_another_static_key_is_refused_on_both_sides() -> None:
    impostor = private(9)
    message = Initiator(impostor, public(RESPONDER), PROLOGUE).start()
    with pytest.raises(Unauthenticated):
        respond(RESPONDER, public(INITIATOR), PROLOGUE, message)
    honest = Initiator(INITIATOR, public(RESPONDER), PROLOGUE)
    with pytest.raises(Unauthenticated):
        respond(impostor, public(INITIATOR), PROLOGUE, honest.start())


def test_a_key_of_low_order_is_refused() -> None:
    initiator = Initiator(INITIATOR, public(RESPONDER), PROLOGUE)
    initiator.start()
    with pytest.raises(Unauthenticated):
        initiator.finish(bytes(KEY_BYTES + TAG_BYTES))


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_A3_A2_any_flipped_bit_or_cut_of_the_handshake_is_refused(data: st.DataObject) -> None:
    initiator = Initiator(INITIATOR, public(RESPONDER), PROLOGUE)
    message = initiator.start(b"payload")
    if data.draw(st.booleans(), label="first message"):
        with pytest.raises((Unauthenticated, ProtocolViolation)):
            respond(RESPONDER, public(INITIATOR), PROLOGUE, damaged(data, message))
    else:
        _, answer, _, _ = respond(RESPONDER, public(INITIATOR), PROLOGUE, message, b"payload")
        with pytest.raises((Unauthenticated, ProtocolViolation)):
            initiator.finish(damaged(data, answer))


def damaged(data: st.DataObject, message: bytes) -> bytes:
    """`message` cut short, or with one bit flipped that means something (bit 255 of an X25519 key is ignored)."""
    if data.draw(st.booleans(), label="cut"):
        return message[: data.draw(st.integers(0, len(message) - 1), label="length")]
    ignored = KEY_BYTES * 8 - 1
    bit = data.draw(st.integers(0, len(message) * 8 - 1).filter(lambda bit: bit != ignored), label="bit")
    changed = bytearray(message)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@given(st.lists(st.tuples(st.binary(max_size=64), st.binary(max_size=64)), max_size=12), st.integers(1, 4))
@settings(deadline=None)
def test_frames_open_in_order_across_generations(frames: list[tuple[bytes, bytes]], limit: int) -> None:
    sealer, opener = Sealer(KEY, limit), Opener(KEY, limit)
    sealed = [sealer.seal(associated, plaintext) for associated, plaintext in frames]
    for (associated, plaintext), ciphertext in zip(frames, sealed, strict=True):
        assert len(ciphertext) == len(plaintext) + TAG_BYTES
        into = bytearray(len(plaintext))
        if len(plaintext) % 2:
            opener.open_into(associated, memoryview(ciphertext), memoryview(into))
            assert bytes(into) == plaintext
        else:
            assert opener.open(associated, ciphertext) == plaintext


def test_B8_the_ratchet_changes_the_key_and_is_one_way() -> None:
    sealer = Sealer(KEY, 2)
    frames = [sealer.seal(b"", b"same") for _ in range(4)]
    second = hmac.digest(KEY, b"ganglion.v1 ratchet", "sha256")
    assert frames[1] == AESGCM(KEY).encrypt(bytes(11) + b"\x01", b"same", b"")
    assert frames[2] == AESGCM(second).encrypt(b"\0\0\0\x01" + bytes(8), b"same", b"")
    assert frames[3] == AESGCM(second).encrypt(b"\0\0\0\x01" + bytes(7) + b"\x01", b"same", b"")
    with pytest.raises(ProtocolViolation):  # a receiver that does not ratchet loses the stream
        [Opener(KEY, 1 << 24).open(b"", frame) for frame in frames]


Damage = Callable[[st.DataObject, list[tuple[bytes, bytes]]], list[tuple[bytes, bytes]]]


def flip(data: st.DataObject, frames: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    at = data.draw(st.integers(0, len(frames) - 1))
    pair = list(frames[at])
    part = data.draw(st.sampled_from([index for index in (0, 1) if pair[index]]))
    changed = bytearray(pair[part])
    changed[data.draw(st.integers(0, len(changed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    pair[part] = bytes(changed)
    return [*frames[:at], (pair[0], pair[1]), *frames[at + 1 :]]


def cut(data: st.DataObject, frames: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    at = data.draw(st.integers(0, len(frames) - 1))
    header, sealed = frames[at]
    return [*frames[:at], (header, sealed[: data.draw(st.integers(0, len(sealed) - 1))]), *frames[at + 1 :]]


def replay(data: st.DataObject, frames: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    at = data.draw(st.integers(0, len(frames) - 1))
    return [*frames[: at + 1], frames[at], *frames[at + 1 :]]


def drop(data: st.DataObject, frames: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    at = data.draw(st.integers(0, len(frames) - 2))
    return [*frames[:at], *frames[at + 1 :]]


def reorder(data: st.DataObject, frames: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    at = data.draw(st.integers(0, len(frames) - 2))
    return [*frames[:at], frames[at + 1], frames[at], *frames[at + 2 :]]


def of_another_session(data: st.DataObject, frames: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    at = data.draw(st.integers(0, len(frames) - 1))
    other = Sealer(bytes(32))
    sealed = [other.seal(header, b"same") for header, _ in frames]
    return [*frames[:at], (frames[at][0], sealed[at]), *frames[at + 1 :]]


@pytest.mark.parametrize("damage", [flip, cut, replay, drop, reorder, of_another_session])
@given(data=st.data(), count=st.integers(2, 6), limit=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_A3_B8_a_damaged_stream_never_opens_beyond_the_damage(
    damage: Damage, data: st.DataObject, count: int, limit: int
) -> None:
    sealer, opener = Sealer(KEY, limit), Opener(KEY, limit)
    frames = [(bytes([number]), sealer.seal(bytes([number]), b"frame %d" % number)) for number in range(count)]
    before, opened = Opener.failures_total, []
    with pytest.raises(ProtocolViolation):
        opened.extend(opener.open(header, sealed) for header, sealed in damage(data, frames))
    assert opened == [b"frame %d" % number for number in range(len(opened))]
    assert Opener.failures_total == before + 1
    with pytest.raises(ProtocolViolation):  # even an honest frame comes too late now
        opener.open(*frames[min(len(opened), count - 1)])
