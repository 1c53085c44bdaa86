"""From a model's name to a ready deployment: find the checkpoint, cut it into the local store, deploy, watch."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from ganglion.cli import output, views
from ganglion.cli.owner import agents_home, device_name, owner_home
from ganglion.cli.serving import read_serving
from ganglion.proto import admin_pb2
from ganglion.wire.errors import ErrorBody, InvalidRequest, NotFound, Unavailable, from_body
from ganglion.wire.home import make_private_folder, write_secret
from ganglion.wire.nouns import Manifest, NumericClass, PlanOptions, to_json

if TYPE_CHECKING:
    from ganglion.cli.admin import Admin

READY: Final = admin_pb2.DEPLOYMENT_PHASE_READY
FAILED: Final = admin_pb2.DEPLOYMENT_PHASE_FAILED
SMALL_CHECKPOINT_BYTES: Final = 256 << 20  # up to here fp32 costs neither memory nor time worth the rounding
STOPPED: Final = admin_pb2.DEPLOYMENT_PHASE_STOPPED


@dataclass(frozen=True)
class Wish:
    """What a person asked of a deployment; `weights` None and default options: whatever is deployed will do."""

    weights: Literal["fp32", "int4"] | None = None
    fast: bool = False
    options: PlanOptions = field(default_factory=PlanOptions)

    @classmethod
    def of(
        cls,
        *,
        weights: str | None,
        fast: bool,
        mode: str,
        devices: str,
        shares: str,
        topology: str,
        context: int,
        sessions: int,
        private: bool,
    ) -> Wish:
        """From a command's options. Raises InvalidRequest naming the option."""
        names = tuple(name.strip() for name in devices.split(",") if name.strip())
        try:
            parts = tuple(int(part) for part in shares.split(",") if part.strip())
        except ValueError:
            raise InvalidRequest(
                f"--shares {shares!r}: whole numbers with commas, as in 2,1,1", param="shares"
            ) from None
        if parts and len(parts) != len(names):
            raise InvalidRequest(
                f"--shares has {len(parts)} numbers for {len(names)} --devices; give one each", param="shares"
            )
        document = {
            "mode": mode, "devices": names, "shares": parts, "topology": topology,
            "context": context, "sessions": sessions, "private": private,
        }  # fmt: skip
        return cls(_format(weights), fast, _plan_options(document))

    @property
    def is_open(self) -> bool:
        """Whether any ready deployment of the model will do."""
        return self == Wish()

    def accepts(self, state: admin_pb2.DeploymentState) -> bool:
        """Whether this deployment is what was asked for, as far as a plan shows it."""
        if state.phase != READY:
            return False
        if self.is_open:
            return True
        found = views.manifest_of(state).numeric_class
        if self.options != PlanOptions() or found.exact == self.fast:
            return False
        return self.weights is None or self.weights == found.format


def _format(text: str | None) -> Literal["fp32", "int4"] | None:
    choices: dict[str | None, Literal["fp32", "int4"] | None] = {None: None, "fp32": "fp32", "int4": "int4"}
    if text in choices:
        return choices[text]
    raise InvalidRequest(f"--format {text!r}: it is fp32 or int4", param="format")


def _plan_options(document: dict[str, Any]) -> PlanOptions:
    import msgspec

    try:
        return msgspec.convert(document, PlanOptions)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"planning options: {error}") from error


@dataclass(frozen=True)
class LocalAgent:
    """The agent of this machine whose store takes the pieces."""

    home: Path
    name: str
    node_id: str


def local_agent(root: Path) -> LocalAgent:
    """The running agent of this machine, the one named after it first. Raises Unavailable when none runs."""
    folder = agents_home(root)
    homes = sorted(folder.iterdir()) if folder.is_dir() else []
    for home in sorted(homes, key=lambda each: each.name != device_name()):
        serving = read_serving(home)
        if serving is not None:
            return LocalAgent(home, str(serving["name"]), str(serving["node_id"]))
    raise Unavailable("no agent runs here to hold the model's pieces; start one with `ganglion up` or `ganglion join`")


def checkpoint_of(model: str, name: str | None) -> tuple[Path, str] | None:
    """Folder and API name of a checkpoint; None when `model` is neither a demo nor a folder."""
    from ganglion.models import DEMO_NAMES, demo_path

    if model in DEMO_NAMES:
        return demo_path(model), name or model
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder.resolve(), name or folder.resolve().name
    if "/" in model or model.startswith("."):
        raise NotFound(f"there is no folder {folder}; give a folder with config.json and *.safetensors", param="model")
    return None


async def ensure_ready(root: Path, line: Admin, model: str, *, name: str | None, wish: Wish) -> str:
    """Deploy `model` unless a ready deployment of it will do; its name in the API. Raises GanglionError."""
    found = checkpoint_of(model, name)
    wanted = found[1] if found else model
    for state in (await line.fleet()).deployments:
        if wanted in (state.model, state.deployment) and wish.accepts(state):
            return state.model
    if found is None:
        raise await unknown_model(line, model)
    agent = local_agent(root)
    manifest = cut(root, agent, found[0], name=wanted, wish=wish)
    await deploy(line, request_of(manifest, wish.options, agent))
    return manifest.name


async def unknown_model(line: Admin, model: str) -> NotFound:
    """The error that names what there is instead of `model`."""
    from ganglion.models import DEMO_NAMES

    known = [state.model for state in (await line.fleet()).deployments if state.phase == READY]
    ready = f"; ready now: {', '.join(sorted(known))}" if known else ""
    return NotFound(
        f"unknown model {model!r}: it is no folder and not deployed{ready}; embedded: {', '.join(DEMO_NAMES)}",
        param="model",
    )


def request_of(manifest: Manifest, options: PlanOptions, agent: LocalAgent) -> admin_pb2.DeployRequest:
    """What the coordinator is asked."""
    return admin_pb2.DeployRequest(manifest=to_json(manifest), options=to_json(options), holder=agent.node_id)


def cut(root: Path, agent: LocalAgent, source: Path, *, name: str, wish: Wish) -> Manifest:
    """The manifest of `source` in the class asked for; cut into the agent's store, with a bar, unless it is there."""
    from ganglion.agent.store import ManifestShelf, PieceStore, all_pieces
    from ganglion.partitioner.cut import numeric_class, partition

    numeric = numeric_class(source, wish.weights or default_weights(source), fast=wish.fast)
    store = PieceStore(agent.home / "store")
    shelf = ManifestShelf(agent.home / "store")
    remembered = make_private_folder(owner_home(root) / "manifests") / _key(source, name, numeric)
    with contextlib.suppress(FileNotFoundError, NotFound):
        known = shelf.get(remembered.read_text(encoding="ascii"))
        if all(store.has(piece.digest, piece.size) for piece in all_pieces(known)):
            return known
    with progress_bar(f"cutting {name} ({numeric.name})") as advance:
        manifest = partition(source, store, name=name, numeric_class=numeric, progress=advance)
    write_secret(remembered, shelf.put(manifest).encode("ascii"))
    return manifest


def default_weights(source: Path) -> Literal["fp32", "int4"]:
    """The weight format where none is asked for: fp32 for small checkpoints, else int4."""
    stored = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    return "fp32" if stored <= SMALL_CHECKPOINT_BYTES else "int4"


def _key(source: Path, name: str, numeric: NumericClass) -> str:
    """A name for (this checkpoint as it lies there now, this class): changes when any of its files does."""
    from ganglion.wire.hello import distribution_version

    marks = [distribution_version(), str(source), name, numeric.name]
    for file in sorted(source.iterdir()):
        if file.is_file():
            stat = file.stat()
            marks.append(f"{file.name}\0{stat.st_size}\0{stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(marks).encode()).hexdigest()


async def deploy(line: Admin, request: admin_pb2.DeployRequest) -> str:
    """Deploy and show each device's progress; the deployment's id once it is ready. Raises the error that ended it."""
    bars = Bars()
    last = ""
    with bars:
        async with contextlib.aclosing(line.deploy(request)) as events:
            async for event in events:
                if event.phase == FAILED:
                    raise from_body(ErrorBody(event.error_code, event.message))
                if event.phase == STOPPED:
                    raise Unavailable(f"the deployment was stopped: {event.message}")
                for device in event.devices:
                    bars.show(
                        f"{device.name}: {device.phase}", device.done_bytes, device.total_bytes, key=device.node_id
                    )
                if event.message and event.message != last:
                    last = event.message
                    bars.say(event.message)
                if event.phase == READY:
                    return event.deployment
    raise Unavailable("the coordinator ended the deployment's stream before it was ready; see `ganglion ps`")


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Any]:
    """A bar on standard error; yields `advance(done_bytes, total_bytes)`."""
    with Bars() as bars:
        yield lambda done, total: bars.show(title, done, total, key=title)
    output.step(title)


class Bars:
    """Several progress bars on standard error: drawn on a terminal, silent elsewhere."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

        console = output.notes()
        self._progress = Progress(
            TextColumn("  {task.description}", markup=False),
            BarColumn(),
            DownloadColumn(binary_units=True),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, title: str, done: int, total: int, *, key: str) -> None:
        """Draw the bar `key` at `done` of `total` bytes."""
        if key not in self._tasks:
            self._tasks[key] = self._progress.add_task(title, total=None)
        self._progress.update(self._tasks[key], description=title, completed=done, total=total or None)

    def say(self, text: str) -> None:
        """A line above the bars."""
        output.doing(text)
