"""An owner, an authority and enrolled nodes in memory."""

from __future__ import annotations

import datetime
from collections.abc import Callable

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from ganglion.wire.certificates import certificate_names
from ganglion.wire.identity import Identity, NodeKeys, OwnerKey, Role, TrustLabel, make_record

DAY = datetime.timedelta(days=1)
DER = serialization.Encoding.DER

MakeNode = Callable[..., Identity]


@pytest.fixture(scope="session")
def make_node() -> MakeNode:
    """`make_node(role=…, label=…, name=…)` enrols a node; all share one owner and one authority."""
    owner, key = OwnerKey.generate(), ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)

    def signed(subject: str, public_key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority")]))
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - DAY)
            .not_valid_after(now + DAY)
        )

    constraints = x509.BasicConstraints(ca=True, path_length=0)
    authority = (
        signed("authority", key.public_key()).add_extension(constraints, critical=True).sign(key, hashes.SHA256())
    )

    def make(
        role: Role = Role.AGENT,
        *,
        label: TrustLabel = TrustLabel.OWNER,
        name: str = "node",
        coordinator: str = "127.0.0.1:1",
        signer: OwnerKey = owner,
    ) -> Identity:
        keys = NodeKeys.generate()
        names = [x509.DNSName(found) for found in certificate_names(keys.node_id, role)]
        certificate = (
            signed("node", keys.tls_private_key.public_key())
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .sign(key, hashes.SHA256())
        )
        return Identity.of_der(
            keys,
            signer.sign_record(make_record(keys, role, label)),
            owner.public_key,
            certificate=certificate.public_bytes(DER),
            authority=authority.public_bytes(DER),
            name=name,
            coordinator=coordinator,
        )

    return make
