"""What caches of experts are measured against: the offline optimum, the least recently used, and no memory of routes.

A trace is int [tokens, layers, k]; an access is a layer's experts for one token. All count reads on demand.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ganglion.agent.paging.cache import ExpertCache
from ganglion.agent.paging.predict import Forecast

TRACE = Path(__file__).parent / "data" / "routes.npz"


def accesses(routes: NDArray[np.int64]) -> Iterator[tuple[int, list[int]]]:
    for token in routes:
        for layer, experts in enumerate(token):
            yield layer, sorted({int(one) for one in experts})


def belady(routes: NDArray[np.int64], slots: int) -> int:
    """Reads of the offline optimum (Belady, 1966): what is needed last goes first. Slots hold at least an access."""
    visits = list(accesses(routes))
    never = len(visits)
    following: list[dict[int, int]] = []
    seen: dict[tuple[int, int], int] = {}
    for at in range(never - 1, -1, -1):
        layer, experts = visits[at]
        following.append({one: seen.get((layer, one), never) for one in experts})
        seen.update({(layer, one): at for one in experts})
    following.reverse()
    held: dict[tuple[int, int], int] = {}
    reads = 0
    for (layer, experts), later in zip(visits, following, strict=True):
        needed = {(layer, one) for one in experts}
        for key in needed:
            if key not in held:
                reads += 1
                if len(held) >= slots:
                    del held[max((one for one in held if one not in needed), key=lambda one: held[one])]
            held[key] = later[key[1]]
    return reads


def least_recent(routes: NDArray[np.int64], slots: int) -> int:
    """Reads of a cache that pushes out what was used longest ago."""
    held: OrderedDict[tuple[int, int], None] = OrderedDict()
    reads = 0
    for layer, experts in accesses(routes):
        for one in experts:
            if (layer, one) in held:
                held.move_to_end((layer, one))
                continue
            reads += 1
            if len(held) >= slots:
                held.popitem(last=False)
            held[layer, one] = None
    return reads


def cached(routes: NDArray[np.int64], experts: int, slots: int, *, ahead: int = 0) -> tuple[int, int]:
    """Misses and reads of `ExpertCache` with `Forecast`; ahead: reads of what is foretold between two layers."""
    layers = routes.shape[1]
    cache, forecast = ExpertCache(layers, experts, slots), Forecast(layers, experts)
    misses = reads = 0
    for token in routes:
        for layer in range(layers):
            chosen = token[None, layer]
            forecast.visit(layer, chosen)
            cache.expect(forecast.expected())
            cache.arrive(layer, sorted({int(one) for one in chosen[0]}))
            misses += len(cache.awaited())
            while (read := cache.next_read(ahead=False)) is not None:
                cache.finished(read.key)
                reads += 1
            cache.ran(cache.ready())
            for _ in range(ahead):
                if (read := cache.next_read()) is None:
                    break
                cache.finished(read.key)
                reads += 1
    return misses, reads


def made_up(tokens: int, layers: int, experts: int, *, domains: int = 4, seed: int = 0) -> NDArray[np.int64]:
    """A trace with what trained routers have: few experts of a domain are hot, and experts follow experts."""
    rng = np.random.default_rng(seed)
    liking = rng.standard_normal((domains, layers, experts)) * 1.5
    after = rng.standard_normal((layers, experts, experts)) * 1.5
    routes = np.zeros((tokens, layers, 2), np.int64)
    for token in range(tokens):
        domain = token * domains // tokens
        for layer in range(layers):
            score = liking[domain, layer] + rng.gumbel(size=experts)
            if layer:
                score = score + after[layer, routes[token, layer - 1]].sum(axis=0)
            routes[token, layer] = np.argsort(-score)[:2]
    return routes
