"""What blending two experts costs, by sampling and candidates: `python bench/blend.py [--prompts 6] [--tokens 48]`.

The demo pair, each on its own lead, over real sessions on loopback, from held-out code. Bytes and messages are those of
both experts together, without their prompts: a round trip is a choice and the distribution that follows, or a question
and its answer, of all experts at once. Vocabulary: 2048 tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "bench")]

from speculation import prompts, small_world, whole  # noqa: E402

from ganglion.agent import control  # noqa: E402
from ganglion.agent.store import PieceStore  # noqa: E402
from ganglion.agent.worker import Worker  # noqa: E402
from ganglion.gateway.experts.blending import BlendStatistics, blend  # noqa: E402
from ganglion.gateway.experts.seat import BlendExpert  # noqa: E402
from ganglion.models import demo_path  # noqa: E402
from ganglion.partitioner.cut import numeric_class, partition  # noqa: E402
from ganglion.proto import identity_pb2, lane_pb2  # noqa: E402
from ganglion.wire.home import Home  # noqa: E402
from ganglion.wire.identity import Identity, Role  # noqa: E402
from ganglion.wire.nouns import to_json  # noqa: E402
from ganglion.wire.session import SessionClient  # noqa: E402

NAMES = ("demo", "demo-drafter")
SAMPLINGS = {
    "greedy": {"temperature": 0.0, "top_p": 1.0},
    "T 0.7, top-p 0.9": {"temperature": 0.7, "top_p": 0.9},
    "T 1, top-p 0.9": {"temperature": 1.0, "top_p": 0.9},
    "T 1, top-k 40": {"temperature": 1.0, "top_p": 1.0, "top_k": 40},
    "T 0.7": {"temperature": 0.7, "top_p": 1.0},
    "T 1": {"temperature": 1.0, "top_p": 1.0},
}
CANDIDATES = (16, 64, 256, 0)


async def start(name: str, folder: Path, node: Identity, gateway: Identity) -> tuple[Worker, SessionClient]:
    """A lead of its own for a demo model, and a client of it."""
    home, said = Home(folder / name), list[control.Event]()
    node.save(home.identity)
    home.store.mkdir(mode=0o700, exist_ok=True)
    path = demo_path(name)
    manifest = partition(path, PieceStore(home.store), name=name, numeric_class=numeric_class(path, "fp32"))
    worker = Worker(said.append)
    await worker.handle(
        control.Load(
            home=str(home.path),
            deployment=name,
            epoch=1,
            plan=to_json(whole(manifest, node.node_id, sessions=2)),
            manifest=to_json(manifest),
            node_id=node.node_id,
            bind="127.0.0.1",
            beat_path=str(folder / f"{name}.beat"),
        )
    )
    listening = said[-1]
    if not isinstance(listening, control.Listening):
        raise SystemExit(f"{name}: {listening}")
    address = f"127.0.0.1:{listening.port}"
    peers = (control.PeerEntry(record=node.record.SerializeToString(), address=address, name=name),)
    gateways = (control.PeerEntry(record=gateway.record.SerializeToString(), address="", name="gateway"),)
    await worker.handle(control.Connect(peers=peers, gateways=gateways))
    lead = identity_pb2.Peer(record=node.record, address=address, name=name)
    return worker, SessionClient(gateway, lead, name, 1)


async def measure(asked: argparse.Namespace) -> None:
    """Start both leads, print the table."""
    given = prompts(asked.prompts, 128)
    with tempfile.TemporaryDirectory() as folder:
        owner = small_world()
        gateway = owner.node(Role.GATEWAY)
        started = [await start(name, Path(folder), owner.node(), gateway) for name in NAMES]
        experts = [BlendExpert(name, 0.5, client.open) for name, (_, client) in zip(NAMES, started, strict=True)]
        print(
            f"{'sampling':<18} {'listed':>6} {'bytes/token':>11} {'round trips':>11} {'asked':>6} {'whole':>6}"
            f" {'near ties':>9} {'ms/token':>8}"
        )
        for sampling, options in SAMPLINGS.items():
            told = list[list[int]]()
            for candidates in CANDIDATES:
                statistics, rounds, ids, began = BlendStatistics(), 0, list[int](), time.perf_counter()
                for seed, prompt in enumerate(given):
                    message = lane_pb2.Sampling(seed=seed, top_logprobs=-1, **options)
                    async for token in blend(
                        experts,
                        prompt,
                        message,
                        stop_ids=(),
                        max_tokens=asked.tokens,
                        on_drop=_fail,
                        candidates=candidates,
                        statistics=statistics,
                    ):
                        ids.append(token.id)
                took_s = time.perf_counter() - began
                told.append(ids)
                count = statistics.tokens
                rounds = count + statistics.questions
                print(
                    f"{sampling:<18} {candidates or 'all':>6} {statistics.token_bytes / count:>11.0f}"
                    f" {rounds / count:>11.3f} {statistics.asked_tokens / count:>6.1%}"
                    f" {statistics.asked_whole / count:>6.1%} {statistics.near_ties:>9} {1e3 * took_s / count:>8.1f}"
                )
            if any(one != told[0] for one in told):
                raise SystemExit(f"{sampling}: the tokens depend on how many candidates are told")
        for worker, client in started:
            await client.close()
            await worker.close()


def _fail(name: str, error: Exception) -> None:
    raise SystemExit(f"{name} was dropped: {error}")


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=48)
    asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
