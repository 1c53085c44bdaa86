"""A layer's router, asked before its time: what it would choose from the rows of the layer before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ganglion.wire.nouns import Segment, Slot
from ganglion.wire.shares import OpenPiece

ROUTER: Final = "router"  # names of slots
NORM: Final = "norm"

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Router:
    """weights [experts, hidden]; norm [hidden] of the rows before it; chosen: experts a row; held: those that lie here.

    Experts of `held` beyond the router's are shared: every row takes them.
    """

    weights: Floats
    norm: Floats | None
    chosen: int
    held: tuple[int, ...]

    def rates(self, rows: Floats, norm: Floats | None) -> Floats:
        """How often rows of another layer, [rows, hidden] scaled by its `norm`, would take each held expert.

        What attention will add in between is left out: layers change a residual little (arXiv 2308.14352, 2312.17238).
        """
        if norm is not None and self.norm is not None:
            scale = self.norm / np.where(norm == 0, 1, norm)
            rows = rows * scale.astype(np.float32)
        scores = rows @ self.weights.T
        experts = len(self.weights)
        best = np.argpartition(scores, -self.chosen, axis=1)[:, -self.chosen :] if self.chosen < experts else scores
        counts = np.bincount(best.ravel(), minlength=experts) if self.chosen < experts else np.full(experts, len(rows))
        found = [counts[one] / len(rows) if one < experts else 1.0 for one in self.held]
        return np.asarray(found, np.float32)


def router_of(segment: Segment, held: tuple[int, ...], open_piece: OpenPiece) -> Router | None:
    """The router of a segment of whole experts; None where it has none."""
    slots = {slot.name: slot for slot in segment.slots}
    if ROUTER not in slots:
        return None
    flat = _numbers(slots[ROUTER], open_piece)
    norm = _numbers(slots[NORM], open_piece) if NORM in slots else None
    if norm is None or not norm.size or flat.size % norm.size:
        return None
    weights = flat.reshape(-1, norm.size)
    shared = segment.groups - len(weights)
    return Router(weights, norm, segment.experts - shared, held)


def _numbers(slot: Slot, open_piece: OpenPiece) -> Floats:
    data = open_piece(slot.pieces[0].digest)
    if slot.stored == "bfloat16":  # the upper half of a float32
        return (np.frombuffer(data, "<u2").astype("<u4") << np.uint32(16)).view(np.float32)
    return np.frombuffer(data, "<f2" if slot.stored else "<f4").astype(np.float32)
