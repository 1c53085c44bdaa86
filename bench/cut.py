"""Cutting at scale: a random checkpoint of 70B shape is cut, beside what the disk takes in plain writes.

    python bench/cut.py --folder FOLDER [--layers 4] [--tied] [--format int4 fp32] [--broken]

Makes the checkpoint in FOLDER (bfloat16, 1.7 GB a layer and 2.1 GB for each of embedding and head), cuts it in a
process of its own, deletes everything. The disk's rate is that of files of 8 MiB, written and synced, in the same
folder, before and after; the cut's time ends with a sync too. --broken: kills the cut halfway and finishes it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ganglion.partitioner.cut import numeric_class, partition
from ganglion.partitioner.sink import DirectorySink

HIDDEN, INNER, VOCAB, HEADS, KV_HEADS, HEAD_DIM = 8192, 28672, 128256, 64, 8, 128
BLOCK_BYTES = 8 << 20
PROBE_BYTES = 3 << 30
SAMPLE_S = 0.02


def shapes(layers: int, *, tied: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of a Llama checkpoint, in order."""
    yield "model.embed_tokens.weight", (VOCAB, HIDDEN)
    for layer in range(layers):
        at = f"model.layers.{layer}."
        yield f"{at}input_layernorm.weight", (HIDDEN,)
        yield f"{at}post_attention_layernorm.weight", (HIDDEN,)
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            yield f"{at}self_attn.{name}_proj.weight", (heads * HEAD_DIM, HIDDEN)
        yield f"{at}self_attn.o_proj.weight", (HIDDEN, HEADS * HEAD_DIM)
        yield f"{at}mlp.gate_proj.weight", (INNER, HIDDEN)
        yield f"{at}mlp.up_proj.weight", (INNER, HIDDEN)
        yield f"{at}mlp.down_proj.weight", (HIDDEN, INNER)
    yield "model.norm.weight", (HIDDEN,)
    if not tied:
        yield "lm_head.weight", (VOCAB, HIDDEN)


def make_checkpoint(folder: Path, layers: int, *, tied: bool) -> int:
    """Write it block by block; returns its bytes. Numbers of either sign between 2^-7 and 2^-3."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": INNER, "num_hidden_layers": layers, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "vocab_size": VOCAB, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu", "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes(layers, tied=tied):
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    rng = np.random.default_rng(1)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for at in range(0, end, BLOCK_BYTES):
            numbers = np.frombuffer(rng.bytes(min(BLOCK_BYTES, end - at)), "<u2")
            file.write((numbers & np.uint16(0x81FF) | np.uint16(0x3C00)).data)
        file.flush()
        os.fsync(file.fileno())
    return end


def disk_rate(folder: Path) -> float:
    """Bytes a second of plain files, synced."""
    block = os.urandom(BLOCK_BYTES)
    folder.mkdir()
    began_s = time.perf_counter()
    for number in range(PROBE_BYTES // BLOCK_BYTES):
        (folder / str(number)).write_bytes(block)
    os.sync()
    taken_s = time.perf_counter() - began_s
    shutil.rmtree(folder)
    return PROBE_BYTES / taken_s


@dataclass
class Peaks:
    """Highest figures of a process, sampled from /proc, in bytes."""

    pid: int
    rss: int = 0
    anonymous: int = 0
    over: threading.Event = field(default_factory=threading.Event)

    def watch(self) -> None:
        """Sample until `over`."""
        while not self.over.wait(SAMPLE_S):
            try:
                lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
            except OSError:
                return
            figures = {line.split(":")[0]: line.split()[1] for line in lines if "kB" in line}
            self.rss = max(self.rss, 1024 * int(figures.get("VmRSS", 0)))
            self.anonymous = max(self.anonymous, 1024 * int(figures.get("RssAnon", 0)))


def cut_here(source: Path, sink: Path, weight_format: Any, threads: int) -> None:
    """What the measured process does: says its progress, then its seconds and its highest memory."""
    began_s = time.perf_counter()
    last = [0]

    def say(done: int, total: int) -> None:
        if 100 * done // total > last[0]:
            last[0] = 100 * done // total
            print(last[0], flush=True)

    partition(
        source,
        DirectorySink(sink),
        name="m",
        numeric_class=numeric_class(source, weight_format),
        progress=say,
        threads=threads,
    )
    cut_s = time.perf_counter() - began_s
    os.sync()
    highest = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(json.dumps([cut_s, time.perf_counter() - began_s, 1024 * int(highest.split()[1]), os.times()[:2]]))


def run(source: Path, sink: Path, weight_format: str, threads: int, kill_at: int | None) -> tuple[Any, Peaks]:
    """Cut in a process of its own; its figures (None when it was killed) and its peaks."""
    command = [sys.executable, __file__, "--folder", str(source), "--sink", str(sink), "--threads", str(threads)]
    child = subprocess.Popen([*command, "--format", weight_format], stdout=subprocess.PIPE, text=True)
    peaks = Peaks(child.pid)
    watcher = threading.Thread(target=peaks.watch)
    watcher.start()
    line = ""
    assert child.stdout is not None
    for line in child.stdout:
        if kill_at is not None and line.strip() == str(kill_at):
            child.send_signal(signal.SIGKILL)
    code = child.wait()
    peaks.over.set()
    watcher.join()
    if kill_at is not None:
        assert code == -signal.SIGKILL, code
        return None, peaks
    assert code == 0, code
    return json.loads(line), peaks


def stored(sink: Path) -> tuple[int, int]:
    """Pieces and their bytes."""
    sizes = [file.stat().st_size for file in sink.rglob("*") if file.is_file() and not file.name.startswith(".")]
    return len(sizes), sum(sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tied", action="store_true")
    parser.add_argument("--format", nargs="+", default=["int4", "fp32"])
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--broken", action="store_true")
    parser.add_argument("--sink", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.sink is not None:
        cut_here(chosen.folder, chosen.sink, chosen.format[0], chosen.threads)
        return
    work = chosen.folder / "bench-cut"
    try:
        began_s = time.perf_counter()
        read_bytes = make_checkpoint(work / "model", chosen.layers, tied=chosen.tied)
        print(f"checkpoint: {read_bytes / 1e9:.2f} GB in {time.perf_counter() - began_s:.0f} s; load {os.getloadavg()}")
        for weight_format in chosen.format:
            sink = work / "pieces"
            before = disk_rate(work / "probe")
            (cut_s, all_s, highest, cpu_s), peaks = run(work / "model", sink, weight_format, chosen.threads, None)
            count, written = stored(sink)
            shutil.rmtree(sink)
            after = disk_rate(work / "probe")
            rate, disk = written / all_s, (before + after) / 2
            print(
                f"{weight_format}: {written / 1e9:.2f} GB in {count} files, {cut_s:.1f} s cutting, {all_s:.1f} s with "
                f"sync; read {read_bytes / all_s / 1e6:.0f} MB/s, written {rate / 1e6:.0f} MB/s; processor "
                f"{cpu_s[0]:.1f} + {cpu_s[1]:.1f} s\n  disk {before / 1e6:.0f} MB/s before, {after / 1e6:.0f} after; "
                f"ratio {rate / disk:.2f}\n  peak memory {highest / 1e9:.2f} GB resident, {peaks.anonymous / 1e9:.2f} "
                f"GB anonymous; load {os.getloadavg()[0]:.1f}",
                flush=True,
            )
            if chosen.broken:
                run(work / "model", sink, weight_format, chosen.threads, 50)
                _, half = stored(sink)
                (cut_s, again_s, _, again_cpu_s), _ = run(work / "model", sink, weight_format, chosen.threads, None)
                assert stored(sink) == (count, written)
                print(
                    f"  killed at half with {half / 1e9:.2f} GB written; finished in {again_s:.1f} s ({cut_s:.1f} s "
                    f"without sync): {again_s / all_s:.2f} of the whole, {sum(again_cpu_s) / sum(cpu_s):.2f} of its "
                    f"processor time"
                )
                shutil.rmtree(sink)
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
