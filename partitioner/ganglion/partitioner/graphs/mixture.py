"""Graphs of mixtures: the router's choice, then each row once for each of its experts through one (Q)MoE node.

What the kernels do themselves (softmax, the choice, the weighing) differs from family to family and adds up in an order
of its own, so they get rows that are repeated for each expert, with that one expert chosen, and mixing is done here:
ONNX Runtime 1.31.1 takes as long for k repeated rows of one expert as for one row of k. Whole experts are two graphs,
for a row's experts may lie on several devices: one chooses, the other runs rows through those that are held. Where
these are of two formats, there is a node for each, which takes the rows of its own experts, possibly none.

Bit-equality of the exact classes, measured (tests/partitioner/mixtures holds it): QMoE at accuracy level 4 and blocks
of at most 32 gives a row the same bits alone and in any batch, in int4 only where the processor has AVX512. MoE
(float32) and QMoE with int4 on AVX2 give other bits to a row that is the only one of its expert, so such rows are run
twice. ReduceSum over the last dimension gives a row of five other bits in
another batch, so weights that add up to one come from a softmax. Outputs of each group of columns are mixed in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from onnx import TensorProto

from ganglion.partitioner.expert_slots import IN, OTHER, OUT, ROUTER, WHICH
from ganglion.partitioner.families.experts import Mixture, Routing
from ganglion.partitioner.graphs.builder import MICROSOFT, Builder
from ganglion.partitioner.quantize.formats import Format

NOT_CHOSEN: Final = -1e4  # a logit beside which a chosen expert's weight is exactly 1


def build_mixture(builder: Builder, core: Mixture) -> None:
    """Choose experts, run the share's columns of each, leave the weighted sum; two graphs where experts are whole."""
    if builder.plan.axis == "experts":
        build_routing(builder, core)
        _build_held(builder, core)
        return
    rows = builder.entry()
    chosen, weights = _route(builder, core, rows)
    each = core.routing.chosen + core.shared
    index = builder.reshape(chosen, [-1])
    beside = builder.node("Unsqueeze", [rows, builder.shape([1])])[0]
    repeated = builder.node("Expand", [beside, builder.shape([1, each, 1])])[0]
    repeated = builder.reshape(repeated, [-1, core.hidden])
    groups = [(group, 1) for group in range(builder.count)] if builder.exact else [(0, builder.count)]
    form = builder.recipe.base
    stacks = [_Stack(form, core.stacked, count * core.width, group) for group, count in groups]
    shares = builder.widen(builder.reshape(weights, [-1, 1, each]))
    terms = []
    for output in _given(builder, core, repeated, index, stacks):
        by_row = builder.widen(builder.reshape(output, [-1, each, core.hidden]))
        terms.append(builder.reshape(builder.node("MatMul", [shares, by_row])[0], [-1, core.hidden]))
    builder.leave(terms)


def build_routing(builder: Builder, core: Mixture) -> None:
    """The first graph of whole experts: the residual, what experts take, and each row's experts and their weights."""
    each = core.routing.chosen + core.shared
    rows = builder.entry()
    chosen, weights = _route(builder, core, rows)
    builder.rename(rows, "rows")
    builder.output("rows", ["S", core.hidden])
    for value, name, dtype in ((chosen, "chosen", TensorProto.INT64), (weights, "weights", TensorProto.FLOAT)):
        builder.rename(value, name)
        builder.output(name, ["S", each], dtype)


def _build_held(builder: Builder, core: Mixture) -> None:
    """The second graph of whole experts: rows, each through its one of those that are held."""
    builder.end()
    rows = builder.input("rows", ["R", core.hidden])
    index = builder.input("index", ["R"], TensorProto.INT64)
    formats = zip(builder.recipe.of_experts(core), ("", OTHER), strict=False)
    stacks = [_Stack(form, builder.held[f"{before}{IN}"], core.width, 0, before) for (form, _), before in formats]
    stacks = [stack for stack in stacks if stack.experts]
    if len(stacks) > 1:
        given = _given_apart(builder, core, rows, index, stacks)
    else:
        (given,) = _given(builder, core, rows, index, stacks)
    builder.rename(given, "given")
    builder.output("given", ["R", core.hidden])


@dataclass(frozen=True)
class _Stack:
    """Experts whose matrices lie in one initializer, how many columns of each, and from which group's bytes on.

    before: the names of their slots.
    """

    form: Format
    experts: int
    width: int
    group: int
    before: str = ""


def _given_apart(builder: Builder, core: Mixture, rows: str, index: str, stacks: list[_Stack]) -> str:
    """What each row's one expert gives, of those held in two formats: [rows, hidden]; index: by place among all."""
    other = builder.weight(WHICH, [builder.count])
    own = builder.node("Sub", [builder.constant(1.0), other])[0]
    places, outputs = [], []
    for mark, stack in zip((own, other), stacks, strict=True):
        mine = builder.node("Equal", [builder.node("Gather", [mark, index])[0], builder.constant(1.0)])[0]
        at = builder.reshape(builder.node("NonZero", [mine])[0], [-1])
        before = builder.node("CumSum", [mark, builder.shape([0])], exclusive=1)[0]
        place = builder.node("Gather", [builder.node("Cast", [before], to=TensorProto.INT64)[0], index])[0]
        taken, place = (builder.node("Gather", [one, at])[0] for one in (rows, place))
        outputs += _given(builder, core, taken, place, [stack])
        places.append(at)
    order = builder.node("Unsqueeze", [builder.node("Concat", places, axis=0)[0], builder.shape([1])])[0]
    given = builder.node("Concat", outputs, axis=0)[0]
    return builder.node("ScatterND", [rows, order, given])[0]


def _given(builder: Builder, core: Mixture, rows: str, index: str, stacks: list[_Stack]) -> list[str]:
    """What each row's one expert gives, of each stack: [rows, hidden]; index: of a row's expert in its stack."""
    logits = _one_hot(builder, index, stacks[0].experts, NOT_CHOSEN, 0.0)
    pairs = ""
    form = stacks[0].form
    if builder.exact and not (form.block and form.bits == 8):
        rows, logits, pairs = _no_lone_rows(builder, stacks[0].experts, index, rows, logits)
    outputs = [_experts(builder, core, (rows, logits), stack) for stack in stacks]
    if not pairs:
        return outputs
    zero = builder.shape([0])
    return [builder.node("Slice", [output, zero, pairs, zero])[0] for output in outputs]


def _route(builder: Builder, core: Mixture, rows: str) -> tuple[str, str]:
    """The experts of each row and their weights, the shared ones last: int64 and float32 [S, chosen + shared]."""
    routing = core.routing
    router = builder.weight(ROUTER, [core.experts, core.hidden])
    scores = builder.node("Gemm", [rows, router], transB=1)[0]
    if core.router_bias:
        scores = builder.node("Add", [scores, builder.weight(f"{ROUTER}_bias", [core.experts])])[0]
    if routing.softmax == "all":
        scores = builder.node("Softmax", [scores], axis=-1)[0]
    if routing.chosen_groups:
        scores = _within_groups(builder, core.experts, routing, scores)
    weights, chosen = builder.node("TopK", [scores, builder.shape([routing.chosen])], outputs=2, axis=-1)
    if routing.softmax == "chosen":
        weights = builder.node("Softmax", [weights], axis=-1)[0]
    if routing.scale != 1.0:
        weights = builder.node("Mul", [weights, builder.constant(routing.scale)])[0]
    if core.shared:
        count = builder.node("Shape", [rows], start=0, end=1)[0]
        size = builder.node("Concat", [count, builder.shape([core.shared])], axis=0)[0]
        last = builder.node("Expand", [builder.shape([*range(core.experts, core.stacked)]), size])[0]
        ones = builder.node("Expand", [builder.constants([1.0] * core.shared), size])[0]
        chosen = builder.node("Concat", [chosen, last], axis=-1)[0]
        weights = builder.node("Concat", [weights, ones], axis=-1)[0]
    return chosen, weights


def _within_groups(builder: Builder, experts: int, routing: Routing, scores: str) -> str:
    """The scores of experts in the groups whose best ones are highest, 0 for the others."""
    by_group = builder.reshape(scores, [-1, routing.groups, experts // routing.groups])
    best = builder.node("ReduceMax", [by_group, builder.shape([2])], keepdims=0)[0]
    highest = builder.node("TopK", [best, builder.shape([routing.chosen_groups])], outputs=2, axis=-1)[1]
    marks = _one_hot(builder, highest, routing.groups, 0.0, 1.0)
    kept = builder.node("ReduceSum", [marks, builder.shape([1])], keepdims=0)[0]
    masked = builder.node("Mul", [by_group, builder.reshape(kept, [-1, routing.groups, 1])])[0]
    return builder.reshape(masked, [-1, experts])


def _no_lone_rows(builder: Builder, experts: int, index: str, rows: str, logits: str) -> tuple[str, str, str]:
    """Rows and logits, those that are alone with their expert once more at the end; and the number before."""
    marks = _one_hot(builder, index, experts, 0.0, 1.0)
    counts = builder.node("ReduceSum", [marks, builder.shape([0])], keepdims=0)[0]
    lone = builder.node("Equal", [builder.node("Gather", [counts, index])[0], builder.constant(1.0)])[0]
    again = [builder.node("Compress", [one, lone], axis=0)[0] for one in (rows, logits)]
    pairs = builder.node("Shape", [rows], start=0, end=1)[0]
    rows, logits = (
        builder.node("Concat", [one, more], axis=0)[0] for one, more in zip((rows, logits), again, strict=True)
    )
    return rows, logits, pairs


def _experts(builder: Builder, core: Mixture, rows: tuple[str, str], stack: _Stack) -> str:
    """What each row's expert gives: [rows, hidden]; rows: they and their logits."""
    form, group, before = stack.form, stack.group, stack.before
    shapes = {
        IN: [stack.experts, 2 * stack.width, core.hidden],
        OUT: [stack.experts, core.hidden, stack.width],
    }
    operands: list[str] = []
    for name, shape in shapes.items():
        slot = f"{before}{name}"
        if form.block:
            blocks = shape[-1] // form.block
            packed = [*shape[:2], blocks * form.block * form.bits // 8]
            operands.append(_part(builder, slot, group, TensorProto.UINT8, packed))
            operands.append(_part(builder, f"{slot}_scales", group, TensorProto.FLOAT, [*shape[:2], blocks]))
        else:
            operands.append(_part(builder, slot, group, TensorProto.FLOAT, shape))
        # Of the output biases a share's first group holds all that the share adds.
        bias = f"{slot}_bias"
        operands.append(_part(builder, bias, group, TensorProto.FLOAT, shape[:2]) if core.bias else "")
    attributes: dict[str, Any] = {
        "k": 1,
        "normalize_routing_weights": 1,
        "activation_type": "swiglu",
        "swiglu_fusion": 1,
        "activation_alpha": core.alpha,
        "activation_beta": core.beta,
    }
    if core.limit is not None:
        attributes["swiglu_limit"] = core.limit
    if form.block:
        attributes |= {"expert_weight_bits": form.bits, "block_size": form.block, "accuracy_level": 4}
    kind = "QMoE" if form.block else "MoE"
    return builder.node(kind, [*rows, *operands], domain=MICROSOFT, **attributes)[0]


def _part(builder: Builder, slot: str, group: int, dtype: int, shape: list[int]) -> str:
    return builder.external(f"{slot}.{group}", dtype, shape, builder.offsets[slot] + group * builder.sizes[slot])


def _one_hot(builder: Builder, index: str, depth: int, off: float, on: float) -> str:
    return builder.node("OneHot", [index, builder.shape([depth]), builder.constants([off, on])], axis=-1)[0]
