"""The certificate authority: P-256 throughout (gRPC's TLS refuses Ed25519 leaves), certificates of 90 days.

A certificate says which key speaks as which node in which role. It is not what devices trust each other by: that is the
owner's signature on the device's record.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ganglion.proto import identity_pb2
from ganglion.wire.certificates import authority_pin, certificate_names
from ganglion.wire.errors import Corrupt, InvalidDocument, NotFound
from ganglion.wire.home import Home, read_secret, write_secret
from ganglion.wire.identity import Identity, NodeKeys, Role, TrustLabel, make_csr, make_record, node_id_of

LIFETIME_DAYS: Final = 90
AUTHORITY_DAYS: Final = 3650
CLOCK_TOLERANCE_S: Final = 300  # certificates are valid from this long ago: home clocks differ
CSR_BYTES: Final = 4096

_DER: Final = serialization.Encoding.DER
_PEM: Final = serialization.Encoding.PEM


@dataclass(frozen=True)
class SigningRequest:
    """A CSR whose own signature holds: whoever sent it has the key. tls_public_key: SubjectPublicKeyInfo, DER."""

    tls_public_key: bytes
    node_id: str


@dataclass(frozen=True)
class Issued:
    """A certificate (DER) and its serial in hexadecimal."""

    certificate: bytes
    serial: str


def read_csr(der: bytes) -> SigningRequest:
    """Parse and check a PKCS#10 request (DER, at most 4 KiB); raises InvalidDocument."""
    if len(der) > CSR_BYTES:
        raise InvalidDocument(f"signing request: {len(der)} bytes, at most {CSR_BYTES} are accepted")
    try:
        csr = x509.load_der_x509_csr(der)
        key = csr.public_key()
        valid = csr.is_signature_valid
    except (ValueError, TypeError, InvalidSignature) as error:
        raise InvalidDocument(f"signing request: it does not parse ({error})") from error
    except Exception as error:  # UnsupportedAlgorithm and kin have no common base
        raise InvalidDocument(f"signing request: not supported ({type(error).__name__})") from error
    if not (isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)):
        raise InvalidDocument("signing request: its key is not on curve P-256")
    if not valid:
        raise InvalidDocument("signing request: its signature is not by its own key")
    public = key.public_bytes(_DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return SigningRequest(public, node_id_of(public))


class Authority:
    """The authority's key and certificate, and what it issues."""

    def __init__(
        self,
        key: ec.EllipticCurvePrivateKey,
        certificate: x509.Certificate,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._key = key
        self._certificate = certificate
        self._clock = clock

    @classmethod
    def create(cls, clock: Callable[[], float] = time.time) -> Authority:
        """A new authority."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Ganglion authority")])
        now = _utc(clock())
        usage = _key_usage(signs_certificates=True)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(seconds=CLOCK_TOLERANCE_S))
            .not_valid_after(now + datetime.timedelta(days=AUTHORITY_DAYS))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        return cls(key, certificate, clock)

    @classmethod
    def open(cls, home: Home, clock: Callable[[], float] = time.time) -> Authority:
        """Load `authority.key` and `authority.crt` of the home (0600), or make them; raises Corrupt."""
        key_path, certificate_path = home.path / "authority.key", home.path / "authority.crt"
        if not key_path.exists():
            made = cls.create(clock)
            # The certificate first: a key beside it means that both are whole.
            write_secret(certificate_path, made.certificate_pem)
            private = serialization.PrivateFormat.PKCS8
            write_secret(key_path, made._key.private_bytes(_PEM, private, serialization.NoEncryption()))
            return made
        try:
            key = serialization.load_pem_private_key(read_secret(key_path), password=None)
            certificate = x509.load_pem_x509_certificate(read_secret(certificate_path))
        except FileNotFoundError as error:
            raise Corrupt(
                f"{error.filename} is missing beside its key: restore it from a copy of {home.path}"
            ) from error
        except ValueError as error:
            raise Corrupt(f"{key_path} or {certificate_path} does not parse ({error}): restore them") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise Corrupt(f"{certificate_path} is not of the key {key_path}: restore both from one copy")
        return cls(key, certificate, clock)

    @property
    def certificate_pem(self) -> bytes:
        """The authority's own certificate, PEM."""
        return self._certificate.public_bytes(_PEM)

    @property
    def certificate_der(self) -> bytes:
        """The authority's own certificate, DER."""
        return self._certificate.public_bytes(_DER)

    @property
    def pin(self) -> bytes:
        """What join tokens pin: the first 16 bytes of SHA-256 of the authority's public key."""
        return authority_pin(self._certificate)

    def issue(self, request: SigningRequest, role: Role) -> Issued:
        """A certificate for the request's key as its node id in `role`, for 90 days."""
        now = _utc(self._clock())
        serial = x509.random_serial_number()
        names = [x509.DNSName(name) for name in certificate_names(request.node_id, role)]
        key = serialization.load_der_public_key(request.tls_public_key)
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise InvalidDocument("signing request: its key is not on curve P-256")
        authority_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        usages = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, request.node_id)]))
            .issuer_name(self._certificate.subject)
            .public_key(key)
            .serial_number(serial)
            .not_valid_before(now - datetime.timedelta(seconds=CLOCK_TOLERANCE_S))
            .not_valid_after(now + datetime.timedelta(days=LIFETIME_DAYS))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(usages, critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(authority_id, critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return Issued(certificate.public_bytes(_DER), f"{serial:x}")


def coordinator_identity(home: Home, authority: Authority, owner_public_key: bytes, address: str) -> Identity:
    """The coordinator's own identity folder: its keys are kept, its certificate is new at every start.

    Its record is not signed: the owner's key is not here, and devices trust the coordinator for nothing but to plan.
    """
    try:
        keys = NodeKeys.load(home.identity)
    except NotFound:
        keys = NodeKeys.generate()
    issued = authority.issue(read_csr(make_csr(keys)), Role.COORDINATOR)
    record = make_record(keys, Role.COORDINATOR, TrustLabel.STRANGER)
    identity = Identity.of_der(
        keys,
        identity_pb2.SignedRecord(record=record.SerializeToString()),
        owner_public_key,
        certificate=issued.certificate,
        authority=authority.certificate_der,
        name="coordinator",
        coordinator=address,
    )
    identity.save(home.identity)
    return identity


def _utc(unix_s: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(unix_s, datetime.UTC)


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )
