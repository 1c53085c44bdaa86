"""Documents: frozen, strict types with one canonical JSON form."""

from __future__ import annotations

import hashlib
from typing import TypeVar

import msgspec

from ganglion.wire.errors import InvalidDocument


class Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of every noun that travels; fields are validated when decoded, never again."""


D = TypeVar("D", bound=Document)


def to_json(document: Document) -> bytes:
    """Canonical JSON: fields in order of declaration, no white space; equal documents give equal bytes."""
    return msgspec.json.encode(document, order="deterministic")


def from_json(kind: type[D], data: bytes | str, *, limit_bytes: int) -> D:
    """Parse `data` (at most `limit_bytes`) as `kind`; raises InvalidDocument naming the field and what was expected."""
    if len(data) > limit_bytes:
        raise InvalidDocument(f"{kind.__name__}: {len(data)} bytes, at most {limit_bytes} are accepted")
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidDocument(f"{kind.__name__}: {error}") from error
    except ValueError as error:  # raised by a __post_init__
        raise InvalidDocument(f"{kind.__name__}: {error}") from error


def digest(document: Document) -> str:
    """SHA-256 of the canonical JSON, 64 lower-case hexadecimal digits."""
    return hashlib.sha256(to_json(document)).hexdigest()
