"""Running a model's segments one after the other, each cut in memory and forgotten: teacher-forced rows of tokens."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ganglion.partitioner.classes import Layout
from ganglion.partitioner.families.plans import SegmentPlan
from ganglion.partitioner.graphs import build_graphs
from ganglion.partitioner.quantize.recipe import Recipe
from ganglion.partitioner.slots import Array, cut_group, cut_whole, slots_of
from ganglion.partitioner.weights import Floats
from ganglion.wire.nouns import EXACT_POSITIONS, PieceRef, Range, Segment
from ganglion.wire.shares import write_weights

EMBEDDING = "model.embed_tokens.weight"
Cut = dict[str, list[Array]]  # slot -> its groups


class Session(Protocol):
    """A session of ONNX Runtime, as far as it is needed here."""

    def run(self, names: Sequence[str] | None, feeds: Mapping[str, Any], /) -> Any:
        """The outputs for these inputs."""
        ...

    def get_inputs(self) -> Any:
        """Names and shapes of the inputs."""
        ...

    def get_outputs(self) -> Any:
        """Names of the outputs."""
        ...


class OpenSession(Protocol):
    """Opens a graph whose `weights.bin` is in memory."""

    def __call__(self, graph: bytes, weights: bytes, /) -> Session:
        """A session of it."""
        ...


Sessions = tuple[Session, ...]  # of a segment's graphs, in the order in which they run


@dataclass
class State:
    """What a row of tokens is between two segments: [tokens, hidden] each, and what the segment before carried."""

    res: Floats
    delta: Array
    carry: Floats | None = None


def cut_segment(plan: SegmentPlan, layout: Layout, recipe: Recipe) -> Cut:
    """Every group of a segment."""
    found: Cut = {}
    parts = [cut_whole(plan, layout.checkpoint, recipe)]
    parts += [cut_group(plan, layout.checkpoint, recipe, group) for group in range(plan.groups)]
    for cut in parts:
        for arrays in cut:
            for slot, array in arrays.items():
                found.setdefault(slot, []).append(array)
    return found


def start(plan: SegmentPlan, layout: Layout, recipe: Recipe, cut: Cut, open_session: OpenSession) -> Sessions:
    """Sessions of all groups of a segment with the numbers in `cut`."""
    pieces: dict[str, memoryview] = {}

    def put(slot: str, place: int, array: Array) -> PieceRef:
        view = np.ascontiguousarray(array).data.cast("B")
        name = hashlib.sha256(f"{slot}/{place}".encode()).hexdigest()  # of its place: nothing here is stored
        pieces[name] = view
        return PieceRef(name, view.nbytes)

    slots = tuple(
        slot.filled(tuple(put(slot.name, place, array) for place, array in enumerate(cut.get(slot.name, ()))))
        for slot in slots_of(plan, recipe)
    )
    segment = Segment(kind=plan.kind, axis=plan.axis, groups=plan.groups, slots=slots)
    weights, share = io.BytesIO(), Range(0, plan.groups)
    write_weights(segment, share, pieces.__getitem__, weights)
    pieces.clear()
    graphs = build_graphs(plan, segment, share, layout.model, recipe)
    return tuple(open_session(graph, weights.getvalue()) for graph in graphs)


def embed(layout: Layout, rows: Iterable[Sequence[int]]) -> list[State]:
    """The rows' first states; only the embeddings of their tokens are read."""
    model, states = layout.model, []
    tensor = layout.checkpoint.tensor(EMBEDDING, model.vocab, model.hidden)
    known: dict[int, Floats] = {}
    wide = np.float64 if layout.recipe.numeric_class.exact else np.float32
    for ids in rows:
        for token in set(ids) - known.keys():
            known[token] = tensor.rows(token, token + 1)[0] * np.float32(model.embedding_scale)
        res = np.stack([known[token] for token in ids])
        states.append(State(res, np.zeros(res.shape, wide)))
    return states


def step(sessions: Sessions, plan: SegmentPlan, layout: Layout, state: State) -> State:
    """The state after a segment."""
    found = run(sessions, plan, layout, state)
    return State(found.get("res_out", state.res), found["partial"], found.get("carry"))


def run(sessions: Sessions, plan: SegmentPlan, layout: Layout, state: State) -> dict[str, Any]:
    """Every output of a segment for a row that begins at position 0, by name."""
    feeds: dict[str, Any] = {"delta": state.delta}
    feeds |= {"carry": state.carry} if plan.entry.mode == "carry" else {"res": state.res}
    tokens = len(state.res)
    if plan.attends:
        capacity = max(tokens + 1, EXACT_POSITIONS)  # exact graphs pad rows
        total = np.array([tokens], np.int32)
        feeds |= {"seqlens_k": total - 1, "total": total}
        for one in (one for session in sessions for one in session.get_inputs()):
            if one.name.startswith("past_"):
                shape = [size if isinstance(size, int) else capacity for size in one.shape]
                feeds[one.name] = np.zeros(shape, np.float32)
        if plan.rope:
            variants = dict(layout.model.ropes)[plan.rope]
            rope = next((one.rope for one in variants if one.context >= tokens), variants[-1].rope)
            feeds["cos"], feeds["sin"] = rope.rows(0, capacity)
    found: dict[str, Any] = {}
    for session in sessions:
        names = [one.name for one in session.get_outputs() if not one.name.startswith("present_")]
        taken = {one.name: (feeds | found)[one.name] for one in session.get_inputs()}
        found |= zip(names, session.run(names, taken), strict=True)
        if "chosen" in found and "index" not in feeds:  # whole experts: rows go once to each of theirs
            each = found["chosen"].shape[1]
            feeds["index"], found["rows"] = found["chosen"].reshape(-1), np.repeat(found["rows"], each, axis=0)
    if "given" in found:
        found["partial"] = mixed(found["given"], found["weights"], state.delta.dtype)
    return found


def mixed(given: Floats, weights: Floats, wide: Any) -> Array:
    """The sum over each row's experts: given [rows * k, hidden], weights [rows, k] -> [rows, hidden] of type `wide`."""
    products = given.reshape(*weights.shape, -1) * weights[..., None]
    total: Array = products.sum(axis=1, dtype=wide)
    return total
