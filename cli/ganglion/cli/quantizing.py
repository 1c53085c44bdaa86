"""`quantize`: cut a model in a format of one's choice, and say before what that costs in quality."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ganglion.cli import output
from ganglion.cli.fleet import root_of
from ganglion.cli.options import ExpertsOption, FastOption, HomeOption, JsonOption, ThreadsOption
from ganglion.cli.runner import command

if TYPE_CHECKING:
    from ganglion.cli.deploying import Wish
    from ganglion.cli.sourcing import Source
    from ganglion.partitioner.classes import Layout
    from ganglion.partitioner.quality import Measured, Suggestion
    from ganglion.partitioner.quantize import Rules

ROW_TOKENS = 512  # of the text that the model sees at a time
ROUNDINGS = ("nearest", "search")
COLUMNS = ("TENSOR", "FORMAT", "SQNR", "PEAK", "NOISE", "KL", "BYTES")


def add_to(app: typer.Typer) -> None:
    """Register the command of this file."""
    command(app, "quantize")(quantize)


async def quantize(
    model: Annotated[
        str, typer.Argument(help="`demo`, a folder or GGUF file with a checkpoint, or a repository of the hub.")
    ],
    weights: Annotated[str, typer.Option("--format", help="Weights: fp32, fp16, int8, int4 or mixed.")] = "int4",
    block: Annotated[
        int | None,
        typer.Option(
            "--block",
            help="Numbers that share a scale: 16, 32, 64, 128; of int8 also 0, one scale for each output. Default: 32"
            " for int4 (with --fast the largest that fits), 0 for int8.",
            show_default=False,
        ),
    ] = None,
    fast: FastOption = False,
    rounding: Annotated[
        str | None,
        typer.Option(
            "--rounding",
            help="nearest, or search: the scale of the least error for each block of int4, at twice the time to cut.",
            show_default=False,
        ),
    ] = None,
    exceptions: Annotated[
        Path | None,
        typer.Option(
            "--exceptions",
            help="JSON file with other formats for some tensors, as --write writes it; names may be patterns.",
            show_default=False,
        ),
    ] = None,
    report: Annotated[bool, typer.Option("--report", help="Measure instead of cutting.")] = False,
    text: Annotated[
        Path | None,
        typer.Option("--text", help="What to measure on. Default: source of Python's library.", show_default=False),
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="Tokens of the text to measure on.")] = 2048,
    tensors: Annotated[
        bool, typer.Option("--tensors/--no-tensors", help="Measure every tensor of its own, which takes most time.")
    ] = True,
    target: Annotated[
        float, typer.Option("--target", min=0, help="KL in nats per token that the suggested exceptions aim at.")
    ] = 0.02,
    write: Annotated[
        Path | None,
        typer.Option("--write", help="Write the suggested exceptions here (with --report).", show_default=False),
    ] = None,
    apply: Annotated[bool, typer.Option("--apply", help="Cut with the suggested exceptions (with --report).")] = False,
    experts: ExpertsOption = None,
    expert_budget: Annotated[
        float | None,
        typer.Option(
            "--expert-budget",
            min=0,
            help="Choose which experts are int8 where the others are int4 (with --report; experts are cut whole):"
            " percent of the perplexity over that of all in int8, as measured on the text.",
            show_default=False,
        ),
    ] = None,
    threads: ThreadsOption = None,
    name: Annotated[
        str | None,
        typer.Option(
            "--name",
            help="Name of the cut model. Default: the model's with the format behind it, as in demo-int4-32.",
            show_default=False,
        ),
    ] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Cut a model in a format of your choice under a name of its own, or report what the format costs.

    The report runs the model on a text, once in float32 and once in the format, layer by layer: for each tensor the
    signal to noise of its numbers in dB, its largest number over its root mean square, how far rounding it alone moves
    the residual, and its part of the KL; for the whole KL, equal choices and perplexities. With --expert-budget it says
    of a mixture which experts need int8, by how often and with which weight they are chosen and how rounding moves what
    they give.
    """
    from ganglion.cli import expert_widths
    from ganglion.cli.deploying import Wish, parse_experts
    from ganglion.cli.sourcing import checkpoint_of
    from ganglion.partitioner.checkpoint import open_checkpoint
    from ganglion.partitioner.classes import lay_out, numeric_class
    from ganglion.partitioner.quality import suggest
    from ganglion.wire.errors import InvalidRequest, NotFound

    if (write or apply or text or expert_budget is not None) and not report:
        raise InvalidRequest("--write, --apply, --text and --expert-budget belong to --report", param="report")
    cut_by: Any = parse_experts(experts) or ("columns" if expert_budget is None else "whole")
    if expert_budget is not None and cut_by != "whole":
        raise InvalidRequest("--expert-budget: experts have formats of their own in a cut by --experts whole")
    source = await checkpoint_of(model)
    if source is None:
        raise NotFound(f"{model!r} is no folder, no GGUF file and no embedded model", param="model")
    if report and weights == "mixed":
        raise InvalidRequest(
            "--report: mixed runs prompts in int8 and answers in int4, and the text to measure on is neither; report"
            " int8 and int4 one by one (exceptions hold for both)",
            param="format",
        )
    rules = _rules(exceptions, rounding)
    chosen: Any = weights
    numeric = numeric_class(source.path, chosen, fast=fast, block=block, rules=rules, experts=cut_by)
    document: dict[str, Any] = {"model": source.name, "numeric_class": numeric.name}
    if report:
        layout = lay_out(open_checkpoint(source.path), numeric, rules, cut_by)
        sample = _rows(layout, text, tokens)
        _start_runtime(threads)
        if expert_budget is not None:
            widths = expert_widths.choose(layout, sample, expert_budget / 100, rules, _open_session)
            document |= {"expert_widths": expert_widths.document(widths)}
            if not as_json:
                expert_widths.show(widths)
            rules = widths.rules
        else:
            measured = _measured(layout, sample, by_tensor=tensors)
            suggestion = suggest(measured, target)
            document |= _document(measured, suggestion, target)
            if not as_json:
                _show(measured, suggestion, target)
            suggested = dict(rules.exceptions) | dict(suggestion.exceptions)
            rules = replace(rules, exceptions=tuple(suggested.items()))
    if write is not None:
        _write(write, rules)
    if apply or not report:
        named = name or f"{source.name}-{weights}" + (f"-{numeric.block}" if numeric.block else "")
        wish = Wish(weights, fast, block=block, rules=rules, experts=cut_by)
        document |= _cut(root_of(home), replace(source, name=named), wish)
    if as_json:
        output.answer_json(document)


def _rules(exceptions: Path | None, rounding: str | None) -> Rules:
    from ganglion.partitioner.quantize import Rules, read_rules
    from ganglion.wire.errors import InvalidRequest

    rules = read_rules(exceptions) if exceptions else Rules()
    if rounding is None:
        return rules
    if rounding not in ROUNDINGS:
        raise InvalidRequest(f"--rounding {rounding!r}: it is {' or '.join(ROUNDINGS)}", param="rounding")
    chosen: Any = rounding
    return replace(rules, rounding=chosen)


def _cut(root: Path, source: Source, wish: Wish) -> dict[str, Any]:
    """Cut into the store of this machine's agent; what the answer says of it."""
    from ganglion.cli import deploying
    from ganglion.wire.errors import Unavailable
    from ganglion.wire.nouns import digest

    place = deploying.store_home(root)
    if place is None:
        raise Unavailable("not cut: this machine has no agent yet; start one with `ganglion up`")
    manifest = deploying.cut(root, place, source, wish=wish)
    output.say(f"run it with: ganglion run {source.name}")
    return {"name": source.name, "numeric_class": manifest.numeric_class.name, "manifest_digest": digest(manifest)}


def _rows(layout: Layout, text: Path | None, tokens: int) -> list[list[int]]:
    """The text as rows of token ids."""
    from tokenizers import Tokenizer

    from ganglion.partitioner.quality import default_text, read_text, rows_of_text
    from ganglion.wire.errors import NotFound

    checkpoint = layout.checkpoint
    if "tokenizer.json" not in checkpoint.tokenizer:
        raise NotFound(f"{checkpoint.path}: no tokenizer.json in it, so no text can be measured", param="model")
    tokenizer = Tokenizer.from_buffer(checkpoint.tokenizer["tokenizer.json"].read_bytes())
    return rows_of_text(
        read_text(text) if text else default_text(),
        lambda part: list(tokenizer.encode(part, add_special_tokens=False).ids),
        first=checkpoint.bos_id,
        tokens=tokens,
        row_tokens=ROW_TOKENS,
        context=layout.model.context,
    )


def _start_runtime(threads: int | None) -> None:
    from ganglion.agent.executor.loader import start_runtime
    from ganglion.agent.probe.machine import usable

    start_runtime(usable(threads or 0).threads)


def _measured(layout: Layout, rows: list[list[int]], *, by_tensor: bool) -> Measured:
    from ganglion.cli.bars import progress_bar
    from ganglion.partitioner.quality import measure

    title = f"measured {layout.recipe.numeric_class.name} on {sum(len(row) - 1 for row in rows)} tokens"
    with progress_bar(title) as advance:
        return measure(layout, rows, _open_session, advance, by_tensor=by_tensor)


def _open_session(graph: bytes, weights: bytes) -> Any:
    """A session as agents open theirs, its `weights.bin` in memory."""
    import onnxruntime as ort

    from ganglion.wire.nouns import WEIGHTS_FILE

    options = ort.SessionOptions()
    options.use_per_session_threads = False
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.add_external_initializers_from_files_in_memory([WEIGHTS_FILE], [weights], [len(weights)])
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def _document(measured: Measured, suggestion: Suggestion, target: float) -> dict[str, Any]:
    return {
        "tokens": measured.tokens,
        "perplexity_fp32": measured.perplexity_fp32,
        "perplexity": measured.perplexity,
        "kl_nats": measured.kl,
        "top1_agreement": measured.top1,
        "tensors": [
            {
                "name": one.name,
                "format": one.format,
                "sqnr_db": one.sqnr_db if one.sqnr_db != float("inf") else None,
                "peak": one.peak,
                "noise": one.noise,
                "kl_nats": one.kl,
                "bytes": one.bytes,
            }
            for one in measured.tensors
        ],
        "suggested": {
            "target_kl_nats": target,
            "expected_kl_nats": suggestion.kl,
            "more_bytes": suggestion.more_bytes,
            "exceptions": {name: form.name for name, form in suggestion.exceptions},
        },
    }


def _show(measured: Measured, suggestion: Suggestion, target: float) -> None:
    rows = [
        (
            one.name,
            one.format,
            f"{one.sqnr_db:.1f} dB" if one.sqnr_db != float("inf") else "as stored",
            f"{one.peak:.1f}",
            f"{one.noise:.1e}",
            f"{one.kl:.5f}",
            output.human_bytes(one.bytes),
        )
        for one in measured.tensors
    ]
    output.answer_table(COLUMNS, rows, empty="nothing is rounded in this format")
    change = 100 * (measured.perplexity / measured.perplexity_fp32 - 1)
    output.answer(
        f"{measured.numeric_class.name} on {measured.tokens} tokens: perplexity {measured.perplexity:.3f}, fp32 "
        f"{measured.perplexity_fp32:.3f} ({change:+.2f} %); KL {measured.kl:.5f} nats; same choice "
        f"{100 * measured.top1:.1f} %"
    )
    if not suggestion.exceptions:
        needed = "no exceptions are needed" if measured.kl <= target else "no exceptions are known"
        output.answer(f"{needed} for a KL of {target:g}")
        return
    output.answer(
        f"{len(suggestion.exceptions)} exceptions for a KL of {target:g}: about {suggestion.kl:.5f} expected, "
        f"{output.human_bytes(suggestion.more_bytes)} more (--write FILE keeps them, --apply cuts with them):"
    )
    for name, form in suggestion.exceptions:
        output.answer(f"  {name} {form.name}")


def _write(path: Path, rules: Rules) -> None:
    from ganglion.partitioner.quantize import write_rules
    from ganglion.wire.errors import InvalidRequest

    try:
        path.write_bytes(write_rules(rules))
    except OSError as error:
        raise InvalidRequest(f"--write {path}: {error.strerror or error}", param="write") from error
    output.step(f"wrote {path}")
