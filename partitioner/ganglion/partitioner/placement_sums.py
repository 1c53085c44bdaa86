"""How the partial sums of a plan travel: whole or rounded, and whether what computes waits for them. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Literal

from ganglion.partitioner.cost import Network, exchange_s
from ganglion.partitioner.placement_request import Request
from ganglion.wire.nouns import Stage
from ganglion.wire.nouns.plan import Payload

PAYLOADS: Final[dict[Payload, float]] = {"full": 1.0, "fp16": 0.5, "int8": 0.265625}  # bytes of sums, to float32's
ROUNDING_S: Final = 30e-6  # of one sum there and back, and of its bytes before rounding: measured, one thread
ROUNDING_BYTES_PER_S: Final = 1e9
ROUNDING_PAYS: Final = 0.9  # of the time of exchanges, below which sums are rounded further
OVERLAP_PAYS: Final = 1.5  # times reading the weights once: what the sums of a chunk take, at least, to be hidden


def overlaps(request: Request, stages: tuple[Stage, ...], payload: Payload, context: int, compute_s: float) -> bool:
    """Whether large steps run in halves: it reads the weights once more, and hides what sums take between machines."""
    chunk = request.chunk(context)
    travel_s = 0.0
    for stage in stages:
        ids = [share.device for share in stage.shares]
        if request.network.apart(ids):
            for row_bytes, count in request.size.exchanges(stage.layers).items():
                size_bytes = int(PAYLOADS[payload] * row_bytes * chunk)
                travel_s += count * exchange_s(request.network, ids, stage.topology, size_bytes)
    return travel_s > OVERLAP_PAYS * compute_s


def payload_of(request: Request, stages: tuple[Stage, ...], context: int) -> Payload:
    """How the sums of a plan travel: as its slowest stage would choose, and as they are in exact classes."""
    wished = request.options.payload
    if request.manifest.numeric_class.exact:
        return "full"
    split = [stage for stage in stages if len(stage.shares) > 1]
    if wished != "auto":
        return wished if split else "full"
    chosen: list[Payload] = [
        _choose(
            request.network,
            [share.device for share in stage.shares],
            stage.topology,
            request.size.exchanges(stage.layers),
            request.chunk(context),
        )
        for stage in split
    ]
    for payload in reversed(PAYLOADS):
        if payload in chosen:
            return payload
    return "full"


def _choose(
    network: Network, ids: Sequence[str], topology: Literal["mesh", "star"], exchanges: Mapping[int, int], chunk: int
) -> Payload:
    """How sums travel among `ids` in a fast class: rounded where the links' throughput, not their latency, decides.

    exchanges: how many of a row there are, by bytes; a row of a prompt counts as much as one of an answer. Within one
    machine rounding takes longer than it saves.
    """
    if not network.apart(ids):
        return "full"

    def one_s(payload: Payload, size_bytes: int) -> float:
        rounding_s = 0.0 if payload == "full" else ROUNDING_S + size_bytes / ROUNDING_BYTES_PER_S
        return exchange_s(network, ids, topology, int(PAYLOADS[payload] * size_bytes)) + rounding_s

    def seconds(payload: Payload) -> float:
        return sum(
            count * (one_s(payload, size) + one_s(payload, size * chunk) / chunk) for size, count in exchanges.items()
        )

    chosen: Payload = "full"
    for payload in PAYLOADS:
        if seconds(payload) < ROUNDING_PAYS * seconds(chosen):
            chosen = payload
    return chosen
