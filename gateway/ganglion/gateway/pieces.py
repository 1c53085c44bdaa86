"""A model's tokenizer files: pieces fetched from the devices that hold them, checked, kept in the gateway's home."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import grpc
import msgspec

from ganglion.gateway.deployments import ModelFacts
from ganglion.gateway.tokenizing import CONFIG_FILE, SPECIALS_FILE, TEMPLATE_FILE, TOKENIZER_FILE, ModelTokenizer
from ganglion.gateway.trials import try_tokenizer
from ganglion.proto import identity_pb2, pieces_pb2, pieces_pb2_grpc
from ganglion.wire import rpc
from ganglion.wire.errors import Corrupt, GanglionError, NotFound, Unavailable
from ganglion.wire.home import Home, make_private_folder, write_secret
from ganglion.wire.identity import Identity, verify_record
from ganglion.wire.limits import CONNECT_S
from ganglion.wire.nouns import PieceRef

WANTED_BYTES: Mapping[str, int] = {  # file -> the most that is accepted
    TOKENIZER_FILE: 64 << 20,
    CONFIG_FILE: 4 << 20,
    SPECIALS_FILE: 1 << 20,
    TEMPLATE_FILE: 1 << 20,
}
FETCH_S = 120.0

_log = logging.getLogger(__name__)


class Tokenizers:
    """Loaded tokenizers by model; each is fetched and loaded once, however many requests wait for it."""

    def __init__(self, home: Home, identity: Identity) -> None:
        self._folder = make_private_folder(home.path / "tokenizers")
        self._identity = identity
        self._loads: dict[str, asyncio.Task[ModelTokenizer]] = {}

    def state(self, facts: ModelFacts) -> str | None:
        """None when it is loaded, else what is going on, for a person."""
        load = self._loads.get(facts.digest)
        if load is None or not load.done():
            return "its tokenizer is being fetched"
        error = None if load.cancelled() else load.exception()
        return None if error is None else f"its tokenizer cannot be had: {_message(error)}"

    def begin(self, facts: ModelFacts, holders: Sequence[identity_pb2.Peer]) -> asyncio.Task[ModelTokenizer]:
        """The running or finished load; one that failed is begun anew."""
        load = self._loads.get(facts.digest)
        if load is None or (load.done() and (load.cancelled() or load.exception() is not None)):
            load = asyncio.create_task(self._load(facts, tuple(holders)))
            load.add_done_callback(_note)
            self._loads[facts.digest] = load
        return load

    async def get(self, facts: ModelFacts, holders: Sequence[identity_pb2.Peer]) -> ModelTokenizer:
        """The tokenizer; raises Unavailable, NotFound or Corrupt."""
        # A request that leaves must not end the load for the others.
        return await asyncio.shield(self.begin(facts, holders))

    def keep(self, digests: frozenset[str]) -> None:
        """Forget what is loaded of other models; the files stay."""
        for digest in self._loads.keys() - digests:
            self._loads.pop(digest).cancel()

    async def close(self) -> None:
        """End every load."""
        loads = list(self._loads.values())
        self.keep(frozenset())
        await asyncio.gather(*loads, return_exceptions=True)

    async def _load(self, facts: ModelFacts, holders: Sequence[identity_pb2.Peer]) -> ModelTokenizer:
        wanted = {name: facts.tokenizer[name] for name in WANTED_BYTES if name in facts.tokenizer}
        if TOKENIZER_FILE not in wanted:
            raise NotFound(f"the model's manifest names no {TOKENIZER_FILE}: text cannot be turned into tokens")
        folder = make_private_folder(self._folder / _set_digest(wanted))
        for name, piece in wanted.items():
            if not await asyncio.to_thread(_holds, folder / name, piece):
                content = await self._fetch(name, piece, holders)
                await asyncio.to_thread(write_secret, folder / name, content)
        await try_tokenizer(folder)
        return await asyncio.to_thread(ModelTokenizer, folder)

    async def _fetch(self, name: str, piece: PieceRef, holders: Sequence[identity_pb2.Peer]) -> bytes:
        if piece.size > WANTED_BYTES[name]:
            raise Corrupt(f"{name} would have {piece.size} bytes; at most {WANTED_BYTES[name]} are accepted")
        troubles: list[str] = []
        for holder in holders:
            try:
                async with asyncio.timeout(FETCH_S):
                    return await self._fetch_from(holder, name, piece)
            except TimeoutError:
                troubles.append(f"{holder.name}: not within {FETCH_S:g} s")
            except grpc.RpcError as error:
                troubles.append(f"{holder.name}: {rpc.to_error(error, holder.address).message}")
            except GanglionError as error:
                troubles.append(f"{holder.name}: {error.message}")
        tried = "; ".join(troubles) or "no device that can be reached holds it"
        raise Unavailable(f"the model's {name} cannot be fetched ({tried})")

    async def _fetch_from(self, holder: identity_pb2.Peer, name: str, piece: PieceRef) -> bytes:
        record = verify_record(holder.record, self._identity.owner_public_key)
        parts: list[bytes] = []
        size = 0
        peer = (record.node_id, record.role)
        async with rpc.channel(holder.address, self._identity, peer=peer, kind="tensor") as channel:
            stub = pieces_pb2_grpc.PiecesStub(channel)  # type: ignore[no-untyped-call]
            async with asyncio.timeout(CONNECT_S):
                rpc.check_hello(await stub.Greet(rpc.hello()))
            async for chunk in stub.Fetch(pieces_pb2.FetchRequest(digest=piece.digest)):
                size += len(chunk.data)
                if size > piece.size:
                    break
                parts.append(chunk.data)
        content = b"".join(parts)
        if size != piece.size or hashlib.sha256(content).hexdigest() != piece.digest:
            raise Corrupt(
                f"it sent {size} bytes that are not {name} ({piece.size} bytes, SHA-256 {piece.digest[:12]}...)"
            )
        return content


def _holds(path: Path, piece: PieceRef) -> bool:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() == piece.digest
    except FileNotFoundError:
        return False


def _set_digest(files: Mapping[str, PieceRef]) -> str:
    return hashlib.sha256(msgspec.json.encode(files, order="sorted")).hexdigest()


def _message(error: BaseException) -> str:
    return error.message if isinstance(error, GanglionError) else type(error).__name__


def _note(load: asyncio.Task[ModelTokenizer]) -> None:
    error = None if load.cancelled() else load.exception()
    if error is not None:
        _log.warning("a tokenizer was not loaded: %s", _message(error))
