"""Cutting: a checkpoint in, pieces, graphs and a manifest out; a matrix's group at a time, deterministic, resumable."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from ganglion.partitioner.checkpoint import Checkpoint, open_checkpoint
from ganglion.partitioner.classes import NO_RULES, lay_out, numeric_class
from ganglion.partitioner.crew import Job, work
from ganglion.partitioner.expert_slots import expert_bytes
from ganglion.partitioner.families.experts import Mixture
from ganglion.partitioner.families.model import RopeVariant
from ganglion.partitioner.families.plans import Head, SegmentPlan
from ganglion.partitioner.graphs import OPSET, build_graphs
from ganglion.partitioner.journal import Pieces, open_journal
from ganglion.partitioner.pages import drop_pages
from ganglion.partitioner.quantize.recipe import Recipe, Rules
from ganglion.partitioner.safetensors import Tensor
from ganglion.partitioner.sink import PieceSink
from ganglion.partitioner.slots import Array, cut_group, cut_whole, slots_of
from ganglion.partitioner.weights import Weights, check_finite
from ganglion.wire.errors import InvalidRequest
from ganglion.wire.nouns import (
    MANIFEST_FORMAT,
    Embedding,
    Layer,
    Manifest,
    NumericClass,
    PieceRef,
    RopeTable,
    Segment,
    Slot,
    to_json,
)

__all__ = ["numeric_class", "partition"]

EMBEDDING: Final = "model.embed_tokens.weight"
ROPE_ROWS: Final = 8192  # positions whose angles are in memory at once
SCRATCH: Final = 3  # times the float32 numbers of a matrix's group: what cutting it takes of memory
Progress = Callable[[int, int], None]  # bytes of the checkpoint done, bytes in all


def partition(
    source: Path,
    sink: PieceSink,
    *,
    name: str,
    numeric_class: NumericClass,
    rules: Rules = NO_RULES,
    progress: Progress = lambda done, total: None,
    threads: int = 0,
) -> Manifest:
    """Cut the checkpoint `source` (a Hugging Face folder or a GGUF file) into pieces in `sink`.

    Equal inputs give equal manifests, whatever the number of `threads` (0: as many as are of use here). Into a sink
    that is a `Shelf`, a cut that was broken off goes on where it stopped. rules: those that `numeric_class` was made
    with. Raises NotFound, Unsupported, InvalidDocument or Corrupt naming the file and the figure; whatever the sink
    raises.
    """
    checkpoint = open_checkpoint(source)
    layout = lay_out(checkpoint, numeric_class, rules)
    model, split, recipe, last, by_layer = layout.model, layout.split, layout.recipe, layout.head, layout.layers
    if recipe.numeric_class != numeric_class:
        raise InvalidRequest(f"numeric class {numeric_class.name}: the checkpoint has {recipe.numeric_class.name}")
    embedded = checkpoint.tensor(EMBEDDING, model.vocab, model.hidden)
    # Every tensor is looked up before the first piece is cut: what is missing is known at once.
    read = [
        checkpoint.tensor(tensor, *shape)
        for plan in (*(plan for layer in by_layer for plan in layer), last)
        for tensor, shape in plan.tensors().items()
    ]
    cutter = _Cutter(checkpoint, sink, recipe)
    rows = split.geometry.vocab_group_rows
    parts = [cutter.embedding_jobs(embedded, rows), *map(cutter.jobs, layout.plans)]
    jobs = [job for part in parts for job in part]
    meter = _Meter(sum(job.read_bytes for job in jobs), progress)
    with open_journal(sink, source, to_json(numeric_class)) as journal:
        cut = iter(work(jobs, journal, meter.add, threads=threads))
        rows_cut, *segments_cut = [[next(cut) for _ in part] for part in parts]
        segments = iter(map(cutter.segment, layout.plans, segments_cut))
        layers = tuple(Layer(segments=tuple(next(segments) for _ in layer)) for layer in by_layer)
        output = next(segments)
        kinds: dict[str, tuple[SegmentPlan, Segment]] = {last.kind: (last, output)}
        for plan_layer, layer in zip(by_layer, layers, strict=True):
            kinds |= {plan.kind: (plan, segment) for plan, segment in zip(plan_layer, layer.segments, strict=True)}
        graphs = {
            f"{kind}/{count}": tuple(map(sink.put, build_graphs(plan, segment, count, model, recipe)))
            for kind, (plan, segment) in sorted(kinds.items())
            for count in _counts(plan)
        }
        manifest = Manifest(
            format_version=MANIFEST_FORMAT,
            name=name,
            family=model.family,
            source_digest=checkpoint.digest,
            numeric_class=numeric_class,
            opset=OPSET,
            geometry=split.geometry,
            layers=layers,
            head=output,
            embedding=Embedding(
                dtype=embedded.stored, pieces=tuple(ref for ((_, ref),) in rows_cut), scale=model.embedding_scale
            ),
            ropes={name: tuple(cutter.rope(variant) for variant in variants) for name, variants in model.ropes},
            handover="parts" if last.entry.post is not None or last.entry.scale != 1.0 else "sum",
            graphs=graphs,
            tokenizer={file: sink.put(path.read_bytes()) for file, path in sorted(checkpoint.tokenizer.items())},
            bos_id=checkpoint.bos_id,
            eos_ids=checkpoint.eos_ids,
            parameters=sum({tensor.name: tensor.elements for tensor in (embedded, *read)}.values()),
        )
        journal.finish()
    return manifest


@dataclass
class _Meter:
    """Counts bytes of the checkpoint and reports them."""

    total: int
    report: Progress
    done: int = 0

    def add(self, job: Job) -> None:
        self.done += job.read_bytes
        self.report(self.done, self.total)


@dataclass(frozen=True)
class _Cutter:
    checkpoint: Checkpoint
    sink: PieceSink
    recipe: Recipe

    def put(self, array: Array) -> PieceRef:
        return self.sink.put(np.ascontiguousarray(array).data.cast("B"))

    def jobs(self, plan: SegmentPlan) -> list[Job]:
        """What every share holds of a segment, then its groups."""
        tensors = [self.checkpoint.tensor(name, *shape) for name, shape in plan.tensors().items()]
        read = sum(tensor.stored_bytes for tensor in tensors)
        # Everything that a segment is cut from and how is in its plan.
        mark = hashlib.sha256(repr(plan).encode()).hexdigest()[:32]
        whole = partial(cut_whole, plan, self.checkpoint, self.recipe)
        replicated = max((matrix.outputs * matrix.inputs for matrix in plan.replicated), default=0)
        jobs = [Job(f"{mark}/whole", SCRATCH * 4 * replicated, 0, partial(self._cut, whole, tensors))]
        numbers = [matrix.width * matrix.inputs for matrix in plan.joined]
        numbers += [plan.summed.width * plan.summed.outputs] if plan.summed is not None else []
        for group in range(plan.groups):
            cut = partial(cut_group, plan, self.checkpoint, self.recipe, group)
            of_group = read * (group + 1) // plan.groups - read * group // plan.groups
            memory_bytes = SCRATCH * 4 * max(numbers, default=0)
            if isinstance(plan.core, Mixture):
                memory_bytes = expert_bytes(plan.core, self.recipe, SCRATCH)
            jobs.append(Job(f"{mark}/{group}", memory_bytes, of_group, partial(self._cut, cut, tensors)))
        return jobs

    def _cut(self, cut: Callable[[], Iterator[dict[str, Array]]], tensors: Sequence[Weights]) -> Pieces:
        try:
            return tuple((slot, self.put(array)) for arrays in cut() for slot, array in arrays.items())
        finally:
            for tensor in tensors:
                _drop(tensor)

    def segment(self, plan: SegmentPlan, cut: Sequence[Pieces]) -> Segment:
        """The segment whose jobs gave `cut`."""
        pieces: dict[str, list[PieceRef]] = {}
        for done in cut:
            for slot, ref in done:
                pieces.setdefault(slot, []).append(ref)
        return Segment(
            kind=plan.kind,
            axis=plan.axis,
            groups=plan.groups,
            attends=plan.attends,
            rope=plan.rope,
            exchange=plan.exchange,
            width=plan.width,
            carry=plan.carry,
            takes=plan.entry.mode,
            experts=plan.experts,
            active=plan.active,
            slots=tuple(
                Slot(
                    name=slot.name, join=slot.join, rows=slot.rows, pieces=tuple(pieces[slot.name]), stored=slot.stored
                )
                for slot in slots_of(plan, self.recipe)
            ),
        )

    def rope(self, variant: RopeVariant) -> RopeTable:
        """Cosine and sine of every position, in blocks of rows."""
        blocks = (range(start, variant.context)[:ROPE_ROWS] for start in range(0, variant.context, ROPE_ROWS))
        parts = [variant.rope.rows(block.start, block.stop) for block in blocks]
        cos, sin = (self.put(np.concatenate(table)) for table in zip(*parts, strict=True))
        return RopeTable(context=variant.context, cos=cos, sin=sin)

    def embedding_jobs(self, tensor: Weights, rows: int) -> list[Job]:
        """The embedding as it is stored, by vocabulary groups of `rows` rows; the last is padded with zero rows."""
        vocab, hidden = tensor.shape
        row_bytes = hidden * (4 if tensor.stored == "float32" else 2)

        def run(start: int) -> Pieces:
            stored = tensor.raw_rows(start, min(start + rows, vocab))
            check_finite(stored, tensor)
            missing = rows * row_bytes - stored.nbytes
            ref = self.sink.put(stored if not missing else bytes(stored) + bytes(missing))
            _drop(tensor)
            return (("", ref),)

        jobs = []
        for start in range(0, vocab, rows):
            size = min(rows, vocab - start) * tensor.stored_bytes // vocab
            jobs.append(Job(f"{tensor.name}/{rows}/{start}", rows * row_bytes, size, partial(run, start)))
        return jobs


def _drop(tensor: Weights) -> None:
    """What was read of a mapped file need not stay in this process."""
    if isinstance(tensor, Tensor):
        drop_pages(tensor.data)


def _counts(plan: SegmentPlan) -> range:
    """The shares that a graph is built for; one without a group has work only where it takes the residual."""
    return range(0 if plan.entry.mode != "carry" and not isinstance(plan.core, Head) else 1, plan.groups + 1)
