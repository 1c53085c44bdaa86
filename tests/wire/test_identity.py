"""Records, their chain to the owner, and identities on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from ganglion.proto import identity_pb2 as pb
from ganglion.wire.certificates import (
    certificate_name,
    certificate_names,
    fingerprint,
    is_node_id,
    parse_certificate_names,
)
from ganglion.wire.errors import Corrupt, InvalidDocument, NotFound, PermissionDenied, Unauthenticated
from ganglion.wire.identity import (
    Identity,
    NodeKeys,
    OwnerKey,
    Role,
    TrustLabel,
    make_csr,
    make_record,
    node_id_of,
    sign_with_one_time,
    verify_grant,
    verify_record,
)
from ganglion.wire.tokens import JoinToken, mint

OWNER = OwnerKey.generate()
KEYS = NodeKeys.generate()
NOW = 1_800_000_000


def token(owner: OwnerKey = OWNER, *, label: TrustLabel = TrustLabel.FRIEND, role: Role = Role.AGENT) -> JoinToken:
    return mint(owner, addresses=["h:1"], authority_pin=bytes(16), label=label, role=role, lifetime_s=60, now=NOW)


def record(label: TrustLabel = TrustLabel.FRIEND, role: Role = Role.AGENT, now: float = NOW) -> pb.DeviceRecord:
    return make_record(KEYS, role, label, now=now)


TOKEN = token()
BY_TOKEN = sign_with_one_time(TOKEN.seed, TOKEN.grant, record())
BY_OWNER = OWNER.sign_record(record())


def test_a_record_signed_by_the_owner_or_through_a_token_is_verified() -> None:
    found = verify_record(BY_OWNER, OWNER.public_key)
    assert (found.node_id, found.role, found.label, found.token_id) == (
        KEYS.node_id,
        Role.AGENT,
        TrustLabel.FRIEND,
        None,
    )
    assert (found.tls_public_key, found.sealing_public_key) == (KEYS.tls_public_key_der, KEYS.sealing_public_key)
    assert verify_record(BY_TOKEN, OWNER.public_key).token_id == TOKEN.allows.token_id


def change(**fields: Any) -> pb.DeviceRecord:
    changed = record()
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def ed25519_like() -> bytes:
    return (
        ec.generate_private_key(ec.SECP384R1())
        .public_key()
        .public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    )


P384 = ed25519_like()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (change(label=TrustLabel.OWNER.number), "role or label"),
        (change(role=Role.GATEWAY.number), "role or label"),
        (change(issued_unix_s=NOW + 61), "1 s after its join token expired"),
        (change(node_id="a" * 26), "node id"),
        (change(sealing_public_key=bytes(31)), "31 bytes, expected 32"),
        (change(tls_public_key=b"junk", node_id=node_id_of(b"junk")), "does not parse"),
        (change(tls_public_key=P384, node_id=node_id_of(P384)), "P-256"),
    ],
)
def test_a_record_that_its_token_does_not_allow_is_refused(body: pb.DeviceRecord, reason: str) -> None:
    with pytest.raises(Unauthenticated, match=reason):
        verify_record(sign_with_one_time(TOKEN.seed, TOKEN.grant, body), OWNER.public_key)


def test_an_unknown_role_or_label_is_refused() -> None:
    for body in (change(role=99), change(label=0)):
        with pytest.raises(Unauthenticated, match="not known"):
            verify_record(OWNER.sign_record(body), OWNER.public_key)


def forged_by_the_coordinator() -> pb.SignedRecord:
    return OwnerKey.generate().sign_record(record())


def with_a_grant_of_its_own() -> pb.SignedRecord:
    own = token(OwnerKey.generate())
    return sign_with_one_time(own.seed, own.grant, record())


def with_the_owners_grant_and_another_seed() -> pb.SignedRecord:
    return sign_with_one_time(bytes(32), TOKEN.grant, record())


def with_the_grant_stripped() -> pb.SignedRecord:
    return pb.SignedRecord(record=BY_TOKEN.record, signature=BY_TOKEN.signature)


def with_a_grant_added() -> pb.SignedRecord:
    return pb.SignedRecord(record=BY_OWNER.record, signature=BY_OWNER.signature, grant=TOKEN.grant)


def with_a_grants_signature_as_a_records() -> pb.SignedRecord:
    return pb.SignedRecord(record=TOKEN.grant.grant, signature=TOKEN.grant.signature)


def unsigned() -> pb.SignedRecord:
    return pb.SignedRecord(record=BY_OWNER.record)


def with_a_swapped_sealing_key() -> pb.SignedRecord:
    return pb.SignedRecord(
        record=change(sealing_public_key=NodeKeys.generate().sealing_public_key).SerializeToString(),
        signature=BY_TOKEN.signature,
        grant=BY_TOKEN.grant,
    )


@pytest.mark.parametrize(
    "forge",
    [
        forged_by_the_coordinator,
        with_a_grant_of_its_own,
        with_the_owners_grant_and_another_seed,
        with_the_grant_stripped,
        with_a_grant_added,
        with_a_grants_signature_as_a_records,
        unsigned,
        with_a_swapped_sealing_key,
        pb.SignedRecord,
    ],
)
def test_a_forged_record_is_refused(forge: Callable[[], pb.SignedRecord]) -> None:
    with pytest.raises(Unauthenticated):
        verify_record(forge(), OWNER.public_key)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_flipped_bit_of_a_signed_record_is_refused(data: st.DataObject) -> None:
    signed = data.draw(st.sampled_from([BY_TOKEN, BY_OWNER]))
    changed = pb.SignedRecord()
    changed.CopyFrom(signed)
    fields = [(changed, "record"), (changed, "signature")]
    if changed.HasField("grant"):
        fields += [(changed.grant, "grant"), (changed.grant, "signature")]
    holder, name = data.draw(st.sampled_from(fields))
    content = bytearray(getattr(holder, name))
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    setattr(holder, name, bytes(content))
    with pytest.raises(Unauthenticated):
        verify_record(changed, OWNER.public_key)


@given(st.binary(max_size=200), st.binary(max_size=80), st.booleans())
def test_random_bytes_as_a_record_raise_only_unauthenticated(body: bytes, signature: bytes, grant: bool) -> None:
    signed = pb.SignedRecord(record=body, signature=signature)
    if grant:
        signed.grant.grant = body
    with pytest.raises(Unauthenticated):
        verify_record(signed, OWNER.public_key)


def test_a_grant_without_a_key_is_refused_even_if_the_owner_signed_it() -> None:
    with pytest.raises(Unauthenticated, match="names no token"):
        verify_grant(OWNER.sign_grant(pb.JoinGrant(token_id="x")), OWNER.public_key)


def test_node_ids() -> None:
    assert is_node_id(KEYS.node_id)
    assert node_id_of(b"") == "4oymiquy7qobjgx36tejs35zeq"  # SHA-256 of nothing, in base32
    for text in ("", "A" * 26, "a" * 25, "a" * 27, "a" * 25 + "1", "a" * 26 + "\n"):
        assert not is_node_id(text)


def test_certificate_names_and_back() -> None:
    for role in Role:
        assert parse_certificate_names(certificate_names(KEYS.node_id, role)) == (KEYS.node_id, role)
        assert Role.of(role.number) is role
    for label in TrustLabel:
        assert TrustLabel.of(label.number) is label
    good = certificate_name(KEYS.node_id, Role.AGENT)
    other = certificate_name(KEYS.node_id, Role.OWNER)
    for names in ([], ["coordinator.ganglion"], [good, other], [good + ".evil"], [good.upper()], ["a.agent.ganglion"]):
        with pytest.raises(Unauthenticated):
            parse_certificate_names(names)
    with pytest.raises(InvalidDocument):
        Role.of(17)
    assert fingerprint(bytes(range(4))) == "0001 0203"


def test_the_signing_request_is_of_the_nodes_key() -> None:
    request = x509.load_der_x509_csr(make_csr(KEYS))
    assert request.is_signature_valid
    assert request.public_key() == KEYS.tls_private_key.public_key()


def test_keys_and_identity_survive_the_disk(tmp_path: Path, world: Any) -> None:
    identity = world.node(Role.GATEWAY)
    folder = tmp_path / "identity"
    identity.save(folder)
    found = Identity.load(folder)
    assert (found.node_id, found.role, found.record) == (identity.node_id, Role.GATEWAY, identity.record)
    assert (found.name, found.coordinator, found.owner_public_key) == ("node", "127.0.0.1:1", world.owner.public_key)
    assert found.keys.sealing_public_key == identity.keys.sealing_public_key
    assert {path.name for path in folder.iterdir()} == {
        "tls.key", "tls.crt", "authority.crt", "sealing.key", "record.bin", "owner.pub", "node.json",
    }  # fmt: skip
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    world.owner.save(tmp_path / "owner" / "owner.key")
    assert OwnerKey.load(tmp_path / "owner" / "owner.key").public_key == world.owner.public_key


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("node.json", None, NotFound),
        ("tls.key", None, NotFound),
        ("node.json", b"{", Corrupt),
        ("node.json", b"[]", Corrupt),
        ("record.bin", b"\xff", Corrupt),
        ("record.bin", b"", Unauthenticated),
        ("owner.pub", bytes(32), Unauthenticated),
        ("tls.crt", b"junk", Corrupt),
        ("sealing.key", b"junk", Corrupt),
    ],
)
def test_a_damaged_identity_is_named(
    tmp_path: Path, world: Any, name: str, content: bytes | None, kind: type[Exception]
) -> None:
    world.node().save(tmp_path / "identity")
    path = tmp_path / "identity" / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(kind):
        Identity.load(tmp_path / "identity")


def test_an_identity_of_other_keys_is_named(tmp_path: Path, world: Any) -> None:
    world.node().save(tmp_path / "identity")
    NodeKeys.generate().save(tmp_path / "identity")
    with pytest.raises(Corrupt, match="enrol again"):
        Identity.load(tmp_path / "identity")
    sealing = tmp_path / "identity" / "sealing.key"
    sealing.write_bytes((tmp_path / "identity" / "tls.key").read_bytes())
    with pytest.raises(Corrupt, match="X25519"):
        NodeKeys.load(tmp_path / "identity")
    sealing.chmod(0o644)
    with pytest.raises(PermissionDenied, match="chmod 600"):
        NodeKeys.load(tmp_path / "identity")
