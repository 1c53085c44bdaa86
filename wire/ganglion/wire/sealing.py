"""End-to-end sealing: Noise_KK_25519_AESGCM_SHA256 (Noise protocol framework, revision 34) and a ratchet. No sockets.

Both ends know each other's static X25519 key from the signed records. The handshake's payloads carry each side's Hello.
Afterwards each direction has its own key; frames are numbered, and the number never travels: order is strict.

    → e, es, ss     initiator
    ← e, ee, se     responder
    → (a sealed confirmation: the responder trusts nothing before it)
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from typing import ClassVar, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ganglion.wire.errors import ProtocolViolation, Unauthenticated

TAG_BYTES: Final = 16
KEY_BYTES: Final = 32
# AES-GCM with one key: far below 2^32 frames, and 2^24 frames of 16 MiB stay below its bound of blocks.
FRAMES_PER_GENERATION: Final = 1 << 24

_PROTOCOL: Final = b"Noise_KK_25519_AESGCM_SHA256"
_RATCHET: Final = b"ganglion.v1 ratchet"
_NONCE: Final = struct.Struct(">IQ")  # generation, counter; generation 0 is Noise's own nonce
_INTO: Final = hasattr(AESGCM, "decrypt_into")  # from cryptography 47 on
_CONFIRMATION: Final = b"ganglion.v1 confirmation"


def make_prologue(purpose: str, deployment: str, epoch: int, initiator: str, responder: str) -> bytes:
    """What both ends must agree on before a byte is sealed: purpose, deployment, epoch, both node ids."""
    parts = [b"ganglion.v1", purpose.encode(), deployment.encode(), str(epoch).encode()]
    parts += [initiator.encode(), responder.encode()]
    return b"".join(struct.pack(">I", len(part)) + part for part in parts)


class _Direction:
    """One direction's key, generation and counter."""

    __slots__ = ("_cipher", "_counter", "_generation", "_key", "_limit")

    def __init__(self, key: bytes, frames_per_generation: int = FRAMES_PER_GENERATION) -> None:
        self._key = key
        self._cipher = AESGCM(key)
        self._generation = 0
        self._counter = 0
        self._limit = frames_per_generation

    def _next_nonce(self) -> bytes:
        if self._counter >= self._limit:
            # One-way: who takes today's key cannot read yesterday's frames.
            self._key = hmac.digest(self._key, _RATCHET, "sha256")
            self._cipher = AESGCM(self._key)
            self._generation += 1
            self._counter = 0
        nonce = _NONCE.pack(self._generation, self._counter)
        self._counter += 1
        return nonce


class Sealer(_Direction):
    """Seals the frames of one direction, in order."""

    __slots__ = ()

    def seal(self, associated: bytes, plaintext: bytes | memoryview) -> bytes:
        """Ciphertext and tag: `TAG_BYTES` longer than `plaintext` (contiguous)."""
        nonce = self._next_nonce()
        return self._cipher.encrypt(nonce, plaintext, associated)

    def seal_into(self, associated: bytes, plaintext: bytes | memoryview, into: memoryview) -> None:
        """The same into a writable buffer of exactly `TAG_BYTES` more than the plaintext."""
        nonce = self._next_nonce()
        if _INTO:
            self._cipher.encrypt_into(nonce, plaintext, associated, into)
        else:
            into[:] = self._cipher.encrypt(nonce, plaintext, associated)


class Opener(_Direction):
    """Opens the frames of one direction, in order. The first that fails is the last: loss and forgery look alike."""

    __slots__ = ("_broken",)

    failures_total: ClassVar[int] = 0  # of this process, for its metrics

    def __init__(self, key: bytes, frames_per_generation: int = FRAMES_PER_GENERATION) -> None:
        super().__init__(key, frames_per_generation)
        self._broken = False

    def open(self, associated: bytes, ciphertext: bytes | memoryview) -> bytes:
        """The plaintext; raises ProtocolViolation, and from then on always."""
        if self._broken:
            raise self._failure()
        nonce = self._next_nonce()
        try:
            return self._cipher.decrypt(nonce, ciphertext, associated)
        except (InvalidTag, ValueError):
            raise self._failure() from None

    def open_into(self, associated: bytes, ciphertext: bytes | memoryview, into: memoryview) -> None:
        """The same into a writable buffer of exactly the plaintext's size in bytes; raises ProtocolViolation."""
        if self._broken:
            raise self._failure()
        nonce = self._next_nonce()
        try:
            if _INTO:
                self._cipher.decrypt_into(nonce, ciphertext, associated, into)
            else:
                into[:] = self._cipher.decrypt(nonce, ciphertext, associated)
        except (InvalidTag, ValueError):
            raise self._failure() from None

    def _failure(self) -> ProtocolViolation:
        self._broken = True
        Opener.failures_total += 1
        return ProtocolViolation(
            "a sealed frame does not open: it was changed, replayed, reordered or lost on the way; the stream ends"
        )


class _Transcript:
    """Noise's symmetric state: chaining key, transcript hash, current key."""

    def __init__(self, prologue: bytes, initiator_static: bytes, responder_static: bytes) -> None:
        self.hash = _PROTOCOL.ljust(hashlib.sha256().digest_size, b"\0")
        self.chain = self.hash
        self.key = b""
        self.counter = 0
        for content in (prologue, initiator_static, responder_static):
            self.mix_hash(content)

    def mix_hash(self, content: bytes) -> None:
        self.hash = hashlib.sha256(self.hash + content).digest()

    def expand(self, secret: bytes) -> tuple[bytes, bytes]:
        extracted = hmac.digest(self.chain, secret, "sha256")
        first = hmac.digest(extracted, b"\x01", "sha256")
        return first, hmac.digest(extracted, first + b"\x02", "sha256")

    def mix_key(self, private: X25519PrivateKey, public: X25519PublicKey) -> None:
        try:
            secret = private.exchange(public)
        except ValueError:  # a point of low order: the shared secret would be all zeros
            raise Unauthenticated("sealing handshake: the peer's key is not usable") from None
        self.chain, self.key = self.expand(secret)
        self.counter = 0

    def encrypt(self, payload: bytes) -> bytes:
        sealed = AESGCM(self.key).encrypt(_NONCE.pack(0, self.counter), payload, self.hash)
        self.counter += 1
        self.mix_hash(sealed)
        return sealed

    def decrypt(self, sealed: bytes) -> bytes:
        try:
            payload = AESGCM(self.key).decrypt(_NONCE.pack(0, self.counter), sealed, self.hash)
        except (InvalidTag, ValueError):
            raise Unauthenticated(
                "sealing handshake: the peer has another key than its record says, or means another deployment or epoch"
            ) from None
        self.counter += 1
        self.mix_hash(sealed)
        return payload

    def split(self) -> tuple[bytes, bytes]:
        return self.expand(b"")


def _raw(key: X25519PrivateKey) -> bytes:
    return key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)


def _split_message(message: bytes) -> tuple[X25519PublicKey, bytes]:
    if len(message) < KEY_BYTES + TAG_BYTES:
        raise ProtocolViolation(
            f"sealing handshake: a message of {len(message)} bytes, expected at least {KEY_BYTES + TAG_BYTES}"
        )
    return X25519PublicKey.from_public_bytes(message[:KEY_BYTES]), message[KEY_BYTES:]


class Initiator:
    """The dialling side of one handshake. Use once: `start`, then `finish`."""

    def __init__(
        self,
        static: X25519PrivateKey,
        peer_static: bytes,
        prologue: bytes,
        *,
        ephemeral: X25519PrivateKey | None = None,  # tests only; otherwise fresh
    ) -> None:
        self._static = static
        self._peer = X25519PublicKey.from_public_bytes(peer_static)
        self._ephemeral = ephemeral or X25519PrivateKey.generate()
        self._transcript = _Transcript(prologue, _raw(static), peer_static)

    def start(self, payload: bytes = b"") -> bytes:
        """The first message, with `payload` sealed in it (not forward secret)."""
        state, ephemeral = self._transcript, _raw(self._ephemeral)
        state.mix_hash(ephemeral)
        state.mix_key(self._ephemeral, self._peer)
        state.mix_key(self._static, self._peer)
        return ephemeral + state.encrypt(payload)

    def finish(self, message: bytes) -> tuple[bytes, Sealer, Opener]:
        """The responder's payload and both directions; raises Unauthenticated, ProtocolViolation."""
        state = self._transcript
        peer_ephemeral, sealed = _split_message(message)
        state.mix_hash(message[:KEY_BYTES])
        state.mix_key(self._ephemeral, peer_ephemeral)
        state.mix_key(self._static, peer_ephemeral)
        payload = state.decrypt(sealed)
        outward, inward = state.split()
        return payload, Sealer(outward), Opener(inward)


def respond(
    static: X25519PrivateKey,
    peer_static: bytes,
    prologue: bytes,
    message: bytes,
    payload: bytes = b"",
    *,
    ephemeral: X25519PrivateKey | None = None,  # tests only; otherwise fresh
) -> tuple[bytes, bytes, Sealer, Opener]:
    """The accepting side: the initiator's payload, the second message, both directions.

    Raises Unauthenticated, ProtocolViolation.
    """
    own = ephemeral or X25519PrivateKey.generate()
    peer = X25519PublicKey.from_public_bytes(peer_static)
    state = _Transcript(prologue, peer_static, _raw(static))
    peer_ephemeral, sealed = _split_message(message)
    state.mix_hash(message[:KEY_BYTES])
    state.mix_key(static, peer_ephemeral)
    state.mix_key(static, peer)
    received = state.decrypt(sealed)
    own_public = _raw(own)
    state.mix_hash(own_public)
    state.mix_key(own, peer_ephemeral)
    state.mix_key(own, peer)
    answer = own_public + state.encrypt(payload)
    inward, outward = state.split()
    return received, answer, Sealer(outward), Opener(inward)


def confirmation(sealer: Sealer) -> bytes:
    """The initiator's third message: proof that it holds the keys, so that the first message was no replay."""
    return sealer.seal(_CONFIRMATION, b"")


def check_confirmation(opener: Opener, message: bytes) -> None:
    """Raise ProtocolViolation unless `message` is the initiator's confirmation."""
    opener.open(_CONFIRMATION, message)
