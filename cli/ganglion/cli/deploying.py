"""From a model's name to a ready deployment: find the checkpoint, cut it into the local store, deploy, watch."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, get_args, get_type_hints

from ganglion.cli import views
from ganglion.cli.bars import Bars, progress_bar
from ganglion.cli.owner import agents_home, device_name
from ganglion.cli.serving import read_serving
from ganglion.cli.shelf import Memory, agent_homes, find_cut, key_of
from ganglion.cli.sourcing import Source, checkpoint_of
from ganglion.proto import admin_pb2
from ganglion.wire.errors import ErrorBody, InvalidRequest, NotFound, Unavailable, from_body
from ganglion.wire.nouns import Manifest, NumericClass, PlanOptions, to_json

if TYPE_CHECKING:
    from ganglion.cli.admin import Admin
    from ganglion.partitioner.quantize import Rules

READY: Final = admin_pb2.DEPLOYMENT_PHASE_READY
FAILED: Final = admin_pb2.DEPLOYMENT_PHASE_FAILED
SMALL_CHECKPOINT_BYTES: Final = 256 << 20  # up to here fp32 costs neither memory nor time worth the rounding
EARLY: Final = "early:"
EXPERTS: Final = ("columns", "whole")
STOPPED: Final = admin_pb2.DEPLOYMENT_PHASE_STOPPED


@dataclass(frozen=True)
class Wish:
    """What a person asked of a deployment; `weights` None and default options: whatever is deployed will do.

    block, rules: of the cut, where the format's usual block and the class's own formats are not what was asked for.
    experts: how a mixture is cut, "columns" or "whole"; None: as it is cut, else by columns.
    drafter: the model that is to guess where this one runs, as a person names it; other kinds are in the options.
    workload: what the format "auto" is chosen for; reason: why it was, once it is.
    """

    weights: str | None = None
    fast: bool = False
    options: PlanOptions = field(default_factory=PlanOptions)
    block: int | None = None
    rules: Rules | None = None
    drafter: str = ""
    workload: str = "chat"
    reason: str = ""
    experts: str | None = None

    @classmethod
    def of(
        cls,
        *,
        weights: str | None,
        workload: str | None = None,
        fast: bool,
        mode: str,
        devices: str,
        shares: str,
        topology: str,
        payload: str,
        context: int,
        sessions: int,
        prefix_tokens: int | None,
        private: bool,
        drafter: str | None = None,
        window: int = 0,
        experts: str | None = None,
        expert_memory: str | None = None,
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
            "payload": payload, "context": context, "sessions": sessions,
            "prefix_tokens": prefix_tokens, "private": private, "window_tokens": window,
            "expert_memory_bytes": _expert_memory(expert_memory),
        }  # fmt: skip
        known = drafter in (None, "none", "ngram") or str(drafter).startswith(EARLY)
        document["drafter"] = ("" if drafter == "none" else drafter or "") if known else "model"
        if workload is not None and weights not in (None, "auto"):
            raise InvalidRequest(f"--for {workload} chooses the format, but --format {weights} was asked", param="for")
        weights = "auto" if workload is not None else weights
        options = _plan_options(document)
        if mode == "expert" or expert_memory is not None:
            if experts == "columns":
                given = "--mode expert runs" if mode == "expert" else "--expert-memory reads"
                raise InvalidRequest(f"{given} whole experts, but --experts columns was asked", param="experts")
            experts = "whole"
        return cls(
            _format(weights),
            fast,
            options,
            drafter="" if known else drafter or "",
            workload=workload or "chat",
            experts=parse_experts(experts),
        )

    @classmethod
    def weights_only(cls, weights: str | None, *, fast: bool, experts: str | None = None) -> Wish:
        """From `--format`, `--fast` and `--experts` alone. Raises InvalidRequest naming the option."""
        return cls(_format(weights), fast, experts=parse_experts(experts))

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
        return self.options == PlanOptions() and self.accepts_cut(views.manifest_of(state))

    def accepts_cut(self, found: Manifest) -> bool:
        """Whether a model that is cut so is what was asked for."""
        whole = any(segment.axis == "experts" for layer in found.layers for segment in layer.segments)
        return self.accepts_class(found.numeric_class) and self.experts in (None, "whole" if whole else "columns")

    def accepts_class(self, found: NumericClass) -> bool:
        """Whether weights in this class are what was asked for."""
        return found.exact != self.fast and self.weights in (None, found.choice)


DRAFTER: Final = Wish(fast=True)  # a guess need not be exact: what it guesses wrongly costs time, never a token


def weight_formats() -> tuple[str, ...]:
    """The weight formats of numeric classes, their mixture, and the choice among them."""
    return (*get_args(get_type_hints(NumericClass)["format"]), "mixed", "auto")


def _format(text: str | None) -> str | None:
    if text is None or text in weight_formats():
        return text
    *others, last = weight_formats()
    raise InvalidRequest(f"--format {text!r}: it is {', '.join(others)} or {last}", param="format")


def parse_experts(text: str | None) -> str | None:
    """How experts are cut, as it is said on a command line; raises InvalidRequest."""
    if text in (None, *EXPERTS):
        return text
    raise InvalidRequest(f"--experts {text!r}: it is {' or '.join(EXPERTS)}", param="experts")


def _expert_memory(text: str | None) -> int:
    if text is None:
        return 0
    from ganglion.cli.settings import parse_bytes

    try:
        size = parse_bytes(text)
    except ValueError as error:
        raise InvalidRequest(f"--expert-memory: {error}", param="expert_memory") from error
    if not isinstance(size, int) or size < 1:
        raise InvalidRequest(
            f"--expert-memory {text}: no expert fits; leave it out for all of them", param="expert_memory"
        )
    return size


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


def store_home(root: Path) -> Path | None:
    """Home of the agent here whose store takes the pieces, whether it runs or not; None when there is none."""
    with contextlib.suppress(Unavailable):
        return local_agent(root).home
    homes = agent_homes(root)
    return min(homes, key=lambda each: each.name != device_name(), default=None)


async def ensure_ready(root: Path, line: Admin, model: str, *, name: str | None, wish: Wish) -> str:
    """Deploy `model` unless a ready deployment of it will do; its name in the API. Raises GanglionError."""
    from ganglion.cli.choosing import decide

    found = await checkpoint_of(model, name)
    wish = await decide(line, wish, found)
    wanted = found.name if found else model
    for state in (await line.fleet()).deployments:
        if wanted in (state.model, state.deployment) and wish.accepts(state) and is_of(state, found):
            return state.model
    manifest = await manifest_for(root, line, model, found, wish)
    agent = local_agent(root)
    drafter = await drafter_for(root, line, wish)
    await deploy(line, request_of(manifest, wish.options, agent, drafter))
    return manifest.name


async def manifest_for(root: Path, line: Admin, model: str, found: Source | None, wish: Wish) -> Manifest:
    """The manifest of a checkpoint, cut unless it is; or the latest model called `model` that is cut here.

    Raises NotFound when `found` is None and nothing of that name is here.
    """
    if found is not None:
        return cut(root, local_agent(root).home, found, wish=wish)
    here = [
        each
        for each in find_cut(root, model)
        if each.home == local_agent(root).home and wish.accepts_cut(each.manifest)
    ]
    if not here:
        raise await unknown_model(line, model)
    return max(here, key=lambda each: each.used_unix_s or 0.0).manifest


async def drafter_for(root: Path, line: Admin, wish: Wish) -> Manifest | None:
    """The manifest of the model that is to guess, cut unless it is; None where none was asked for."""
    if not wish.drafter:
        return None
    return await manifest_for(root, line, wish.drafter, await checkpoint_of(wish.drafter), DRAFTER)


def is_of(state: admin_pb2.DeploymentState, found: Source | None) -> bool:
    """Whether a deployment is of this very checkpoint: another one may have the same name."""
    from ganglion.partitioner.checkpoint import open_checkpoint

    return found is None or views.manifest_of(state).source_digest == open_checkpoint(found.path).digest


async def unknown_model(line: Admin, model: str) -> NotFound:
    """The error that names what there is instead of `model`."""
    from ganglion.models import DEMO_NAMES

    known = [state.model for state in (await line.fleet()).deployments if state.phase == READY]
    ready = f"; ready now: {', '.join(sorted(known))}" if known else ""
    return NotFound(
        f"unknown model {model!r}: it is no folder, not cut here and not deployed{ready}; embedded:"
        f" {', '.join(DEMO_NAMES)}; a repository is org/name",
        param="model",
    )


def request_of(
    manifest: Manifest, options: PlanOptions, agent: LocalAgent, drafter: Manifest | None = None
) -> admin_pb2.DeployRequest:
    """What the coordinator is asked; `drafter`: the model that is to guess."""
    return admin_pb2.DeployRequest(
        manifest=to_json(manifest),
        options=to_json(options),
        holder=agent.node_id,
        drafter=to_json(drafter) if drafter is not None else b"",
    )


def cut(root: Path, home: Path, source: Source, *, wish: Wish) -> Manifest:
    """The manifest of `source` in the class asked for; cut into the store of the agent in `home` unless it is there."""
    from ganglion.agent.store import ManifestShelf, PieceStore, all_pieces
    from ganglion.partitioner.classes import NO_RULES, numeric_class
    from ganglion.partitioner.cut import partition

    weights: Any = wish.weights or default_weights(source.path)  # one of the formats that there are
    if weights == "auto":
        raise InvalidRequest(
            "--format auto chooses by what was measured of the devices: use it with `ganglion run` or `ganglion plan`",
            param="format",
        )
    rules = wish.rules or NO_RULES
    experts: Any = wish.experts or "columns"
    numeric = numeric_class(source.path, weights, fast=wish.fast, block=wish.block, rules=rules, experts=experts)
    store = PieceStore(home / "store")
    shelf = ManifestShelf(home / "store")
    memory, key = Memory(root), key_of(source, numeric, experts)
    if (remembered := memory.recall(key)) is not None:
        with contextlib.suppress(NotFound):
            known = shelf.get(remembered)
            if all(store.has(piece.digest, piece.size) for piece in all_pieces(known)):
                return known
    with progress_bar(f"cutting {source.name} ({numeric.name})") as advance:
        manifest = partition(
            source.path,
            store,
            name=source.name,
            numeric_class=numeric,
            rules=rules,
            experts=experts,
            progress=advance,
        )
    memory.note(key, shelf.put(manifest), source)
    return manifest


def default_weights(path: Path) -> str:
    """The weight format where none is asked for: of the source's own blocks, else fp32 for small ones, else int4."""
    from ganglion.partitioner.classes import default_format

    return default_format(path, SMALL_CHECKPOINT_BYTES)


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
