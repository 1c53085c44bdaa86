"""Enrolment: who may have a certificate. Every refusal says the same to the asker, and its reason to the log."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError

from ganglion.coordinator.allowance import Allowance
from ganglion.coordinator.authority import Authority, SigningRequest, read_csr
from ganglion.coordinator.changes import Changes
from ganglion.coordinator.registry import DeviceRow, Registry, TokenRow
from ganglion.proto import enrolment_pb2, enrolment_pb2_grpc, identity_pb2
from ganglion.wire.errors import Conflict, GanglionError, InvalidDocument, NotFound, PermissionDenied, Unauthenticated
from ganglion.wire.hello import check_hello, hello
from ganglion.wire.identity import Role, TrustLabel, VerifiedRecord, verify_grant, verify_record
from ganglion.wire.limits import NAME_PATTERN

log = logging.getLogger(__name__)

REFUSED: Final = "enrolment refused; the coordinator's log says why"
PENDING_DEVICES: Final = 64
PENDING_S: Final = 3600.0  # a pending device that has not asked for this long is forgotten
RETRY_AFTER_S: Final = 2.0
REQUEST_BYTES: Final = 16 << 10
REQUESTS_PER_S: Final = 50.0  # of all together: strangers must not keep the coordinator from its fleet
REQUESTS_AT_ONCE: Final = 200
CLOCK_TOLERANCE_S: Final = 300.0


@dataclass(frozen=True)
class _Asked:
    """A request whose shape holds: CSR and record are of one key."""

    request: SigningRequest
    signed: identity_pb2.SignedRecord
    record: identity_pb2.DeviceRecord
    role: Role
    name: str


class EnrolmentService(enrolment_pb2_grpc.EnrolmentServicer):
    """The only service without client certificates."""

    def __init__(
        self,
        registry: Registry,
        authority: Authority,
        owner_public_key: bytes,
        *,
        changes: Changes,
        on_enrolled: Callable[[DeviceRow], None],
        fleet_port: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._registry = registry
        self._authority = authority
        self._owner_public_key = owner_public_key
        self._changes = changes
        self._on_enrolled = on_enrolled
        self._fleet_port = fleet_port
        self._clock = clock
        self._allowance = Allowance(REQUESTS_PER_S, REQUESTS_AT_ONCE)

    async def Enrol(  # noqa: N802 - the protocol's name
        self, request: enrolment_pb2.EnrolRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> enrolment_pb2.EnrolReply:
        """See enrolment.proto; raises Unauthenticated with one constant text."""
        try:
            self._allowance.take(time.monotonic(), "enrolment requests")
            return self._enrol(request)
        except GanglionError as error:
            log.warning("enrolment of %r from %s refused: %s", request.name[:64], context.peer(), error.message)
            raise Unauthenticated(REFUSED) from None

    def _enrol(self, request: enrolment_pb2.EnrolRequest) -> enrolment_pb2.EnrolReply:
        asked = self._parse(request)
        if not asked.signed.signature:
            known = self._known(asked)
            if known is None or known.standing != "enrolled":
                return self._pending(asked, known)
            return self._issue(asked, known)
        verified = verify_record(asked.signed, self._owner_public_key)
        known = self._known(asked)
        if known is not None and known.standing == "enrolled" and self._is_in_force(known, verified):
            return self._issue(asked, known)  # the reply was lost, or the certificate is renewed: no use is spent
        return self._issue(asked, self._admit(asked, verified))

    def _is_in_force(self, known: DeviceRow, asked: VerifiedRecord) -> bool:
        """Whether the device asks with what it was enrolled with: the same keys, vouched for by the same token."""
        in_force = verify_record(identity_pb2.SignedRecord.FromString(known.record), self._owner_public_key)
        return (in_force.sealing_public_key, in_force.label, in_force.token_id) == (
            asked.sealing_public_key,
            asked.label,
            asked.token_id,
        )

    def _parse(self, request: enrolment_pb2.EnrolRequest) -> _Asked:
        if request.ByteSize() > REQUEST_BYTES:
            raise InvalidDocument(f"a request of {request.ByteSize()} bytes, at most {REQUEST_BYTES} are accepted")
        check_hello(request.hello)
        if not re.fullmatch(NAME_PATTERN.removeprefix("^").removesuffix("$"), request.name):
            raise InvalidDocument(f"name {request.name[:80]!r} does not match {NAME_PATTERN}", param="name")
        signing = read_csr(request.csr)
        try:
            record = identity_pb2.DeviceRecord.FromString(request.record.record)
        except DecodeError:
            raise InvalidDocument("the device record does not parse") from None
        if record.tls_public_key != signing.tls_public_key or record.node_id != signing.node_id:
            raise Unauthenticated("the device record is of another key than the signing request")
        if len(record.sealing_public_key) != 32:
            raise InvalidDocument(f"a sealing key of {len(record.sealing_public_key)} bytes, expected 32")
        return _Asked(signing, request.record, record, Role.of(record.role), request.name)

    def _known(self, asked: _Asked) -> DeviceRow | None:
        """The node's row; raises PermissionDenied when it is revoked, Conflict when its role or sealing key changed."""
        try:
            row = self._registry.device(asked.request.node_id)
        except NotFound:
            return None
        if row.standing == "revoked":
            raise PermissionDenied(f"device {row.name} is revoked")
        if row.standing == "enrolled" and row.role != asked.record.role:
            raise Conflict(f"device {row.name} is enrolled in another role: a role needs keys of its own")
        if row.standing == "enrolled" and not asked.signed.signature:
            in_force = identity_pb2.DeviceRecord.FromString(identity_pb2.SignedRecord.FromString(row.record).record)
            if in_force.sealing_public_key != asked.record.sealing_public_key:
                raise Conflict(f"device {row.name} asks with another sealing key than the owner signed")
        return row

    def _pending(self, asked: _Asked, known: DeviceRow | None) -> enrolment_pb2.EnrolReply:
        if asked.role not in {Role.AGENT, Role.GATEWAY}:
            raise PermissionDenied(f"role {asked.role.value} needs a record that the owner signed")
        TrustLabel.of(asked.record.label)
        now = self._clock()
        unsigned = identity_pb2.SignedRecord(record=asked.signed.record).SerializeToString()
        row = self._registry.ask(
            self._row(asked, unsigned, now), limit=PENDING_DEVICES, expired_before_unix_s=now - PENDING_S
        )
        if known is None:
            log.info("device %s waits for approval: ganglion device approve %s", row.name, row.name)
        self._changes.mark()
        return enrolment_pb2.EnrolReply(hello=hello(), pending=enrolment_pb2.Pending(retry_after_s=RETRY_AFTER_S))

    def _row(self, asked: _Asked, record: bytes, now: float) -> DeviceRow:
        return DeviceRow(
            node_id=asked.request.node_id,
            name=asked.name,
            role=asked.record.role,
            label=asked.record.label,
            record=record,
            standing="pending",
            certificate_serial="",
            seen_unix_s=now,
        )

    def _admit(self, asked: _Asked, verified: VerifiedRecord) -> DeviceRow:
        """Enrol with the owner's signature, or with a token's, whose use is spent in the same transaction."""
        now = self._clock()
        if verified.role is Role.COORDINATOR:
            raise PermissionDenied("a coordinator's certificate is not to be had by enrolling")
        token = None
        if asked.signed.HasField("grant"):
            grant = verify_grant(asked.signed.grant, self._owner_public_key)
            if now > grant.expires_unix_s:
                raise Unauthenticated(f"token {grant.token_id} expired {now - grant.expires_unix_s:.0f} s ago")
            token = token_row(asked.signed.grant, grant)
        if verified.issued_unix_s > now + CLOCK_TOLERANCE_S:
            raise Unauthenticated(f"a record issued {verified.issued_unix_s - now:.0f} s from now: check the clocks")
        row = self._registry.enrol(self._row(asked, asked.signed.SerializeToString(), now), token)
        log.info("device %s (%s, %s) is enrolled", row.name, verified.role.value, verified.label.value)
        self._on_enrolled(row)
        return row

    def _issue(self, asked: _Asked, row: DeviceRow) -> enrolment_pb2.EnrolReply:
        issued = self._authority.issue(asked.request, Role.of(row.role))
        row = self._registry.put_certificate(row.node_id, issued.serial)
        self._changes.mark()
        return enrolment_pb2.EnrolReply(
            hello=hello(),
            enrolled=enrolment_pb2.Enrolled(
                certificate=issued.certificate,
                authority=self._authority.certificate_der,
                record=identity_pb2.SignedRecord.FromString(row.record),
                owner_public_key=self._owner_public_key,
                name=row.name,
                fleet_port=self._fleet_port,
            ),
        )


def token_row(signed: identity_pb2.SignedGrant, grant: identity_pb2.JoinGrant) -> TokenRow:
    """The registry's row for a verified grant; raises InvalidDocument for one without uses."""
    if grant.uses < 1:
        raise InvalidDocument(f"token {grant.token_id[:64]} allows {grant.uses} uses", param="uses")
    return TokenRow(
        token_id=grant.token_id,
        grant=signed.SerializeToString(),
        expires_unix_s=grant.expires_unix_s,
        uses=grant.uses,
    )
