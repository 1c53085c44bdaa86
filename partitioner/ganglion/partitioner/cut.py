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
from ganglion.partitioner.families.model import Experts, RopeVariant
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
    Range,
    RopeTable,
    Segment,
    to_json,
)
from ganglion.wire.shares import Groups, graph_name

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
    experts: Experts = "columns",
    progress: Progress = lambda done, total: None,
    threads: int = 0,
) -> Manifest:
    """Cut the checkpoint `source` (a Hugging Face folder or a GGUF file) into pieces in `sink`.

    Equal inputs give equal manifests, whatever the number of `threads` (0: as many as are of use here). Into a sink
    that is a `Shelf`, a cut that was broken off goes on where it stopped. rules: those that `numeric_class` was made
    with. experts: how a mixture is cut, through each expert by columns or expert by expert. Raises NotFound,
    Unsupported, InvalidDocument or Corrupt naming the file and the figure, InvalidRequest for whole experts of a model
    without; whatever the sink raises.
    """
    checkpoint = open_checkpoint(source)
    layout = lay_out(checkpoint, numeric_class, rules, experts)
    model, split, last, by_layer = layout.model, layout.split, layout.head, layout.layers
    if layout.recipe.numeric_class != numeric_class:
        found = layout.recipe.numeric_class.name
        raise InvalidRequest(f"numeric class {numeric_class.name}: the checkpoint has {found}")
    embedded = checkpoint.tensor(EMBEDDING, model.vocab, model.hidden)
    # Every tensor is looked up before the first piece is cut: what is missing is known at once.
    read = [
        checkpoint.tensor(tensor, *shape)
        for plan in (*(plan for layer in by_layer for plan in layer), last)
        for tensor, shape in plan.tensors().items()
    ]
    cutter, of_prompts = _Cutter(checkpoint, sink, layout.recipe), _Cutter(checkpoint, sink, layout.prompt_recipe)
    rows = split.geometry.vocab_group_rows
    # A layer's two sets are cut one after the other: the second finds in memory what the first has read.
    sets = [(cutter, by_layer), *([(of_prompts, layout.prompt_layers)] if numeric_class.prompt else [])]
    order = [(by, plan) for layer in range(len(by_layer)) for by, plans in sets for plan in plans[layer]]
    order.append((cutter, last))
    parts = [cutter.embedding_jobs(embedded, rows), *(by.jobs(plan) for by, plan in order)]
    jobs = [job for part in parts for job in part]
    meter = _Meter(sum(job.read_bytes for job in jobs), progress)
    with open_journal(sink, source, to_json(numeric_class)) as journal:
        cut = iter(work(jobs, journal, meter.add, threads=threads))
        rows_cut, *segments_cut = [[next(cut) for _ in part] for part in parts]
        made = [by.segment(plan, pieces) for (by, plan), pieces in zip(order, segments_cut, strict=True)]
        segments = iter(made)
        layers = [Layer(segments=tuple(next(segments) for _ in layer)) for layer in by_layer for _ in sets]
        graphs: dict[str, tuple[PieceRef, ...]] = {}
        for (by, plan), segment in zip(order, made, strict=True):
            for share in _shares(plan, segment):
                if (graph := graph_name(segment, share)) not in graphs:
                    graphs[graph] = tuple(map(sink.put, build_graphs(plan, segment, share, model, by.recipe)))
        manifest = Manifest(
            format_version=MANIFEST_FORMAT,
            name=name,
            family=model.family,
            source_digest=checkpoint.digest,
            numeric_class=numeric_class,
            opset=OPSET,
            geometry=split.geometry,
            layers=tuple(layers[:: len(sets)]),
            prompt_layers=tuple(layers[1::2]) if numeric_class.prompt else (),
            head=made[-1],
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
            dropped = tensors
            if isinstance(plan.core, Mixture):
                whole_expert = plan.axis == "experts"
                form = self.recipe.of_expert(plan.core, group) if whole_expert else self.recipe.base
                memory_bytes = expert_bytes(plan.core, form, SCRATCH, 1 if whole_expert else plan.core.stacked)
                if whole_expert:
                    named = plan.core.of_expert(group).items()
                    dropped = [self.checkpoint.tensor(name, *shape) for name, shape in named]
            jobs.append(Job(f"{mark}/{group}", memory_bytes, of_group, partial(self._cut, cut, dropped)))
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
            slots=tuple(slot.filled(tuple(pieces.get(slot.name, ()))) for slot in slots_of(plan, self.recipe)),
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


def _shares(plan: SegmentPlan, segment: Segment) -> Iterator[Groups]:
    """A share for each of a segment's graphs; one without a group has work only where it takes the residual.

    Of experts of two formats, one for every number of those and of these: fewer than (experts / 2 + 1) ** 2 in a layer.
    """
    apart = tuple(dict.fromkeys(slot.groups for slot in segment.slots if slot.groups is not None))
    if apart:
        own, other = apart
        yield from (tuple(sorted((*own[:n], *other[:m]))) for n in range(len(own) + 1) for m in range(len(other) + 1))
        return
    least = 0 if plan.entry.mode != "carry" and not isinstance(plan.core, Head) else 1
    yield from (Range(0, count) for count in range(least, plan.groups + 1))
