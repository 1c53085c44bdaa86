"""Speculative decoding between a device and a verifier, in every mode: `python bench/speculation.py PART [--quick]`.

The verifier is a worker with the demo model, the device drafts with the demo drafter: two processes with real sealed
sockets, across bench/link.py's namespaces (loopback where the round trip is 0). Acceptance is the demo pair's own.

  modes     every mode over every link; a pass of the target takes 50 ms, a drafted token 10 ms on the device and 6 ms
            at the verifier (bench/padded.py): the timed stand-in for large models beside accelerators
  real      the same without padding: the demo pair as fast as it is
  clients   sessions at once until the verifier is busy: the device drafts, or the verifier does

Tokens of every run are compared with the target alone; a difference ends the run. Anything but a round trip of 0 needs
root and /dev/net/tun.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "bench"), str(ROOT / "models")]

from corpus import SKIPPED_PARTS, Document, functions  # noqa: E402
from link import ADDRESSES, Link  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

from ganglion.agent import control  # noqa: E402
from ganglion.agent.store import PieceStore  # noqa: E402
from ganglion.models import demo_path  # noqa: E402
from ganglion.partitioner.cut import numeric_class, partition  # noqa: E402
from ganglion.wire.home import Home  # noqa: E402
from ganglion.wire.identity import Identity  # noqa: E402
from ganglion.wire.nouns import Manifest, Plan, Range, Share, Stage, digest, kv_capacity_tokens, to_json  # noqa: E402

CONTEXT = 1024
PASS_MS, DEVICE_MS, OWN_MS = 50.0, 10.0, 6.0
TEMPERATURES = (0.0, 0.7, 1.0)
MODES = ("plain", "own", "sync", "ahead", "edge", "branch", "auto")
SAID = {
    "plain": "cloud alone",
    "own": "co-located",
    "sync": "synchronous",
    "ahead": "draft ahead",
    "edge": "edge cache",
    "branch": "branch queue",
    "auto": "auto",
}


@dataclass(frozen=True, slots=True)
class Way:
    """A link: its round trip, jitter either side of that, and the part of the frames that is lost."""

    rtt_ms: float
    jitter_ms: float = 0.0
    loss: float = 0.0

    @property
    def name(self) -> str:
        jitter = f" ± {self.jitter_ms:g}" if self.jitter_ms else ""
        return f"{self.rtt_ms:g}{jitter} ms{f', {self.loss:.0%} lost' if self.loss else ''}"


LINKS = (*(Way(rtt) for rtt in (0, 20, 40, 80, 150)), Way(80, jitter_ms=20), Way(80, loss=0.01))


# --- processes


def small_world() -> Any:
    """The tests' own small world: an owner and an authority that certifies anyone, in memory."""
    spec = importlib.util.spec_from_file_location("world", ROOT / "tests" / "wire" / "conftest.py")
    if spec is None or spec.loader is None:
        raise SystemExit("tests/wire/conftest.py: not here")
    module = importlib.util.module_from_spec(spec)
    sys.modules["world"] = module
    spec.loader.exec_module(module)
    return module.World()


class Line:
    """A process that is told lines and says lines; ended with the block."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self._log = log
        self._file = log.open("ab")
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._file)

    def say(self, line: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line)
        self._process.stdin.flush()

    def hear(self) -> bytes:
        """The next line; raises SystemExit with the end of its log when it is gone."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._log.stem} ended:\n{self._log.read_text()[-6000:]}")
        return line

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._file):
            if stream is not None:
                stream.close()


@dataclass
class Models:
    """The demo pair, cut once, in one store below `work`; drafts: what the device makes of the drafter's guesses."""

    work: Path
    target: Manifest
    drafter: Manifest
    drafts: str

    @staticmethod
    def cut(work: Path, drafts: str) -> Models:
        (work / "store").mkdir(mode=0o700)
        store, found = PieceStore(work / "store"), []
        for name in ("demo", "demo-drafter"):
            path = demo_path(name)
            manifest = partition(path, store, name=name, numeric_class=numeric_class(path, "fp32"))
            found.append(manifest)
        return Models(work, *found, drafts)


@dataclass
class Stand:
    """A verifier and a device over one link."""

    device: Line

    def ask(self, mode: str, asks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Sessions that run at once."""
        self.device.say(json.dumps({"mode": mode, "asks": asks}).encode() + b"\n")
        found: list[dict[str, Any]] = json.loads(self.device.hear())
        return found


def whole(manifest: Manifest, node: str, *, sessions: int) -> Plan:
    """A plan of one device."""
    g = manifest.geometry
    ranges = (Range(0, count) for count in (g.head_groups, g.column_groups, g.vocab_groups))
    share = Share(device=node, **dict(zip(("heads", "columns", "vocab"), ranges, strict=True)))
    return Plan(
        manifest_digest=digest(manifest),
        numeric_class=manifest.numeric_class,
        context=CONTEXT,
        sessions=sessions,
        kv_tokens=sessions * kv_capacity_tokens(CONTEXT),
        chunk=256,
        stages=(Stage(layers=Range(0, g.layers), shares=(share,), topology="mesh"),),
        threads={node: 1},
    )


@dataclass(frozen=True, slots=True)
class Times:
    """Milliseconds of a pass, and of a drafted token at device and verifier; whether drafting blocks the device's loop.

    pass_rows, step_rows: of a pass and of a step at the verifier: so many take as long as one.
    """

    pass_ms: float = 0.0
    device_ms: float = 0.0
    own_ms: float = 0.0
    blocking: bool = True
    pass_rows: int = 16
    step_rows: int = 16


@contextmanager
def stand(
    models: Models,
    way: Way,
    times: Times,
    *,
    sessions: int,
    own: bool = True,
    devices: int = 1,
    window: int = 0,
    fixed: bool = False,
) -> Iterator[Stand]:
    """Both processes over a link; own: the verifier has a drafter too. window: at most, or always; 0: as is chosen."""
    world = small_world()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stand-", dir=models.work)))
        link, bind = None, "127.0.0.1"
        if way.rtt_ms:
            how = {"jitter_s": way.jitter_ms / 2e3, "loss": way.loss}
            link = stack.enter_context(Link(way.rtt_ms / 2e3, 12.5e6, **how))
            bind = ADDRESSES[1]
        identities: list[Identity] = [world.node(), world.node()]
        homes = [Home(folder / name) for name in ("verifier", "device")]
        for identity, home in zip(identities, homes, strict=True):
            identity.save(home.identity)
            shutil.copytree(models.work / "store", home.store, copy_function=os.link, dirs_exist_ok=True)

        drafter = to_json(models.drafter).decode()

        def start(what: str, end: int, setup: dict[str, Any]) -> Line:
            before = link.command(end) if link is not None else []
            setup |= {"fixed": window if fixed else 0}
            setup |= {
                "home": str(homes[0 if what == "worker" else 1].path),
                "blocking": times.blocking,
            }
            (folder / f"{what}.json").write_text(json.dumps({"context": CONTEXT, "drafter": drafter, **setup}))
            command = [sys.executable, str(ROOT / "bench" / "padded.py"), what, str(folder / f"{what}.json")]
            line = Line([*before, *command], folder / f"{what}.log")
            stack.callback(line.close)
            return line

        drafts = {} if own else {"drafter": ""}
        rows = {"pass_rows": times.pass_rows, "step_rows": times.step_rows}
        own_setup = {"pass_ms": times.pass_ms, "token_ms": times.own_ms, "sessions": sessions, **rows, **drafts}
        verifier = start("worker", 1, own_setup)
        plan = whole(models.target, identities[0].node_id, sessions=sessions)
        load = control.Load(
            home=str(homes[0].path),
            deployment="demo",
            epoch=1,
            plan=to_json(plan),
            manifest=to_json(models.target),
            node_id=identities[0].node_id,
            bind=bind,
            beat_path=str(folder / "beat"),
        )
        verifier.say(control.encode(load))
        while not isinstance(event := control.decode_event(verifier.hear()), control.Listening):
            if isinstance(event, control.Failed):
                raise SystemExit(f"the verifier: {event.error.message}")
        records = [identity.record.SerializeToString() for identity in identities]
        address = f"{bind}:{event.port}"
        peers = (control.PeerEntry(record=records[0], address=address, name="verifier"),)
        gateways = (control.PeerEntry(record=records[1], address="", name="device"),)
        verifier.say(control.encode(control.Connect(peers=peers, gateways=gateways)))
        while not isinstance(control.decode_event(verifier.hear()), control.Connected):
            pass
        setup = {
            "record": records[0].hex(),
            "address": address,
            "deployment": "demo",
            "epoch": 1,
            "target": to_json(models.target).decode(),
            "token_ms": times.device_ms,
            "step_rows": 16,
            "devices": devices,
            "drafts": models.drafts,
            "window": window,
            "stops": False,
        }
        device = start("device", 0, setup)
        device.hear()
        yield Stand(device)


def prompts(count: int, tokens: int) -> list[list[int]]:
    """Beginnings of held-out functions, each with what stands before it in its file: `tokens` ids."""
    tokenizer = Tokenizer.from_file(str(demo_path("demo") / "tokenizer.json"))
    found = []
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py"), key=lambda path: hashlib.sha256(path.name.encode()).digest()):
        relative = path.relative_to(root)
        document = Document(relative.as_posix(), "")
        if not document.is_validation or document.is_test or not SKIPPED_PARTS.isdisjoint(relative.parts):
            continue
        document = Document(document.path, path.read_text("utf-8"))
        one = next((each for each in functions(document) if len(each.body) > 200), None)
        if one is None or (at := document.text.find(one.header)) < 0:
            continue
        ids = tokenizer.encode(document.text[: at + len(one.header)] + "\n").ids[-tokens:]
        if len(ids) == tokens:
            found.append(ids)
        if len(found) == count:
            break
    return found


# --- figures


@dataclass
class Cell:
    """What a mode gave over a link at one temperature: figures of each prompt."""

    ms: list[float] = field(default_factory=list)
    passes: int = 0
    tokens: int = 0
    drafted: int = 0
    hits: int = 0
    sent: int = 0
    received: int = 0
    counts: Counter[int] = field(default_factory=Counter)

    def add(self, told: dict[str, Any]) -> None:
        counts, at_s = told["counts"], told["at_s"]
        self.ms.append((at_s[-1] - at_s[0]) * 1e3 / max(1, sum(counts[1:])))
        said = told.get("speculation", {})
        self.tokens += len(told["ids"])
        self.passes += said.get("passes", len(counts))
        self.drafted += said.get("drafted", 0)
        self.hits += said.get("hits", 0)
        self.sent += int(said.get("sent_bytes", 0))
        self.received += int(said.get("received_bytes", 0))
        self.counts.update(dict(enumerate(said.get("accepted_counts", ()))))

    @property
    def document(self) -> dict[str, Any]:
        return {
            "ms_per_token": statistics.median(self.ms),
            "ms": self.ms,
            "passes_per_token": self.passes / self.tokens,
            "hit_rate": self.hits / self.passes if self.passes else 0.0,
            "drafted_per_token": self.drafted / self.tokens,
            "sent_per_token": self.sent / self.tokens,
            "received_per_token": self.received / self.tokens,
            "accepted": {str(count): passes for count, passes in sorted(self.counts.items())},
        }


class Bench:
    """Runs, with every token compared."""

    def __init__(self, models: Models, chosen: argparse.Namespace) -> None:
        self.models, self.chosen = models, chosen
        self.prompts = prompts(chosen.prompts, chosen.prompt_tokens)
        self.compared = 0
        self._alone: dict[tuple[int, float], list[int]] = {}

    def ask_of(self, prompt: int, temperature: float) -> dict[str, Any]:
        sampling = {"temperature": temperature, "seed": 1000 + prompt, "top_p": self.chosen.top_p}
        return {"prompt": self.prompts[prompt], "tokens": self.chosen.tokens, "sampling": sampling}

    def alone(self, temperatures: Sequence[float]) -> None:
        """The target's own tokens, without any drafting."""
        with stand(self.models, Way(0), Times(), sessions=self.chosen.sessions, own=False) as here:
            for temperature in temperatures:
                for prompt in range(len(self.prompts)):
                    (told,) = here.ask("alone", [self.ask_of(prompt, temperature)])
                    self._alone[prompt, temperature] = told["ids"]

    def check(self, told: dict[str, Any], prompt: int, temperature: float, what: str) -> None:
        """Raises SystemExit where a run gave other tokens than the target alone."""
        wanted = self._alone[prompt, temperature]
        if told["ids"] != wanted:
            at = next(
                (at for at, pair in enumerate(zip(told["ids"], wanted, strict=False)) if pair[0] != pair[1]), None
            )
            lengths = f"{len(told['ids'])} tokens of {len(wanted)}"
            raise SystemExit(
                f"{what}, prompt {prompt}, T={temperature:g}: other tokens than the target's, at {at} ({lengths})"
            )
        self.compared += len(wanted)

    def modes(self, times: Times) -> list[dict[str, Any]]:
        """A cell for each mode, link and temperature."""
        found = []
        for way in self.chosen.ways:
            with stand(self.models, way, times, sessions=self.chosen.sessions, window=self.chosen.window) as here:
                for temperature in self.chosen.temperatures:
                    for mode in self.chosen.modes:
                        here.ask(
                            mode, [self.ask_of(0, temperature) | {"tokens": 8}]
                        )  # connections, and what is learned
                        cell = Cell()
                        for prompt in range(len(self.prompts)):
                            (told,) = here.ask(mode, [self.ask_of(prompt, temperature)])
                            self.check(told, prompt, temperature, f"{mode} over {way.name}")
                            cell.add(told)
                        document = cell.document
                        found.append(
                            {"mode": mode, "link": way.name, "rtt_ms": way.rtt_ms, "T": temperature, **document}
                        )
                        said = f"{way.name}, T={temperature:g}, {mode}: {document['ms_per_token']:.1f} ms/token"
                        print(said, file=sys.stderr, flush=True)
        return found

    def clients(self, times: Times) -> list[dict[str, Any]]:
        """Tokens a second of the verifier by sessions at once, drafted for remotely and by itself."""
        found = []
        most = max(self.chosen.clients)
        with stand(
            self.models, self.chosen.ways[0], times, sessions=most, devices=most, window=self.chosen.window, fixed=True
        ) as here:
            for mode in ("own", *self.chosen.remote):
                for count in self.chosen.clients:
                    asks = [self.ask_of(at % len(self.prompts), 0.0) for at in range(count)]
                    told = here.ask(mode, asks)
                    for at, one in enumerate(told):
                        self.check(one, at % len(self.prompts), 0.0, f"{mode}, {count} at once")
                    cell = Cell()
                    for one in told:
                        cell.add(one)
                    # From when the last one's first token came until the first one ends all of them run.
                    since_s, until_s = max(one["at_s"][0] for one in told), min(one["at_s"][-1] for one in told)
                    events = (pair for one in told for pair in zip(one["at_s"], one["counts"], strict=True))
                    rate = sum(n for at_s, n in events if since_s < at_s <= until_s) / (until_s - since_s)
                    found.append({"mode": mode, "clients": count, "tokens_per_s": rate, **cell.document})
                    print(f"{mode}, {count} at once: {rate:.1f} tokens/s", file=sys.stderr, flush=True)
        return found


def show_modes(found: Sequence[dict[str, Any]], chosen: argparse.Namespace) -> None:
    """Tables by temperature: ms a token; then what stands behind them."""
    console, by = Console(width=170), {(each["mode"], each["link"], each["T"]): each for each in found}
    for temperature in chosen.temperatures:
        table = Table("ms/token", *(way.name for way in chosen.ways), title=f"T = {temperature:g}")
        for mode in chosen.modes:
            cells = [by[mode, way.name, temperature] for way in chosen.ways]
            table.add_row(SAID[mode], *(f"{cell['ms_per_token']:.1f}" for cell in cells))
        console.print(table)
        table = Table("passes/token; hits; bytes/token up, down", *(way.name for way in chosen.ways))
        for mode in chosen.modes:
            cells = [by[mode, way.name, temperature] for way in chosen.ways]
            said = [
                f"{cell['passes_per_token']:.2f}; {cell['hit_rate']:.0%}; {cell['sent_per_token']:.0f}, "
                f"{cell['received_per_token']:.0f}"
                for cell in cells
            ]
            table.add_row(SAID[mode], *said)
        console.print(table)
    table = Table("passes that accepted", "T", *map(str, range(9)), "more")
    for mode in chosen.modes:
        for temperature in chosen.temperatures:
            counts: Counter[int] = Counter()
            for way in chosen.ways:
                counts.update({int(at): n for at, n in by[mode, way.name, temperature]["accepted"].items()})
            total = sum(counts.values()) or 1
            shares = [counts[at] / total for at in range(9)] + [sum(n for at, n in counts.items() if at > 8) / total]
            if sum(counts.values()):
                table.add_row(SAID[mode], f"{temperature:g}", *(f"{one:.0%}" for one in shares))
    console.print(table)


def show_clients(found: Sequence[dict[str, Any]]) -> None:
    """Tokens a second by sessions, and how many times those of the verifier that drafts itself."""
    own = {each["clients"]: each["tokens_per_s"] for each in found if each["mode"] == "own"}
    table = Table("mode", "sessions", "tokens/s", "of co-located", "passes/token", "drafted/token", "ms/token of one")
    for each in found:
        table.add_row(
            SAID[each["mode"]],
            str(each["clients"]),
            f"{each['tokens_per_s']:.1f}",
            f"{each['tokens_per_s'] / own[each['clients']]:.2f}" if own.get(each["clients"]) else "",
            f"{each['passes_per_token']:.2f}",
            f"{each['drafted_per_token']:.2f}",
            f"{each['ms_per_token']:.1f}",
        )
    Console(width=140).print(table)


def main() -> None:
    """Run a part and print tables, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("modes", "real", "clients"))
    parser.add_argument("--quick", action="store_true", help="one prompt, greedy, round trips of 0 and 80 ms")
    parser.add_argument("--rtt", type=float, nargs="+", help="round trips in ms, instead of every link")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--remote", nargs="+", choices=MODES, default=["sync", "branch"], help="clients: as these")
    parser.add_argument("--temperatures", type=float, nargs="+", default=list(TEMPERATURES))
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--drafts", choices=("good", "random", "adversary"), default="good", help="of the device")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=96)
    parser.add_argument("--window", type=int, default=0, help="drafted tokens of a pass at most; 0: as is chosen")
    parser.add_argument("--unbatched", action="store_true", help="windows and drafts of n sessions take n times one")
    parser.add_argument(
        "--free-device", action="store_true", help="drafting does not hold up the device's loop, as on an accelerator"
    )
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8])
    chosen = parser.parse_args()
    chosen.ways = LINKS if chosen.rtt is None else tuple(Way(rtt) for rtt in chosen.rtt)
    if chosen.quick:
        chosen.prompts, chosen.tokens, chosen.temperatures = 1, min(chosen.tokens, 32), [0.0]
        chosen.ways = chosen.ways if chosen.rtt else (Way(0), Way(80))
    if chosen.part == "clients":
        chosen.temperatures, chosen.prompts = [0.0], max(chosen.clients)
        chosen.window = chosen.window or 5
        chosen.prompt_tokens = min(chosen.prompt_tokens, 16)  # passes of prompts are padded too
    chosen.sessions = 4
    times = Times() if chosen.part == "real" else Times(PASS_MS, DEVICE_MS, OWN_MS, not chosen.free_device)
    if chosen.unbatched:
        times = replace(times, pass_rows=chosen.window + 1, step_rows=1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that its processes and folders end with it
    with tempfile.TemporaryDirectory(prefix="ganglion-bench-") as folder:
        bench = Bench(Models.cut(Path(folder), chosen.drafts), chosen)
        bench.alone(chosen.temperatures)
        found = bench.clients(times) if chosen.part == "clients" else bench.modes(times)
    if chosen.part == "clients":
        show_clients(found)
    else:
        show_modes(found, chosen)
    print(f"tokens equal to the target's alone: {bench.compared} positions compared; load {os.getloadavg()}")
    print(json.dumps({"part": chosen.part, "times": asdict(times), "found": found}))


if __name__ == "__main__":
    main()
