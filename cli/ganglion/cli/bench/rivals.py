"""What a deployment is compared with, each in a process of its own, on the same checkpoint and with equal threads.

Whatever is not here is said by name; nothing is skipped in silence.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from ganglion.cli.bench.machine import version
from ganglion.cli.bench.measures import Decoded
from ganglion.cli.output import say
from ganglion.partitioner.checkpoint import open_checkpoint
from ganglion.partitioner.gguf.writing import BITS, Kind, write_gguf
from ganglion.wire.errors import GanglionError, InvalidRequest, NotFound, Unavailable
from ganglion.wire.nouns import NumericClass

NAMES: Final = ("llama-cpp-python", "transformers", "llama.cpp")
GGUF: Final = ".gguf"
BENCH_S: Final = 900.0
_INSTRUCTIONS: Final = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
library.llama_print_system_info.restype = ctypes.c_char_p
print(library.llama_print_system_info().decode())
"""


@dataclass(frozen=True)
class About:
    """What is compared with. `bits`: of a weight of a matrix, scales included."""

    name: str
    version: str
    weights: str
    bits: float
    instructions: str
    threads: int


class Rival(Protocol):
    """Blocking; every call raises Unavailable when the other program fails."""

    @property
    def about(self) -> About:
        """What it is."""
        ...

    def decode(self, prompt: Sequence[int], tokens: int) -> Decoded:
        """`tokens` greedy tokens after a prompt."""
        ...

    def prefill(self, prompt: Sequence[int]) -> float:
        """Seconds that a prompt takes, to its first token where the program gives one."""
        ...

    def close(self) -> None:
        """End it."""
        ...


@dataclass(frozen=True)
class Wanted:
    """One `--against NAME[=PATH]`."""

    name: str
    path: Path | None

    @classmethod
    def of(cls, text: str, names: Sequence[str] = NAMES) -> Wanted:
        """Raises InvalidRequest naming what there is to compare with, NotFound for a path that is none."""
        name, _, path = text.partition("=")
        if name not in names:
            raise InvalidRequest(f"--against {name!r}: it is {', '.join(names)}", param="against")
        if path and not Path(path).expanduser().exists():
            raise NotFound(f"--against {text}: there is no {path}", param="against")
        if name not in {"llama-cpp-python", "transformers"} and not path:
            raise InvalidRequest(f"--against {name}: name its folder, as in {name}=/path/to/bin", param="against")
        return cls(name, Path(path).expanduser().resolve() if path else None)


def like(numeric_class: NumericClass) -> Kind:
    """The GGUF kind of as many bits as a class, or the next more."""
    kinds: dict[str, Kind] = {"int4": "Q4_0", "int8": "Q8_0"}
    return kinds.get(numeric_class.format, "F16")


class Converted:
    """The checkpoint as each needs it, written once into `folder`."""

    def __init__(self, checkpoint: Path, folder: Path) -> None:
        self.checkpoint = checkpoint
        self.folder = folder

    def gguf(self, kind: Kind) -> tuple[Path, float]:
        """(a GGUF file in `kind`, bits of a weight); the checkpoint itself where it is one, as it is."""
        from ganglion.cli.bars import progress_bar

        if self.checkpoint.suffix.lower() == GGUF:
            elements, size = 0, 0
            for tensor in open_checkpoint(self.checkpoint).tensors.values():
                if len(tensor.shape) > 1:
                    elements, size = elements + tensor.elements, size + tensor.stored_bytes
            return self.checkpoint, 8 * size / elements
        opened = open_checkpoint(self.checkpoint)
        path = self.folder / f"{opened.digest[:16]}-{kind}{GGUF}"
        if not path.exists():
            with progress_bar(f"writing {self.checkpoint.name} as {kind}") as advance:
                write_gguf(opened, path, kind, progress=advance)
        return path, BITS[kind]


def open_rivals(
    wanted: Sequence[Wanted], converted: Converted, kind: Kind, threads: int, context: int
) -> tuple[list[Rival], list[str]]:
    """(those that can run here, a line for each that cannot)."""
    found: list[Rival] = []
    missing: list[str] = []
    for each in wanted:
        for name in _variants(each.name):
            try:
                found.append(_open(name, each, converted, kind, threads, context))
                say(f"  {name}: {found[-1].about.instructions}")
            except GanglionError as error:
                missing.append(f"{name}: {error.message}")
                say(f"  {missing[-1]}")
    return found, missing


def _variants(name: str) -> tuple[str, ...]:
    return ("transformers-bf16", "transformers-fp32") if name == "transformers" else (name,)


def _open(name: str, wanted: Wanted, converted: Converted, kind: Kind, threads: int, context: int) -> Rival:
    if wanted.name == "llama.cpp":
        path, bits = converted.gguf(kind)
        if wanted.path is None:
            raise Unavailable("its folder is not named")
        return LlamaBench(wanted.path, path, kind, bits, threads)
    modules = {"llama-cpp-python": "llama_cpp"}.get(wanted.name, "torch transformers")
    for module in modules.split():
        if importlib.util.find_spec(module) is None:
            raise Unavailable(f"not installed here (no module {module})")
    if wanted.name == "llama-cpp-python":
        path, bits = converted.gguf(kind)
        about = About(name, version("llama-cpp-python") or "?", kind, bits, "", threads)
        return Child(about, path, context)
    weights = name.rpartition("-")[2]
    about = About(name, f"{version('transformers')}, torch {version('torch')}", weights, 0.0, "", threads)
    return Child(about, converted.checkpoint, context)


class Child:
    """A library in a child of this Python, which keeps the model loaded: one JSON line for each question."""

    def __init__(self, about: About, model: Path, context: int) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        arguments = [about.name, str(model), str(about.threads), str(context)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ganglion.cli.bench.rival_child", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._name = about.name
        try:
            said = self._answer()
        except BaseException:
            self.close()
            raise
        bits = float(said.get("bits") or about.bits)
        self.about = About(about.name, about.version, about.weights, bits, str(said["instructions"]), about.threads)

    def decode(self, prompt: Sequence[int], tokens: int) -> Decoded:
        """`tokens` greedy tokens after a prompt."""
        said = self._ask({"op": "decode", "prompt": list(prompt), "tokens": tokens})
        return Decoded(tpot_s=float(said["tpot_s"]), ids=list(said["ids"]), ttft_s=float(said["ttft_s"]))

    def prefill(self, prompt: Sequence[int]) -> float:
        """Seconds to its first token."""
        return float(self._ask({"op": "prefill", "prompt": list(prompt)})["seconds"])

    def close(self) -> None:
        """End it. First the process: a thread that still waits for its answer holds the pipe."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self._errors.close()

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        if self._process.stdin is None:
            raise Unavailable(f"{self._name} has no input")
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self._ended() from error
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout is not None else ""
        if not line:
            raise self._ended()
        found: dict[str, Any] = json.loads(line)
        return found

    def _ended(self) -> Unavailable:
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        return Unavailable(f"it ended: {said[-1][:300] if said else 'it said nothing'}")


class LlamaBench:
    """`llama-bench` of a folder with llama.cpp's programs; a process for each figure, which warms up by itself.

    extra: more of its options. It draws no token: a prompt's time is that of the prompt alone.
    """

    name = "llama.cpp"

    def __init__(
        self,
        folder: Path,
        model: Path,
        kind: Kind,
        bits: float,
        threads: int,
        *,
        name: str = "llama.cpp",
        extra: Sequence[str] = (),
    ) -> None:
        self._program = program(folder, "llama-bench")
        self._model = model
        self._extra = tuple(extra)
        self._threads = threads
        commit = self._run("-p", "1", "-n", "0", tell=("build_commit", "build_number"))
        self.about = About(name, f"{commit[0]} ({commit[1]})", kind, bits, instructions(folder), threads)

    def decode(self, prompt: Sequence[int], tokens: int) -> Decoded:
        """Tokens of its own choice after so many others."""
        nanoseconds = self._run("-p", "0", "-n", str(tokens), "-d", str(len(prompt)))[0]
        return Decoded(tpot_s=float(nanoseconds) / tokens / 1e9, ids=None)

    def prefill(self, prompt: Sequence[int]) -> float:
        """Seconds of a prompt of as many tokens."""
        return float(self._run("-p", str(len(prompt)), "-n", "0")[0]) / 1e9

    def close(self) -> None:
        """Nothing runs between figures."""

    def _run(self, *arguments: str, tell: Sequence[str] = ("avg_ns",)) -> list[Any]:
        command = [str(self._program), "-m", str(self._model), "-t", str(self._threads), "-r", "1", "-o", "json"]
        try:
            done = subprocess.run(
                [*command, *arguments, *self._extra], capture_output=True, text=True, timeout=BENCH_S, check=True
            )
            found = json.loads(done.stdout)[0]
            return [found[key] for key in tell]
        except subprocess.CalledProcessError as error:
            last = (error.stderr or "").strip().splitlines()[-1:]
            raise Unavailable(f"{self._program.name} ended with {error.returncode}: {''.join(last)[:300]}") from error
        except (OSError, ValueError, LookupError, subprocess.TimeoutExpired) as error:
            raise Unavailable(f"{self._program.name}: {error!r:.300}") from error


def program(folder: Path, *names: str) -> Path:
    """The first of `names` in a folder or its `bin`. Raises NotFound."""
    for path in (folder / sub / name for name in names for sub in ("", "bin")):
        if path.is_file():
            return path
    raise NotFound(f"there is no {' or '.join(names)} in {folder}", param="against")


def instructions(folder: Path) -> str:
    """What llama.cpp's library says that it was built with, by itself; why not, where it cannot be asked."""
    suffix = ".dylib" if platform.system() == "Darwin" else ".so"
    for library in (folder / f"libllama{suffix}", folder / "bin" / f"libllama{suffix}"):
        if library.exists():
            done = subprocess.run(
                [sys.executable, "-c", _INSTRUCTIONS, str(library)], capture_output=True, text=True, check=False
            )
            return built_with(done.stdout) if done.returncode == 0 else "its library does not load alone"
    return f"no libllama{suffix} beside it to ask"


def built_with(said: str) -> str:
    """llama.cpp's line of `NAME = 1` as names."""
    parts = (part.rpartition(":")[2].split("=") for part in said.split("|"))
    return ", ".join(part[0].strip() for part in parts if len(part) == 2 and part[1].strip() == "1")
