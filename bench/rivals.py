"""Competitors over two processes, which a contributor builds: llama.cpp over RPC, and distributed-llama."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dllama import write_model, write_tokenizer

from ganglion.cli.bench.machine import machine
from ganglion.cli.bench.measures import Decoded
from ganglion.cli.bench.rivals import About, Converted, LlamaBench, program
from ganglion.partitioner.checkpoint import open_checkpoint
from ganglion.wire.errors import Unavailable

START_S, RUN_S = 30.0, 600.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Servers:
    """Processes that listen on loopback, one thread each; `close` ends them."""

    def __init__(self) -> None:
        self._running: list[subprocess.Popen[bytes]] = []

    def start(self, *command: str, port: int) -> None:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._running.append(process)
        deadline_s = time.monotonic() + START_S
        while time.monotonic() < deadline_s:
            if process.poll() is not None:
                raise Unavailable(f"{command[0]} ended with {process.returncode}")
            if _listens(port):
                return
            time.sleep(0.05)
        raise Unavailable(f"{command[0]} does not listen at port {port} within {START_S:.0f} s")

    def close(self) -> None:
        for process in self._running:
            process.kill()
            process.wait()
        self._running.clear()


def _listens(port: int) -> bool:
    """By the kernel's table: a connection would be taken for a client."""
    with contextlib.suppress(OSError):
        table = Path("/proc/net/tcp").read_text()
        return any(f":{port:04X} 00000000:0000 0A" in line for line in table.splitlines())
    return False


class LlamaRpc(LlamaBench):
    """llama-bench over `count` rpc servers of one thread each on loopback; they get layers (mode `tensor`: parts)."""

    def __init__(self, folder: Path, converted: Converted, count: int = 2, mode: str = "layer") -> None:
        self._servers = Servers()
        model, bits = converted.gguf("Q4_0")
        ports = [free_port() for _ in range(count)]
        server = program(folder, "ggml-rpc-server", "rpc-server")
        try:
            for port in ports:
                self._servers.start(str(server), "-H", "127.0.0.1", "-p", str(port), "-t", "1", port=port)
            name = "llama.cpp-rpc" if mode == "layer" else f"llama.cpp-rpc-{mode}"
            hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
            extra = ("--rpc", hosts, "-ngl", "99", "-sm", mode)
            super().__init__(folder, model, "Q4_0", bits, 1, name=name, extra=extra)
            self.about = replace(self.about, threads=count)
        except BaseException:
            self._servers.close()
            raise

    def close(self) -> None:
        self._servers.close()


class DistributedLlama:
    """`dllama inference` with one worker: two processes of one thread each, tensor parallel, Q40, Q80 between them."""

    def __init__(self, folder: Path, converted: Converted, context: int) -> None:
        self._program, self._context = program(folder, "dllama"), context
        opened = open_checkpoint(converted.checkpoint)
        self._model = converted.folder / f"{opened.digest[:16]}.m"
        self._tokenizer = converted.folder / f"{opened.digest[:16]}.t"
        if not self._model.exists():
            write_model(opened, self._model)
            write_tokenizer(self._tokenizer, opened.config.whole("vocab_size"))
        flags = " ".join(machine()["instructions"])
        # It says nothing of its kernels; its Makefile asks the compiler for this machine's own.
        self.about = About("distributed-llama", "as built", "Q40", 4.5, f"-march=native here: {flags}", 2)

    def decode(self, prompt: Sequence[int], tokens: int) -> Decoded:
        return Decoded(tpot_s=1 / self._rate("Prediction", len(prompt), tokens), ids=None)

    def prefill(self, prompt: Sequence[int]) -> float:
        return len(prompt) / self._rate("Evaluation", len(prompt), 2)

    def close(self) -> None:
        """Its processes end with each figure."""

    def _rate(self, what: str, prompt: int, tokens: int) -> float:
        port, servers = free_port(), Servers()
        try:
            servers.start(str(self._program), "worker", "--port", str(port), "--nthreads", "1", port=port)
            command = [
                str(self._program), "inference", "--model", str(self._model), "--tokenizer", str(self._tokenizer),
                "--buffer-float-type", "q80", "--prompt", "x" * prompt, "--steps", str(prompt + tokens), "--nthreads",
                "1", "--workers", f"127.0.0.1:{port}", "--max-seq-len", str(self._context), "--temperature", "0",
            ]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=RUN_S, check=False)
        except subprocess.TimeoutExpired as error:
            raise Unavailable(f"dllama took more than {RUN_S:.0f} s") from error
        finally:
            servers.close()
        found = re.search(rf"^{what}\n(?:.*\n)*?\s+tokens/s: ([\d.]+)", done.stdout, re.MULTILINE)
        if done.returncode or found is None:
            raise Unavailable(f"dllama ended with {done.returncode}: {(done.stderr or done.stdout).strip()[-300:]}")
        return float(found[1])
