"""Experts on disk against experts in memory: `python bench/paging.py --work FOLDER [--routes routes.npz]`.

A large random mixture (Qwen3-MoE: hidden 2048, 32 heads of 128, 4 of keys, 16 experts of 768, two a row, in
int4-128-fast) of as many layers as make its experts 1 GB. Every layer computes what a real one does (norms, attention
over a growing context, router, experts); the output matrix is left out. Only the router's choice is replaced by routes
recorded from a trained mixture: layer l of token t takes what layer l % n took at token t + (l // n) * --shift, so that
layers that share a recorded one take it from different text. Text is of one domain, as a chat is, or of all in turn.

Engines, each a process of its own, that take turns on the same tokens:
  resident    every expert in memory
  each-time   on demand, nothing is kept: a layer's experts are read when it is there
  on-demand   on demand; what is read stays until it is the least recently used
  paged       this pager, reading nothing ahead
  ahead       this pager, reading ahead
The disk is read past the page cache and throttled; files are synced and pushed out of the page cache first. Memory is
for 40 % of the experts' bytes. Forecasts have seen --learn other tokens of the trace before. Printed beside: reads of
the offline optimum (Belady), and the speed that it allows.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import statistics
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "bench")]

from paging_reference import TRACE, belady, least_recent  # noqa: E402

from ganglion.agent.executor.executor import Executor  # noqa: E402
from ganglion.agent.executor.loader import load_shard, start_runtime  # noqa: E402
from ganglion.agent.executor.prepacked import Prepacked  # noqa: E402
from ganglion.agent.paging.cache import ExpertCache  # noqa: E402
from ganglion.agent.paging.pager import Pager  # noqa: E402
from ganglion.agent.paging.predict import NAMES  # noqa: E402
from ganglion.agent.store import PieceStore  # noqa: E402
from ganglion.models import demo_path  # noqa: E402
from ganglion.partitioner.cut import numeric_class, partition  # noqa: E402
from ganglion.wire.nouns import Manifest, Plan, Range, Stage, digest, from_json, to_json  # noqa: E402
from ganglion.wire.shares import whole_share  # noqa: E402

ENGINES = ("resident", "each-time", "on-demand", "paged", "ahead")
HIDDEN, HEADS, KEYS, HEAD, INNER, EXPERTS, VOCAB = 2048, 32, 4, 128, 768, 16, 512
NODE = "a" * 26
MIXED_TOKENS = 64  # of a domain, before the next one's turn
OTHER_BYTES = 256 << 20  # that a confined engine may take beside its experts: key-value state, forecasts, page cache


class LeastRecent(ExpertCache):
    """Pushes out what was used longest ago, and foretells nothing."""

    def __init__(self, layers: int, experts: int, slots: int) -> None:
        super().__init__(layers, experts, slots)
        self._used = np.zeros((layers, experts), np.float32)
        self._now = 0.0

    def expect(self, expected: np.ndarray) -> None:
        pass

    def arrive(self, layer: int, experts: Any) -> None:
        self._now += 1
        self._used[layer, list(experts)] = self._now
        self._expected = self._now - self._used + 1
        super().arrive(layer, experts)


def write_layer(folder: Path) -> Path:
    """A checkpoint of one layer, random, as Hugging Face has it."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True)
    layer = "model.layers.0."
    tensors = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        f"{layer}input_layernorm.weight": (HIDDEN,),
        f"{layer}post_attention_layernorm.weight": (HIDDEN,),
        f"{layer}self_attn.q_proj.weight": (HEADS * HEAD, HIDDEN),
        f"{layer}self_attn.k_proj.weight": (KEYS * HEAD, HIDDEN),
        f"{layer}self_attn.v_proj.weight": (KEYS * HEAD, HIDDEN),
        f"{layer}self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD),
        f"{layer}self_attn.q_norm.weight": (HEAD,),
        f"{layer}self_attn.k_norm.weight": (HEAD,),
        f"{layer}mlp.gate.weight": (EXPERTS, HIDDEN),
    }
    for expert in range(EXPERTS):
        tensors[f"{layer}mlp.experts.{expert}.gate_proj.weight"] = (INNER, HIDDEN)
        tensors[f"{layer}mlp.experts.{expert}.up_proj.weight"] = (INNER, HIDDEN)
        tensors[f"{layer}mlp.experts.{expert}.down_proj.weight"] = (HIDDEN, INNER)
    header, offset = {}, 0
    for name, shape in tensors.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    rng = np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for shape in tensors.values():
            ones = len(shape) == 1
            values = np.ones(shape, np.float32) if ones else rng.standard_normal(shape, np.float32) / shape[1] ** 0.5
            file.write((values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((demo_path("demo") / name).read_bytes())
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "attention_bias": False,
        "hidden_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": HEADS, "num_key_value_heads": KEYS,
        "head_dim": HEAD, "intermediate_size": 4 * HIDDEN, "moe_intermediate_size": INNER, "num_experts": EXPERTS,
        "num_experts_per_tok": 2, "norm_topk_prob": True, "vocab_size": VOCAB, "max_position_embeddings": 4096,
        "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_model(work: Path, layers: int) -> Manifest:
    """One layer cut into whole experts; the others are the same but for their experts' int4 numbers, drawn anew."""
    path = work / f"manifest-{layers}.json"
    if path.exists():
        return from_json(Manifest, path.read_bytes(), limit_bytes=1 << 30)
    checkpoint = write_layer(work / "checkpoint")
    store = PieceStore(work / "store")
    one = partition(
        checkpoint,
        store,
        name="mixture",
        numeric_class=numeric_class(checkpoint, "int4", fast=True, block=128),
        experts="whole",
    )
    rng = np.random.default_rng(1)
    copies = []
    for _ in range(layers):
        segments = []
        for segment in one.layers[0].segments:
            slots = [
                msgspec.structs.replace(slot, pieces=tuple(store.put(rng.bytes(piece.size)) for piece in slot.pieces))
                if slot.name in {"experts_in", "experts_out"}
                else slot
                for slot in segment.slots
            ]
            segments.append(msgspec.structs.replace(segment, slots=tuple(slots)))
        copies.append(msgspec.structs.replace(one.layers[0], segments=tuple(segments)))
    geometry = msgspec.structs.replace(one.geometry, layers=layers)
    manifest = msgspec.structs.replace(one, layers=tuple(copies), geometry=geometry)
    path.write_bytes(to_json(manifest))
    return manifest


def routes_of(chosen: argparse.Namespace, tokens: int) -> np.ndarray:
    """What each layer of the large mixture takes: [tokens, layers, k]."""
    with np.load(chosen.routes) as data:
        recorded, domains = data["routes"].astype(np.int64), data["domains"]
    layers = recorded.shape[1]
    places = [(layer // layers * chosen.shift, layer % layers) for layer in range(chosen.layers)]

    def taken(text: np.ndarray, at: np.ndarray) -> np.ndarray:
        return np.stack([text[(at + shift) % len(text), layer] for shift, layer in places], axis=1)

    at = np.arange(tokens)
    if chosen.domain != "mixed":
        return taken(recorded[domains == int(chosen.domain)], at)
    found = np.stack([taken(recorded[domains == one], at) for one in np.unique(domains)])
    return found[at // MIXED_TOKENS % len(found), at]


def serve(chosen: argparse.Namespace) -> None:
    """An engine: reads `first count rows` from its input, runs these tokens, and answers with what was measured."""
    engine = chosen.engine
    work = chosen.work
    manifest = from_json(Manifest, (work / f"manifest-{chosen.layers}.json").read_bytes(), limit_bytes=1 << 30)
    start_runtime(chosen.threads)
    store = PieceStore(work / "store")
    whole = whole_share(manifest, NODE, Range(0, chosen.layers))
    share = msgspec.structs.replace(whole, expert_cache_bytes=0 if engine == "resident" else chosen.memory)
    stage = Stage(layers=Range(0, chosen.layers), shares=(share,), topology="mesh")
    plan = Plan(
        manifest_digest=digest(manifest), numeric_class=manifest.numeric_class, context=4096, sessions=4,
        kv_tokens=16384, chunk=256, stages=(stage,), threads={NODE: chosen.threads},
    )  # fmt: skip
    prepacked = Prepacked(store)
    shard = load_shard(
        manifest, stage, share, open_piece=store.open, folder=work / f"run-{engine}", progress=lambda done, total: None,
        prepacked=prepacked,
    )  # fmt: skip
    prepacked.keep()
    pager = None
    if shard.pager is not None:
        layers, routers = shard.pager._layers, shard.pager._routers
        stop(shard.pager)
        cache = LeastRecent if engine in {"each-time", "on-demand"} else ExpertCache
        memory = chosen.memory
        if engine == "each-time":
            memory = sum(one.resident_bytes for one in layers) + 2 * layers[0].index.record_bytes
        ahead = engine == "ahead"
        pager = Pager(layers, memory, routers=routers, ahead=ahead, disk_bytes_per_s=chosen.disk * 1e6, cache=cache)
        shard = dataclasses.replace(shard, pager=pager)
    executor = Executor(manifest, plan, shard, store.open)
    routes = routes_of(chosen, chosen.tokens + chosen.learn)
    if pager is not None and engine in {"paged", "ahead"}:
        for token in routes[chosen.tokens :]:
            for layer, taken in enumerate(token):
                pager._forecast.visit(layer, taken[None])
    now: list[np.ndarray] = []

    def force(layer: int, taken: np.ndarray) -> None:
        taken[...] = now[0][:, layer]

    executor.on_routes = force
    if chosen.cgroup and pager is not None:
        confine(pager.slots * layers[0].index.record_bytes + OTHER_BYTES)
    position, session = 0, 1
    print("ready", flush=True)
    for line in sys.stdin:
        first, count, rows = (int(one) for one in line.split())
        before = dataclasses.replace(pager.counts) if pager is not None else None
        state = np.random.default_rng(first).standard_normal((count, HIDDEN), np.float32)
        found = hashlib.sha256()
        begun, begun_cpu = time.perf_counter(), time.process_time()
        for at in range(first, first + count, rows):
            if position + rows > 4000:
                executor.close(session)
                session, position = session + 1, 0
            now[:] = [routes[at : at + rows]]
            batch = executor.begin([(session, position, rows)])
            executor.residual(batch)[...] = state[at - first : at - first + rows]
            for index in range(executor.segments):
                partial = executor.run(batch, index)
            found.update(executor.residual(batch).tobytes() + partial.tobytes())
            position += rows
        seconds, cpu = time.perf_counter() - begun, time.process_time() - begun_cpu
        said: dict[str, Any] = {"seconds": seconds, "cpu_s": cpu, "digest": found.hexdigest(), **memory_now()}
        if pager is not None and before is not None:
            after = pager.counts
            said |= {
                name: getattr(after, name) - getattr(before, name)
                for name in ("hits", "misses", "waited_s", "read_bytes", "ahead", "ahead_used")
            }
            layers = pager._layers
            said |= {"record": layers[0].index.record_bytes, "stays": sum(one.resident_bytes for one in layers)}
            said |= {"slots": pager.slots, "precision": dict(zip(NAMES, map(float, pager.precision), strict=True))}
        print(json.dumps(said), flush=True)


def confine(limit_bytes: int) -> None:
    """Give what this process takes from now on, page cache included, so much memory; beyond, the kernel ends it."""
    group = Path("/sys/fs/cgroup/memory") / f"paging-{os.getpid()}"
    group.mkdir()
    (group / "memory.limit_in_bytes").write_text(str(limit_bytes))
    (group / "cgroup.procs").write_text(str(os.getpid()))


def stop(pager: Pager) -> None:
    """End a pager and keep its layers, for another."""
    with pager._changed:
        pager._closed = True
        pager._changed.notify_all()
    pager._thread.join()
    pager._pool.close()


def memory_now() -> dict[str, int]:
    """Bytes that are this process's own, and of its pool, each page once; file pages are the page cache's."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    found = {name: int(value.split()[0]) << 10 for name, value in (line.split(":", 1) for line in lines)}
    return {"anonymous": found["Pss_Anon"], "shared": found["Pss_Shmem"]}


class Engine:
    """A process that runs tokens when told."""

    def __init__(self, name: str, chosen: argparse.Namespace) -> None:
        words = [sys.executable, __file__, "--engine", name, "--work", str(chosen.work), "--memory", str(chosen.memory)]
        for option in ("routes", "domain", "layers", "shift", "threads", "disk", "tokens", "learn"):
            words += [f"--{option}", str(getattr(chosen, option))]
        words += ["--cgroup"] if chosen.cgroup else []
        self.name = name
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self.process.stdout is None or self.process.stdout.readline().strip() != "ready":
            raise SystemExit(f"{name} did not start")

    def run(self, first: int, count: int, rows: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{first} {count} {rows}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.name} ended with {self.process.wait()}")
        found: dict[str, Any] = json.loads(answer)
        return found

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)
        with contextlib.suppress(OSError):
            (Path("/sys/fs/cgroup/memory") / f"paging-{self.process.pid}").rmdir()


def evict(folder: Path) -> None:
    """Push files out of the page cache."""
    for file in folder.rglob("experts.bin"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def report(name: str, parts: list[dict[str, Any]], tokens: int, resident: float) -> str:
    speed = tokens / statistics.median(part["seconds"] for part in parts)
    cpu_ms = 1e3 * statistics.median(part["cpu_s"] for part in parts) / tokens
    text = f"{name:10} {speed:7.2f} tok/s {100 * speed / resident:5.1f} %  cores {cpu_ms:6.1f} ms/token"
    if "hits" not in parts[0]:
        return text
    hits, misses = (sum(part[one] for part in parts) for one in ("hits", "misses"))
    read = sum(part["read_bytes"] for part in parts) / (tokens * len(parts)) / 1e6
    waited = sum(part["waited_s"] for part in parts) / sum(part["seconds"] for part in parts)
    used = sum(part["ahead_used"] for part in parts) / max(1, sum(part["ahead"] for part in parts))
    return (
        f"{text}  hits {100 * hits / (hits + misses):5.1f} %  {read:7.2f} MB/token  waiting {100 * waited:4.1f} %  "
        f"ahead used {100 * used:3.0f} %  pool {max(part['shared'] for part in parts) / 1e6:.0f} MB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--routes", type=Path, default=TRACE)
    parser.add_argument("--domain", default="0", help="whose text: a number of the trace's domains, or mixed")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--shift", type=int, default=3001, help="tokens between layers that share a recorded one")
    parser.add_argument("--share", type=float, default=0.4, help="of the experts' bytes that fit into memory")
    parser.add_argument("--disk", type=float, default=500.0, help="MB/s")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--warm", type=int, default=128, help="tokens before anything is measured")
    parser.add_argument("--learn", type=int, default=1000, help="tokens after these that forecasts have seen before")
    parser.add_argument("--count", type=int, default=64, help="tokens of a turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=1, help="tokens of a step")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--cgroup", action="store_true", help="confine memory by a cgroup (version 1; needs root)")
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    parser.add_argument("--memory", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, default=0, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    chosen.tokens = chosen.tokens or chosen.warm + chosen.rounds * chosen.count
    if chosen.engine:
        serve(chosen)
        return
    write_model(chosen.work, chosen.layers)
    chosen.memory = 1 << 40
    probe = Engine("ahead", chosen)  # makes the parts, and says how many experts there are
    found = probe.run(0, chosen.rows, chosen.rows)
    slots, record = found["slots"], found["record"]
    every = slots * record + found["stays"]
    probe.close()
    chosen.memory = int(chosen.share * every)
    evict(chosen.work / "store")
    engines = [Engine(name, chosen) for name in chosen.engines]
    parts: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen.engines}
    for turn in range(chosen.rounds + 1):
        first = 0 if turn == 0 else chosen.warm + (turn - 1) * chosen.count
        count = chosen.warm if turn == 0 else chosen.count
        order = engines if turn % 2 else engines[::-1]
        found = {engine.name: engine.run(first, count, chosen.rows) for engine in order}
        if len({one["digest"] for one in found.values()}) > 1:
            raise SystemExit(f"outputs differ: {found}")
        if turn:
            for name, one in found.items():
                parts[name].append(one)
    held = parts["ahead"][0]["slots"] if "ahead" in parts else int(chosen.share * slots)
    routes = routes_of(chosen, chosen.tokens)
    resident = chosen.count / statistics.median(part["seconds"] for part in parts[chosen.engines[0]])
    print(f"{slots} experts, {every / 1e9:.2f} GB; memory for {held}, {chosen.memory / 1e6:.0f} MB; same outputs")
    for name in chosen.engines:
        print(report(name, parts[name], chosen.count, resident))
    if "ahead" in parts:
        print("precision", parts["ahead"][-1]["precision"])
    for name, reads in (("Belady", belady), ("least recent", least_recent)):
        skipped = reads(routes[: chosen.warm], held)
        a_token = (reads(routes, held) - skipped) / (chosen.tokens - chosen.warm)
        disk_s = a_token * record / (chosen.disk * 1e6)
        share = min(1.0, 1 / (resident * disk_s))
        print(f"{name}: {a_token:.2f} reads a token at one row, {100 * share:.0f} % of resident if all overlap")
    for engine in engines:
        engine.close()


if __name__ == "__main__":
    main()
