"""Which format to run a model in, by what it is for: from measured rates and memory. Pure, but for `figures_of`.

A reference request stands for the workload: its prompt and its answer, so many of them at once, each with so many rows
in a step. A step of one row takes what the device measured of one, of 16 and of 128 rows what it measured of those, in
between it is interpolated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

from ganglion.partitioner.checkpoint import open_checkpoint
from ganglion.partitioner.classes import Choice, default_format, lay_out, numeric_class
from ganglion.partitioner.cost import (
    WEIGHTS_FACTOR,
    WORKER_OVERHEAD_BYTES,
    Device,
    decode_rate,
    rate_of,
)
from ganglion.partitioner.families.plans import Core, SegmentPlan
from ganglion.partitioner.quantize.formats import Format
from ganglion.partitioner.quantize.recipe import PROMPT, base_of, packed_bits
from ganglion.wire.errors import InvalidRequest
from ganglion.wire.nouns import BATCH_ROWS, PREFILL_ROWS, DeviceProfile, NumericClass, kv_capacity_tokens

WORTH: Final = 1.1  # a format that takes more memory must be so many times as fast
GIB: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class Workload:
    """A reference request, in tokens, and how many run at once.

    rows: of a step for each: more than one where drafted tokens are verified. tokens: of the answer that a step gives.
    """

    prompt_tokens: int
    answer_tokens: int
    streams: int
    rows: int = 1
    tokens: int = 1


WORKLOADS: Final[dict[str, Workload]] = {
    "chat": Workload(1024, 256, 1),
    "batch": Workload(1024, 256, 16),
    "draft": Workload(0, 256, 1),
    "verify": Workload(1024, 256, 1, rows=9, tokens=4),
}


@dataclass(frozen=True, slots=True)
class Figures:
    """A model: numbers in the matrices of its layers and of its head, bytes of the rest; the classes to choose among.

    active_numbers: of the layers, those that a row is multiplied with. kv_token_bytes: of one session. fixed: the
    format and why where nothing is to be chosen.
    """

    layer_numbers: int
    active_numbers: int
    head_numbers: int
    embedding_bytes: int
    kv_token_bytes: int
    classes: Mapping[Choice, NumericClass]
    fixed: tuple[Choice, str] | None = None


@dataclass(frozen=True, slots=True)
class Chosen:
    """A format and, in one line for a person, why."""

    format: Choice
    reason: str


@dataclass(frozen=True, slots=True)
class _Way:
    """One format on the device that answers first in it."""

    format: Choice
    device: Device
    seconds: float
    bytes: int

    @property
    def memory(self) -> str:
        return f"{self.bytes / GIB:.1f} GiB of {self.device.profile.memory_budget_bytes / GIB:.1f} GiB"


def choose_format(model: Figures, devices: Sequence[Device], workload: Workload) -> Chosen:
    """The format in which the reference request is answered soonest by a device that holds it; the smaller on a par.

    A model that no device holds alone is taken in int4, which needs the fewest devices.
    """
    if model.fixed is not None:
        return Chosen(*model.fixed)
    measured = [device for device in devices if device.profile.rates]
    if not measured:
        return Chosen("int4", "no device is measured yet")
    ways: dict[Choice, _Way] = {}
    short: dict[Choice, str] = {}
    for choice, kind in model.classes.items():
        size = _held_bytes(model, kind, workload)
        roomy = max(measured, key=lambda one: one.profile.memory_budget_bytes)
        fitting = [one for one in measured if one.profile.memory_budget_bytes >= size]
        if fitting:
            each = [_Way(choice, one, _request_s(model, kind, one.profile, workload), size) for one in fitting]
            ways[choice] = min(each, key=lambda way: way.seconds)
        else:
            has = f"{roomy.name} has {roomy.profile.memory_budget_bytes / GIB:.1f} GiB"
            short[choice] = f"{choice} needs {size / GIB:.1f} GiB and {has}"
    if not ways:
        return Chosen("int4", f"no device holds the model alone: {short['int4']}")
    best = min(ways.values(), key=lambda way: way.bytes)
    for way in sorted(ways.values(), key=lambda way: way.bytes):
        if best.seconds > WORTH * way.seconds:
            best = way
    return Chosen(best.format, _reason(best, ways, short, model, workload))


def figures_of(source: Path, *, fast: bool, small_bytes: int) -> Figures:
    """The figures of the checkpoint `source`; of its weights only headers are read. Raises what `lay_out` raises.

    small_bytes: up to here a checkpoint stays in float32.
    """
    checkpoint = open_checkpoint(source)
    layout = lay_out(checkpoint, NumericClass(format="fp32", block=0, exact=not fast))
    model = layout.model
    held = [(plan, _numbers(plan)) for layer in layout.layers for plan in layer]
    choices: list[Choice] = ["int4", "int8", "mixed"] if model.per_row else ["int4", "int8"]
    usual, fixed = default_format(source, small_bytes), None
    if packed_bits(one for one in checkpoint.tensors.values() if len(one.shape) > 1):
        fixed = usual, "the checkpoint's own blocks, taken over bit for bit"
    elif usual == "fp32":
        fixed = usual, f"a checkpoint of at most {small_bytes >> 20} MiB gains little by rounding"
    embedding = checkpoint.tensor("model.embed_tokens.weight", model.vocab, model.hidden)
    return Figures(
        layer_numbers=sum(numbers for _, numbers in held),
        active_numbers=int(sum(plan.active * numbers for plan, numbers in held)),
        head_numbers=_numbers(layout.head),
        embedding_bytes=embedding.stored_bytes,
        kv_token_bytes=2 * 4 * model.layers * model.kv_heads * model.head_dim,
        classes={choice: numeric_class(source, choice, fast=fast) for choice in choices},
        fixed=fixed,
    )


def workload_of(name: str) -> Workload:
    """The workload of this name; raises InvalidRequest with the names that there are."""
    if name not in WORKLOADS:
        raise InvalidRequest(f"--for {name!r}: it is {', '.join(WORKLOADS)}", param="for")
    return WORKLOADS[name]


def step_s(profile: DeviceProfile, numeric_class: NumericClass, size_bytes: int, numbers: int, rows: float) -> float:
    """Seconds of `rows` rows through matrices of so many bytes and numbers in the class's format, on one device."""
    known = rate_of(profile, numeric_class)
    points = [(1.0, size_bytes / (decode_rate(profile, numeric_class) or 1.0))]
    if known is not None and known.batch_bytes_per_s:
        points.append((float(BATCH_ROWS), size_bytes / known.batch_bytes_per_s))
    if known is not None and known.prefill_flop_per_s:
        points.append((float(PREFILL_ROWS), PREFILL_ROWS * 2 * numbers / known.prefill_flop_per_s))
    for (few, few_s), (many, many_s) in pairwise(points):
        if rows <= many:
            return few_s + (many_s - few_s) * (rows - few) / (many - few)
    return points[-1][1] * rows / points[-1][0]


def _request_s(model: Figures, kind: NumericClass, profile: DeviceProfile, workload: Workload) -> float:
    """Seconds of the workload's requests, all at once."""
    generated = _bytes(model.active_numbers, base_of(kind)), model.active_numbers
    head = _bytes(model.head_numbers, base_of(kind)), model.head_numbers
    rows = workload.streams * workload.rows
    steps_s = step_s(profile, kind, *generated, rows) + step_s(profile, kind, *head, rows)
    steps = workload.answer_tokens / workload.tokens
    return workload.streams * _prompt_s(model, kind, profile, workload) + steps * steps_s


def _prompt_s(model: Figures, kind: NumericClass, profile: DeviceProfile, workload: Workload) -> float:
    prompted = NumericClass(format="int8", block=0, exact=kind.exact) if kind.prompt else kind
    of_prompt = _bytes(model.active_numbers, base_of(prompted)), model.active_numbers
    return workload.prompt_tokens / PREFILL_ROWS * step_s(profile, prompted, *of_prompt, PREFILL_ROWS)


def _held_bytes(model: Figures, kind: NumericClass, workload: Workload) -> int:
    """Memory of a device that holds all of it, with the workload's sessions."""
    weights = _bytes(model.layer_numbers, base_of(kind)) + _bytes(model.head_numbers, base_of(kind))
    weights += _bytes(model.layer_numbers, PROMPT) if kind.prompt else 0
    tokens = workload.streams * kv_capacity_tokens(workload.prompt_tokens + workload.answer_tokens)
    return int(WEIGHTS_FACTOR * weights) + model.embedding_bytes + WORKER_OVERHEAD_BYTES + tokens * model.kv_token_bytes


def _reason(best: _Way, ways: Mapping[Choice, _Way], short: Mapping[Choice, str], model: Figures, of: Workload) -> str:
    profile = best.device.profile
    if best.format == "mixed":
        faster = _prompt_s(model, model.classes["int4"], profile, of) / _prompt_s(
            model, model.classes["mixed"], profile, of
        )
        return f"prompts {faster:.1f} times faster in int8, {best.memory} on {best.device.name}"
    others = [way for way in ways.values() if way is not best]
    if best.format == "int8":
        told = [f"{way.seconds / best.seconds:.1f} times as fast as {way.format}" for way in others]
        streams = f"{of.streams} at once" if of.streams > 1 else "one at a time"
        streams += f" in steps of {of.rows} rows" if of.rows > 1 else ""
        return "; ".join([*short.values(), ", ".join([streams, *told]), f"{best.memory} on {best.device.name}"])
    told = [f"{way.format} would take {way.seconds / best.seconds:.2f} times as long" for way in others]
    return "; ".join([*short.values(), *told]) + f"; {best.memory} on {best.device.name}"


def _bytes(numbers: int, form: Format) -> int:
    """Bytes of so many numbers, as if in one matrix of 2048 inputs."""
    return form.weight_bytes(-(-numbers // 2048), 2048)


def _numbers(plan: SegmentPlan) -> int:
    """Numbers in the matrices of a segment, those of its experts among them."""
    shapes: list[tuple[int, ...]] = [(matrix.outputs, matrix.inputs) for matrix in plan.linears]
    shapes += list(plan.core.tensors().values()) if isinstance(plan.core, Core) else []
    return sum(math.prod(shape) for shape in shapes)
