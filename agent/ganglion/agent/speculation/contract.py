"""What a drafting device and a verifier must have in common before anything is drafted. Pure."""

from __future__ import annotations

import re

from ganglion.proto import lane_pb2
from ganglion.wire.errors import InvalidRequest, Unsupported
from ganglion.wire.nouns import Manifest, tokenizer_digest

_DIGEST_BYTES = 32


def check_contract(contract: lane_pb2.Contract, manifest: Manifest, manifest_digest: str) -> None:
    """Whether the verifier of `manifest` (whose digest it is, 64 hexadecimal digits) is the one that a device means.

    Raises InvalidRequest for what does not parse, Unsupported for what differs; `param` names the field.
    """
    if not re.fullmatch("[0-9a-f]{64}", contract.manifest_digest):
        raise InvalidRequest(
            f"the contract names the model by {contract.manifest_digest[:80]!r}, expected 64 hexadecimal digits",
            param="contract.manifest_digest",
        )
    if len(contract.tokenizer_digest) != _DIGEST_BYTES:
        raise InvalidRequest(
            f"the contract names the tokenizer by {len(contract.tokenizer_digest)} bytes, expected {_DIGEST_BYTES}",
            param="contract.tokenizer_digest",
        )
    if contract.miss not in lane_pb2.Miss.values():
        raise InvalidRequest(f"the contract asks for miss {contract.miss}, which is none", param="contract.miss")
    tokenizer = tokenizer_digest(manifest)
    for field, asked, held in (
        ("manifest_digest", contract.manifest_digest, manifest_digest),
        ("numeric_class", contract.numeric_class[:80], manifest.numeric_class.name),
        ("tokenizer_digest", contract.tokenizer_digest.hex(), tokenizer.hex()),
        ("vocab", contract.vocab, manifest.geometry.vocab),
    ):
        if asked != held:
            raise Unsupported(
                f"the device drafts for {field} {asked}, this verifier ({manifest.name}) has {held};"
                " draft for what is deployed here, with a drafter of the same tokenizer",
                param=f"contract.{field}",
            )


def draws_as(accepted: str, asked: str) -> bool:
    """Whether a verifier in class `accepted` is what a contract of class `asked` means: that class, or the same formats
    by other kernels, which say so ("int4-32-fast@torch-cuda-bf16") and are never exact. Empty: any is meant.
    """
    if asked in ("", accepted):
        return True
    formats, at, _ = accepted.partition("@")
    return bool(at) and formats == f"{asked.removesuffix('-exact').removesuffix('-fast')}-fast"
