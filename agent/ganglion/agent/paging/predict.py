"""Which experts the next rows will need: what each predictor says, blended by how often it was right.

Predictors of a layer's experts, each with rates a row in [0, 1]:
  recent     how often the last few steps took each expert: what a session is at
  frequent   how often a few hundred rows did
  path       what followed the experts of two layers (the path table of EdgeMoE, arXiv 2308.14352), in each of the next
             `AHEAD` layers, into the next token's; where these two were seldom seen together, of the later one
  router     the next layer's router on this layer's rows, given by the caller (`hint`)
A predictor's weight at a layer is a power of its measured precision there: of the experts that it ranks highest, the
share that rows took. Routers before attention (SmallThinker, arXiv 2507.20984) need a model that has them; no supported
family does.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

RECENT_STEPS: Final = 12.0  # after which what was seen counts 1/e
FREQUENT_ROWS: Final = 400.0
PATH_ROWS: Final = 8  # of a step, that the path table learns from and foretells for
PATH_CHOSEN: Final = 2  # experts of a row and layer that make paths, at most: those it weighs most
AHEAD: Final = 6  # layers that a path foretells: reading an expert takes as long as computing some layers
PATH_BYTES: Final = 64 << 20  # of the table, at most; beyond, paths share places in it
PATH_PRIOR: Final = 3.0  # visits that what is known without the path counts as
PATH_VISITS: Final = 400.0  # after which a path's counts are halved
SHARPNESS: Final = 4.0  # power of precision that weighs predictors
MEMORY: Final = 1 / 32  # of a layer's measured precision: the weight of a visit
UNKNOWN: Final = 0.5  # precision before anything was said
LEAST: Final = 1e-4  # rate of an expert that was never seen

NAMES: Final = ("recent", "frequent", "path", "router")
_RECENT, _FREQUENT, _PATH, _ROUTER = range(len(NAMES))


class Forecast:
    """Rates and paths of `layers` layers with experts, numbered from 0, of `experts` each. One thread uses it."""

    def __init__(self, layers: int, experts: int) -> None:
        self.layers = layers
        self.experts = experts
        start = np.float32(min(1.0, 2.0 / experts))
        # what each predictor says of each layer: rates a row; `_speaks`: whether it says anything
        self._said = np.full((layers, len(NAMES), experts), start, np.float32)
        self._speaks = np.zeros((layers, len(NAMES)), bool)
        self._speaks[:, :_PATH] = True
        self._frequent, self._recent = self._said[:, _FREQUENT], self._said[:, _RECENT]  # views
        self._ahead = min(AHEAD, layers)
        self._sets = experts**PATH_CHOSEN
        fit = PATH_BYTES // (4 * self._ahead * layers * (experts + 1))
        self._places = max(1, min(self._sets + self._sets**2, fit - 1 + fit % 2))  # odd, if they are shared
        # by how far ahead, and layer: counts of each expert after a path of one or two layers; last column: visits
        self._paths = np.zeros((self._ahead, layers, self._places, experts + 1), np.float32)
        self._took: NDArray[np.int64] | None = None  # what rows took in the layer visited last, as a number [rows]
        # places in the table that the paths of the last layers lead to, the newest first: [rows, 2] each
        self._led: list[NDArray[np.int64]] = []
        # what they say of the next layers: rates a row [ahead, experts]
        self._far: Floats | None = None
        self._right = np.full((layers, len(NAMES)), UNKNOWN)
        self._layer, self._rows = 0, 1
        self._blend = self._recent.copy()
        self._digits = experts ** np.arange(PATH_CHOSEN - 1, -1, -1)
        numbers = np.arange(layers, dtype=np.float32)
        self._away = ((numbers[None, :] - numbers[:, None] - 1) % layers + 1)[:, :, None]  # [from, to, 1]

    @property
    def precision(self) -> NDArray[np.float64]:
        """Of what each predictor of `NAMES` ranked highest, the share that rows took, over the last steps."""
        spoke = self._right != UNKNOWN
        found: NDArray[np.float64] = np.where(spoke, self._right, 0.0).sum(axis=0) / np.maximum(spoke.sum(axis=0), 1)
        return found

    def visit(self, layer: int, chosen: NDArray[np.int64], *, paths: bool = True) -> None:
        """Rows of a step took these experts of `layer`: chosen [rows, k], the weightiest of each row first.

        paths: whether these are learned and foretold, which is most of the work.
        """
        rows = len(chosen)
        rate = np.bincount(chosen.ravel(), minlength=self.experts).astype(np.float32)
        if rows > 1:
            rate /= rows
        self._judge(layer, rate, chosen.shape[1])
        self._speaks[layer, _PATH:] = False  # what they said was of this visit
        few = chosen[: PATH_ROWS if paths else 0]
        if layer != (self._layer + 1) % self.layers or self._took is None or len(self._took) != len(few):
            self._took, self._led = None, []
        self._learn_paths(layer, few)
        self._recent[layer] += (rate - self._recent[layer]) * (1 / RECENT_STEPS)
        self._frequent[layer] += (rate - self._frequent[layer]) * (1 - math.exp(-rows / FREQUENT_ROWS))
        recent, frequent = self._right[layer, :_PATH] ** SHARPNESS
        share = recent / (recent + frequent)
        self._blend[layer] = share * self._recent[layer] + (1 - share) * self._frequent[layer]
        self._layer, self._rows, self._far = layer, rows, None
        if not paths:
            self._took = None
            return
        took = np.sort(few[:, :PATH_CHOSEN], axis=1) @ self._digits[-min(PATH_CHOSEN, few.shape[1]) :]
        if self._took is not None:
            led = np.stack((took, self._sets + self._took * self._sets + took), axis=1) % self._places
            self._led = [led, *self._led[: self._ahead - 1]]
            self._foretell(layer, led)
        self._took = took

    def hint(self, layer: int, rates: Floats) -> None:
        """What the router of `layer` would choose from rows it has not seen yet: rates a row of its experts."""
        self._said[layer, _ROUTER] = 0.0
        self._said[layer, _ROUTER, : len(rates)] = rates
        self._speaks[layer, _ROUTER] = True

    def expected(self) -> Floats:
        """Layers until each expert's next use, from the layer visited last: [layers, experts]."""
        used = np.maximum(self._blend, LEAST)
        if self._rows > 1:
            used = 1 - (1 - used) ** self._rows
        cycles = self.layers / used
        expected: Floats = cycles + (self._away[self._layer] - self.layers)
        following = (self._layer + 1 + np.arange(self._ahead)) % self.layers
        far = self._blend[following[:1]] if self._far is None else self._far
        following = following[: len(far)]
        weights = self._right[following[0]] ** SHARPNESS * self._speaks[following[0]]
        soon = np.clip(far, LEAST, 1.0)
        soon[0] = np.clip(weights @ self._said[following[0]] / weights.sum(), LEAST, 1.0)
        if self._rows > 1:
            soon = 1 - (1 - soon) ** self._rows
        steps = np.arange(1, len(far) + 1, dtype=np.float32)
        expected[following] = steps[:, None] + (1 - soon) * cycles[following]
        return expected

    def _judge(self, layer: int, rate: Floats, count: int) -> None:
        """Compare what was said of this layer with what rows took."""
        best = np.argpartition(self._said[layer], -count, axis=1)[:, -count:]
        right = rate[best].sum(axis=1) / count
        self._right[layer] += (right - self._right[layer]) * MEMORY * self._speaks[layer]

    def _learn_paths(self, layer: int, chosen: NDArray[np.int64]) -> None:
        """Count what these rows took for the paths that led here from some layers before."""
        if not self._led:
            return
        steps = np.arange(len(self._led))[:, None]
        for row, one in enumerate(chosen):
            places = np.array([led[row] for led in self._led])  # [steps, 2]
            took = np.array([*one, -1])
            self._paths[steps[:, :, None], layer, places[:, :, None], took] += 1
            often = self._paths[steps[:, 0], layer, places[:, 0], -1] > PATH_VISITS
            if often.any():
                self._paths[steps[often, 0], layer, places[often, 0]] *= 0.5

    def _foretell(self, layer: int, led: NDArray[np.int64]) -> None:
        """What the next layers will take, the mean over rows."""
        steps = np.arange(self._ahead)
        following = (layer + 1 + steps) % self.layers
        counts = self._paths[steps[:, None, None], following[:, None, None], led[None]]  # [ahead, rows, 2, experts + 1]
        rates = self._blend[following][:, None]
        for length in range(2):
            seen = counts[:, :, length]
            rates = (seen[..., :-1] + PATH_PRIOR * rates) / (seen[..., -1:] + PATH_PRIOR)
        far = self._far = rates.mean(axis=1)
        self._said[following[0], _PATH] = far[0]
        self._speaks[following[0], _PATH] = True
