"""The dialect of rounds: what a device and a verifier over HTTP say to each other, as JSON.

    GET  /verify   Facts, of the model that verifies
    POST /verify   Round -> Rounded, one pass of the model for one request

A session's state at a verifier is a cache. A round names the text that it goes on from, by its length and digest; a
verifier that does not hold it (another replica, or one that is new) says `unknown`, and the same round is asked again
with `begin`: the whole text. Tokens are drawn with keyed noise, so it is the same text wherever and however often it is
drawn, and a round may be repeated without harm.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec

PATH: Final = "/verify"
SESSION_HEADER: Final = "x-session-id"  # by which a router sends a session's rounds to one replica

Id = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]
Name = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{16}$")]
Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What a contract with this verifier says, and how far it goes.

    manifest_digest, tokenizer_digest: SHA-256 in hexadecimal. numeric_class: of the model; the one of the kernels that
    run it is told by Accepted. vocab: ids are below it. context: tokens of a session at most. eos_ids: end an answer.
    """

    model: Annotated[str, msgspec.Meta(max_length=128)]
    manifest_digest: Digest
    numeric_class: Annotated[str, msgspec.Meta(max_length=80)]
    tokenizer_digest: Digest
    vocab: Id
    context: Id
    eos_ids: tuple[Id, ...] = ()


class Round(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a device asks.

    at, prefix: the text so far, its tokens and the name of their `Prefix.of`, in hexadecimal. window: drafted tokens
    that follow; empty: one token without (with `own`: after the verifier's drafts); None: no pass, only `begin`.
    begin: an Open with its contract, as protobuf's JSON, whose prompt is the text so far. close: nothing more comes.
    """

    session: Annotated[str, msgspec.Meta(pattern="^[0-9A-Za-z._-]{1,64}$")]
    at: Id
    prefix: Name
    window: tuple[Id, ...] | None = None
    own: bool = False
    begin: dict[str, Any] | None = None
    close: bool = False


class Rounded(msgspec.Struct, frozen=True, kw_only=True):
    """What the verifier answers.

    outcomes: every pass since the text of the round, each a Tokens with its outcome as protobuf's JSON. at, prefix: the
    text after them. finished: a Finished, when the answer is over. accepted: an Accepted, after `begin`. replica: who.
    """

    replica: str
    unknown: bool = False
    outcomes: tuple[dict[str, Any], ...] = ()
    at: Id = 0
    prefix: str = ""
    finished: dict[str, Any] | None = None
    accepted: dict[str, Any] | None = None
