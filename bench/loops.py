"""The bare loop as something to compare with: whole, or in shares that run at once and never exchange."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ganglion.cli.bench.deployed import bits_per_weight
from ganglion.cli.bench.machine import machine
from ganglion.cli.bench.measures import Decoded
from ganglion.cli.bench.rivals import About
from ganglion.wire.errors import Unavailable
from ganglion.wire.limits import MANIFEST_BYTES
from ganglion.wire.nouns import Manifest, from_json

BARE = Path(__file__).with_name("bare.py")


class BareLoop:
    """`shares` processes of `threads` threads each, over the manifest `digest` in `store`; a step is `rows` tokens.

    One share's tokens are the model's; of several the time is the mean of all and there are no tokens. The time of a
    window counts as that of its tokens, as if all of them were kept.
    """

    def __init__(self, store: Path, digest: str, work: Path, *, threads: int, shares: int = 1, rows: int = 1) -> None:
        self._manifest, self._store, self._work = store / "manifests" / f"{digest}.json", store, work / "bare" / digest
        self._shares, self._rows, self._threads = shares, rows, threads
        numeric = from_json(Manifest, self._manifest.read_bytes(), limit_bytes=MANIFEST_BYTES).numeric_class
        name = "bare loop" if shares == 1 else f"{shares} shares, no exchange"
        window = f", windows of {rows}" if rows > 1 else ""
        flags = ", ".join(machine()["instructions"])
        self.about = About(
            f"{name}{window}",
            "",
            numeric.name,
            bits_per_weight(numeric),
            f"ONNX Runtime here: {flags}",
            threads * shares,
        )

    def decode(self, prompt: Sequence[int], tokens: int) -> Decoded:
        """`tokens` steps, of windows as many as they make."""
        steps = tokens if self._rows == 1 else max(4, tokens // self._rows)
        running = [self._start(index, prompt, steps) for index in range(self._shares)]
        try:
            for process in running:
                if process.stdout is None or process.stdout.readline() != "loaded\n":
                    raise Unavailable(f"the bare loop did not load: {process.communicate()[1][-300:]}")
            for process in running:
                assert process.stdin is not None
                process.stdin.write("go\n")
                process.stdin.flush()
            found = [json.loads(process.communicate()[0]) for process in running]
        finally:
            for process in running:
                process.kill()
                process.wait()
        ids = list(found[0]["ids"]) if self._shares == self._rows == 1 else None
        return Decoded(tpot_s=sum(one["ms"] for one in found) / len(found) / 1e3 / self._rows, ids=ids)

    def prefill(self, prompt: Sequence[int]) -> float:
        raise Unavailable("the bare loop runs no prompts")

    def close(self) -> None:
        """Its processes end with each figure."""

    def _start(self, index: int, prompt: Sequence[int], steps: int) -> subprocess.Popen[str]:
        folder = self._work / f"{index}-{self._shares}"
        command = [
            sys.executable, str(BARE), str(self._manifest), str(self._store), str(folder),
            "--threads", str(self._threads), "--tokens", str(steps), "--rows", str(self._rows), "--wait",
            "--share", f"{index}/{self._shares}", "--prompt", ",".join(map(str, prompt)),
        ]  # fmt: skip
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
