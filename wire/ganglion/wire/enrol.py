"""Enrolment, the joining side: pin the authority before a word is said, then ask for a certificate (D10)."""

from __future__ import annotations

import asyncio
import hmac
import re
import ssl
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import grpc
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import Encoding

from ganglion.proto import enrolment_pb2, identity_pb2
from ganglion.wire.address import join_address, split_address
from ganglion.wire.certificates import (
    COORDINATOR_NAME,
    Role,
    TrustLabel,
    authority_pin,
    fingerprint,
    parse_certificate_names,
    subject_public_key,
)
from ganglion.wire.errors import GanglionError, InvalidRequest, NotFound, Unauthenticated, Unreachable
from ganglion.wire.hello import check_hello, hello
from ganglion.wire.identity import Identity, NodeKeys, make_csr, make_record, sign_with_one_time
from ganglion.wire.limits import CONNECT_S, ENROLMENT_PORT, NAME_PATTERN
from ganglion.wire.rpc import client_options, to_error
from ganglion.wire.tokens import JoinToken

OnPending = Callable[[str, str], None]  # (fingerprint of the authority, own node id)

_CALL_S: Final = 10.0
_RETRY_S: Final = (0.05, 60.0)


def _presented_chain(connection: Any) -> list[bytes]:
    """Certificates (DER) that a TLS server presented, unverified, leaf first."""
    if hasattr(connection, "get_unverified_chain"):  # public from Python 3.13 on
        return [bytes(certificate) for certificate in connection.get_unverified_chain()]
    chain = connection._sslobj.get_unverified_chain()
    return [certificate.public_bytes(2) for certificate in chain]  # 2: ssl._ssl.ENCODING_DER


async def fetch_authority(address: str) -> x509.Certificate:
    """The authority's certificate that the enrolment port at `address` presents, not yet trusted.

    Nothing but a TLS handshake is sent. Raises Unreachable, Unauthenticated (no such chain).
    """
    host, port = split_address(address, ENROLMENT_PORT)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # the pin decides, and the channel that follows verifies
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    try:
        async with asyncio.timeout(CONNECT_S):
            _, writer = await asyncio.open_connection(host, port, ssl=context, server_hostname=COORDINATOR_NAME)
            try:
                chain = _presented_chain(writer.get_extra_info("ssl_object"))
            finally:
                writer.transport.abort()
    except (OSError, TimeoutError) as error:  # ssl.SSLError is an OSError
        raise Unreachable(
            f"no coordinator answers at {join_address(host, port)} ({error or 'no answer in time'}); check that it "
            f"runs, that this is its enrolment port ({ENROLMENT_PORT} by default), and that no firewall is between"
        ) from error
    if len(chain) < 2:
        raise Unauthenticated(
            f"{join_address(host, port)} presents no authority: it is not an enrolment port of ganglion"
        )
    try:
        return x509.load_der_x509_certificate(chain[-1])
    except ValueError:
        raise Unauthenticated(f"{join_address(host, port)} presents an authority that does not parse") from None


def _check_pin(authority: x509.Certificate, token: JoinToken, address: str) -> None:
    found = authority_pin(authority)
    if not hmac.compare_digest(found, token.authority_pin):
        raise Unauthenticated(
            f"the coordinator at {address} is not the one that this token is for: its authority is "
            f"{fingerprint(found)}, the token's {fingerprint(token.authority_pin)}; nothing was sent to it"
        )


async def _find_authority(addresses: Sequence[str], token: JoinToken | None) -> tuple[str, x509.Certificate]:
    failures: list[GanglionError] = []
    for address in addresses:
        try:
            authority = await fetch_authority(address)
            if token is not None:
                _check_pin(authority, token, address)
        except (Unreachable, Unauthenticated) as error:
            failures.append(error)
            continue
        return address, authority
    # A wrong authority tells more than an address that did not answer.
    raise next((error for error in failures if isinstance(error, Unauthenticated)), failures[0])


def load_or_make_keys(identity_dir: Path) -> NodeKeys:
    """The node's keys, made at the first call: a device that asks again is the same device."""
    try:
        return NodeKeys.load(identity_dir)
    except NotFound:
        keys = NodeKeys.generate()
        keys.save(identity_dir)
        return keys


async def enrol(
    identity_dir: Path,
    *,
    token: JoinToken | None = None,
    coordinator: str | None = None,
    role: Role = Role.AGENT,
    name: str,
    on_pending: OnPending | None = None,
    now: float | None = None,
) -> Identity:
    """Enrol this node and save its identity; returns at once with a token, otherwise when the owner has approved.

    `token` decides whom to trust. With `coordinator` (host or host:port of the enrolment port) alone the first
    authority met is trusted, and `on_pending(fingerprint, node_id)` is called so that people can compare. With both,
    the token's pin holds and the address is tried first. `now`: unix seconds, by default this moment.

    Raises InvalidRequest (name, role, neither token nor address), Unauthenticated (expired token, wrong authority,
    refused), Unreachable.
    """
    if not re.fullmatch(NAME_PATTERN, name):
        raise InvalidRequest(f"name {name!r}: 1 to 63 of a-z, 0-9 and -, not beginning with -", param="name")
    addresses = [coordinator] if coordinator else []
    if token is not None:
        token.check_fresh(now)
        if token.allows.role != role.number:
            raise InvalidRequest(
                f"this token is for a node of role {Role.of(token.allows.role).value}, not {role.value}", param="token"
            )
        addresses += [address for address in token.addresses if address != coordinator]
    if not addresses:
        raise InvalidRequest("enrolling takes a join token or --coordinator host:port", param="coordinator")
    keys = load_or_make_keys(identity_dir)
    address, authority = await _find_authority(addresses, token)
    host, port = split_address(address, ENROLMENT_PORT)
    request = _request(keys, token, role, name, now)
    async with grpc.aio.secure_channel(
        join_address(host, port),
        grpc.ssl_channel_credentials(authority.public_bytes(Encoding.PEM)),
        options=client_options("control", COORDINATOR_NAME),
    ) as channel:
        told = None if on_pending is None else (on_pending, fingerprint(authority_pin(authority)))
        enrolled = await _ask(channel, request, join_address(host, port), told, keys.node_id)
    identity = _identity(keys, enrolled, authority, join_address(host, enrolled.fleet_port or port + 1))
    _check_identity(identity, role, authority, _pinned_owner(identity_dir, token))
    identity.save(identity_dir)
    return identity


def _request(
    keys: NodeKeys, token: JoinToken | None, role: Role, name: str, now: float | None
) -> enrolment_pb2.EnrolRequest:
    moment = time.time() if now is None else now
    if token is None:
        unsigned = make_record(keys, role, TrustLabel.STRANGER, now=moment)  # the owner will sign a label
        record = identity_pb2.SignedRecord(record=unsigned.SerializeToString(deterministic=True))
    else:
        label = TrustLabel.of(token.allows.label)
        record = sign_with_one_time(token.seed, token.grant, make_record(keys, role, label, now=moment))
    return enrolment_pb2.EnrolRequest(hello=hello(), csr=make_csr(keys), record=record, name=name)


async def _ask(
    channel: grpc.aio.Channel,
    request: enrolment_pb2.EnrolRequest,
    address: str,
    told: tuple[OnPending, str] | None,
    node_id: str,
) -> enrolment_pb2.Enrolled:
    ask: Any = channel.unary_unary(
        "/ganglion.v1.Enrolment/Enrol",
        request_serializer=enrolment_pb2.EnrolRequest.SerializeToString,
        response_deserializer=enrolment_pb2.EnrolReply.FromString,
    )
    while True:
        try:
            reply: enrolment_pb2.EnrolReply = await ask(request, timeout=_CALL_S)
        except grpc.RpcError as error:
            raise to_error(error, address) from error
        check_hello(reply.hello)
        outcome = reply.WhichOneof("outcome")
        if outcome == "enrolled":
            return reply.enrolled
        if outcome is None:
            raise Unauthenticated(f"{address} answered with neither a certificate nor a wait")
        if told is not None:
            told[0](told[1], node_id)
            told = None
        await asyncio.sleep(min(max(reply.pending.retry_after_s, _RETRY_S[0]), _RETRY_S[1]))


def _identity(
    keys: NodeKeys, enrolled: enrolment_pb2.Enrolled, authority: x509.Certificate, coordinator: str
) -> Identity:
    try:
        return Identity.of_der(
            keys,
            enrolled.record,
            enrolled.owner_public_key,
            certificate=enrolled.certificate,
            authority=authority.public_bytes(Encoding.DER),
            name=enrolled.name,
            coordinator=coordinator,
        )
    except ValueError:
        raise Unauthenticated("the coordinator's certificate for this node does not parse") from None


def _pinned_owner(identity_dir: Path, token: JoinToken | None) -> bytes | None:
    if token is not None:
        return token.owner_public_key
    known = identity_dir / "owner.pub"
    return known.read_bytes() if known.exists() else None


def _check_identity(identity: Identity, role: Role, authority: x509.Certificate, owner: bytes | None) -> None:
    if owner is not None and not hmac.compare_digest(owner, identity.owner_public_key):
        raise Unauthenticated("the coordinator names another owner than the one this node trusts")
    record = identity.verified
    if record.tls_public_key != identity.keys.tls_public_key_der or record.role is not role:
        raise Unauthenticated("the coordinator answered with the record of another node or role")
    if record.sealing_public_key != identity.keys.sealing_public_key:
        raise Unauthenticated("the coordinator answered with a record that swaps this node's sealing key")
    certificate = x509.load_pem_x509_certificate(identity.certificate_pem)
    try:
        certificate.verify_directly_issued_by(authority)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (InvalidSignature, ValueError, TypeError, x509.ExtensionNotFound):
        raise Unauthenticated("the certificate for this node is not of the pinned authority, or names nobody") from None
    if parse_certificate_names(names.get_values_for_type(x509.DNSName)) != (identity.node_id, role):
        raise Unauthenticated("the certificate names another node or role")
    if subject_public_key(certificate) != identity.keys.tls_public_key_der:
        raise Unauthenticated("the certificate is of another key than this node's")
