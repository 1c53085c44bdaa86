"""A device in a process of its own, for tests that kill it: `peer.py serve|fetch IDENTITY STORE [...]`.

serve [bytes per second]: serves the store and prints its address. fetch NODE_ID ADDRESS DIGEST:SIZE...: fetches.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from ganglion.agent.store import PieceStore
from ganglion.agent.store.bandwidth import Throttle
from ganglion.agent.store.fetch import Holder, PieceFetcher
from ganglion.agent.store.service import ALLOWED, PieceService
from ganglion.wire import rpc
from ganglion.wire.identity import Identity
from ganglion.wire.nouns import PieceRef


async def serve(identity: Identity, store: PieceStore, bytes_per_s: str = "0") -> None:
    bound = rpc.server(
        identity, bind="127.0.0.1", port=0, what="the piece port", knob="--piece-port", allowed=ALLOWED, kind="tensor"
    )
    PieceService(store, "", Throttle(int(bytes_per_s))).add_to(bound.server)
    await bound.start()
    print(bound.address, flush=True)
    await asyncio.Event().wait()


async def fetch(identity: Identity, store: PieceStore, node_id: str, address: str, *pieces: str) -> None:
    refs = [PieceRef(digest, int(size)) for digest, size in (piece.split(":") for piece in pieces)]
    fetcher = PieceFetcher(store, identity, [Holder(node_id, address, "holder")])
    print("fetching", flush=True)
    await fetcher.fetch(refs)


if __name__ == "__main__":
    what, identity_folder, store_folder, *rest = sys.argv[1:]
    work = {"serve": serve, "fetch": fetch}[what]
    asyncio.run(work(Identity.load(Path(identity_folder)), PieceStore(Path(store_folder)), *rest))
