"""The deployment to measure: one that runs, or one for the time of the benchmark, after which all is as before."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ganglion.cli import output, views
from ganglion.cli.deploying import READY, Wish, deploy, is_of, local_agent, manifest_for, request_of
from ganglion.cli.sourcing import Source, checkpoint_of
from ganglion.proto import admin_pb2
from ganglion.wire.errors import Conflict, InvalidRequest, NotFound
from ganglion.wire.limits import PLAN_BYTES
from ganglion.wire.nouns import Manifest, NumericClass, Plan, from_json

if TYPE_CHECKING:
    from ganglion.cli.admin import Admin

SUFFIX = "-bench"


@dataclass(frozen=True)
class Deployed:
    """A ready deployment; `names` of devices by node id."""

    model: str
    deployment: str
    epoch: int
    manifest: Manifest
    plan: Plan
    names: dict[str, str]

    @classmethod
    def of(cls, state: admin_pb2.DeploymentState, names: dict[str, str]) -> Deployed:
        """From what the coordinator says."""
        plan = from_json(Plan, state.plan, limit_bytes=PLAN_BYTES)
        return cls(state.model, state.deployment, state.epoch, views.manifest_of(state), plan, names)

    @property
    def threads(self) -> int:
        """Of all its devices together."""
        return sum(self.plan.threads.get(device, 1) for device in self.plan.devices)

    @property
    def document(self) -> dict[str, Any]:
        """As `--json` has it. `weights_bytes`: read for every token, scales and norms included."""
        numeric = self.plan.numeric_class
        return {
            "model": self.model,
            "numeric_class": numeric.name,
            "exact": numeric.exact,
            "bits_per_weight": bits_per_weight(numeric),
            "weights_bytes": weights_bytes(self.manifest),
            "parameters": self.manifest.parameters,
            "mode": views.mode(self.plan),
            "devices": {self.names.get(node, node): self.plan.threads.get(node) for node in self.plan.devices},
            "threads": self.threads,
            "context": self.plan.context,
            "sessions": self.plan.sessions,
        }


def bits_per_weight(numeric: NumericClass) -> float:
    """Of a matrix in the class's own format, the float32 scale of each block included; exceptions are not counted."""
    bits = {"fp32": 32.0, "fp16": 16.0, "int8": 8.0, "int4": 4.0}[numeric.format]
    return bits + (32 / numeric.block if numeric.block else 0.0)


def weights_bytes(manifest: Manifest) -> int:
    """Bytes of every segment and of the head, as they are stored."""
    segments = [segment for layer in manifest.layers for segment in layer.segments]
    slots = (slot for segment in (*segments, manifest.head) for slot in segment.slots)
    return sum(piece.size for slot in slots for piece in slot.pieces)


@contextlib.asynccontextmanager
async def deployed(
    root: Path, line: Admin, model: str | None, *, name: str | None, wish: Wish
) -> AsyncIterator[tuple[Deployed, Source | None]]:
    """A running deployment that is what was asked for, else one made for this block under a name of its own.

    Yields it and the checkpoint that it is of, None where only its name is known. Afterwards deployments and stores of
    this machine are as before; other devices keep pieces that they fetched, as after `ganglion stop`.
    """
    fleet = await line.fleet()
    ready = [state for state in fleet.deployments if state.phase == READY]
    chosen: admin_pb2.DeploymentState | None
    if model is None:
        found, chosen = None, _only(ready, wish)
    else:
        found = await checkpoint_of(model, name)
        wanted = found.name if found else model
        fits = (s for s in ready if wanted in (s.model, s.deployment) and wish.accepts(s) and is_of(s, found))
        chosen = next(fits, None)
    if chosen is not None:
        yield Deployed.of(chosen, views.names_of(fleet.devices)), found
        return
    taken = {state.model for state in fleet.deployments}
    async with _made(root, line, str(model), found, wish, taken) as made:
        yield Deployed.of(made, views.names_of((await line.fleet()).devices)), found


def _only(ready: list[admin_pb2.DeploymentState], wish: Wish) -> admin_pb2.DeploymentState:
    if not wish.is_open:
        raise InvalidRequest(
            "these options are for a model to deploy: name it, as in ganglion bench demo", param="model"
        )
    if not ready:
        raise NotFound("nothing is deployed; name a model to measure, as in ganglion bench demo", param="model")
    if len(ready) > 1:
        names = ", ".join(sorted(state.model for state in ready))
        raise InvalidRequest(f"several models are deployed: name one of {names}", param="model")
    return ready[0]


@contextlib.asynccontextmanager
async def _made(
    root: Path, line: Admin, model: str, found: Source | None, wish: Wish, taken: set[str]
) -> AsyncIterator[admin_pb2.DeploymentState]:
    from ganglion.agent.store import ManifestShelf

    shelf = ManifestShelf(local_agent(root).home / "store")
    before = set(shelf.digests())
    source = None if found is None else replace(found, name=found.name + SUFFIX)
    manifest = await manifest_for(root, line, model, source, wish)
    if found is None:  # cut under its own name, which the deployment must not take from another one
        import msgspec

        manifest = msgspec.structs.replace(manifest, name=manifest.name + SUFFIX)
    if manifest.name in taken:
        raise Conflict(f"{manifest.name} is deployed already; stop it first: it is the name of what is measured here")
    try:
        identifier = await deploy(line, request_of(manifest, wish.options, local_agent(root)))
        states = (await line.fleet()).deployments
        yield next(state for state in states if state.deployment == identifier)
    finally:
        for each in (await line.fleet()).deployments:  # one that failed is there too
            if each.model == manifest.name:
                await line.stop(each.deployment)
        _forget(root, shelf, set(shelf.digests()) - before, manifest.name)
        output.step(f"{manifest.name} is gone again")


def _forget(root: Path, shelf: Any, digests: set[str], name: str) -> None:
    """Remove what was cut for the block; pieces that another model here has too stay."""
    from ganglion.agent.store import PieceStore
    from ganglion.agent.store.gc import remove_model
    from ganglion.cli.shelf import Memory

    store = PieceStore(local_agent(root).home / "store")
    for digest in digests:
        if shelf.get(digest).name == name:
            remove_model(store, shelf, digest)
            Memory(root).forget(digest)
