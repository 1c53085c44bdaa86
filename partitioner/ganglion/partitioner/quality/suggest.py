"""Which tensors to keep in a wider format so that the rest costs no more than a target: greedy by gain per byte."""

from __future__ import annotations

from dataclasses import dataclass

from ganglion.partitioner.quality.measure import Measured
from ganglion.partitioner.quantize.formats import Format, parse_format


@dataclass(frozen=True)
class Suggestion:
    """Formats by tensor, the KL that is expected with them, and what they cost in bytes.

    The expectation takes the tensors' costs as independent and a kept tensor's as none; measure again to know.
    """

    exceptions: tuple[tuple[str, Format], ...]
    kl: float
    more_bytes: int


def suggest(measured: Measured, target_kl: float) -> Suggestion:
    """The fewest bytes more, as far as the greedy choice goes, that bring the KL to `target_kl` nats per token.

    What is int4 becomes int8 in blocks of 32, what is int8 becomes fp16. Experts have the format of the class.
    """
    options = []
    for one in measured.tensors:
        wider = parse_format("int8-32" if one.format.startswith("int4") else "fp16")
        more = wider.weight_bytes(one.outputs, one.inputs) - one.bytes
        if one.format != "fp16" and one.kl > 0 and not one.name.endswith("*"):
            options.append((one.kl / max(more, 1), one.name, wider, one.kl, more))
    kl, more_bytes, chosen = measured.kl, 0, []
    for _, name, wider, gain, more in sorted(options, key=lambda option: (-option[0], option[1])):
        if kl <= target_kl:
            break
        kl -= gain
        more_bytes += more
        chosen.append((name, wider))
    return Suggestion(tuple(chosen), max(kl, 0.0), more_bytes)
