"""What `experts` commands show: stable JSON documents made from the coordinator's messages, and cells for tables.

The keys of these documents, and their order, are a contract: keys may be added, never renamed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

from ganglion.proto import admin_pb2
from ganglion.wire.certificates import TrustLabel
from ganglion.wire.errors import InvalidRequest

EXPERT_COLUMNS = ("NAME", "STATE", "WHERE", "DOMAINS", "TOK/S", "TTFT", "P95", "J/TOKEN", "QUEUE", "ANSWERS")
EXPLAINED_COLUMNS = ("", "EXPERT", "TOK/S", "J/TOKEN", "WHY")

_COMBINES = ("best", "vote", "rerank", "blend")


def expert(state: admin_pb2.ExpertState, names: Mapping[str, str]) -> dict[str, Any]:
    """One expert as a document; `names` gives the devices' names by node id."""
    spec, figures = state.spec, state.figures
    return {
        "name": spec.name,
        "state": state.state,
        "why": state.why or None,
        "url": spec.url or None,
        "model": spec.model or spec.name,
        "domains": list(spec.domains),
        "label": TrustLabel.of(spec.label).value if spec.url and spec.label else None,
        "deployment": state.deployment or None,
        "device": names.get(state.node_id, state.node_id) or None,
        "tokens_per_s": figures.tokens_per_s,
        "ttft_s": figures.ttft_s,
        "ttft_p95_s": figures.ttft_p95_s,
        "tpot_p95_s": figures.tpot_p95_s,
        "link_s": figures.link_s or None,
        "energy_j_per_token": figures.energy_j_per_token,
        "energy_measured": figures.energy_measured,
        "samples": figures.samples,
        "queue": state.queue,
        "tokenizer_digest": state.tokenizer_digest or None,
    }


def expert_cells(row: Mapping[str, Any]) -> list[str]:
    """One expert under EXPERT_COLUMNS; energy that was assumed is marked."""
    return [
        row["name"],
        row["state"],
        row["url"] or row["device"] or "-",
        ", ".join(row["domains"]) or "-",
        f"{row['tokens_per_s']:.1f}",
        _seconds(row["ttft_s"]),
        _seconds(row["ttft_p95_s"]),
        _energy(row),
        str(row["queue"]),
        str(row["samples"]) if row["samples"] else "none: as claimed",
    ]


def costs_line(row: Mapping[str, Any]) -> str:
    """Speed and energy in words."""
    how = f"measured in {row['samples']} answers" if row["samples"] else "until it is measured"
    return f"{row['tokens_per_s']:.1f} tokens/s, {_seconds(row['ttft_s'])} to the first, {_energy(row)} J/token ({how})"


def selection(found: admin_pb2.Selection) -> dict[str, Any]:
    """The subset of one class as a document."""
    budget = found.budget
    return {
        "class": budget.name,
        "combine": combine_name(budget.combine),
        "tokens": budget.tokens,
        "latency_s": budget.latency_p95_s or None,
        "energy_j": budget.energy_j or None,
        "most": budget.most or None,
        "private": budget.private,
        "domains": list(budget.domains),
        "experts": list(found.experts),
        "value": found.value,
        "predicted_latency_p95_s": found.latency_p95_s if found.experts else None,
        "predicted_energy_j": found.energy_j if found.experts else None,
        "optimal": found.optimal,
        "gap": found.gap,
        "refused": found.refused or None,
        "left_out": {each.expert: each.why for each in found.left_out},
    }


def selection_lines(row: Mapping[str, Any]) -> list[str]:
    """The same in words."""
    limits = [
        f"{row['tokens']} tokens",
        f"95 % within {row['latency_s']:g} s" if row["latency_s"] else "",
        f"{row['energy_j']:g} J" if row["energy_j"] else "",
        f"at most {row['most']} experts" if row["most"] else "",
        "private" if row["private"] else "",
        f"about {', '.join(row['domains'])}" if row["domains"] else "",
    ]
    lines = [f"class     {row['class']}: {row['combine']}, {', '.join(each for each in limits if each)}"]
    if row["refused"]:
        return [*lines, f"refused   {row['refused']}"]
    proof = "no subset is better" if row["optimal"] else f"the optimum is at most {row['gap']:.4f} better"
    return [
        *lines,
        f"chosen    {', '.join(row['experts'])}",
        f"value     {row['value']:.4f} of 1 ({proof})",
        f"latency   {_seconds(row['predicted_latency_p95_s'])} (p95, predicted)",
        f"energy    {row['predicted_energy_j']:.3g} J (predicted)",
    ]


def explained_cells(row: Mapping[str, Any], experts: Mapping[str, admin_pb2.ExpertState]) -> list[list[str]]:
    """Chosen experts, then the others with their reasons, under EXPLAINED_COLUMNS."""
    told = [("→", name, "chosen") for name in row["experts"]]
    told += [("", name, why) for name, why in row["left_out"].items()]
    cells = []
    for mark, name, why in told:
        figures = experts[name].figures if name in experts else admin_pb2.ExpertFigures()
        energy = {"energy_j_per_token": figures.energy_j_per_token, "energy_measured": figures.energy_measured}
        cells.append([mark, name, f"{figures.tokens_per_s:.1f}", _energy(energy), why])
    return cells


def combine_of(name: str) -> admin_pb2.Combine:
    """How answers are combined, by its name. Raises InvalidRequest naming the choices."""
    if name not in _COMBINES:
        raise InvalidRequest(f"combine {name!r}: it is one of {', '.join(_COMBINES)}", param="combine")
    return cast("admin_pb2.Combine", admin_pb2.Combine.Value(f"COMBINE_{name.upper()}"))


def combine_name(number: admin_pb2.Combine) -> str:
    """The same by its number."""
    name = admin_pb2.Combine.Name(number).removeprefix("COMBINE_").lower()
    return "best" if name == "unspecified" else name


def split_names(text: str) -> list[str]:
    """Names with commas between."""
    return [each.strip() for each in text.split(",") if each.strip()]


def parse_seconds(text: str, option: str) -> float:
    """Seconds of "2s", "500ms", "2" or "1.5". Raises InvalidRequest."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s)?", text.strip())
    if found is None:
        raise InvalidRequest(f"{option} {text!r}: expected a time, as in 2s or 500ms", param=option.lstrip("-"))
    return float(found[1]) * (1e-3 if found[2] == "ms" else 1.0)


def _seconds(value: float) -> str:
    return f"{1e3 * value:.0f} ms" if value < 1.0 else f"{value:.2f} s"


def _energy(row: Mapping[str, Any]) -> str:
    """Joule per token; "~" where it is not measured."""
    return f"{'' if row['energy_measured'] else '~'}{row['energy_j_per_token']:.2g}"
