"""What a share of the output matrix is asked for one token, and how the question travels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ganglion.proto import lane_pb2
from ganglion.wire.errors import ProtocolViolation
from ganglion.wire.sampling.adjusting import Adjusting, Adjustments, VocabShare


@dataclass(frozen=True, slots=True)
class Draw:
    """What is asked of a share. `position` is that of the token to be drawn.

    candidates: how many by falling adjusted logit; 0: only the best. top_logprobs: -1 none; n: the raw distribution's
    sums and its n likeliest tokens. mass: the sums of the adjusted logits over the temperature. adjusting: None when
    this share's logits are drawn from as they are. keep: the share keeps the row for later questions.
    """

    candidates: int
    temperature: float
    seed: int
    position: int
    top_logprobs: int = -1
    mass: bool = False
    adjusting: Adjusting | None = None
    keep: bool = False

    def available(self, share: VocabShare) -> int:
        """How many of the share's tokens may be drawn."""
        return share.count if self.adjusting is None else self.adjusting.available(share)


def write_draw(draw: Draw, newer: Adjustments, share: VocabShare | None, into: lane_pb2.Draw) -> None:
    """Fill a message with `draw`, of whose adjustments the share has all but the `newer` ones."""
    into.candidates = draw.candidates
    into.temperature = draw.temperature
    into.seed = draw.seed
    into.position = draw.position
    if draw.top_logprobs >= 0:
        into.top_logprobs = draw.top_logprobs
    into.mass = draw.mass
    into.keep = draw.keep
    if draw.adjusting is None or share is None:
        return
    into.repetition_penalty = draw.adjusting.repetition_penalty
    if len(newer):
        into.adjustments.gaps.extend(np.diff(newer.ids, prepend=np.uint32(share.first)).tolist())
        if newer.bias.any():
            into.adjustments.bias.extend(newer.bias.tolist())
        if newer.repeated.any():
            into.adjustments.repeated = _packed(newer.repeated)
        if newer.subtract.any():
            into.adjustments.subtract.extend(newer.subtract.tolist())
    if draw.adjusting.allowed is not None:
        into.allowed = _packed(draw.adjusting.allowed)


def read_draw(message: lane_pb2.Draw, share: VocabShare | None, held: Adjustments) -> Draw:
    """Parse what a share (None: a device without one) is asked; `held`: the session's adjustments up to now.

    Raises ProtocolViolation for figures out of range, and for ids or a mask that are not the share's.
    """
    temperature, penalty = message.temperature, message.repetition_penalty or 1.0
    if not math.isfinite(temperature) or temperature < 0.0:
        raise ProtocolViolation(f"a draw at temperature {temperature}")
    if not math.isfinite(penalty) or penalty <= 0.0:
        raise ProtocolViolation(f"a draw with repetition penalty {penalty}")
    share = share or VocabShare(0, 0, 1)
    adjustments = held.updated(_adjustments(message.adjustments, share))
    allowed = _bits(message.allowed, share.count, "mask") if message.allowed else None
    return Draw(
        message.candidates,
        temperature,
        message.seed,
        message.position,
        message.top_logprobs if message.HasField("top_logprobs") else -1,
        message.mass,
        Adjusting(penalty, adjustments, allowed) if len(adjustments) or allowed is not None else None,
        message.keep,
    )


def _adjustments(message: lane_pb2.Adjustments, share: VocabShare) -> Adjustments:
    gaps = np.array(message.gaps, np.int64)
    count, ids = gaps.size, share.first + np.cumsum(gaps)
    if count and (ids[-1] >= share.first + share.count or not gaps[1:].all()):
        raise ProtocolViolation(
            f"adjustments: ids are not rising within {share.first}..{share.first + share.count - 1}"
        )
    bias, subtract = np.array(message.bias, np.float32), np.array(message.subtract, np.float32)
    for figures in (bias, subtract):
        if figures.size not in (0, count) or not np.isfinite(figures).all():
            raise ProtocolViolation(f"adjustments: {figures.size} figures for {count} ids, or not all are finite")
    repeated = _bits(message.repeated, count, "adjustments") if message.repeated else np.zeros(count, np.bool_)
    nothing = np.zeros(count, np.float32)
    return Adjustments(
        ids.astype(np.uint32), bias if bias.size else nothing, repeated, subtract if subtract.size else nothing
    )


def _packed(flags: NDArray[np.bool_]) -> bytes:
    return np.packbits(flags, bitorder="little").tobytes()


def _bits(packed: bytes, count: int, what: str) -> NDArray[np.bool_]:
    expected = -(-count // 8)
    if len(packed) != expected:
        raise ProtocolViolation(f"{what}: {len(packed)} bytes of bits; {count} take {expected}")
    bits = np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little")
    if bits[count:].any():
        raise ProtocolViolation(f"{what}: bits beyond the {count} that there are")
    return bits[:count].view(np.bool_)
