"""One exchange over each kind of lane between two processes, each pinned to a core: `python bench/lane.py`.

Both send and both receive, as in a mesh of two: the figure is the wall time of one exchange. Nothing is written.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from typing import Any

from ganglion.wire.environment import tuned_environment

os.environ.update(tuned_environment())
from ganglion.wire import rpc


def _identities() -> list[Any]:
    """Two enrolled agents of an authority that lives only here."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    from ganglion.wire.certificates import certificate_names
    from ganglion.wire.identity import Identity, NodeKeys, OwnerKey, Role, TrustLabel, make_record

    owner, key = OwnerKey.generate(), ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "bench")])
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)

    def issue(public: Any, names: tuple[str, ...]) -> bytes:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])]) if names else name
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(name).public_key(public)
        builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now - day)
        builder = builder.not_valid_after(now + day)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(n) for n in names]), False)
        else:
            builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
        return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)

    authority, found = issue(key.public_key(), ()), []
    for _ in range(2):
        keys = NodeKeys.generate()
        record = owner.sign_record(make_record(keys, Role.AGENT, TrustLabel.OWNER))
        certificate = issue(keys.tls_private_key.public_key(), certificate_names(keys.node_id, Role.AGENT))
        found.append((keys, record, owner.public_key, certificate, authority))
    return [
        Identity.of_der(keys, record, public, certificate=crt, authority=ca, name="bench", coordinator="127.0.0.1:1")
        for keys, record, public, crt, ca in found
    ]


async def _exchange(lane: Any, size: int, exchanges: int) -> list[float]:
    import numpy as np

    from ganglion.wire.frames import Dtype, Expectation, Kind

    array, into = np.ones((1, size // 8)), np.empty((1, size // 8))
    times = []
    for exchange in range(exchanges):
        started = time.perf_counter()
        await lane.send_tensor(Kind.PARTIAL, size, exchange, array)
        await lane.receive(Expectation(Kind.PARTIAL, size, exchange, Dtype.F64, 1, size // 8), into)
        times.append(time.perf_counter() - started)
    return times


def _end(
    core: int, own: bytes, other: bytes, pipe: Connection, dials: bool, mode: Any, sizes: list[int], exchanges: int
) -> None:
    import uvloop

    from ganglion.wire.identity import Role
    from ganglion.wire.lane import Lane
    from ganglion.wire.lane_opening import METHOD, LaneServicer, dial_lane
    from ganglion.wire.lane_upgrade import Sockets

    os.sched_setaffinity(0, {core})
    mine, peer, sockets = _unpack(own), _unpack(other), Sockets(mode, "127.0.0.1")

    async def run() -> None:
        if dials:
            ranks = {"own_rank": 0, "peer_rank": 1}
            lane = await dial_lane(
                pipe.recv(), mine, peer.verified, deployment="bench", epoch=1, **ranks, sockets=sockets
            )
        else:
            lanes: asyncio.Queue[Lane] = asyncio.Queue()
            bound = rpc.server(
                mine,
                bind="127.0.0.1",
                port=0,
                what="port",
                knob="-",
                allowed={METHOD: frozenset({Role.AGENT})},
                kind="tensor",
            )
            LaneServicer(mine, lambda *_: peer.verified, lanes.put_nowait, lambda *_: None, sockets).add_to(
                bound.server
            )
            await bound.start()
            pipe.send(bound.address)
            lane = await asyncio.wait_for(lanes.get(), 20)
        for size in sizes:
            before = lane.sealing_s
            times = await _exchange(lane, size, exchanges)
            if dials:
                times = sorted(times[exchanges // 10 :])
                pipe.send((size, times, (lane.sealing_s - before) / exchanges))
        await lane.close()
        if not dials:
            await bound.stop()

    uvloop.run(run())


def _pack(identity: Any) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    sealing = identity.keys.sealing_private_key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
    parts = [identity.keys.tls_private_pem, sealing, identity.record.SerializeToString(), identity.owner_public_key]
    return b"\xff--".join([*parts, identity.certificate_pem, identity.authority_pem])


def _unpack(packed: bytes) -> Any:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    from ganglion.proto import identity_pb2
    from ganglion.wire.identity import Identity, NodeKeys

    tls, sealing, record, owner, certificate, authority = packed.split(b"\xff--")
    keys = NodeKeys(load_pem_private_key(tls, None), X25519PrivateKey.from_private_bytes(sealing))  # type: ignore[arg-type]
    signed = identity_pb2.SignedRecord.FromString(record)
    return Identity(keys, signed, owner, certificate, authority, "bench", "127.0.0.1:1")


def _measure(mode: str, near: bytes, far: bytes, exchanges: int) -> None:
    sizes, cores = [8 << 10, 16 << 10], sorted(os.sched_getaffinity(0))
    context = multiprocessing.get_context("spawn")
    ends = [context.Pipe(), context.Pipe()]
    what = (mode, sizes, exchanges)
    processes = [
        context.Process(target=_end, args=(cores[0], near, far, ends[0][1], True, *what), daemon=True),
        context.Process(target=_end, args=(cores[-1], far, near, ends[1][1], False, *what), daemon=True),
    ]
    for process in processes:
        process.start()
    ends[0][0].send(ends[1][0].recv())
    for _ in sizes:
        if not ends[0][0].poll(60):
            raise SystemExit("no answer from the dialling end")
        size, times, sealing_s = ends[0][0].recv()
        p50, p99 = times[len(times) // 2] * 1e6, times[len(times) * 99 // 100] * 1e6
        figures = f"p50 {p50:6.0f} µs  p99 {p99:6.0f} µs  sealing {sealing_s * 1e6:4.1f} µs"
        print(f"{mode:6}  {size >> 10:3d} KiB  {figures}")
    for process in processes:
        process.join(30)


def main() -> None:
    """Print p50 and p99 of an exchange of 8 KiB and 16 KiB, and the part of it that is sealing, kinds alternating."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--exchanges", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=2)
    chosen = parser.parse_args()
    near, far = (_pack(identity) for identity in _identities())
    for _ in range(chosen.rounds):
        for mode in ("grpc", "socket"):
            _measure(mode, near, far, chosen.exchanges)


if __name__ == "__main__":
    main()
