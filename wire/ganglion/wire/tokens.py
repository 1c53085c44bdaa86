"""Join tokens: one line that lets a device in. The secret in it signs once and never travels (D10)."""

from __future__ import annotations

import base64
import binascii
import hashlib
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from google.protobuf.message import DecodeError

from ganglion.proto import identity_pb2 as pb
from ganglion.wire.address import split_address
from ganglion.wire.certificates import PIN_BYTES, Role, TrustLabel
from ganglion.wire.errors import InvalidDocument, InvalidRequest, Unauthenticated
from ganglion.wire.identity import OwnerKey, one_time_public_key, verify_grant

PREFIX: Final = "gj1."
TOKEN_CHARACTERS: Final = 1024
_CHECKSUM_BYTES: Final = 4


@dataclass(frozen=True)
class JoinToken:
    """Where to enrol, whom to trust there, and a one-time key that the owner vouches for."""

    addresses: tuple[str, ...]  # host:port of the enrolment port, tried in order
    authority_pin: bytes  # 16 bytes
    owner_public_key: bytes  # Ed25519, 32 bytes
    seed: bytes  # 32 bytes, secret
    grant: pb.SignedGrant
    gateway_grant: pb.SignedGrant | None = None  # of the same one-time key: a gateway may come beside the agent

    def __repr__(self) -> str:  # the seed must not reach a log
        return f"JoinToken({self.allows.token_id}, {', '.join(self.addresses)})"

    @property
    def allows(self) -> pb.JoinGrant:
        """What it allows; not verified by this."""
        return pb.JoinGrant.FromString(self.grant.grant)

    @property
    def for_gateway(self) -> JoinToken:
        """The token for the gateway beside the agent; raises InvalidRequest when it lets none in."""
        if self.gateway_grant is None:
            raise InvalidRequest(
                "this token lets an agent in, and no gateway beside it, which a device that drafts has: make one with"
                " `ganglion token create --draft`",
                param="token",
            )
        return replace(self, grant=self.gateway_grant, gateway_grant=None)

    @property
    def grants(self) -> tuple[pb.SignedGrant, ...]:
        """Every grant in it; each has uses of its own."""
        return (self.grant,) if self.gateway_grant is None else (self.grant, self.gateway_grant)

    def encode(self) -> str:
        """The line for people: `gj1.` and base64url."""
        body = pb.JoinTokenBody(
            addresses=self.addresses,
            authority_pin=self.authority_pin,
            owner_public_key=self.owner_public_key,
            seed=self.seed,
            grant=self.grant,
            gateway_grant=self.gateway_grant,
        ).SerializeToString()
        return PREFIX + base64.urlsafe_b64encode(body + _checksum(body)).decode().rstrip("=")

    @classmethod
    def decode(cls, text: str) -> JoinToken:
        """Read a token; raises InvalidDocument (no token, damaged), Unauthenticated (its signatures do not hold)."""
        text = text.strip()
        if not text.startswith(PREFIX):
            raise InvalidDocument(f"this is not a join token: a token begins with {PREFIX!r}", param="token")
        if len(text) > TOKEN_CHARACTERS:
            raise InvalidDocument(
                f"the join token has {len(text)} characters, at most {TOKEN_CHARACTERS} are possible", param="token"
            )
        encoded = text.removeprefix(PREFIX)
        try:
            raw = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            raw = b""
        # urlsafe base64 has spare bits at its end: only the canonical spelling counts
        canonical = base64.urlsafe_b64encode(raw).decode().rstrip("=") == encoded
        content, checksum = raw[:-_CHECKSUM_BYTES], raw[-_CHECKSUM_BYTES:]
        if not (canonical and content and checksum == _checksum(content)):
            raise InvalidDocument(
                f"the join token is damaged or cut short ({len(text)} characters); copy the whole line again",
                param="token",
            )
        return cls._parse(content)

    @classmethod
    def _parse(cls, content: bytes) -> JoinToken:
        try:
            body = pb.JoinTokenBody.FromString(content)
        except DecodeError:
            raise InvalidDocument(
                "the join token does not parse; it may be of a newer release", param="token"
            ) from None
        if not body.addresses or len(body.authority_pin) != PIN_BYTES or len(body.seed) != 32:
            raise InvalidDocument("the join token lacks an address, a pin of 16 or a seed of 32 bytes", param="token")
        for address in body.addresses:
            split_address(address)
        beside = body.gateway_grant if body.HasField("gateway_grant") else None
        token = cls(tuple(body.addresses), body.authority_pin, body.owner_public_key, body.seed, body.grant, beside)
        for signed in token.grants:
            grant = verify_grant(signed, body.owner_public_key)
            if grant.one_time_public_key != one_time_public_key(body.seed):
                raise Unauthenticated("the join token's seed is not of the key that the owner signed")
        if beside is not None and pb.JoinGrant.FromString(beside.grant).role != Role.GATEWAY.number:
            raise Unauthenticated("the join token's second grant is for another role than a gateway's")
        return token

    def check_fresh(self, now: float | None = None) -> None:
        """Raise Unauthenticated when the token has expired at `now` (unix seconds, by default this moment)."""
        late_s = (time.time() if now is None else now) - self.allows.expires_unix_s
        if late_s > 0:
            raise Unauthenticated(
                f"the join token expired {late_s:.0f} s ago; make a fresh one with: ganglion token create"
            )


def _checksum(body: bytes) -> bytes:
    return hashlib.sha256(b"ganglion join token\0" + body).digest()[:_CHECKSUM_BYTES]


def mint(
    owner_key: OwnerKey,
    *,
    addresses: Sequence[str],
    authority_pin: bytes,
    label: TrustLabel = TrustLabel.OWNER,
    role: Role = Role.AGENT,
    lifetime_s: float = 3600.0,
    uses: int = 1,
    gateway: bool = False,
    now: float | None = None,
) -> JoinToken:
    """A new token; the coordinator must be told its grant (`Admin.RegisterToken`) or accept it on sight.

    `addresses`: host:port of the enrolment port, at most 8. `gateway`: a gateway may come beside each agent, under the
    same label and for as long. Raises InvalidRequest.
    """
    if not 1 <= len(addresses) <= 8:
        raise InvalidRequest(f"a token holds 1 to 8 addresses, not {len(addresses)}", param="addresses")
    if not (uses >= 1 and lifetime_s > 0):
        raise InvalidRequest(f"a token needs uses >= 1 and a lifetime > 0, not {uses} and {lifetime_s} s")
    for address in addresses:
        split_address(address)
    if gateway and role is not Role.AGENT:
        raise InvalidRequest(f"a gateway comes beside an agent, not beside a node of role {role.value}", param="role")
    seed = secrets.token_bytes(32)

    def grant(role: Role) -> pb.SignedGrant:
        made = pb.JoinGrant(
            token_id=secrets.token_hex(6),
            one_time_public_key=one_time_public_key(seed),
            label=label.number,
            role=role.number,
            expires_unix_s=int((time.time() if now is None else now) + lifetime_s),
            uses=uses,
        )
        return owner_key.sign_grant(made)

    beside = grant(Role.GATEWAY) if gateway else None
    return JoinToken(tuple(addresses), authority_pin, owner_key.public_key, seed, grant(role), beside)
