"""Drafting: what guesses at a lead, and how a device drafts for a model that verifies elsewhere."""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal

import msgspec

from ganglion.wire.limits import WINDOW_TOKENS
from ganglion.wire.nouns.document import Document
from ganglion.wire.nouns.manifest import TOKENIZER_FILE, Count, Manifest, PieceRef

DraftMode = Literal["auto", "plain", "own", "sync", "ahead", "edge", "branch"]
AwayPolicy = Literal["wait", "local", "fail"]
Window = Annotated[int, msgspec.Meta(ge=0, le=WINDOW_TOKENS)]

_TOKENIZER = b"ganglion.v1 tokenizer"


class Drafter(Document, frozen=True, kw_only=True):
    """What guesses at a lead, and what it may hold.

    kind: "ngram" holds no model; "model" is the one of `manifest_digest` (in a drafting deployment the plan's own);
    "early" the first `layers` layers of the plan's model with its head. slots: sequences whose key-value state is held,
    each of up to `context` tokens; of n-grams 0. window_tokens: drafted tokens of one pass at most; 0: as measured.
    """

    kind: Literal["ngram", "model", "early"]
    manifest_digest: Annotated[str, msgspec.Meta(pattern="^([0-9a-f]{64})?$")] = ""
    layers: Count = 0
    slots: Count = 0
    context: Count = 0
    window_tokens: Window = 0


class Drafting(Document, frozen=True, kw_only=True):
    """How a device drafts: for which model, and what it does when that is away.

    target: name of the model that answers. url: of an HTTP verifier; empty: the deployment of that name. wait_s: for a
    verifier to come back, where `away` is "wait". window_tokens: 0: as measured. memory_bytes: of this device for
    drafting at most; 0: its budget. offered: the device offered it, nobody asked.
    """

    target: Annotated[str, msgspec.Meta(max_length=128)] = ""
    mode: DraftMode = "auto"
    away: AwayPolicy = "wait"
    wait_s: Annotated[float, msgspec.Meta(ge=0, le=86400)] = 60.0
    window_tokens: Window = 0
    memory_bytes: Annotated[int, msgspec.Meta(ge=0, le=2**50)] = 0
    url: Annotated[str, msgspec.Meta(pattern="^(https?://[^\\s]{1,500})?$")] = ""
    offered: bool = False


def id_files(manifest: Manifest) -> dict[str, PieceRef]:
    """The files that say what ids mean: tokenizer.json, or all of the tokenizer's where there is none.

    Templates and defaults beside it may differ between models of one family.
    """
    one = manifest.tokenizer.get(TOKENIZER_FILE)
    return dict(manifest.tokenizer) if one is None else {TOKENIZER_FILE: one}


def tokenizer_digest(manifest: Manifest) -> bytes:
    """What ids mean: SHA-256 (32 bytes) over names and digests of the files that say it, in order of names."""
    found = hashlib.sha256(_TOKENIZER)
    for name, piece in sorted(id_files(manifest).items()):
        found.update(len(name.encode()).to_bytes(4, "little") + name.encode() + bytes.fromhex(piece.digest))
    return found.digest()


def drafting_fault(target: Manifest, drafter: Manifest) -> str:
    """Why `drafter` cannot draft for `target`, naming what differs; "" when it can."""
    ours, theirs = drafter.geometry.vocab, target.geometry.vocab
    if ours != theirs:
        return f"{drafter.name} has a vocabulary of {ours} tokens, {target.name} of {theirs}"
    one, other = id_files(drafter), id_files(target)
    differing = [name for name in sorted(one.keys() | other.keys()) if one.get(name) != other.get(name)]
    if differing:
        return f"{drafter.name} and {target.name} differ in {', '.join(differing)}: they must have one tokenizer"
    return ""
