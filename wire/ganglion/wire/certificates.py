"""What certificates say: names, pins, fingerprints and signing requests. Shared by the authority and its clients."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable
from enum import StrEnum
from typing import Final, cast

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from ganglion.proto import identity_pb2 as pb
from ganglion.wire.errors import InvalidDocument, Unauthenticated

COORDINATOR_NAME: Final = "coordinator.ganglion"
PIN_BYTES: Final = 16
_NODE_ID: Final = re.compile(r"[a-z2-7]{26}\Z")


class Role(StrEnum):
    """What a node is; the value stands in its certificate."""

    AGENT = "agent"
    GATEWAY = "gateway"
    COORDINATOR = "coordinator"
    OWNER = "owner"

    @property
    def number(self) -> pb.Role:
        """Its number on the wire."""
        return cast("pb.Role", pb.Role.Value(f"ROLE_{self.name}"))

    @classmethod
    def of(cls, number: int) -> Role:
        """The role with this number on the wire; raises InvalidDocument."""
        for role in cls:
            if role.number == number:
                return role
        raise InvalidDocument(f"role {number} is not known to this release", param="role")


class TrustLabel(StrEnum):
    """How far the owner trusts a device."""

    STRANGER = "stranger"
    FRIEND = "friend"
    OWNER = "owner"

    @property
    def number(self) -> pb.TrustLabel:
        """Its number on the wire."""
        return cast("pb.TrustLabel", pb.TrustLabel.Value(f"TRUST_LABEL_{self.name}"))

    @classmethod
    def of(cls, number: int) -> TrustLabel:
        """The label with this number on the wire; raises InvalidDocument."""
        for label in cls:
            if label.number == number:
                return label
        raise InvalidDocument(f"trust label {number} is not known to this release", param="label")


_ROLES: Final = frozenset(role.value for role in Role)


def node_id_of(tls_public_key_der: bytes) -> str:
    """A node's id: lower-case base32 of SHA-256 of its SubjectPublicKeyInfo (DER), first 26 characters."""
    return base64.b32encode(hashlib.sha256(tls_public_key_der).digest()).decode().lower()[:26]


def is_node_id(text: str) -> bool:
    """Whether `text` has the form of a node id."""
    return _NODE_ID.match(text) is not None


def certificate_name(node_id: str, role: Role) -> str:
    """The DNS name by which a node's certificate is expected: `<node_id>.<role>.ganglion`."""
    return f"{node_id}.{role.value}.ganglion"


def certificate_names(node_id: str, role: Role) -> tuple[str, ...]:
    """All DNS names (SAN) of a node's certificate; the coordinator's has one that needs no node id."""
    name = certificate_name(node_id, role)
    return (name, COORDINATOR_NAME) if role is Role.COORDINATOR else (name,)


def parse_certificate_names(names: Iterable[str]) -> tuple[str, Role]:
    """Node id and role in a certificate's DNS names; raises Unauthenticated unless exactly one name says them."""
    found = []
    for name in names:
        node_id, _, rest = name.partition(".")
        role, _, suffix = rest.partition(".")
        if suffix == "ganglion" and is_node_id(node_id) and role in _ROLES:
            found.append((node_id, Role(role)))
    if len(found) != 1:
        raise Unauthenticated("the certificate does not name one node and its role")
    return found[0]


def subject_public_key(certificate: x509.Certificate) -> bytes:
    """The certificate's SubjectPublicKeyInfo, DER."""
    return certificate.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def authority_pin(authority: x509.Certificate) -> bytes:
    """What a join token pins: the first 16 bytes of SHA-256 of the authority's SubjectPublicKeyInfo."""
    return hashlib.sha256(subject_public_key(authority)).digest()[:PIN_BYTES]


def fingerprint(pin: bytes) -> str:
    """A pin for people to compare: hexadecimal in groups of four."""
    text = pin.hex()
    return " ".join(text[at : at + 4] for at in range(0, len(text), 4))


def make_signing_request(key: ec.EllipticCurvePrivateKey, node_id: str) -> bytes:
    """PKCS#10 request (DER) for `key`; its subject is the node id, the authority decides the names."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, node_id)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.DER)
