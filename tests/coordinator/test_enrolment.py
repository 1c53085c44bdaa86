# ruff: noqa: N802 - the ids of faults in names of tests are upper case
"""Enrolment over real TLS: who gets a certificate, who does not, and that refusals tell a stranger nothing."""

from __future__ import annotations

import asyncio
import logging
import time

import grpc
import pytest
from cryptography import x509

from ganglion.coordinator.authority import Authority, read_csr
from ganglion.coordinator.enrolment_service import PENDING_DEVICES, REFUSED
from ganglion.proto import admin_pb2, enrolment_pb2, enrolment_pb2_grpc, identity_pb2
from ganglion.wire import rpc
from ganglion.wire.certificates import Role, TrustLabel
from ganglion.wire.enrol import enrol
from ganglion.wire.errors import InvalidDocument, PermissionDenied, Unauthenticated
from ganglion.wire.hello import hello
from ganglion.wire.home import Home
from ganglion.wire.identity import NodeKeys, OwnerKey, make_csr, make_record, sign_with_one_time


class Asker:
    """Speaks to the enrolment port without the client's own checks."""

    def __init__(self, world) -> None:
        self.world = world
        credentials = grpc.ssl_channel_credentials((world.home.path / "authority.crt").read_bytes())
        options = rpc.client_options("control", "coordinator.ganglion")
        address = f"127.0.0.1:{world.ready.enrolment_port}"
        self.channel = grpc.aio.secure_channel(address, credentials, options=options)

    async def ask(self, request) -> enrolment_pb2.EnrolReply:
        stub = enrolment_pb2_grpc.EnrolmentStub(self.channel)
        try:
            return await asyncio.wait_for(stub.Enrol(request), 10)
        except grpc.aio.AioRpcError as error:
            raise rpc.to_error(error, "coordinator") from error


@pytest.fixture
async def asker(world):
    made = Asker(world)
    yield made
    await made.channel.close()


def request_of(keys: NodeKeys, record: identity_pb2.SignedRecord, name: str = "box") -> enrolment_pb2.EnrolRequest:
    return enrolment_pb2.EnrolRequest(hello=hello(), csr=make_csr(keys), record=record, name=name)


def by_token(keys: NodeKeys, token, label: TrustLabel = TrustLabel.OWNER, **changes) -> identity_pb2.SignedRecord:
    record = make_record(keys, Role.of(token.allows.role), label)
    record.MergeFrom(identity_pb2.DeviceRecord(**changes))
    return sign_with_one_time(token.seed, token.grant, record)


def unsigned(keys: NodeKeys, role: Role = Role.AGENT) -> identity_pb2.SignedRecord:
    return identity_pb2.SignedRecord(record=make_record(keys, role, TrustLabel.STRANGER).SerializeToString())


async def test_a_token_lets_a_device_in_with_a_certificate_of_its_role(world):
    identity = await world.enrol("box")
    certificate = x509.load_pem_x509_certificate(identity.certificate_pem)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [f"{identity.node_id}.agent.ganglion"]
    life = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    assert life.days == 90
    assert certificate.not_valid_before_utc.timestamp() < time.time() - 200
    assert identity.coordinator == f"127.0.0.1:{world.ready.fleet_port}"
    second = await world.enrol("second", Role.GATEWAY)
    assert second.verified.role is Role.GATEWAY
    assert oct((world.home.path / "authority.key").stat().st_mode & 0o777) == "0o600"


async def test_names_are_made_unique(world, tmp_path):
    await world.enrol("box")
    folder = Home(tmp_path / "other").identity
    assert (await enrol(folder, token=world.token(), name="box")).name == "box-2"


async def test_B2_of_racing_devices_one_gets_in(world, asker):
    token = world.token()
    requests = [request_of(keys := NodeKeys.generate(), by_token(keys, token)) for _ in range(12)]
    replies = await asyncio.gather(*map(asker.ask, requests), return_exceptions=True)
    let_in = [reply for reply in replies if isinstance(reply, enrolment_pb2.EnrolReply)]
    refused = [reply for reply in replies if isinstance(reply, Unauthenticated)]
    assert (len(let_in), len(refused)) == (1, 11)
    assert {error.message for error in refused} == {REFUSED}


async def test_D8_asking_again_spends_nothing(world, asker):
    keys, token = NodeKeys.generate(), world.token()
    first = await asker.ask(request_of(keys, by_token(keys, token)))
    again = await asker.ask(request_of(keys, by_token(keys, token, issued_unix_s=int(time.time()) + 1)))
    assert again.enrolled.name == first.enrolled.name
    assert again.enrolled.record == first.enrolled.record
    other = NodeKeys.generate()
    with pytest.raises(Unauthenticated):
        await asker.ask(request_of(other, by_token(other, token)))


async def test_refusals_say_one_thing_to_the_asker_and_the_reason_to_the_log(world, asker, caplog):
    keys, other = NodeKeys.generate(), NodeKeys.generate()
    expired = world.token(lifetime_s=1, now=time.time() - 60)
    stranger = OwnerKey.generate()
    revoked = world.token()
    admin = await world.admin()
    await world.call(admin.RegisterToken(admin_pb2.RegisterTokenRequest(grant=revoked.grant)))
    await world.call(admin.RevokeToken(admin_pb2.RevokeTokenRequest(token_id=revoked.allows.token_id)))
    good = by_token(keys, world.token())
    tampered = identity_pb2.SignedRecord(record=good.record[:-1] + b"\x01", signature=good.signature, grant=good.grant)
    coordinator = world.owner.sign_record(make_record(keys, Role.COORDINATOR, TrustLabel.OWNER))
    newer = request_of(keys, good)
    newer.hello.protocol = 99
    cases = {
        "expired": request_of(keys, by_token(keys, expired, issued_unix_s=int(time.time()) - 100)),
        "signature is not valid": request_of(
            keys, stranger.sign_record(make_record(keys, Role.AGENT, TrustLabel.OWNER))
        ),
        "is revoked": request_of(keys, by_token(keys, revoked)),
        "device record": request_of(keys, tampered),
        "role or label is not what": request_of(keys, by_token(keys, world.token(label=TrustLabel.FRIEND))),
        "another key than the signing request": enrolment_pb2.EnrolRequest(
            hello=hello(), csr=make_csr(other), record=good, name="box"
        ),
        "does not parse": enrolment_pb2.EnrolRequest(hello=hello(), csr=b"junk", record=good, name="box"),
        "name 'Box!'": request_of(keys, good, name="Box!"),
        "name 'box\\n'": request_of(keys, good, name="box\n"),
        "at most 16384": enrolment_pb2.EnrolRequest(hello=hello(), csr=bytes(20000), record=good, name="box"),
        "not to be had by enrolling": request_of(keys, coordinator),
        "needs a record that the owner signed": request_of(keys, unsigned(keys, Role.OWNER)),
        "speaks protocol 99": newer,
    }
    for reason, request in cases.items():
        caplog.clear()
        with caplog.at_level(logging.WARNING), pytest.raises(Unauthenticated) as refused:
            await asker.ask(request)
        assert refused.value.message == REFUSED, reason
        assert reason in caplog.text, caplog.text
    assert (await asker.ask(request_of(keys, good))).HasField("enrolled")  # control: nothing of it was spent


async def test_a_device_without_a_token_waits_for_the_owner(world, tools, tmp_path):
    admin = await world.admin()
    told = []
    folder = Home(tmp_path / "box").identity
    address = f"127.0.0.1:{world.ready.enrolment_port}"
    waiting = asyncio.create_task(enrol(folder, coordinator=address, name="box", on_pending=lambda *a: told.append(a)))
    watcher = await world.watch()
    await tools.until(lambda: watcher.device("box"))
    state = watcher.device("box")
    assert state.state == "pending"
    assert not state.record.signature
    record = identity_pb2.DeviceRecord.FromString(state.record.record)
    record.label = TrustLabel.FRIEND.number
    forged = OwnerKey.generate().sign_record(record)
    with pytest.raises(Unauthenticated):
        await world.call(admin.PutRecord(admin_pb2.PutRecordRequest(record=forged)))
    assert not waiting.done()
    await world.call(admin.PutRecord(admin_pb2.PutRecordRequest(record=world.owner.sign_record(record))))
    identity = await asyncio.wait_for(waiting, 10)
    assert identity.verified.label is TrustLabel.FRIEND
    assert told[0][1] == identity.node_id


async def test_pending_devices_are_bounded(world, asker):
    for number in range(PENDING_DEVICES):
        keys = NodeKeys.generate()
        reply = await asker.ask(request_of(keys, unsigned(keys), f"box-{number}"))
        assert reply.HasField("pending")
    one_more = NodeKeys.generate()
    with pytest.raises(Unauthenticated, match=REFUSED):
        await asker.ask(request_of(one_more, unsigned(one_more)))
    assert (await asker.ask(request_of(keys, unsigned(keys)))).HasField("pending")


async def test_a_sealing_key_cannot_be_swapped_without_the_owner(world, asker):
    keys = NodeKeys.generate()
    await asker.ask(request_of(keys, by_token(keys, world.token())))
    swapped = NodeKeys(keys.tls_private_key, NodeKeys.generate().sealing_private_key)
    with pytest.raises(Unauthenticated):
        await asker.ask(request_of(swapped, unsigned(swapped)))
    assert (await asker.ask(request_of(keys, unsigned(keys)))).HasField("enrolled")  # control: a renewal


async def test_B4_a_revoked_device_does_not_come_back(world, asker):
    identity = await world.enrol("box")
    admin = await world.admin()
    await world.call(admin.Revoke(admin_pb2.RevokeRequest(node_id=identity.node_id)))
    for record in (by_token(identity.keys, world.token()), unsigned(identity.keys)):
        with pytest.raises(Unauthenticated, match=REFUSED):
            await asker.ask(request_of(identity.keys, record))
    signed = world.owner.sign_record(make_record(identity.keys, Role.AGENT, TrustLabel.OWNER))
    with pytest.raises(PermissionDenied, match="revoked"):
        await world.call(admin.PutRecord(admin_pb2.PutRecordRequest(record=signed)))


def test_the_authority_is_kept_and_checked(tmp_path):
    home = Home(tmp_path)
    first, second = Authority.open(home), Authority.open(home)
    assert first.pin == second.pin
    assert len(first.pin) == 16
    request = read_csr(make_csr(NodeKeys.generate()))
    certificate = x509.load_der_x509_certificate(second.issue(request, Role.AGENT).certificate)
    certificate.verify_directly_issued_by(x509.load_der_x509_certificate(first.certificate_der))
    with pytest.raises(InvalidDocument, match="at most 4096"):
        read_csr(bytes(5000))
    damaged = bytearray(make_csr(NodeKeys.generate()))
    damaged[-1] ^= 1
    with pytest.raises(InvalidDocument):
        read_csr(bytes(damaged))
