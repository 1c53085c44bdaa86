"""A small world for tests: an owner, a certificate authority and enrolled nodes, all in memory."""

from __future__ import annotations

import datetime
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from lane_pair import Pair, lane_pair

from ganglion.wire.certificates import certificate_names
from ganglion.wire.identity import Identity, NodeKeys, OwnerKey, Role, TrustLabel, make_record

DER = serialization.Encoding.DER
DAY = datetime.timedelta(days=1)


@dataclass
class World:
    """An authority that issues to anyone: what a coordinator may do."""

    owner: OwnerKey = field(default_factory=OwnerKey.generate)
    key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))

    def __post_init__(self) -> None:
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ganglion authority")])
        now = datetime.datetime.now(datetime.UTC)
        self.authority = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(self.key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - DAY)
            .not_valid_after(now + DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(self.key, hashes.SHA256())
        )

    def issue(self, public_key: ec.EllipticCurvePublicKey, names: tuple[str, ...]) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "node")]))
            .issuer_name(self.authority.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - DAY)
            .not_valid_after(now + DAY)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=False)
            .sign(self.key, hashes.SHA256())
        )

    def node(
        self, role: Role = Role.AGENT, *, label: TrustLabel = TrustLabel.OWNER, keys: NodeKeys | None = None
    ) -> Identity:
        keys = keys or NodeKeys.generate()
        certificate = self.issue(keys.tls_private_key.public_key(), certificate_names(keys.node_id, role))
        return Identity.of_der(
            keys,
            self.owner.sign_record(make_record(keys, role, label)),
            self.owner.public_key,
            certificate=certificate.public_bytes(DER),
            authority=self.authority.public_bytes(DER),
            name="node",
            coordinator="127.0.0.1:1",
        )


@pytest.fixture(scope="session")
def world() -> World:
    return World()


@pytest.fixture(scope="session")
def make_world() -> Callable[[], World]:
    return World


@pytest.fixture(params=["grpc", "socket"])
async def pair(world: Any, request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    """A lane of each kind."""
    async with lane_pair(world, request.param, request.param) as made:
        assert (made.near.medium, made.far.medium) == (request.param, request.param)
        yield made
