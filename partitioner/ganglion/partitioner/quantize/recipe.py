"""A recipe: the format of every matrix of a model, by its class, by what its source stores, and by rules given."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from ganglion.partitioner.families.experts import Mixture
from ganglion.partitioner.families.plans import Linear, SegmentPlan
from ganglion.partitioner.quantize.formats import EXACT_BLOCK, Format, Rounding, parse_format
from ganglion.partitioner.quantize.repack import block_for
from ganglion.partitioner.weights import Packing, Weights
from ganglion.wire.errors import InvalidDocument, InvalidRequest, NotFound
from ganglion.wire.nouns import NumericClass

RULES_BYTES: Final = 1 << 20
FAST_BLOCK: Final = 128
PROMPT: Final = Format("int8")  # of a class that mixes formats, for prompt tokens
WIDER: Final = "int8-32"  # of what a source of 4-bit blocks stores wider, and not in blocks that fit


@dataclass(frozen=True)
class Rules:
    """What a person asks beyond the class: formats by tensor name (or a pattern as in shells), and the rounding."""

    exceptions: tuple[tuple[str, Format], ...] = ()
    rounding: Rounding = "nearest"

    def of(self, tensor: str) -> Format | None:
        """The format asked for a tensor: of its own name first, then of the first pattern that matches."""
        plain = dict(self.exceptions).get(tensor)
        return plain or next((form for pattern, form in self.exceptions if fnmatchcase(tensor, pattern)), None)


@dataclass(frozen=True)
class Recipe:
    """Every matrix's format. exceptions: by tensor, those that differ from the class's own."""

    numeric_class: NumericClass
    exceptions: Mapping[str, Format] = field(default_factory=dict)
    bfloat16: frozenset[str] = frozenset()  # tensors whose 16 bits are bfloat16
    rounding: Rounding = "nearest"

    @property
    def base(self) -> Format:
        """The class's own format."""
        return base_of(self.numeric_class)

    def of(self, matrix: Linear) -> Format:
        """The format of a matrix."""
        return self.exceptions.get(f"{matrix.tensor}.weight", self.base)

    def stored(self, matrix: Linear) -> Literal["", "float16", "bfloat16"]:
        """How its pieces are stored where that is not how it is multiplied: `Slot.stored`."""
        if self.of(matrix).kind != "fp16":
            return ""
        return "bfloat16" if f"{matrix.tensor}.weight" in self.bfloat16 else "float16"

    def of_expert(self, core: Mixture, expert: int) -> Format:
        """The format of an expert, which all of its matrices have."""
        return self.exceptions.get(core.names_of(expert)[0], self.base)

    def of_experts(self, core: Mixture) -> tuple[tuple[Format, tuple[int, ...]], ...]:
        """The experts of a layer by format: the class's own first, and where any has another, that."""
        by_format: dict[Format, list[int]] = {self.base: []}
        for expert in range(core.stacked):
            by_format.setdefault(self.of_expert(core, expert), []).append(expert)
        return tuple((form, tuple(experts)) for form, experts in by_format.items())

    def named(self, plan: SegmentPlan) -> SegmentPlan:
        """The segment with the exceptions of its matrices in its kind, which names its graphs."""
        other = [f"{m.slot}={self.of(m).name}" for m in plan.linears if self.of(m) != self.base]
        if isinstance(plan.core, Mixture):
            other += [f"experts={form.name}" for form, _ in self.of_experts(plan.core)[1:]]
        return replace(plan, kind="+".join([plan.kind, *other]))


def base_of(numeric_class: NumericClass) -> Format:
    """The format of a class."""
    return Format(numeric_class.format, numeric_class.block)


def recipe_of(
    numeric_class: NumericClass, plans: Iterable[SegmentPlan], tensor: Callable[[Linear], Weights], rules: Rules
) -> Recipe:
    """The recipe of a class for the segments `plans`, whose matrices `tensor` opens; nothing of them is read.

    numeric_class: its `exceptions` are replaced by the recipe's own. Raises InvalidRequest for a rule that matches no
    tensor, a block that an exact class does not have, or a format that an expert cannot have.
    """
    base = base_of(numeric_class)
    at_most = EXACT_BLOCK if numeric_class.exact else FAST_BLOCK
    matrices = [(matrix, matrix is plan.summed) for plan in plans for matrix in plan.linears]
    opened = {f"{matrix.tensor}.weight": tensor(matrix) for matrix, _ in matrices}
    bits = packed_bits(opened.values())
    exceptions: dict[str, Format] = {}
    marked: dict[str, Format] = {}  # beyond the exceptions, what the class's mark is of
    for matrix, summed in matrices:
        name = f"{matrix.tensor}.weight"
        form = rules.of(name)
        if form is None:
            form = _as_stored(opened[name].packing, base, at_most, matrix.width if summed else 0, bits)
        else:
            _check_exact(name, form, numeric_class)
            if numeric_class.prompt and form != PROMPT:
                marked[f"prompt {name}"] = form
        if form != base:
            exceptions[name] = form
    mixtures = [(plan.core, plan.axis == "experts") for plan in plans if isinstance(plan.core, Mixture)]
    for core, whole in mixtures:
        exceptions |= _of_experts(core, numeric_class, rules) if whole else {}
    of_experts = {name for core, _ in mixtures for expert in range(core.stacked) for name in core.names_of(expert)}
    known = opened.keys() | {name for name in of_experts if mixtures[0][1]}
    for pattern, _ in rules.exceptions:
        if pattern not in known and not any(fnmatchcase(name, pattern) for name in known):
            if any(fnmatchcase(name, pattern) for name in of_experts):
                raise InvalidRequest(
                    f"exceptions name experts as {pattern!r}, which have formats of their own only where they are cut"
                    " whole; use --experts whole",
                    param="experts",
                )
            some = ", ".join(sorted(opened)[:3])
            raise InvalidRequest(
                f"exceptions name {pattern!r}, which no matrix of the model is called; there are {some}, ...",
                param="exceptions",
            )
    bfloat16 = frozenset(
        name
        for name, weights in opened.items()
        if exceptions.get(name, base).kind == "fp16" and weights.stored == "bfloat16"
    )
    named = msgspec.structs.replace(numeric_class, exceptions=_digest(exceptions | marked, rules.rounding))
    return Recipe(named, exceptions, bfloat16, rules.rounding)


def _check_exact(name: str, form: Format, numeric_class: NumericClass) -> None:
    if numeric_class.exact and form.block > EXACT_BLOCK:
        raise InvalidRequest(
            f"{name}: format {form.name} in an exact class, whose blocks are at most {EXACT_BLOCK}; use "
            f"{replace(form, block=EXACT_BLOCK).name} or a fast class",
            param="exceptions",
        )


def _of_experts(core: Mixture, numeric_class: NumericClass, rules: Rules) -> dict[str, Format]:
    """The exceptions of a layer's whole experts, by the names of `Mixture.names_of`."""
    base, found = base_of(numeric_class), dict[str, Format]()
    for expert in range(core.stacked):
        names = core.names_of(expert)
        asked = {rules.of(name) or base for name in names}
        if len(asked) > 1:
            each = " and ".join(sorted(form.name for form in asked))
            raise InvalidRequest(
                f"{names[0]}: an expert in {each}; its matrices have one format, name all of {', '.join(names)}",
                param="exceptions",
            )
        (form,) = asked
        if form == base:
            continue
        _check_exact(names[0], form, numeric_class)
        divides = not form.block or not (core.hidden % form.block or core.width % form.block)
        if form.kind == "fp16" or form.per_row or form.zero_points or not divides:
            raise InvalidRequest(
                f"{names[0]}: format {form.name}; an expert has fp32, or int4 or int8 with a block that divides its"
                f" {core.width} columns and {core.hidden} inputs, as int8-{base.block or EXACT_BLOCK}",
                param="exceptions",
            )
        found |= dict.fromkeys(names, form)
    if len(set(found.values())) > 1:
        each = ", ".join(sorted(form.name for form in set(found.values())))
        raise InvalidRequest(
            f"{core.router}: experts in {each} beside {base.name}; the experts of a layer have one other format",
            param="exceptions",
        )
    return found


def prompt_recipe(recipe: Recipe, plans: Iterable[SegmentPlan], rules: Rules) -> Recipe:
    """The formats in which prompt tokens run through `plans`, for a class that mixes formats: int8, or by a rule.

    To its class, which is that of `recipe`, they are exceptions like others: kinds of segments are named after them.
    """
    names = {f"{matrix.tensor}.weight" for plan in plans for matrix in plan.linears}
    formats = {name: rules.of(name) or PROMPT for name in sorted(names)}
    return replace(recipe, exceptions={name: form for name, form in formats.items() if form != recipe.base})


def packed_bits(weights: Iterable[Weights]) -> int:
    """Bits of the blocks in which most of a model's numbers are stored; 0 where most are plain floats."""
    counts = {0: 0, 4: 0, 8: 0}
    for one in weights:
        counts[one.packing.bits if one.packing else 0] += one.elements
    return max(counts, key=lambda bits: counts[bits])


def _as_stored(packing: Packing | None, base: Format, at_most: int, width: int, model_bits: int) -> Format:
    """The format of a matrix that nothing was asked for: the class's, but blocks of the source are not rounded twice.

    In a model of 4-bit blocks, what its maker stored wider stays wider.
    """
    if base.kind in ("fp32", "fp16") or base.per_row:
        return base
    wider = base.kind == "int4" and model_bits == 4
    if packing is not None:
        block = block_for(packing, at_most, width)
        kind = base.kind if packing.bits == 4 or not wider else "int8"
        if block is not None:
            form = Format(kind, block, packing.zero_points and Format(kind).bits == packing.bits)
            if form.holds(packing):
                return base if base.holds(packing) and _divides(base.block, width) else form
    return parse_format(WIDER) if wider else base


def _divides(block: int, width: int) -> bool:
    return not width or width % block == 0


def _digest(exceptions: Mapping[str, Format], rounding: Rounding) -> str:
    if not exceptions and rounding == "nearest":
        return ""
    marks = [rounding, *(f"{name}={form.name}" for name, form in sorted(exceptions.items()))]
    return hashlib.sha256("\n".join(marks).encode()).hexdigest()[:8]


def read_rules(path: Path) -> Rules:
    """Rules from a JSON file: {"exceptions": {"<tensor or pattern>": "<format>"}, "rounding": "nearest" or "search"}.

    Both keys may be missing. Raises NotFound, InvalidDocument or InvalidRequest naming the file and the entry.
    """
    if not path.is_file():
        raise NotFound(f"exceptions: there is no file {path}", param="exceptions")
    if path.stat().st_size > RULES_BYTES:
        raise InvalidDocument(f"{path}: {path.stat().st_size} bytes, at most {RULES_BYTES} are accepted")
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InvalidDocument(f"{path}: not JSON: {error}") from error
    if not isinstance(document, dict) or set(document) - {"exceptions", "rounding"}:
        raise InvalidDocument(f"{path}: an object with exceptions and rounding is expected")
    return Rules(tuple(_entries(path, document.get("exceptions", {}))), _rounding(path, document))


def write_rules(rules: Rules) -> bytes:
    """The file that `read_rules` reads."""
    document = {"exceptions": {name: form.name for name, form in rules.exceptions}, "rounding": rules.rounding}
    return json.dumps(document, indent=1).encode() + b"\n"


def _entries(path: Path, found: Any) -> Iterator[tuple[str, Format]]:
    if not isinstance(found, dict):
        raise InvalidDocument(f"{path}: exceptions are an object of tensor names and formats")
    for name, form in found.items():
        if not isinstance(form, str):
            raise InvalidDocument(f"{path}: the format of {name!r} is {form!r}, a name as int8-32 is expected")
        yield name, parse_format(form, param="exceptions")


def _rounding(path: Path, document: dict[str, Any]) -> Rounding:
    found = document.get("rounding", "nearest")
    known: dict[Any, Rounding] = {"nearest": "nearest", "search": "search"}
    if not isinstance(found, str) or found not in known:
        raise InvalidDocument(f"{path}: rounding {found!r}; it is nearest or search")
    return known[found]
