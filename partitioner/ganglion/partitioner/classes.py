"""From a format's name to a numeric class, and a checkpoint laid out under it: segments, and every matrix's format."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from ganglion.partitioner.checkpoint import Checkpoint, open_checkpoint
from ganglion.partitioner.families import family_of
from ganglion.partitioner.families.experts import MixtureModel
from ganglion.partitioner.families.model import Experts, Split, largest_block, split_model
from ganglion.partitioner.families.plans import Linear, SegmentPlan
from ganglion.partitioner.quantize.formats import BLOCKS, EXACT_BLOCK, Block
from ganglion.partitioner.quantize.recipe import Recipe, Rules, packed_bits, prompt_recipe, recipe_of
from ganglion.partitioner.weights import Weights
from ganglion.wire.errors import InvalidRequest, Unsupported
from ganglion.wire.nouns import NumericClass

Choice = Literal["fp32", "fp16", "int4", "int8", "mixed"]
CHOICES: Final[tuple[Choice, ...]] = ("fp32", "fp16", "int4", "int8", "mixed")
NO_RULES: Final = Rules()


@dataclass(frozen=True)
class Layout:
    """A checkpoint under a class: its segments by layer, with the tensors of their layer, and the recipe.

    prompt_layers, prompt_recipe: what prompt tokens run through, where the class mixes formats; else the same.
    """

    checkpoint: Checkpoint
    model: Any  # the family's own kind of `Model`
    split: Split
    layers: tuple[tuple[SegmentPlan, ...], ...]
    head: SegmentPlan
    recipe: Recipe
    prompt_layers: tuple[tuple[SegmentPlan, ...], ...]
    prompt_recipe: Recipe

    @property
    def plans(self) -> Iterable[SegmentPlan]:
        """Every segment."""
        yield from (plan for layer in self.layers for plan in layer)
        yield self.head


def lay_out(
    checkpoint: Checkpoint, numeric_class: NumericClass, rules: Rules = NO_RULES, experts: Experts = "columns"
) -> Layout:
    """Lay `checkpoint` out under a class (whose `exceptions` are made anew) and the rules given; reads headers only.

    experts: how a mixture is cut.

    Raises Unsupported, InvalidDocument or Corrupt naming the file and the figure, InvalidRequest for a class that there
    is not or a rule that does not fit.
    """
    _check(numeric_class)
    family = family_of(checkpoint.config)
    model = family.read(checkpoint.config)
    if numeric_class.prompt and not model.per_row:
        raise Unsupported(
            f"{numeric_class.name}: {model.family} is a mixture of experts, whose int8 is no faster for prompts; use "
            "int4 or int8",
            param="format",
        )
    if experts == "whole" and not isinstance(model, MixtureModel):
        raise InvalidRequest(f"{model.family} has no experts to cut whole; leave --experts out", param="experts")
    split = split_model(model, numeric_class, experts)
    head = family.head(model, split)
    layers = [[plan.at_layer(layer) for plan in family.layer(model, split, layer)] for layer in range(model.layers)]

    def tensor(matrix: Linear) -> Weights:
        return checkpoint.tensor(f"{matrix.tensor}.weight", matrix.stored_outputs, matrix.inputs)

    recipe = recipe_of(numeric_class, [*(plan for layer in layers for plan in layer), head], tensor, rules)
    prompt = recipe
    if numeric_class.prompt:
        prompt = prompt_recipe(recipe, [plan for layer in layers for plan in layer], rules)
    named, prompt_named = (
        tuple(tuple(each.named(plan) for plan in layer) for layer in layers) for each in (recipe, prompt)
    )
    return Layout(checkpoint, model, split, named, recipe.named(head), recipe, prompt_named, prompt)


def numeric_class(
    source: Path,
    weight_format: Choice,
    *,
    fast: bool = False,
    block: int | None = None,
    rules: Rules = NO_RULES,
    experts: Experts = "columns",
) -> NumericClass:
    """The class of a format for the checkpoint `source`; of its weights only headers are read.

    block: where it is not given, int4 has 32 in exact classes, in fast ones the largest of 128, 64, 32, 16 that divides
    an attention group's inputs and is not above the source's own; int8 has none (a scale for each output), but 32 where
    the source is in blocks already, which are then taken over as they are, and for mixtures. mixed: int4, and int8
    without a block for prompt tokens. experts: how a mixture is cut, where rules are of experts.
    """
    if weight_format not in CHOICES:
        raise Unsupported(f"format {weight_format!r}; supported are {', '.join(CHOICES)}", param="format")
    if block is not None and block not in (0, *BLOCKS):
        raise InvalidRequest(f"block {block}: it is {', '.join(map(str, reversed(BLOCKS)))}", param="block")
    if weight_format in ("fp32", "fp16") and rules == NO_RULES:
        return _check(_class(weight_format, block or 0, not fast))
    checkpoint = open_checkpoint(source)
    if block is None:
        block = _default_block(checkpoint, weight_format, fast)
    return lay_out(checkpoint, _class(weight_format, block, not fast), rules, experts).recipe.numeric_class


def default_format(source: Path, small_bytes: int) -> Literal["fp32", "int4", "int8"]:
    """The format where none is asked for: of the blocks of the source, else fp32 up to `small_bytes`, else int4."""
    tensors = open_checkpoint(source).tensors.values()
    bits = packed_bits(tensor for tensor in tensors if len(tensor.shape) > 1)
    if bits:
        return "int8" if bits == 8 else "int4"
    return "fp32" if sum(tensor.stored_bytes for tensor in tensors) <= small_bytes else "int4"


def _default_block(checkpoint: Checkpoint, weight_format: Choice, fast: bool) -> int:
    if weight_format in ("fp32", "fp16"):
        return 0
    model = family_of(checkpoint.config).read(checkpoint.config)
    if weight_format in ("int4", "mixed"):
        return EXACT_BLOCK if not fast else largest_block(model.block_inputs, _packed_block(checkpoint) or 128)
    in_blocks = packed_bits(one for one in checkpoint.tensors.values() if len(one.shape) > 1)
    return 32 if in_blocks or not model.per_row else 0


def _packed_block(checkpoint: Checkpoint) -> int:
    """The block of most numbers that the source has in blocks of 4 bits; 0 where it has none."""
    counts: dict[int, int] = {}
    for tensor in checkpoint.tensors.values():
        if tensor.packing is not None and tensor.packing.bits == 4:
            counts[tensor.packing.block] = counts.get(tensor.packing.block, 0) + tensor.elements
    return max(counts, key=lambda block: counts[block], default=0)


def _class(weight_format: Choice, block: int, exact: bool) -> NumericClass:
    known: dict[int, Block] = {0: 0, **{one: one for one in BLOCKS}}
    if weight_format == "mixed":
        return NumericClass(format="int4", block=known[block], exact=exact, prompt="int8")
    return NumericClass(format=weight_format, block=known[block], exact=exact)


def _check(numeric_class: NumericClass) -> NumericClass:
    """The class, unless there is no such one."""
    name, block = numeric_class.name, numeric_class.block
    if numeric_class.format in ("fp32", "fp16") and block:
        raise InvalidRequest(f"numeric class {name}: {numeric_class.format} has none of block {block}", param="block")
    if numeric_class.prompt and numeric_class.format != "int4":
        raise InvalidRequest(f"numeric class {name}: generated tokens run in int4 where prompts run in int8")
    if numeric_class.format == "int4" and not block:
        raise InvalidRequest(f"numeric class {name}: int4 has a block of 16 to 128", param="block")
    if numeric_class.exact and block > EXACT_BLOCK:
        raise InvalidRequest(
            f"numeric class {name}: blocks of exact classes are at most {EXACT_BLOCK}; use block {EXACT_BLOCK} or a "
            "fast class",
            param="block",
        )
    return numeric_class
