"""Who a node is: its keys, its record signed under the owner's key, and its certificate.

The trust that counts is the signed record: owner → (grant → one-time key) → record. Certificates only carry it.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import grpc
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, x25519
from google.protobuf.message import DecodeError

from ganglion.proto import identity_pb2 as pb
from ganglion.wire.certificates import (
    Role,
    TrustLabel,
    make_signing_request,
    node_id_of,
    parse_certificate_names,
    subject_public_key,
)
from ganglion.wire.errors import Corrupt, InvalidDocument, NotFound, Unauthenticated
from ganglion.wire.home import make_private_folder, read_secret, write_secret

__all__ = [
    "Identity",
    "NodeKeys",
    "OwnerKey",
    "PeerIdentity",
    "Role",
    "TrustLabel",
    "VerifiedRecord",
    "make_csr",
    "make_record",
    "node_id_of",
    "peer_of",
    "sign_with_one_time",
    "verify_grant",
    "verify_record",
]

# A signature made for one purpose must mean nothing for another.
_RECORD_CONTEXT: Final = b"ganglion.v1 device record\0"
_GRANT_CONTEXT: Final = b"ganglion.v1 join grant\0"
_RECORD_BYTES: Final = 1024

_DER: Final = serialization.Encoding.DER
_PEM: Final = serialization.Encoding.PEM
_RAW: Final = serialization.Encoding.Raw


def _private_pem(key: ec.EllipticCurvePrivateKey | x25519.X25519PrivateKey | ed25519.Ed25519PrivateKey) -> bytes:
    return key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def _load_private(path: Path, kind: type[Any]) -> Any:
    try:
        content = read_secret(path)
    except FileNotFoundError:
        raise NotFound(f"there is no key at {path}") from None
    try:
        key = serialization.load_pem_private_key(content, password=None)
    except ValueError as error:
        raise Corrupt(f"{path} is not a private key: {error}") from error
    if not isinstance(key, kind):
        raise Corrupt(f"{path} holds a {type(key).__name__}, expected {kind.__name__}")
    return key


@dataclass(frozen=True)
class NodeKeys:
    """A node's own keys, which never leave it: P-256 for TLS, X25519 for sealing."""

    tls_private_key: ec.EllipticCurvePrivateKey
    sealing_private_key: x25519.X25519PrivateKey

    @classmethod
    def generate(cls) -> NodeKeys:
        """New keys, and so a new node id."""
        return cls(ec.generate_private_key(ec.SECP256R1()), x25519.X25519PrivateKey.generate())

    @classmethod
    def load(cls, folder: Path) -> NodeKeys:
        """Read `tls.key` and `sealing.key`; raises NotFound, Corrupt, PermissionDenied."""
        tls = _load_private(folder / "tls.key", ec.EllipticCurvePrivateKey)
        if not isinstance(tls.curve, ec.SECP256R1):
            raise Corrupt(f"{folder / 'tls.key'} is on curve {tls.curve.name}, expected secp256r1")
        return cls(tls, _load_private(folder / "sealing.key", x25519.X25519PrivateKey))

    def save(self, folder: Path) -> None:
        """Write both keys into `folder` (0700), each with mode 0600."""
        make_private_folder(folder)
        write_secret(folder / "tls.key", self.tls_private_pem)
        write_secret(folder / "sealing.key", _private_pem(self.sealing_private_key))

    @functools.cached_property
    def tls_private_pem(self) -> bytes:
        """PKCS#8, PEM."""
        return _private_pem(self.tls_private_key)

    @functools.cached_property
    def tls_public_key_der(self) -> bytes:
        """SubjectPublicKeyInfo, DER."""
        public = self.tls_private_key.public_key()
        return public.public_bytes(_DER, serialization.PublicFormat.SubjectPublicKeyInfo)

    @functools.cached_property
    def sealing_public_key(self) -> bytes:
        """X25519, 32 bytes."""
        return self.sealing_private_key.public_key().public_bytes(_RAW, serialization.PublicFormat.Raw)

    @functools.cached_property
    def node_id(self) -> str:
        """26 characters of base32."""
        return node_id_of(self.tls_public_key_der)


def make_csr(keys: NodeKeys) -> bytes:
    """A certificate signing request (PKCS#10, DER) for the node's TLS key."""
    return make_signing_request(keys.tls_private_key, keys.node_id)


def make_record(keys: NodeKeys, role: Role, label: TrustLabel, *, now: float | None = None) -> pb.DeviceRecord:
    """The unsigned record of a node, issued at `now` (unix seconds, by default this moment)."""
    return pb.DeviceRecord(
        node_id=keys.node_id,
        role=role.number,
        label=label.number,
        tls_public_key=keys.tls_public_key_der,
        sealing_public_key=keys.sealing_public_key,
        issued_unix_s=int(time.time() if now is None else now),
    )


@dataclass(frozen=True)
class OwnerKey:
    """The owner's Ed25519 key: signs device records and what join tokens allow. Kept outside the coordinator."""

    private_key: ed25519.Ed25519PrivateKey

    @classmethod
    def generate(cls) -> OwnerKey:
        """A new owner."""
        return cls(ed25519.Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, path: Path) -> OwnerKey:
        """Read the key; raises NotFound, Corrupt, PermissionDenied."""
        return cls(_load_private(path, ed25519.Ed25519PrivateKey))

    def save(self, path: Path) -> None:
        """Write the key with mode 0600 into a folder of mode 0700."""
        make_private_folder(path.parent)
        write_secret(path, _private_pem(self.private_key))

    @property
    def public_key(self) -> bytes:
        """Ed25519, 32 bytes."""
        return _raw_public(self.private_key)

    def sign_record(self, record: pb.DeviceRecord) -> pb.SignedRecord:
        """Sign a device's record directly, without a token."""
        return _sign_record(self.private_key, record)

    def sign_grant(self, grant: pb.JoinGrant) -> pb.SignedGrant:
        """Sign what a join token allows."""
        body = grant.SerializeToString(deterministic=True)
        return pb.SignedGrant(grant=body, signature=self.private_key.sign(_GRANT_CONTEXT + body))


def _raw_public(key: ed25519.Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes(_RAW, serialization.PublicFormat.Raw)


def one_time_public_key(seed: bytes) -> bytes:
    """The Ed25519 public key (32 bytes) of a join token's seed (32 bytes)."""
    return _raw_public(ed25519.Ed25519PrivateKey.from_private_bytes(seed))


def _sign_record(key: ed25519.Ed25519PrivateKey, record: pb.DeviceRecord) -> pb.SignedRecord:
    body = record.SerializeToString(deterministic=True)
    return pb.SignedRecord(record=body, signature=key.sign(_RECORD_CONTEXT + body))


def sign_with_one_time(seed: bytes, grant: pb.SignedGrant, record: pb.DeviceRecord) -> pb.SignedRecord:
    """Sign a device's own record with its join token's one-time key (`seed`: 32 bytes), the grant attached."""
    signed = _sign_record(ed25519.Ed25519PrivateKey.from_private_bytes(seed), record)
    signed.grant.CopyFrom(grant)
    return signed


@dataclass(frozen=True)
class VerifiedRecord:
    """A device's record whose signatures lead to the owner's key."""

    node_id: str
    role: Role
    label: TrustLabel
    tls_public_key: bytes  # SubjectPublicKeyInfo, DER
    sealing_public_key: bytes  # X25519, 32 bytes
    issued_unix_s: int
    token_id: str | None  # of the grant that vouches for it; None when the owner signed it directly


def _verify(public_key: bytes, signature: bytes, message: bytes, what: str) -> None:
    if len(public_key) != 32 or len(signature) != 64:
        raise Unauthenticated(
            f"{what}: a key of {len(public_key)} and a signature of {len(signature)} bytes, expected 32 and 64"
        )
    try:
        ed25519.Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
    except (InvalidSignature, ValueError):
        raise Unauthenticated(f"{what}: the signature is not valid") from None


def verify_grant(signed: pb.SignedGrant, owner_public_key: bytes) -> pb.JoinGrant:
    """The grant, if the owner signed it; raises Unauthenticated with the reason. Expiry is for the caller to judge."""
    _verify(owner_public_key, signed.signature, _GRANT_CONTEXT + signed.grant, "join grant (owner's key)")
    try:
        grant = pb.JoinGrant.FromString(signed.grant)
    except DecodeError:
        raise Unauthenticated("join grant: it does not parse") from None
    if len(grant.one_time_public_key) != 32 or not grant.token_id:
        raise Unauthenticated("join grant: it names no token or no one-time key of 32 bytes")
    return grant


def verify_record(signed: pb.SignedRecord, owner_public_key: bytes) -> VerifiedRecord:
    """Check the chain owner → (grant → one-time key) → record and the record itself.

    `owner_public_key`: Ed25519, 32 bytes. Raises Unauthenticated with the reason.
    """
    if not signed.record or len(signed.record) > _RECORD_BYTES:
        raise Unauthenticated(f"device record: {len(signed.record)} bytes, expected 1 to {_RECORD_BYTES}")
    grant = verify_grant(signed.grant, owner_public_key) if signed.HasField("grant") else None
    signer = owner_public_key if grant is None else grant.one_time_public_key
    who = "owner's key" if grant is None else "one-time key"
    _verify(signer, signed.signature, _RECORD_CONTEXT + signed.record, f"device record ({who})")
    try:
        record = pb.DeviceRecord.FromString(signed.record)
    except DecodeError:
        raise Unauthenticated("device record: it does not parse") from None
    if grant is not None:
        if record.role != grant.role or record.label != grant.label:
            raise Unauthenticated("device record: its role or label is not what its join token allows")
        if record.issued_unix_s > grant.expires_unix_s:
            raise Unauthenticated(
                f"device record: issued {record.issued_unix_s - grant.expires_unix_s} s after its join token expired"
            )
    return _checked(record, None if grant is None else grant.token_id)


def _checked(record: pb.DeviceRecord, token_id: str | None) -> VerifiedRecord:
    if len(record.sealing_public_key) != 32:
        raise Unauthenticated(f"device record: a sealing key of {len(record.sealing_public_key)} bytes, expected 32")
    if record.node_id != node_id_of(record.tls_public_key):
        raise Unauthenticated("device record: the node id is not the one of its TLS key")
    try:
        key = serialization.load_der_public_key(record.tls_public_key)
    except ValueError:
        raise Unauthenticated("device record: the TLS key does not parse") from None
    if not (isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)):
        raise Unauthenticated("device record: the TLS key is not on curve P-256")
    try:
        role, label = Role.of(record.role), TrustLabel.of(record.label)
    except InvalidDocument as error:
        raise Unauthenticated(f"device record: {error.message}") from None
    return VerifiedRecord(
        record.node_id, role, label, record.tls_public_key, record.sealing_public_key, record.issued_unix_s, token_id
    )


def _pem_of(certificate_der: bytes) -> bytes:
    return x509.load_der_x509_certificate(certificate_der).public_bytes(_PEM)


@dataclass(frozen=True)
class Identity:
    """An enrolled node: the content of its `identity/` folder."""

    keys: NodeKeys
    record: pb.SignedRecord
    owner_public_key: bytes  # Ed25519, 32 bytes
    certificate_pem: bytes
    authority_pem: bytes
    name: str
    coordinator: str  # host:port of the fleet services

    @classmethod
    def of_der(
        cls,
        keys: NodeKeys,
        record: pb.SignedRecord,
        owner_public_key: bytes,
        *,
        certificate: bytes,
        authority: bytes,
        name: str,
        coordinator: str,
    ) -> Identity:
        """The same from certificates in DER."""
        return cls(keys, record, owner_public_key, _pem_of(certificate), _pem_of(authority), name, coordinator)

    @classmethod
    def load(cls, folder: Path) -> Identity:
        """Read and verify; raises NotFound when not enrolled, Corrupt, Unauthenticated, PermissionDenied."""
        keys = NodeKeys.load(folder)
        try:
            about = json.loads((folder / "node.json").read_bytes())
            identity = cls(
                keys,
                pb.SignedRecord.FromString((folder / "record.bin").read_bytes()),
                (folder / "owner.pub").read_bytes(),
                (folder / "tls.crt").read_bytes(),
                (folder / "authority.crt").read_bytes(),
                str(about["name"]),
                str(about["coordinator"]),
            )
            certificate = x509.load_pem_x509_certificate(identity.certificate_pem)
        except FileNotFoundError as error:
            raise NotFound(f"{folder} is not enrolled yet: {error.filename} is missing") from None
        except (ValueError, KeyError, TypeError, DecodeError) as error:
            raise Corrupt(f"{folder} does not hold a readable identity ({error}); enrol again") from error
        if identity.verified.tls_public_key != keys.tls_public_key_der:
            raise Corrupt(f"{folder}: the record is not of the key beside it; enrol again")
        if subject_public_key(certificate) != keys.tls_public_key_der:
            raise Corrupt(f"{folder}: the certificate is not of the key beside it; enrol again")
        return identity

    def save(self, folder: Path) -> None:
        """Write every file of the folder, keys included; `node.json`, whose presence means enrolled, comes last."""
        self.keys.save(folder)
        write_secret(folder / "record.bin", self.record.SerializeToString())
        write_secret(folder / "owner.pub", self.owner_public_key)
        write_secret(folder / "tls.crt", self.certificate_pem)
        write_secret(folder / "authority.crt", self.authority_pem)
        about = {"name": self.name, "coordinator": self.coordinator}
        write_secret(folder / "node.json", json.dumps(about, indent=2).encode() + b"\n")

    @property
    def node_id(self) -> str:
        """Of the TLS key."""
        return self.keys.node_id

    @functools.cached_property
    def verified(self) -> VerifiedRecord:
        """The own record, checked as any peer checks it; raises Unauthenticated."""
        return verify_record(self.record, self.owner_public_key)

    @property
    def role(self) -> Role:
        """As signed."""
        return self.verified.role

    def server_credentials(self) -> grpc.ServerCredentials:
        """Mutual TLS: a client certificate of the same authority is required."""
        pair = (self.keys.tls_private_pem, self.certificate_pem + self.authority_pem)
        return grpc.ssl_server_credentials([pair], self.authority_pem, require_client_auth=True)

    def enrolment_credentials(self) -> grpc.ServerCredentials:
        """Server TLS only, for the enrolment port; the chain presented ends with the authority, which clients pin."""
        pair = (self.keys.tls_private_pem, self.certificate_pem + self.authority_pem)
        return grpc.ssl_server_credentials([pair])

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Mutual TLS as a client."""
        return grpc.ssl_channel_credentials(self.authority_pem, self.keys.tls_private_pem, self.certificate_pem)


@dataclass(frozen=True)
class PeerIdentity:
    """Who calls, as its certificate says."""

    node_id: str
    role: Role


@functools.lru_cache(maxsize=1024)
def _peer_of_certificate(pem: bytes) -> PeerIdentity:
    certificate = x509.load_pem_x509_certificate(pem)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    node_id, role = parse_certificate_names(names.get_values_for_type(x509.DNSName))
    if node_id != node_id_of(subject_public_key(certificate)):
        raise Unauthenticated("the certificate's node id is not the one of its key")
    return PeerIdentity(node_id, role)


def peer_of(context: grpc.ServicerContext | grpc.aio.ServicerContext[Any, Any]) -> PeerIdentity:
    """The caller by its TLS certificate, which the handshake has verified; raises Unauthenticated."""
    certificates = list(cast("Mapping[str, Iterable[bytes]]", context.auth_context()).get("x509_pem_cert", ()))
    if len(certificates) != 1:
        raise Unauthenticated("the call carries no client certificate")
    try:
        return _peer_of_certificate(certificates[0])
    except (ValueError, x509.ExtensionNotFound):
        raise Unauthenticated("the client certificate does not parse or names nobody") from None
