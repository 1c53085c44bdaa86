"""Drafting in a lead's worker: what guesses there, and sessions for a model that verifies elsewhere.

A lead guesses for its own model (`Guessing.drafter`), or, in a drafting deployment, for another one: its engine then
drafts what `DraftingFor` has verified, beside the ordinary sessions of its own model.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from google.protobuf.message import DecodeError

from ganglion.agent import control
from ganglion.agent.executor.embedding import EmbeddingTable
from ganglion.agent.executor.loader import Shard, load_shard
from ganglion.agent.executor.prepacked import Prepacked
from ganglion.agent.speculation.drafters import Drafter, ModelDrafter, NGram, Propose
from ganglion.agent.speculation.early import early_layers, early_shard
from ganglion.agent.speculation.engine import DraftEngine
from ganglion.agent.speculation.http.openai import HttpVerifier
from ganglion.agent.speculation.http.rounds import RoundVerifier, round_base
from ganglion.agent.speculation.http.texts import TokenTexts
from ganglion.agent.speculation.hybrid import Hybrid, Local, Policy, Target
from ganglion.agent.speculation.verifier import AgentVerifier, Verifier
from ganglion.proto import identity_pb2, lane_pb2
from ganglion.wire.errors import GanglionError, InvalidDocument, InvalidRequest, Unsupported
from ganglion.wire.identity import Identity
from ganglion.wire.limits import MANIFEST_BYTES
from ganglion.wire.nouns import (
    TOKENIZER_FILE,
    Drafting,
    Manifest,
    Plan,
    Range,
    Stage,
    digest,
    from_json,
    tokenizer_digest,
)
from ganglion.wire.shares import OpenPiece, whole_share

log = logging.getLogger(__name__)

VERIFIER_KEY: Final = "GANGLION_VERIFIER_KEY"  # of an HTTP verifier; read here, it goes to that one alone
ROUNDS_S: Final = 5.0  # for another replica to answer a round; after that the policy for its absence decides

_AWAY: Final = {"wait": lane_pb2.AWAY_WAIT, "local": lane_pb2.AWAY_LOCAL, "fail": lane_pb2.AWAY_FAIL}
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Guessing:
    """What guesses at a lead: for its own model, or the engine that drafts for another one. Neither: nothing does.

    texts: of the tokens, where OpenAI's API verifies.
    """

    drafter: Drafter | None = None
    engine: DraftEngine | None = None
    texts: TokenTexts | None = None


@dataclass(frozen=True, slots=True)
class Room:
    """Where a lead loads from and to."""

    open_piece: OpenPiece
    folder: Path
    prepacked: Prepacked
    progress: Progress


def load_guessing(
    manifest: Manifest, plan: Plan, shard: Shard | None, embedding: EmbeddingTable, *, drafter_json: bytes, room: Room
) -> Guessing:
    """What the plan's lead guesses with. `drafter_json`: the manifest of another model, where the plan names one.

    Raises InvalidDocument, and what loading raises.
    """
    wanted = plan.drafter
    if wanted is None:
        return Guessing()
    if wanted.kind == "ngram":
        return Guessing(_within(NGram(), wanted.window_tokens))
    if plan.drafting is not None:
        model, parts = manifest, shard or _load_whole(manifest, plan.lead, room)
    elif wanted.kind == "early":
        model = early_layers(manifest, wanted.layers)
        whole = shard if len(plan.devices) == 1 else None
        parts = early_shard(whole, model) if whole is not None else _load_whole(model, plan.lead, room)
    else:
        model = from_json(Manifest, drafter_json, limit_bytes=MANIFEST_BYTES)
        if digest(model) != wanted.manifest_digest:
            raise InvalidDocument("the plan is for another drafter")
        parts = _load_whole(model, plan.lead, room)
        embedding = EmbeddingTable(model, room.open_piece)
    engine = DraftEngine(
        model, parts, room.open_piece, embedding, slots=wanted.slots, context=wanted.context, chunk=plan.chunk
    )
    if plan.drafting is not None:
        by_text = plan.drafting.url and round_base(plan.drafting.url) is None
        return Guessing(engine=engine, texts=_texts(manifest, room.open_piece) if by_text else None)
    return Guessing(_within(ModelDrafter(engine), wanted.window_tokens))


def _texts(manifest: Manifest, open_piece: OpenPiece) -> TokenTexts:
    piece = manifest.tokenizer.get(TOKENIZER_FILE)
    if piece is None:
        raise Unsupported(f"{manifest.name} has no {TOKENIZER_FILE}, by which tokens are told to an HTTP verifier")
    geometry = manifest.geometry
    return TokenTexts(bytes(open_piece(piece.digest)), geometry.vocab, eos_ids=manifest.eos_ids, name=manifest.name)


def _load_whole(manifest: Manifest, device: str, room: Room) -> Shard:
    layers = Range(0, manifest.geometry.layers)
    share = whole_share(manifest, device, layers)
    stage = Stage(layers=layers, shares=(share,), topology="mesh")
    folder = room.folder / "drafter"
    folder.mkdir(mode=0o700, exist_ok=True)
    return load_shard(
        manifest,
        stage,
        share,
        open_piece=room.open_piece,
        folder=folder,
        progress=room.progress,
        prepacked=room.prepacked,
    )


def _within(drafter: Drafter, window_tokens: int) -> Drafter:
    return _Narrow(drafter, window_tokens) if window_tokens else drafter


class _Narrow:
    """A drafter that proposes at most so many tokens for a session at a time."""

    def __init__(self, drafter: Drafter, window_tokens: int) -> None:
        self.name = drafter.name
        self._drafter = drafter
        self._most = window_tokens

    def propose(self, asks: Sequence[Propose]) -> list[list[int]]:
        """See Drafter."""
        return self._drafter.propose([replace(ask, most=min(ask.most, self._most)) for ask in asks])

    def close(self, session: int) -> None:
        """See Drafter."""
        self._drafter.close(session)

    def token_s(self, batch: int) -> float:
        """See Drafter."""
        return self._drafter.token_s(batch)


class DraftingFor:
    """A drafting deployment's sessions for the model that answers; its verifier is told and may change at any time."""

    def __init__(
        self, identity: Identity, manifest: Manifest, drafting: Drafting, guessing: Guessing, local: Local
    ) -> None:
        """`manifest`: of the drafter; `local`: sessions of it, as its own lead serves them."""
        self._identity = identity
        self._texts, self._bos_id = guessing.texts, manifest.bos_id
        self._drafting = drafting
        self._verifier: Verifier | None = None
        self._from: control.Verifier | None = None  # that the present verifier was made of
        self._closing: set[asyncio.Task[None]] = set()
        # Until something is told of the model: it has the drafter's ids.
        target = Target(
            name=drafting.target,
            manifest_digest="",
            numeric_class="",
            tokenizer_digest=tokenizer_digest(manifest),
            vocab=manifest.geometry.vocab,
            context=manifest.geometry.context,
            eos_ids=frozenset(manifest.eos_ids),
        )
        policy = Policy(
            mode=None if drafting.mode == "auto" else drafting.mode,
            away=_AWAY[drafting.away],
            wait_s=drafting.wait_s,
            window_tokens=drafting.window_tokens,
        )
        self._hybrid = Hybrid(guessing.engine, lambda: self._verifier, local, target, policy)

    def told(self, verifier: control.Verifier) -> None:
        """Who verifies from now on; sessions that another one verifies go on by the policy for its absence."""
        known = self._hybrid.target
        self._hybrid.target = Target(
            name=known.name,
            manifest_digest=verifier.manifest_digest or known.manifest_digest,
            numeric_class=verifier.numeric_class or known.numeric_class,
            tokenizer_digest=known.tokenizer_digest,
            vocab=verifier.vocab or known.vocab,
            context=verifier.context or known.context,
            eos_ids=frozenset(verifier.eos_ids) or known.eos_ids,
        )
        if self._verifier is not None and verifier == self._from:
            return
        self._close_verifier()
        self._from = verifier
        try:
            self._verifier = self._made(verifier)
        except GanglionError as error:
            log.warning("nobody verifies for %s: %s", known.name, error.message)
            return
        if self._verifier is None:
            log.info("nobody verifies for %s: %s", known.name, verifier.why_away)
        else:
            log.info("%s is verified by %s", known.name, self._verifier.name)

    def _made(self, verifier: control.Verifier) -> Verifier | None:
        key = os.environ.get(VERIFIER_KEY) or None
        if (base := round_base(verifier.url)) is not None:
            return RoundVerifier(base, key=key, patience_s=ROUNDS_S)
        if verifier.url and self._texts is not None:
            return HttpVerifier(
                verifier.url,
                self._texts,
                model=self._drafting.target,
                key=key,
                bos_id=self._bos_id,
                tokenizer_digest=self._hybrid.target.tokenizer_digest,
            )
        if verifier.lead is None:
            return None
        try:
            record = identity_pb2.SignedRecord.FromString(verifier.lead.record)
        except DecodeError:
            raise InvalidDocument(f"the record of {verifier.lead.name} does not parse") from None
        peer = identity_pb2.Peer(record=record, address=verifier.lead.address, name=verifier.lead.name)
        return AgentVerifier(self._identity, peer, verifier.lead_deployment, verifier.lead_epoch)

    def serve(self, request: lane_pb2.Open, client: str) -> AsyncGenerator[lane_pb2.SessionEvent, None]:
        """Events of one session for the model that answers; raises InvalidRequest for another one."""
        if request.target != self._drafting.target:
            raise InvalidRequest(
                f"this device drafts for {self._drafting.target}, not for {request.target[:128]!r}", param="target"
            )
        if request.HasField("choosing"):
            raise InvalidRequest(
                f"choosing is set in a session for {self._drafting.target}, for which this device drafts",
                param="choosing",
            )
        return self._hybrid.serve(request, client)

    async def close(self) -> None:
        """Stop drafting and leave the verifier."""
        self._close_verifier()
        await self._hybrid.close()
        await asyncio.gather(*self._closing, return_exceptions=True)

    def _close_verifier(self) -> None:
        verifier, self._verifier = self._verifier, None
        if isinstance(verifier, AgentVerifier | HttpVerifier | RoundVerifier):
            task = asyncio.create_task(verifier.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)


def refuse_target(request: lane_pb2.Open) -> None:
    """Raise InvalidRequest for a session for another model, at a lead that drafts for none."""
    if request.target:
        raise InvalidRequest(f"this lead does not draft for {request.target[:128]!r}", param="target")
