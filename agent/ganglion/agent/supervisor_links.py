"""Measuring links: small and large round trips over the piece services of other devices."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from typing import Final

import grpc

from ganglion.agent.store.fetch import Holder
from ganglion.proto import fleet_pb2, pieces_pb2, pieces_pb2_grpc
from ganglion.wire.certificates import Role
from ganglion.wire.errors import GanglionError
from ganglion.wire.hello import check_hello, hello
from ganglion.wire.identity import Identity
from ganglion.wire.limits import CONNECT_S, PIECE_CHUNK_BYTES
from ganglion.wire.rpc import channel

SMALL_TRIPS: Final = 9
LARGE_S: Final = 0.4  # how long large round trips go on at most, after the first
LARGE_TRIPS: Final = 8
TRIP_S: Final = 10.0


async def measure_links(peers: Sequence[Holder], identity: Identity) -> list[fleet_pb2.Link]:
    """One link after the other, so that they do not disturb each other; what does not answer is not reachable."""
    return [await measure_link(peer, identity) for peer in peers if peer.node_id != identity.node_id]


async def measure_link(peer: Holder, identity: Identity) -> fleet_pb2.Link:
    """Median seconds of a small round trip, bytes per second of large replies."""
    unreachable = fleet_pb2.Link(node_id=peer.node_id, reachable=False)
    if not peer.address:
        return unreachable
    made: grpc.aio.Channel | None = None
    try:
        made = channel(peer.address, identity, peer=(peer.node_id, Role.AGENT), kind="tensor")
        stub = pieces_pb2_grpc.PiecesStub(made)  # type: ignore[no-untyped-call]
        check_hello(await stub.Greet(hello(), timeout=CONNECT_S))
        small = [await _trip_s(stub, 0) for _ in range(SMALL_TRIPS)]
        rtt_s = statistics.median(small)
        large = [await _trip_s(stub, PIECE_CHUNK_BYTES)]
        until_s = time.monotonic() + LARGE_S
        while len(large) < LARGE_TRIPS and time.monotonic() < until_s:
            large.append(await _trip_s(stub, PIECE_CHUNK_BYTES))
        wire_s = max(min(large) - rtt_s, 1e-6)
        return fleet_pb2.Link(node_id=peer.node_id, reachable=True, rtt_s=rtt_s, bytes_per_s=PIECE_CHUNK_BYTES / wire_s)
    except (grpc.aio.AioRpcError, GanglionError):
        return unreachable
    finally:
        if made is not None:
            await made.close()


async def _trip_s(stub: pieces_pb2_grpc.PiecesStub, reply_bytes: int) -> float:
    request = pieces_pb2.EchoRequest(payload=bytes(16), reply_bytes=reply_bytes)
    began_s = time.perf_counter()
    await stub.Echo(request, timeout=TRIP_S)
    await asyncio.sleep(0)  # other tasks, heartbeats among them, go on between trips
    return time.perf_counter() - began_s
