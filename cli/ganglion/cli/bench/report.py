"""What was measured, as a stable document and as tables for people. Times in the document are in ms, rates a second.

The document's keys are a contract: keys may be added, never renamed. What was not measured is null or an empty list.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ganglion.cli.bench.energy import NONE
from ganglion.cli.bench.figures import Spread, percentile, ratios
from ganglion.cli.bench.measures import PARTS
from ganglion.cli.bench.running import Collected, Ours, Theirs, same_tokens
from ganglion.cli.output import human_bytes

COLUMNS = ("WHAT", "FIGURE", "SPREAD", "")
AGAINST_COLUMNS = ("AGAINST", "BITS", "WHAT", "THEIRS", "OURS", "OURS/THEIRS", "")


def ours_document(ours: Ours, memory: Sequence[dict[str, Any]], energy_source: str) -> dict[str, Any]:
    """One deployment."""
    found = ours.found
    return {
        "name": ours.name,
        "deployment": ours.deployed.document,
        "decode": _decode(found),
        "prefill": _prefill(found),
        "concurrent": [
            {"sessions": count, "tokens_per_s": Spread.of(rates).document} for count, rates in found.concurrent.items()
        ],
        "arrivals": _arrivals(found),
        "second_turn": _second_turn(found),
        "account_ms": _account(found),
        "wire_bytes_per_token": _of([each.wire_bytes for each in found.decode]),
        "energy": {"source": energy_source, "joules_per_token": _joules(found)},
        "memory": list(memory),
    }


def _decode(found: Collected) -> dict[str, Any] | None:
    """`between_tokens_ms`: over the tokens of all rounds together."""
    if not found.decode:
        return None
    gaps = [gap * 1e3 for each in found.decode for gap in each.gaps_s]
    return {
        "ms_per_token": Spread.of([each.tpot_s * 1e3 for each in found.decode]).document,
        "tokens_per_s": Spread.of([1 / each.tpot_s for each in found.decode]).document,
        "ttft_ms": _of([None if each.ttft_s is None else each.ttft_s * 1e3 for each in found.decode]),
        "between_tokens_ms": _percentiles(gaps),
    }


def _prefill(found: Collected) -> list[dict[str, Any]]:
    return [
        {
            "prompt_tokens": size,
            "tokens_per_s": Spread.of([size / each for each in seconds]).document,
            "ttft_ms": Spread.of([each * 1e3 for each in seconds]).document,
        }
        for size, seconds in found.prefill_s.items()
    ]


def _arrivals(found: Collected) -> dict[str, Any] | None:
    quiet = [gap * 1e3 for each in found.quiet_s for gap in each]
    busy = [gap * 1e3 for each in found.busy_s for gap in each]
    if not quiet or not busy:
        return None
    return {"quiet_between_tokens_ms": _percentiles(quiet), "between_tokens_ms": _percentiles(busy)}


def _second_turn(found: Collected) -> dict[str, Any] | None:
    if not found.turns_s:
        return None
    return {
        "first_ttft_ms": Spread.of([first * 1e3 for first, _ in found.turns_s]).document,
        "second_ttft_ms": Spread.of([second * 1e3 for _, second in found.turns_s]).document,
        "ratio": Spread.of([second / first for first, second in found.turns_s]).document,
    }


def _account(found: Collected) -> dict[str, Any] | None:
    """By part, of a token with its part of the prompt; `wall` is the sum of all but `api`, which no lead sees."""
    rounds = [each for each in found.decode if each.account_s]
    if not rounds:
        return None
    return {
        part.removesuffix("_s"): Spread.of([each.account_s[part] * 1e3 for each in rounds]).median
        for part in (*PARTS, "api_s")
    }


def _joules(found: Collected) -> dict[str, Any] | None:
    return _of([None if each.joules is None else each.joules / max(1, len(each.ids or ())) for each in found.decode])


def _of(rounds: Sequence[float | None]) -> dict[str, Any] | None:
    known = [each for each in rounds if each is not None]
    return Spread.of(known).document if known else None


def _percentiles(values: Sequence[float]) -> dict[str, Any] | None:
    return {"p50": percentile(values, 0.5), "p99": percentile(values, 0.99), "count": len(values)} if values else None


def against_document(ours: Ours, theirs: Theirs) -> dict[str, Any]:
    """One competitor; `ratio` is our rate over its rate in the same round: above 1 ours is faster."""
    about, found = theirs.rival.about, theirs.found
    same = same_tokens(ours.found, found)
    document: dict[str, Any] = {
        "name": about.name,
        "version": about.version,
        "weights": about.weights,
        "bits_per_weight": about.bits,
        "threads": about.threads,
        "instructions": about.instructions,
        "decode": _decode(found),
        "prefill": _prefill(found),
        "same_tokens": None if same is None else {"equal": same[0], "of": same[1]},
    }
    if document["decode"] is not None and ours.found.decode:
        pair = [Spread.of([1 / each.tpot_s for each in one.decode]) for one in (ours.found, found)]
        document["decode"]["ratio"] = ratios(*pair).document
    for row in document["prefill"]:
        size = row["prompt_tokens"]
        if size in ours.found.prefill_s:
            pair = [Spread.of([1 / each for each in one.prefill_s[size]]) for one in (ours.found, found)]
            row["ratio"] = ratios(*pair).document
    return document


def _row(what: str, spread: dict[str, Any] | None, unit: str, note: str = "", digits: int = 1) -> list[list[str]]:
    if spread is None:
        return []
    low, high = spread["low"], spread["high"]
    apart = f"{low:.{digits}f}–{high:.{digits}f}" if len(spread["rounds"]) > 1 else "one round"
    return [[what, f"{spread['median']:.{digits}f} {unit}", apart, note]]


def ours_rows(found: dict[str, Any]) -> list[list[str]]:
    """One deployment under COLUMNS."""
    rows: list[list[str]] = []
    decode, arrivals, turn = found["decode"], found["arrivals"], found["second_turn"]
    if decode:
        rows += _row("decode", decode["tokens_per_s"], "tokens/s")
        rows += _row("  per token", decode["ms_per_token"], "ms", digits=2)
        rows += _between("  between tokens", decode["between_tokens_ms"])
        rows += _row("  first token", decode["ttft_ms"], "ms", "prompt of 8 tokens")
    for each in found["prefill"]:
        first = f"first token after {each['ttft_ms']['median']:.0f} ms"
        rows += _row(f"prefill {each['prompt_tokens']}", each["tokens_per_s"], "tokens/s", first, 0)
    admitted = found["deployment"]["sessions"]
    for each in found["concurrent"]:
        note = f"{admitted} are admitted, the others wait" if each["sessions"] > admitted else "together"
        rows += _row(f"{each['sessions']} sessions", each["tokens_per_s"], "tokens/s", note)
    if arrivals:
        rows += _between("streams, quiet", arrivals["quiet_between_tokens_ms"])
        rows += _between("streams, prompts arriving", arrivals["between_tokens_ms"])
    if turn:
        first, second = turn["first_ttft_ms"]["median"], turn["second_ttft_ms"]["median"]
        rows += _row(
            "second turn", turn["ratio"], "of the first", f"first token {second:.0f} against {first:.0f} ms", 2
        )
    account = found["account_ms"]
    if account:
        shown = ", ".join(f"{name} {value:.2f}" for name, value in account.items() if name != "wall")
        rows.append(["a token's ms", f"{account['wall']:.2f} ms at the lead", "", shown])
    rows += _row("on the lead's lanes", found["wire_bytes_per_token"], "bytes/token", digits=0)
    energy = found["energy"]
    if energy["joules_per_token"]:
        rows += _row("energy", energy["joules_per_token"], "J/token", energy["source"], 2)
    elif decode:
        rows.append(["energy", NONE, "", ""])
    for each in found["memory"]:
        if each["resident_bytes"] is None:
            rows.append([f"memory, {each['device']}", NONE, "", "it runs elsewhere"])
        else:
            anonymous = f"{human_bytes(each['anonymous_bytes'])} of them anonymous" if each["anonymous_bytes"] else ""
            rows.append([f"memory, {each['device']}", f"{human_bytes(each['resident_bytes'])} resident", "", anonymous])
    return rows


def _between(what: str, found: dict[str, Any] | None) -> list[list[str]]:
    if found is None:
        return []
    return [[what, f"p50 {found['p50']:.2f} ms, p99 {found['p99']:.2f} ms", f"{found['count']} gaps", ""]]


def against_rows(ours: dict[str, Any], found: dict[str, Any]) -> list[list[str]]:
    """One competitor under AGAINST_COLUMNS."""
    head = [
        found["name"],
        f"{found['bits_per_weight']:.2g}",
    ]
    rows = []
    decode = found["decode"]
    if decode and "ratio" in decode:
        same = found["same_tokens"]
        note = f"{same['equal']} of {same['of']} tokens equal before the first that differs" if same else ""
        theirs, mine = decode["tokens_per_s"]["median"], ours["decode"]["tokens_per_s"]["median"]
        rows.append([*head, "decode", f"{theirs:.1f} tokens/s", f"{mine:.1f}", _ratio(decode["ratio"]), note])
    mine_by = {each["prompt_tokens"]: each["tokens_per_s"]["median"] for each in ours["prefill"]}
    for each in found["prefill"]:
        if "ratio" in each:
            size = each["prompt_tokens"]
            theirs = f"{each['tokens_per_s']['median']:.0f} tokens/s"
            rows.append([*head, f"prefill {size}", theirs, f"{mine_by[size]:.0f}", _ratio(each["ratio"]), ""])
    return rows


def _ratio(spread: dict[str, Any]) -> str:
    apart = f" ({spread['low']:.2f}–{spread['high']:.2f})" if len(spread["rounds"]) > 1 else ""
    return f"{spread['median']:.2f}x{apart}"
