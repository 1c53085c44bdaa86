"""Which experts the lead's tokens were sent to: counts of sets for each layer, never an order, never a session. Pure.

Counts leave the device only over at least ROUTED_TOKENS tokens, of all sessions together, and are forgotten then.
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ganglion.proto import fleet_pb2
from ganglion.wire.limits import ROUTE_SETS, ROUTED_TOKENS

KEPT_SETS: Final = 1024  # of a layer while they are counted; of twice as many the rarer half is no longer told apart
REPORTED_TOKENS: Final = 8 * ROUTED_TOKENS  # between two reports, after the first
_NUMBER: Final = np.dtype("<u2")


class RouteRecorder:
    """Counts while the model runs. Its methods may be called by several threads.

    Memory is bounded: a layer keeps at most twice KEPT_SETS sets. When there are more, the rarest go, and their tokens
    count as others; so no count is ever too high.
    """

    def __init__(self, manifest_digest: str, layers: int) -> None:
        self._digest = manifest_digest
        self._counts: list[Counter[bytes]] = [Counter() for _ in range(layers)]
        self._others = [0] * layers
        self._tokens = [0] * layers
        self._wanted_tokens = ROUTED_TOKENS
        self._lock = threading.Lock()

    def record(self, layer: int, chosen: NDArray[np.int64]) -> None:
        """Count the sets of one layer's rows [rows, k], experts in any order."""
        rows, width = chosen.shape
        with self._lock:
            counts = self._counts[layer]
            data = np.sort(chosen, axis=1).astype(_NUMBER).tobytes()
            size = width * _NUMBER.itemsize
            for start in range(0, rows * size, size):
                counts[data[start : start + size]] += 1
            self._tokens[layer] += rows
            if len(counts) > 2 * KEPT_SETS:
                self._others[layer] += _trim(counts, KEPT_SETS)

    @property
    def due(self) -> bool:
        """Whether enough was counted for a report."""
        return max(self._tokens, default=0) >= self._wanted_tokens

    def take(self) -> fleet_pb2.RouteReport | None:
        """What was counted since the last report, which is forgotten; None before ROUTED_TOKENS tokens."""
        with self._lock:
            tokens = max(self._tokens, default=0)
            if tokens < ROUTED_TOKENS:
                return None
            report = fleet_pb2.RouteReport(manifest_digest=self._digest, tokens=tokens)
            for layer, counts in enumerate(self._counts):
                others = self._others[layer] + _trim(counts, ROUTE_SETS)
                told = report.layers.add(others=others)
                for key, count in sorted(counts.items(), key=lambda one: (-one[1], one[0])):
                    told.sets.add(experts=np.frombuffer(key, _NUMBER).tolist(), tokens=count)
                counts.clear()
                self._others[layer] = self._tokens[layer] = 0
            self._wanted_tokens = REPORTED_TOKENS
            return report


def _trim(counts: Counter[bytes], kept: int) -> int:
    """Leave the `kept` most frequent sets; returns the tokens of those that went."""
    ranked = sorted(counts.items(), key=lambda one: (-one[1], one[0]))
    for key, _ in ranked[kept:]:
        del counts[key]
    return sum(count for _, count in ranked[kept:])
