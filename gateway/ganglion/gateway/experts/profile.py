"""Pure: the kinds of requests as the gate sees them, for the coordinator's choice: figures, never text.

Each request leaves one vector, the quality that the gate expects of every expert. Near ones that have the same best
expert are put together: at most KINDS centroids of each best expert, each with how often it comes; older requests count
less. Put together with others, requests that an expert is the best for by little would leave no trace of it, and it
would never be chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from ganglion.proto import admin_pb2

KINDS: Final = 4
NEAR: Final = 0.05  # root mean square difference of two vectors of one kind
KEPT: Final = 0.999  # of the weight of what was seen, with each request
TRAINED: Final = 100.0  # requests that the kinds of a gate's training weigh as much as

Kind = tuple[float, Mapping[str, float]]
"""How large a share of requests it is, and the quality of each expert."""


class Profile:
    """Centroids over `experts`; it begins anew when these change, or the gate that speaks of them."""

    def __init__(self) -> None:
        self._experts: tuple[str, ...] = ()
        self._begun: Sequence[Kind] = ()
        self._centers: list[npt.NDArray[np.float64]] = []
        self._weights: list[float] = []

    def begin(self, experts: Sequence[str], kinds: Sequence[Kind] | None = None) -> bool:
        """Speak of `experts` from now on; whether that is something new.

        Where they are others than before, or `kinds` are given and are others, it begins with `kinds`.
        """
        if tuple(experts) == self._experts and (kinds is None or list(kinds) == list(self._begun)):
            return False
        self._experts, self._begun, self._centers, self._weights = tuple(experts), kinds or (), [], []
        if experts:
            self._centers = [self._vector(quality) for _, quality in self._begun]
            self._weights = [TRAINED * share for share, _ in self._begun]
        return True

    def add(self, quality: Mapping[str, float], experts: Sequence[str]) -> None:
        """One request: the quality that the gate expects of each of `experts`."""
        self.begin(experts)
        if not experts:
            return
        found = self._vector(quality)
        self._weights = [weight * KEPT for weight in self._weights]
        best = int(np.argmax(found))
        # A mean of vectors that are greatest at one place is so too: centroids keep their best expert.
        alike = [at for at, center in enumerate(self._centers) if int(np.argmax(center)) == best]
        distances = [float(np.sqrt(np.mean((self._centers[at] - found) ** 2))) for at in alike]
        if len(alike) < KINDS and (not distances or min(distances) > NEAR):
            self._centers.append(found)
            self._weights.append(1.0)
            return
        at = alike[int(np.argmin(distances))]
        self._weights[at] += 1.0
        self._centers[at] = self._centers[at] + (found - self._centers[at]) / self._weights[at]

    def kinds(self) -> list[Kind]:
        """The kinds that were found, the most frequent first."""
        whole = sum(self._weights)
        found = [
            (weight / whole, dict(zip(self._experts, map(float, center), strict=True)))
            for center, weight in zip(self._centers, self._weights, strict=True)
        ]
        return sorted(found, key=lambda kind: -kind[0])

    def _vector(self, quality: Mapping[str, float]) -> npt.NDArray[np.float64]:
        return np.array([quality.get(name, 0.0) for name in self._experts], np.float64)

    def message(self) -> admin_pb2.QualityProfile | None:
        """For the wire; None while there is nothing to say."""
        rows = [admin_pb2.QualityRow(share=share, quality=quality.values()) for share, quality in self.kinds()]
        if not rows:
            return None
        return admin_pb2.QualityProfile(experts=self._experts, rows=rows)
