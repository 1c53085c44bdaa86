"""Administration: what the owner's command line and the gateways ask. The roles of each method are in ROLES."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError

from ganglion.coordinator.addresses import seen_host
from ganglion.coordinator.deployments.driver import Deployments
from ganglion.coordinator.deployments.events import Phase
from ganglion.coordinator.enrolment_service import token_row
from ganglion.coordinator.experts_service import ExpertMethods
from ganglion.coordinator.registry import DeviceRow, Registry
from ganglion.coordinator.roster import Roster
from ganglion.coordinator.selection import Experts
from ganglion.proto import admin_pb2, admin_pb2_grpc, identity_pb2
from ganglion.wire.errors import Conflict, InvalidDocument, InvalidRequest, NotFound, PermissionDenied, Unavailable
from ganglion.wire.hello import check_hello, distribution_version, hello
from ganglion.wire.identity import Role, TrustLabel, VerifiedRecord, peer_of, verify_grant, verify_record
from ganglion.wire.limits import NAME_PATTERN, REPORT_BYTES
from ganglion.wire.nouns import PlanReport, to_json

log = logging.getLogger(__name__)

COALESCE_S: Final = 0.05  # between two states of one watcher
_ENDS: Final = frozenset({Phase.READY, Phase.FAILED, Phase.STOPPED})
_OWNER: Final = frozenset({Role.OWNER})

ROLES: Final[dict[str, frozenset[Role]]] = {
    "/ganglion.v1.Fleet/Control": frozenset({Role.AGENT}),
    "/ganglion.v1.Admin/Greet": frozenset({Role.OWNER, Role.GATEWAY, Role.AGENT}),
    "/ganglion.v1.Admin/Deploy": _OWNER,
    "/ganglion.v1.Admin/Explain": _OWNER,
    "/ganglion.v1.Admin/Stop": _OWNER,
    "/ganglion.v1.Admin/Watch": frozenset({Role.OWNER, Role.GATEWAY}),
    "/ganglion.v1.Admin/ListTokens": _OWNER,
    "/ganglion.v1.Admin/RegisterToken": _OWNER,
    "/ganglion.v1.Admin/RevokeToken": _OWNER,
    "/ganglion.v1.Admin/PutRecord": _OWNER,
    "/ganglion.v1.Admin/Rename": _OWNER,
    "/ganglion.v1.Admin/Revoke": _OWNER,
    "/ganglion.v1.Admin/PutExpert": _OWNER,
    "/ganglion.v1.Admin/RemoveExpert": _OWNER,
    "/ganglion.v1.Admin/PutBudget": _OWNER,
    "/ganglion.v1.Admin/RemoveBudget": _OWNER,
    "/ganglion.v1.Admin/Select": frozenset({Role.OWNER, Role.GATEWAY}),
    "/ganglion.v1.Admin/Report": frozenset({Role.GATEWAY}),
}

_Context = grpc.aio.ServicerContext[Any, Any]


class AdminService(ExpertMethods, admin_pb2_grpc.AdminServicer):
    """The methods of admin.proto, in its order; those about edge experts are in experts_service.py."""

    def __init__(
        self,
        registry: Registry,
        roster: Roster,
        deployments: Deployments,
        experts: Experts,
        owner_public_key: bytes,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(experts)
        self._registry = registry
        self._roster = roster
        self._deployments = deployments
        self._owner_public_key = owner_public_key
        self._clock = clock
        self._closing = False

    def close(self) -> None:
        """End every open stream at its next turn, which comes at once."""
        self._closing = True
        self._roster.changes.mark()

    async def Greet(self, request: identity_pb2.Hello, context: _Context) -> identity_pb2.Hello:  # noqa: N802
        """Versions; raises Unsupported."""
        check_hello(request)
        return hello()

    async def Deploy(  # noqa: N802
        self, request: admin_pb2.DeployRequest, context: _Context
    ) -> AsyncIterator[admin_pb2.DeployEvent]:
        """Events until the deployment is ready, failed or stopped; a caller that leaves does not stop it."""
        deployment = self._deployments.deploy(request.manifest, request.options, request.holder, request.drafter)
        last = None
        while True:
            version, sent_s = self._roster.changes.version, time.monotonic()
            event, is_over = deployment.event(self._roster), deployment.machine.phase in _ENDS
            if event != last:
                yield event
                last = event
            if is_over:
                return
            await self._next(version, sent_s, peer_of(context).node_id)

    async def Explain(  # noqa: N802
        self, request: admin_pb2.DeployRequest, context: _Context
    ) -> admin_pb2.ExplainReply:
        """Every candidate with its figures, without deploying."""
        report = await self._deployments.explain(request.manifest, request.options, request.drafter)
        return admin_pb2.ExplainReply(report=fitting_report(report))

    async def Stop(self, request: admin_pb2.StopRequest, context: _Context) -> admin_pb2.StopReply:  # noqa: N802
        """Stop a deployment, by id or model; raises NotFound."""
        self._deployments.stop(request.deployment)
        return admin_pb2.StopReply()

    async def Watch(  # noqa: N802
        self, request: admin_pb2.WatchRequest, context: _Context
    ) -> AsyncIterator[admin_pb2.Fleetwide]:
        """The state now and at every change, at most every 50 ms."""
        peer = peer_of(context)
        host = seen_host(context.peer())
        while True:
            version, sent_s = self._roster.changes.version, time.monotonic()
            yield self._fleetwide(host)
            if request.once:
                return
            await self._next(version, sent_s, peer.node_id)

    async def _next(self, version: int, sent_s: float, node_id: str) -> None:
        """Wait for a change, which is told at once unless something was told just before."""
        await self._roster.changes.after(version)
        await asyncio.sleep(max(0.0, sent_s + COALESCE_S - time.monotonic()))
        if self._closing:
            raise Unavailable("the coordinator is stopping")
        # A stream that was open before the revocation must not outlive it.
        if is_shut_out(self._registry, node_id):
            raise PermissionDenied("not allowed")

    def _fleetwide(self, viewer_host: str) -> admin_pb2.Fleetwide:
        now = self._clock()
        unused = [
            token
            for token in self._registry.tokens()
            if not token.revoked and token.used < token.uses and token.expires_unix_s > now
        ]
        return admin_pb2.Fleetwide(
            devices=[self._device_state(row, viewer_host) for row in self._registry.devices()],
            deployments=[each.state(self._roster, viewer_host) for each in self._deployments.all()],
            tokens_unused=len(unused),
            coordinator_version=distribution_version(),
            refused_offers=self._deployments.offers.refused(),
            experts=self.experts.states(),
            selections=self.experts.selections(),
        )

    def _device_state(self, row: DeviceRow, viewer_host: str) -> admin_pb2.DeviceState:
        member = self._roster.member(row.node_id)
        state, silence_s = self._roster.state(row)
        peer = self._roster.peer(row.node_id, viewer_host)
        return admin_pb2.DeviceState(
            node_id=row.node_id,
            name=row.name,
            role=Role.of(row.role).number,
            label=TrustLabel.of(row.label).number,
            state=state,
            profile=to_json(member.profile) if member and member.profile else b"",
            address=peer.address,
            last_seen_s=silence_s,
            record=peer.record,
        )

    async def ListTokens(  # noqa: N802
        self, request: admin_pb2.ListTokensRequest, context: _Context
    ) -> admin_pb2.ListTokensReply:
        """Every token, with its uses."""
        states = []
        for token in self._registry.tokens():
            grant = identity_pb2.JoinGrant.FromString(identity_pb2.SignedGrant.FromString(token.grant).grant)
            states.append(admin_pb2.TokenState(grant=grant, used=token.used, revoked=token.revoked))
        return admin_pb2.ListTokensReply(tokens=states)

    async def RegisterToken(  # noqa: N802
        self, request: admin_pb2.RegisterTokenRequest, context: _Context
    ) -> admin_pb2.RegisterTokenReply:
        """Note a token that the owner signed; raises Unauthenticated when he did not."""
        grant = verify_grant(request.grant, self._owner_public_key)
        self._registry.register_token(token_row(request.grant, grant))
        self._roster.changes.mark()
        return admin_pb2.RegisterTokenReply()

    async def RevokeToken(  # noqa: N802
        self, request: admin_pb2.RevokeTokenRequest, context: _Context
    ) -> admin_pb2.RevokeTokenReply:
        """Let nobody in by this token any more; raises NotFound."""
        self._registry.revoke_token(request.token_id)
        self._roster.changes.mark()
        return admin_pb2.RevokeTokenReply()

    async def PutRecord(  # noqa: N802
        self, request: admin_pb2.PutRecordRequest, context: _Context
    ) -> admin_pb2.DeviceState:
        """Approve a pending device, or change a label; raises Unauthenticated for what the owner did not sign."""
        try:
            verified = verify_record(request.record, self._owner_public_key)
            before = self._registry.device(verified.node_id)
            known = identity_pb2.DeviceRecord.FromString(identity_pb2.SignedRecord.FromString(before.record).record)
        except DecodeError as error:
            raise InvalidDocument(f"record: {error}") from error
        self._check_same_device(verified, before, known)
        row = self._registry.put_record(
            verified.node_id, record=request.record.SerializeToString(), label=verified.label.number
        )
        log.info("device %s: label %s, signed by the owner", row.name, verified.label.value)
        if before.standing == "enrolled" and before.label != row.label:
            self._deployments.device_changed(row.node_id, f"it is labelled {verified.label.value} now")
        if verified.role is Role.GATEWAY:
            self._deployments.gateways_changed()
        self._roster.changes.mark()
        self._roster.on_changed()
        return self._device_state(row, seen_host(context.peer()))

    def _check_same_device(self, verified: VerifiedRecord, row: DeviceRow, known: identity_pb2.DeviceRecord) -> None:
        if row.standing == "revoked":
            raise PermissionDenied(f"device {row.name} is revoked: it needs new keys and a new token")
        if verified.token_id is not None:
            raise PermissionDenied(
                "record: it is to be signed by the owner's key itself, not by a token's", param="record"
            )
        if verified.role.number != row.role or verified.sealing_public_key != known.sealing_public_key:
            raise Conflict(f"record: its role or its keys are not those of device {row.name}", param="record")
        if verified.issued_unix_s < known.issued_unix_s and row.standing == "enrolled":
            raise Conflict(
                f"record: issued {known.issued_unix_s - verified.issued_unix_s} s before the one {row.name} has",
                param="record",
            )

    async def Rename(self, request: admin_pb2.RenameRequest, context: _Context) -> admin_pb2.DeviceState:  # noqa: N802
        """Give a device a name; raises NotFound, Conflict, InvalidRequest."""
        if not re.fullmatch(NAME_PATTERN.removeprefix("^").removesuffix("$"), request.name):
            raise InvalidRequest(f"name {request.name[:80]!r} does not match {NAME_PATTERN}", param="name")
        row = self._registry.rename(request.node_id, request.name)
        self._roster.changes.mark()
        return self._device_state(row, seen_host(context.peer()))

    async def Revoke(self, request: admin_pb2.RevokeRequest, context: _Context) -> admin_pb2.DeviceState:  # noqa: N802
        """Shut a device out for good: its calls, its streams, its deployments; raises NotFound, InvalidRequest."""
        if request.node_id == peer_of(context).node_id:
            raise InvalidRequest(
                "this would revoke the key that asks for it: revoke it from another one", param="node_id"
            )
        row = self._registry.revoke(request.node_id)
        log.warning("device %s is revoked", row.name)
        self._roster.cut(row.node_id, PermissionDenied("not allowed"))
        if row.role == Role.GATEWAY.number:
            self._deployments.gateways_changed()
        self._roster.changes.mark()
        return self._device_state(row, seen_host(context.peer()))


def is_shut_out(registry: Registry, node_id: str) -> bool:
    """Whether calls of this node are refused: all but enrolled nodes are."""
    try:
        return registry.device(node_id).standing != "enrolled"
    except NotFound:
        return True


def fitting_report(report: PlanReport) -> bytes:
    """The report as JSON of at most REPORT_BYTES, for which the worst candidates are left out, and a note says so."""
    candidates = report.candidates
    while True:
        left_out = len(report.candidates) - len(candidates)
        note = (f"{left_out} more candidates are left out of this report",) if left_out else ()
        shown = PlanReport(
            model=report.model,
            numeric_class=report.numeric_class,
            candidates=candidates,
            plan=report.plan,
            notes=report.notes + note,
        )
        encoded = to_json(shown)
        if len(encoded) <= REPORT_BYTES or len(candidates) <= 1:
            return encoded
        candidates = candidates[: len(candidates) // 2]
