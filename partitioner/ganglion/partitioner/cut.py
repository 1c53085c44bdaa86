"""Cutting: a checkpoint in, pieces, graphs and a manifest out; streaming a matrix's group at a time, deterministic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np

from ganglion.partitioner.checkpoint import Checkpoint, open_checkpoint, read_config
from ganglion.partitioner.families import family_of
from ganglion.partitioner.families.base import RopeVariant, largest_block, split_model
from ganglion.partitioner.families.plans import SegmentPlan
from ganglion.partitioner.graphs import OPSET, build_graph
from ganglion.partitioner.safetensors import READABLE, Tensor
from ganglion.partitioner.sink import PieceSink
from ganglion.partitioner.slots import Array, cut_group, cut_whole, slots_of
from ganglion.wire.errors import InvalidRequest, Unsupported
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
)

EMBEDDING: Final = "model.embed_tokens.weight"
ROPE_ROWS: Final = 8192  # positions whose angles are in memory at once
Progress = Callable[[int, int], None]  # bytes of the checkpoint done, bytes in all


def numeric_class(source: Path, weight_format: Literal["fp32", "int4"], *, fast: bool = False) -> NumericClass:
    """The class of a format for the checkpoint in `source` (only config.json is read).

    Exact int4 has block 32; fast int4 the largest of 128, 64, 32, 16 that divides an attention group's inputs.
    """
    if weight_format == "fp32":
        return NumericClass(format="fp32", block=0, exact=not fast)
    if weight_format != "int4":
        raise Unsupported(f"format {weight_format!r}; supported are fp32 and int4", param="format")
    if not fast:
        return NumericClass(format="int4", block=32, exact=True)
    config = read_config(source)
    model = family_of(config).read(config)
    block = largest_block(model.heads // model.kv_heads * model.head_dim, 128)
    return NumericClass(format="int4", block=block, exact=False)


def partition(
    source: Path,
    sink: PieceSink,
    *,
    name: str,
    numeric_class: NumericClass,
    progress: Progress = lambda done, total: None,
) -> Manifest:
    """Cut the Hugging Face checkpoint in the folder `source` into pieces in `sink`; equal inputs give equal manifests.

    Raises NotFound, Unsupported, InvalidDocument or Corrupt naming the file and the figure; whatever the sink raises.
    """
    if (numeric_class.format == "int4") != bool(numeric_class.block):
        raise InvalidRequest(f"numeric class {numeric_class.name}: int4 has a block of 16 to 128, fp32 has none")
    checkpoint = open_checkpoint(source)
    family = family_of(checkpoint.config)
    model = family.read(checkpoint.config)
    split = split_model(model, numeric_class)
    last = family.head(model, split)
    by_layer = [[plan.at_layer(layer) for plan in family.layer(model, split, layer)] for layer in range(model.layers)]
    embedded = checkpoint.tensor(EMBEDDING, model.vocab, model.hidden)
    # Every tensor is looked up before the first piece is cut: what is missing is known at once.
    read = [
        checkpoint.tensor(tensor, *shape)
        for plan in (*(plan for layer in by_layer for plan in layer), last)
        for tensor, shape in plan.tensors().items()
    ]
    total = embedded.data.nbytes + sum(tensor.data.nbytes for tensor in read)
    cutter = _Cutter(checkpoint, sink, numeric_class, _Meter(total, progress))
    embedding = cutter.embedding(embedded, split.geometry.vocab_group_rows, model.embedding_scale)
    layers = tuple(Layer(segments=tuple(cutter.segment(plan) for plan in layer)) for layer in by_layer)
    output = cutter.segment(last)
    kinds: dict[str, tuple[SegmentPlan, Segment]] = {last.kind: (last, output)}
    for plan_layer, layer in zip(by_layer, layers, strict=True):
        kinds |= {plan.kind: (plan, segment) for plan, segment in zip(plan_layer, layer.segments, strict=True)}
    graphs = {
        f"{kind}/{count}": sink.put(build_graph(plan, segment, count, model, numeric_class))
        for kind, (plan, segment) in sorted(kinds.items())
        for count in _counts(plan)
    }
    return Manifest(
        format_version=MANIFEST_FORMAT,
        name=name,
        family=model.family,
        source_digest=checkpoint.digest,
        numeric_class=numeric_class,
        opset=OPSET,
        geometry=split.geometry,
        layers=layers,
        head=output,
        embedding=embedding,
        ropes={name: tuple(cutter.rope(variant) for variant in variants) for name, variants in model.ropes},
        handover="parts" if last.entry.post is not None or last.entry.scale != 1.0 else "sum",
        graphs=graphs,
        tokenizer={file: sink.put(path.read_bytes()) for file, path in sorted(checkpoint.tokenizer.items())},
        bos_id=checkpoint.bos_id,
        eos_ids=checkpoint.eos_ids,
        parameters=sum({tensor.name: tensor.elements for tensor in (embedded, *read)}.values()),
    )


@dataclass
class _Meter:
    """Counts bytes of the checkpoint and reports them."""

    total: int
    report: Progress
    done: int = 0

    def add(self, count: int) -> None:
        self.done += count
        self.report(min(self.done, self.total), self.total)


@dataclass
class _Cutter:
    checkpoint: Checkpoint
    sink: PieceSink
    numeric_class: NumericClass
    meter: _Meter

    def put(self, array: Array) -> PieceRef:
        return self.sink.put(np.ascontiguousarray(array).data.cast("B"))

    def segment(self, plan: SegmentPlan) -> Segment:
        """Cut every group of a segment."""
        pieces: dict[str, list[PieceRef]] = {}
        for cut in cut_whole(plan, self.checkpoint, self.numeric_class):
            pieces |= {slot: [self.put(array)] for slot, array in cut.items()}
        read = sum(self.checkpoint.tensor(name, *shape).data.nbytes for name, shape in plan.tensors().items())
        for group in range(plan.groups):
            for cut in cut_group(plan, self.checkpoint, self.numeric_class, group):
                for slot, array in cut.items():
                    pieces.setdefault(slot, []).append(self.put(array))
            self.meter.add(read * (group + 1) // plan.groups - read * group // plan.groups)
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
            slots=tuple(
                Slot(name=slot.name, join=slot.join, rows=slot.rows, pieces=tuple(pieces[slot.name]))
                for slot in slots_of(plan, self.numeric_class)
            ),
        )

    def rope(self, variant: RopeVariant) -> RopeTable:
        """Cosine and sine of every position, in blocks of rows."""
        blocks = (range(start, variant.context)[:ROPE_ROWS] for start in range(0, variant.context, ROPE_ROWS))
        parts = [variant.rope.rows(block.start, block.stop) for block in blocks]
        cos, sin = (self.put(np.concatenate(table)) for table in zip(*parts, strict=True))
        return RopeTable(context=variant.context, cos=cos, sin=sin)

    def embedding(self, tensor: Tensor, rows: int, scale: float) -> Embedding:
        """The embedding as it is stored, by vocabulary groups of `rows` rows; the last is padded with zero rows."""
        if tensor.dtype not in READABLE:
            raise Unsupported(f"tensor {tensor.name}: dtype {tensor.dtype}; supported are {', '.join(READABLE)}")
        vocab, pieces = tensor.shape[0], []
        for start in range(0, vocab, rows):
            stored = tensor.raw_rows(start, min(start + rows, vocab))
            missing = rows * (tensor.data.nbytes // vocab) - stored.nbytes
            pieces.append(self.sink.put(stored if not missing else bytes(stored) + bytes(missing)))
            self.meter.add(stored.nbytes)
        return Embedding(dtype=READABLE[tensor.dtype], pieces=tuple(pieces), scale=scale)


def _counts(plan: SegmentPlan) -> range:
    """The shares that a graph is built for; one without a group has work only where it takes the residual."""
    return range(0 if plan.entry.mode != "carry" and plan.kind != "head" else 1, plan.groups + 1)
