"""Prefixes by name: a SHA-256 chain over ids, by which a drafting device and a verifier speak of the same text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np

NAME_BYTES: Final = 8  # of a digest, as it travels
_ROOT: Final = b"ganglion.v1 prefix"


class Prefix:
    """The digest of a sequence of ids; immutable. Names are compared, digests are chained."""

    __slots__ = ("_digest", "name")

    def __init__(self, digest: bytes) -> None:
        self._digest = digest
        self.name = digest[:NAME_BYTES]

    @staticmethod
    def of(tokens: Sequence[int]) -> Prefix:
        """Where a session's chain begins: its prompt at once. Chains of different beginnings do not meet."""
        return Prefix(hashlib.sha256(_ROOT + np.asarray(tokens, "<u4").tobytes()).digest())

    def then(self, token: int) -> Prefix:
        """One token further."""
        return Prefix(hashlib.sha256(self._digest + token.to_bytes(4, "little")).digest())

    def through(self, tokens: Iterable[int]) -> Prefix:
        """Several tokens further."""
        prefix = self
        for token in tokens:
            prefix = prefix.then(token)
        return prefix
