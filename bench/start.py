"""How long things take to be ready: `up` to its first token, and a model's shard to be loaded.

    python bench/start.py up [--runs 3]                      # a fresh home, then the same home again
    python bench/start.py load --work FOLDER [--fast]        # Llama-3.2-1B shape, int4: first load, then from parts

`up` is timed from its start until a client, which polls /readyz, has one token of the demo. `load` makes a random
checkpoint in FOLDER, cuts it once, and loads all of it in a process of its own each time, as a worker does.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

LIMIT_S = 120.0
PROMPT = "def read_lines(path):"


def first_token_s(home: Path) -> float:
    """Seconds from the start of `ganglion up` on `home` to the first token."""
    command = [sys.executable, "-m", "ganglion.cli", "up", "--no-mdns", "--port", "0", "--fleet-port", "0"]
    began_s = time.perf_counter()
    up = subprocess.Popen(
        [*command, "--enrolment-port", "0"], env={**os.environ, "GANGLION_HOME": str(home)}, stderr=subprocess.DEVNULL
    )
    try:
        while time.perf_counter() - began_s < LIMIT_S:
            with contextlib.suppress(OSError, ValueError, KeyError):
                api = json.loads((home / "gateway" / "serving.json").read_bytes())["api"]
                found = json.loads(_ask(f"{api}/readyz"))["deployments"]
                if any(each["ready"] for each in found):
                    body = {"model": "demo", "prompt": PROMPT, "max_tokens": 1, "temperature": 0}
                    _ask(f"{api}/v1/completions", json.dumps(body).encode())
                    return time.perf_counter() - began_s
            time.sleep(0.01)
        raise SystemExit(f"no token within {LIMIT_S:.0f} s")
    finally:
        up.send_signal(signal.SIGINT)
        up.wait()


def _ask(url: str, body: bytes | None = None) -> bytes:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as reply:
        content: bytes = reply.read()
        return content


def run_up(runs: int) -> None:
    """Print the seconds of `runs` fresh homes and of as many starts on a home that stands."""
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as folder:
            fresh, again = (first_token_s(Path(folder) / "home") for _ in range(2))
            print(f"first token after {fresh:.2f} s on a fresh home, {again:.2f} s on the same home again", flush=True)


def run_load(work: Path, *, fast: bool) -> None:
    """Cut the checkpoint unless it is cut, then load it three times: put together, and twice from parts."""
    from shapes import write_checkpoint

    from ganglion.agent.store import ManifestShelf, PieceStore
    from ganglion.models import demo_path
    from ganglion.partitioner.cut import numeric_class, partition

    path = write_checkpoint(work, "llama-3.2-1b", demo_path("demo"))
    kind = numeric_class(path, "int4", fast=fast)
    store = PieceStore(work / f"store-{kind.name}")
    shelf = ManifestShelf(store.path)
    if not shelf.digests():
        shelf.put(partition(path, store, name="bench", numeric_class=kind))
    store.prepacked.shrink(1 << 60)
    for how in ("in memory", "first time", "from parts", "from parts"):
        subprocess.run([sys.executable, __file__, "one", "--work", str(store.path), "--how", how], check=True)


def load_once(store_path: Path, how: str) -> None:
    """Load the model of a store in this process and print what it took."""
    from ganglion.agent.executor.loader import load_shard, start_runtime
    from ganglion.agent.executor.prepacked import Prepacked
    from ganglion.agent.store import ManifestShelf, PieceStore
    from ganglion.wire.nouns import Range, Share, Stage

    store, shelf = PieceStore(store_path), ManifestShelf(store_path)
    manifest = shelf.get(shelf.digests()[0])
    groups = {segment.axis: segment.groups for layer in manifest.layers for segment in layer.segments}
    share = Share(
        device="a" * 26,
        heads=Range(0, groups["heads"]),
        columns=Range(0, groups["columns"]),
        vocab=Range(0, manifest.head.groups),
    )
    stage = Stage(layers=Range(0, manifest.geometry.layers), shares=(share,), topology="mesh")
    start_runtime(os.cpu_count() or 1)
    prepacked = None if how == "in memory" else Prepacked(store)
    with tempfile.TemporaryDirectory(dir=store_path) as folder:
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        options: dict[str, Any] = {"open_piece": store.open, "folder": Path(folder), "progress": lambda *_: None}
        shard = load_shard(manifest, stage, share, prepacked=prepacked, **options)
        took_s, cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
    memory = dict(line.split()[:2] for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    if prepacked is not None:
        prepacked.keep()
    print(
        f"{manifest.numeric_class.name}, {how}: {took_s:.2f} s, {cpu_s:.2f} of a processor; resident"
        f" {int(memory['Rss:']) >> 10} MiB, of it anonymous {int(memory['Anonymous:']) >> 10}; weights"
        f" {shard.weights_bytes >> 20} MiB, parts {store.prepacked.used_bytes() >> 20}",
        flush=True,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("up", "load", "one"))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--how", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.what == "up":
        run_up(arguments.runs)
    elif arguments.work is None:
        parser.error("--work FOLDER is needed")
    elif arguments.what == "load":
        run_load(arguments.work, fast=arguments.fast)
    else:
        load_once(arguments.work, arguments.how)
