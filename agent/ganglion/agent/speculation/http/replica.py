"""A verifier replica: a store folder and a manifest in, a lead with its loop out, without a coordinator or lanes.

It runs the whole model on its own machine, by ONNX Runtime or torch, and answers rounds (`serving.RoundServer`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ganglion.agent.executor.choice import load_torch, parse_executor
from ganglion.agent.executor.embedding import EmbeddingTable
from ganglion.agent.executor.executor import Executor
from ganglion.agent.executor.loader import load_shard, start_runtime
from ganglion.agent.executor.port import StepExecutor
from ganglion.agent.executor.prepacked import Prepacked
from ganglion.agent.lead.driver import Lead
from ganglion.agent.lead.grammar import Grammars
from ganglion.agent.speculation.http.round_messages import Facts
from ganglion.agent.speculation.http.serving import RoundServer
from ganglion.agent.store import ManifestShelf, PieceStore
from ganglion.agent.worker_beat import Beat
from ganglion.agent.worker_stage import StageRunner, vocab_shares
from ganglion.wire.errors import GanglionError, InvalidRequest, Unavailable, to_body
from ganglion.wire.nouns import Manifest, Plan, Range, Stage, digest, kv_capacity_tokens, tokenizer_digest
from ganglion.wire.shares import whole_share

log = logging.getLogger(__name__)

_DEVICE: Final = "a" * 26  # the plan's one device: no peer ever meets it


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaOptions:
    """store: a folder with pieces and manifests, as agents have. model: a manifest's name, or the start of its digest.

    executor: as `--executor`. threads: 0: every processor that this process may use. context: of a session, 0: the
    model's own, at most 4096. sessions: whose key-value state is kept at a time. kept_tokens: of prompts, for later
    sessions. key: that rounds must bear; "": none.
    """

    store: Path
    model: str
    executor: str = "ort"
    threads: int = 0
    context: int = 0
    sessions: int = 16
    kept_tokens: int = 8192
    key: str = ""


class Replica:
    """A loaded model that answers rounds. Create it, then `start` it on the event loop that will serve it."""

    def __init__(self, options: ReplicaOptions) -> None:
        """Load the model; raises NotFound, InvalidRequest, and what loading raises."""
        self.name = secrets.token_hex(4)
        store = PieceStore(options.store)
        self.manifest = _manifest(options)
        plan = _plan(self.manifest, options)
        self._folder = Path(tempfile.mkdtemp(prefix="ganglion-replica-"))
        try:
            self._prepacked = Prepacked(store)
            executor = _executor(self.manifest, plan, options, store, self._prepacked)
            self._beat = Beat(self._folder / "beat")
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        self.numeric_class = executor.class_name
        runner = StageRunner(self.manifest, plan, 0, executor, {})
        self._lead = Lead(
            self.manifest,
            plan,
            runner,
            embedding=EmbeddingTable(self.manifest, store.open),
            lanes={},
            names=(self.name,),
            vocab=vocab_shares(self.manifest, plan),
            beat=self._beat,
            grammars=Grammars(self.manifest, store.open),
        )
        self.rounds = RoundServer(
            self._lead.serve,
            _facts(self.manifest, plan),
            sessions=options.sessions,
            name=self.name,
            key=options.key or None,
        )
        self._running: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to run steps, on this event loop."""
        self._running = asyncio.create_task(self._lead.run())
        self._running.add_done_callback(self._ended)

    def _ended(self, running: asyncio.Task[None]) -> None:
        if not running.cancelled() and (error := running.exception()) is not None:
            log.error("the replica cannot go on", exc_info=error)
            self._lead.end(error if isinstance(error, GanglionError) else Unavailable(to_body(error).message))

    def check(self) -> None:
        """Whether it can answer; raises Unavailable."""
        if self._running is None or self._running.done():
            raise Unavailable(f"replica {self.name} does not run; start it again")

    async def close(self) -> None:
        """End sessions and steps, remove what it wrote."""
        await self.rounds.close()
        if self._running is not None:
            self._running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._running
        self._beat.close()
        self._prepacked.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _manifest(options: ReplicaOptions) -> Manifest:
    shelf = ManifestShelf(options.store)
    every = {each: shelf.get(each) for each in shelf.digests()}
    found = [one for each, one in every.items() if options.model == one.name or each.startswith(options.model)]
    if len(found) != 1:
        there = ", ".join(f"{one.name} ({one.numeric_class.name}, {each[:12]})" for each, one in every.items())
        raise InvalidRequest(
            f"{len(found)} models of {options.store} are {options.model!r}; name one by its digest: {there or 'none'}",
            param="model",
        )
    return found[0]


def _plan(manifest: Manifest, options: ReplicaOptions) -> Plan:
    geometry = manifest.geometry
    context = options.context or min(geometry.context, 4096)
    layers = Range(0, geometry.layers)
    return Plan(
        manifest_digest=digest(manifest),
        numeric_class=manifest.numeric_class,
        context=context,
        sessions=options.sessions,
        kv_tokens=options.sessions * kv_capacity_tokens(context + 1),
        chunk=256,
        stages=(Stage(layers=layers, shares=(whole_share(manifest, _DEVICE, layers),), topology="mesh"),),
        threads={_DEVICE: options.threads or len(os.sched_getaffinity(0))},
        prefix_tokens=-(-options.kept_tokens // 32) * 32,
    )


def _facts(manifest: Manifest, plan: Plan) -> Facts:
    return Facts(
        model=manifest.name,
        manifest_digest=plan.manifest_digest,
        numeric_class=manifest.numeric_class.name,
        tokenizer_digest=tokenizer_digest(manifest).hex(),
        vocab=manifest.geometry.vocab,
        context=plan.context,
        eos_ids=tuple(manifest.eos_ids),
    )


def _executor(
    manifest: Manifest, plan: Plan, options: ReplicaOptions, store: PieceStore, prepacked: Prepacked
) -> StepExecutor:
    choice, (stage,) = parse_executor(options.executor), plan.stages
    (share,) = stage.shares

    def progress(done_bytes: int, total_bytes: int) -> None:
        log.debug("%d of %d bytes of weights are loaded", done_bytes, total_bytes)

    if choice.kind == "torch":
        return load_torch(manifest, plan, stage, share, choice, open_piece=store.open, progress=progress)
    start_runtime(plan.threads[_DEVICE])
    with tempfile.TemporaryDirectory(prefix="ganglion-load-") as folder:
        shard = load_shard(
            manifest,
            stage,
            share,
            open_piece=store.open,
            folder=Path(folder),
            progress=progress,
            prepacked=prepacked,
        )
    prepacked.keep()
    return Executor(manifest, plan, shard, store.open)
