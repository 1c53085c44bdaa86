"""Enrolment against a real server-TLS port with a scripted coordinator behind it."""

# ruff: noqa: N802 - test names carry the case ids of shared/notes/faults.md

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from ganglion.proto import enrolment_pb2, enrolment_pb2_grpc, identity_pb2
from ganglion.wire import rpc
from ganglion.wire.certificates import authority_pin, certificate_names, fingerprint
from ganglion.wire.enrol import enrol, fetch_authority
from ganglion.wire.errors import InvalidRequest, Unauthenticated, Unreachable, Unsupported
from ganglion.wire.hello import hello
from ganglion.wire.identity import Identity, NodeKeys, OwnerKey, Role, TrustLabel, verify_record
from ganglion.wire.tokens import JoinToken, mint

Answer = Callable[[enrolment_pb2.EnrolReply], None]


@dataclass
class Coordinator:
    """Grants what it is asked; `tamper` is what a dishonest or broken one does to its answer."""

    world: Any
    tamper: Answer = lambda _reply: None
    pending: int = 0
    requests: list[enrolment_pb2.EnrolRequest] = field(default_factory=list)

    async def Enrol(self, request: enrolment_pb2.EnrolRequest, _: object) -> enrolment_pb2.EnrolReply:
        self.requests.append(request)
        if len(self.requests) <= self.pending:
            return enrolment_pb2.EnrolReply(hello=hello(), pending=enrolment_pb2.Pending(retry_after_s=0.01))
        record = identity_pb2.DeviceRecord.FromString(request.record.record)
        if request.record.signature:
            signed = request.record
            verify_record(signed, self.world.owner.public_key)
        else:
            record.label = TrustLabel.FRIEND.number
            signed = self.world.owner.sign_record(record)
        csr = x509.load_der_x509_csr(request.csr)
        certificate = self.world.issue(csr.public_key(), certificate_names(record.node_id, Role.of(record.role)))
        reply = enrolment_pb2.EnrolReply(
            hello=hello(),
            enrolled=enrolment_pb2.Enrolled(
                certificate=certificate.public_bytes(Encoding.DER),
                authority=self.world.authority.public_bytes(Encoding.DER),
                record=signed,
                owner_public_key=self.world.owner.public_key,
                name=request.name + "-2",
                fleet_port=4321,
            ),
        )
        self.tamper(reply)
        return reply


@contextlib.asynccontextmanager
async def serving(coordinator: Coordinator) -> AsyncIterator[str]:
    identity = coordinator.world.node(Role.COORDINATOR)
    bound = rpc.server(identity, bind="127.0.0.1", port=0, what="the enrolment port", knob="-", allowed=None)
    enrolment_pb2_grpc.add_EnrolmentServicer_to_server(coordinator, bound.server)
    await bound.start()
    try:
        async with asyncio.timeout(60):
            yield bound.address
    finally:
        await bound.stop()


def token_for(world: Any, *addresses: str, **options: Any) -> JoinToken:
    return mint(world.owner, addresses=addresses, authority_pin=authority_pin(world.authority), **options)


async def test_enrolling_with_a_token(world: Any, tmp_path: Path) -> None:
    coordinator = Coordinator(world)
    async with serving(coordinator) as address:
        token = token_for(world, "127.0.0.1:1", address)  # the first address does not answer
        identity = await enrol(tmp_path / "identity", token=JoinToken.decode(token.encode()), name="pi")
    assert (identity.name, identity.coordinator, identity.role) == ("pi-2", "127.0.0.1:4321", Role.AGENT)
    assert identity.verified.token_id == token.allows.token_id
    assert identity.verified.label is TrustLabel.OWNER
    assert Identity.load(tmp_path / "identity").node_id == identity.node_id
    (request,) = coordinator.requests
    assert token.seed not in request.SerializeToString()
    assert identity.keys.tls_private_pem not in request.SerializeToString()


async def test_B3_a_coordinator_of_another_authority_is_told_nothing(
    world: Any, make_world: Any, tmp_path: Path
) -> None:
    impostor = Coordinator(make_world())
    async with serving(impostor) as address:
        with pytest.raises(Unauthenticated, match="nothing was sent") as caught:
            await enrol(tmp_path / "identity", token=token_for(world, address), name="pi")
    assert fingerprint(authority_pin(world.authority)) in caught.value.message
    assert impostor.requests == []
    assert not (tmp_path / "identity" / "node.json").exists()


async def test_B3_the_right_authority_shown_by_who_has_no_key_of_it(
    world: Any, make_world: Any, tmp_path: Path
) -> None:
    """The man in the middle replays the true authority's certificate behind a leaf of its own."""
    other = make_world()
    liar = Coordinator(other)
    real = world.authority

    class Shown:
        """The other world's node, presenting this world's authority as its chain."""

        def node(self, role: Role) -> Identity:
            identity = other.node(role)
            return Identity(
                identity.keys,
                identity.record,
                identity.owner_public_key,
                identity.certificate_pem,
                real.public_bytes(Encoding.PEM),
                "x",
                "127.0.0.1:1",
            )

    liar.world = Shown()
    async with serving(liar) as address:
        assert authority_pin(await fetch_authority(address)) == authority_pin(real)  # the deception works so far
        with pytest.raises(Unreachable):
            await enrol(tmp_path / "identity", token=token_for(world, address), name="pi")
    assert liar.requests == []


async def test_a_certified_agent_cannot_pose_as_the_coordinator(world: Any, tmp_path: Path) -> None:
    coordinator = Coordinator(world)

    class Posing:
        def node(self, _: Role) -> Identity:
            return world.node(Role.AGENT)  # type: ignore[no-any-return]

    coordinator.world = Posing()
    async with serving(coordinator) as address:
        with pytest.raises(Unreachable):
            await enrol(tmp_path / "identity", token=token_for(world, address), name="pi")
    assert coordinator.requests == []


async def test_without_a_token_the_device_waits_and_asks_again_as_itself(world: Any, tmp_path: Path) -> None:
    coordinator = Coordinator(world, pending=2)
    told: list[tuple[str, str]] = []
    async with serving(coordinator) as address:
        identity = await enrol(
            tmp_path / "identity",
            coordinator=address,
            name="pi",
            role=Role.GATEWAY,
            on_pending=lambda print_, node_id: told.append((print_, node_id)),
        )
    assert told == [(fingerprint(authority_pin(world.authority)), identity.node_id)]
    assert len(coordinator.requests) == 3
    assert all(request == coordinator.requests[0] for request in coordinator.requests)
    assert not coordinator.requests[0].record.signature
    assert (identity.verified.label, identity.role) == (TrustLabel.FRIEND, Role.GATEWAY)


async def test_a_device_that_asks_again_is_the_same_device(world: Any, make_world: Any, tmp_path: Path) -> None:
    coordinator = Coordinator(world)
    async with serving(coordinator) as address:
        first = await enrol(tmp_path / "identity", token=token_for(world, address), name="pi")
        second = await enrol(tmp_path / "identity", coordinator=address, name="pi")
        assert second.node_id == first.node_id
        # Without a token it keeps to the owner that it knows.
        stranger = OwnerKey.generate()
        coordinator.world.owner, kept = stranger, coordinator.world.owner
        try:
            with pytest.raises(Unauthenticated, match="another owner"):
                await enrol(tmp_path / "identity", coordinator=address, name="pi")
        finally:
            coordinator.world.owner = kept
    assert Identity.load(tmp_path / "identity").owner_public_key == world.owner.public_key


def swap_sealing_key(reply: enrolment_pb2.EnrolReply, world: Any) -> None:
    record = identity_pb2.DeviceRecord.FromString(reply.enrolled.record.record)
    record.sealing_public_key = NodeKeys.generate().sealing_public_key
    reply.enrolled.record.CopyFrom(world.owner.sign_record(record))


def other_owner(reply: enrolment_pb2.EnrolReply, world: Any) -> None:
    owner = OwnerKey.generate()
    record = identity_pb2.DeviceRecord.FromString(reply.enrolled.record.record)
    reply.enrolled.owner_public_key = owner.public_key
    reply.enrolled.record.CopyFrom(owner.sign_record(record))


def other_node(reply: enrolment_pb2.EnrolReply, world: Any) -> None:
    reply.enrolled.record.CopyFrom(world.node().record)


def other_key(reply: enrolment_pb2.EnrolReply, world: Any) -> None:
    record = identity_pb2.DeviceRecord.FromString(reply.enrolled.record.record)
    key = NodeKeys.generate().tls_private_key.public_key()
    issued = world.issue(key, certificate_names(record.node_id, Role.AGENT))
    reply.enrolled.certificate = issued.public_bytes(Encoding.DER)


def other_role(reply: enrolment_pb2.EnrolReply, world: Any) -> None:
    record = identity_pb2.DeviceRecord.FromString(reply.enrolled.record.record)
    key = x509.load_der_x509_certificate(reply.enrolled.certificate).public_key()
    issued = world.issue(key, certificate_names(record.node_id, Role.OWNER))
    reply.enrolled.certificate = issued.public_bytes(Encoding.DER)


def junk_certificate(reply: enrolment_pb2.EnrolReply, world: Any) -> None:
    reply.enrolled.certificate = b"junk"


def no_outcome(reply: enrolment_pb2.EnrolReply, world: Any) -> None:
    reply.ClearField("enrolled")


@pytest.mark.parametrize(
    "tamper", [swap_sealing_key, other_owner, other_node, other_key, other_role, junk_certificate, no_outcome]
)
async def test_a_dishonest_answer_is_refused_and_nothing_is_saved(
    world: Any, tmp_path: Path, tamper: Callable[[enrolment_pb2.EnrolReply, Any], None]
) -> None:
    async with serving(Coordinator(world, lambda reply: tamper(reply, world))) as address:
        with pytest.raises(Unauthenticated):
            await enrol(tmp_path / "identity", token=token_for(world, address), name="pi")
    assert not (tmp_path / "identity" / "node.json").exists()


async def test_A4_a_coordinator_of_a_newer_protocol_is_named(world: Any, tmp_path: Path) -> None:
    def newer(reply: enrolment_pb2.EnrolReply) -> None:
        reply.hello.protocol = 99

    async with serving(Coordinator(world, newer)) as address:
        with pytest.raises(Unsupported, match="protocol 99"):
            await enrol(tmp_path / "identity", token=token_for(world, address), name="pi")


async def test_what_is_wrong_here_is_said_here(world: Any, tmp_path: Path) -> None:
    """Port 1 has no listener: an attempt to reach it would be Unreachable."""
    folder, fresh = tmp_path / "identity", token_for(world, "127.0.0.1:1")
    with pytest.raises(InvalidRequest, match="name"):
        await enrol(folder, token=fresh, name="Pi\n")
    with pytest.raises(InvalidRequest, match="--coordinator"):
        await enrol(folder, name="pi")
    with pytest.raises(InvalidRequest, match="role agent, not gateway"):
        await enrol(folder, token=fresh, name="pi", role=Role.GATEWAY)
    with pytest.raises(Unauthenticated, match="expired"):
        await enrol(folder, token=token_for(world, "127.0.0.1:1", lifetime_s=1, now=1000), name="pi")
    with pytest.raises(Unreachable, match=r"127\.0\.0\.1:1 .*enrolment port"):
        await enrol(folder, token=fresh, name="pi")


async def test_a_port_that_speaks_something_else(tmp_path: Path, world: Any) -> None:
    async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH\r\n")
        await reader.read(1)
        writer.close()

    server = await asyncio.start_server(babble, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(Unreachable, match=str(port)):
            await enrol(tmp_path / "identity", token=token_for(world, f"127.0.0.1:{port}"), name="pi")
