"""`quantize --report --expert-budget`: which experts of a mixture are int8 where the others are int4."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import exp, log1p
from typing import TYPE_CHECKING, Any

from ganglion.cli import output

if TYPE_CHECKING:
    from ganglion.partitioner.classes import Layout
    from ganglion.partitioner.quality import ExpertError, Line, Measured, OpenSession, WidthChoice
    from ganglion.partitioner.quantize import Format, Rules

TRIES = 4  # choices that are measured until one is within the budget
COLUMNS = ("EXPERTS", "INT8", "BYTES", "KL", "PERPLEXITY")


@dataclass(frozen=True)
class Widths:
    """Experts measured narrow, wide, and as chosen within `budget` (of the perplexity over that of all wide).

    bytes: of all experts narrow. rules: with the choice.
    """

    budget: float
    errors: tuple[ExpertError, ...]
    line: Line
    choice: WidthChoice
    narrow: Measured
    wide: Measured
    chosen: Measured
    bytes: int
    rules: Rules

    @property
    def expected_kl(self) -> float:
        """The KL that the choice was made for."""
        return self.line.kl(self.choice.error)


def choose(layout: Layout, rows: list[list[int]], budget: float, rules: Rules, open_session: OpenSession) -> Widths:
    """Measure and choose for a model whose experts are cut whole; `rules` are those that it was laid out with.

    The choice is measured, and made again where it costs more than was expected.

    Raises InvalidRequest for a format that is not int4, or a model without experts.
    """
    from ganglion.cli.bars import progress_bar
    from ganglion.partitioner.classes import lay_out
    from ganglion.partitioner.quality import Line, choose_widths, expert_errors, measure
    from ganglion.partitioner.quantize import Format
    from ganglion.wire.errors import InvalidRequest

    narrow_form = layout.recipe.base
    if narrow_form.kind != "int4":
        raise InvalidRequest(
            f"--expert-budget chooses which experts are int8 where others are int4, not {narrow_form.name}; leave"
            " --format int4",
            param="format",
        )
    wide_form = Format("int8", narrow_form.block)

    def measured(exceptions: Any, title: str) -> tuple[Measured, Rules]:
        some = replace(rules, exceptions=tuple((dict(rules.exceptions) | dict(exceptions)).items()))
        with progress_bar(title) as advance:
            laid = lay_out(layout.checkpoint, layout.recipe.numeric_class, some, "whole")
            return measure(laid, rows, open_session, advance, by_tensor=False), some

    with progress_bar(f"measured the experts of {len(layout.layers)} layers") as advance:
        errors = expert_errors(layout, wide_form, rows, open_session, advance)
    narrow, _ = measured((), "measured all experts in int4")
    wide, _ = measured(((one.name, wide_form) for one in errors), "measured all experts in int8")
    line = Line.through(errors, narrow, wide)
    size, tries = _bytes(errors, narrow_form, wide_form), 0
    while True:
        choice, tries = choose_widths(errors, line.most(budget)), tries + 1
        chosen, with_choice = measured(((name, wide_form) for name in choice.wide), "measured a choice")
        if chosen.kl - wide.kl <= log1p(budget) or choice.error <= line.wide[0] or tries == TRIES:
            return Widths(budget, errors, line, choice, narrow, wide, chosen, size, with_choice)
        line = Line((choice.error, chosen.kl), line.wide)  # nearer by: what is left costs more than was expected


def _bytes(errors: tuple[ExpertError, ...], narrow: Format, wide: Format) -> int:
    """Bytes of all experts narrow, from what they take more when they are wide."""
    sizes = [form.weight_bytes(1, form.block) for form in (narrow, wide)]
    return sum(one.more_bytes for one in errors) * sizes[0] // (sizes[1] - sizes[0])


def document(widths: Widths) -> dict[str, Any]:
    """What `--json` says of it."""
    return {
        "budget": widths.budget,
        "experts": len(widths.errors),
        "int8_experts": list(widths.choice.wide),
        "int4_bytes": widths.bytes,
        "more_bytes": widths.choice.more_bytes,
        "expected_kl_nats": widths.expected_kl,
        "expected_perplexity": _expected(widths),
        **{
            name: {"kl_nats": one.kl, "perplexity": one.perplexity, "top1_agreement": one.top1}
            for name, one in (("int4", widths.narrow), ("int8", widths.wide), ("chosen", widths.chosen))
        },
        "perplexity_fp32": widths.narrow.perplexity_fp32,
        "errors": [
            {"name": one.name, "layer": one.layer, "rows": one.rows, "int4": one.narrow, "int8": one.wide}
            for one in widths.errors
        ],
    }


def show(widths: Widths) -> None:
    """Print it."""
    every, choice = len(widths.errors), widths.choice
    more = sum(one.more_bytes for one in widths.errors)
    rows = [
        (name, str(count), output.human_bytes(widths.bytes + added), f"{one.kl:.5f}", f"{one.perplexity:.3f}")
        for name, count, added, one in (
            ("all int4", 0, 0, widths.narrow),
            ("chosen", len(choice.wide), choice.more_bytes, widths.chosen),
            ("all int8", every, more, widths.wide),
        )
    ]
    output.answer_table(COLUMNS, rows, empty="")
    output.answer(
        f"{len(choice.wide)} of {every} experts in int8, for {100 * widths.budget:g} % of the perplexity over all in"
        f" int8: KL {widths.expected_kl:.5f} expected, {widths.chosen.kl:.5f} measured; perplexity"
        f" {_expected(widths):.3f} expected, {widths.chosen.perplexity:.3f} measured, fp32"
        f" {widths.chosen.perplexity_fp32:.3f}, on {widths.chosen.tokens} tokens"
    )


def _expected(widths: Widths) -> float:
    """On a text as the model itself would write it, perplexity grows by the exponential of the KL."""
    return widths.wide.perplexity * exp(widths.expected_kl - widths.wide.kl)
