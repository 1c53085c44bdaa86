"""How a mixture routes: the traces of a text, and how much structure they have."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import Qwen3MoeForCausalLM

Routes = npt.NDArray[np.uint8]
"""[tokens, layers, k]: the experts of each token, heaviest first."""

GROUPS = 4
HOT_SHARE = 0.4


@torch.no_grad()
def routes_of(model: Qwen3MoeForCausalLM, row: Tensor) -> Routes:
    """The routes of a row of token ids; row: [tokens] int64."""
    logits: tuple[Tensor, ...] = model(row[None], output_router_logits=True).router_logits
    chosen = [layer.topk(model.config.num_experts_per_tok, dim=-1).indices for layer in logits]
    return torch.stack(chosen, dim=1).to(torch.uint8).numpy()


def usage(routes: Routes, experts: int) -> npt.NDArray[np.float64]:
    """The share of a layer's routes that each expert takes: [layers, experts], each layer sums to one."""
    layers = routes.shape[1]
    counts = [np.bincount(routes[:, layer].ravel(), minlength=experts) for layer in range(layers)]
    share: npt.NDArray[np.float64] = np.stack(counts) / (routes.shape[0] * routes.shape[2])
    return share


def usage_entropy_bits(routes: Routes, experts: int) -> float:
    """Entropy of a layer's expert usage in bits, mean over the layers; `log2(experts)` when all are used alike."""
    share = usage(routes, experts)
    logs = np.log2(share, out=np.zeros_like(share), where=share > 0)
    return float(-(share * logs).sum(-1).mean())


def hot_share(routes: Routes, experts: int, share: float = HOT_SHARE) -> float:
    """The part of all routes that the most used `share` of the experts, over all layers, take."""
    ranked = np.sort(usage(routes, experts).ravel())[::-1]
    return float(ranked[: int(share * len(ranked))].sum() / ranked.sum())


def greedy_groups(routes: Routes, experts: int, groups: int = GROUPS) -> npt.NDArray[np.int64]:
    """Each layer's experts in `groups` of one size by co-activation: [layers, experts], the group's number.

    A group begins with the busiest expert left and takes, one by one, the one most often chosen together with it.
    """
    layers, size = routes.shape[1], experts // groups
    group_of = np.zeros((layers, experts), dtype=np.int64)
    for layer in range(layers):
        chosen = np.zeros((len(routes), experts), dtype=np.float32)
        np.put_along_axis(chosen, routes[:, layer].astype(np.int64), 1.0, axis=1)
        together = chosen.T @ chosen
        left = set(range(experts))
        for group in range(groups):
            members = [max(left, key=lambda expert: together[expert, expert])]
            left.discard(members[0])
            while len(members) < size:
                closest = max(left, key=lambda expert: float(together[expert, members].sum()))
                members.append(closest)
                left.discard(closest)
            group_of[layer, members] = group
    return group_of


def same_group_share(routes: Routes, group_of: npt.NDArray[np.int64]) -> float:
    """How often all experts of a token in a layer lie in one group; group_of: [layers, experts]."""
    layers = np.arange(routes.shape[1])[None, :, None]
    groups = group_of[layers, routes]
    return float((groups == groups[..., :1]).all(-1).mean())


def structure(routes: Routes, domains: npt.NDArray[np.uint8], names: tuple[str, ...], experts: int) -> dict[str, Any]:
    """The figures of a trace; domains: [tokens], an index into `names`."""
    of_domain = {name: routes[domains == index] for index, name in enumerate(names)}
    in_turn = np.tile(np.arange(experts) % GROUPS, (routes.shape[1], 1))
    return {
        "usage_entropy_bits": {
            "all": round(usage_entropy_bits(routes, experts), 3),
            **{name: round(usage_entropy_bits(part, experts), 3) for name, part in of_domain.items()},
        },
        f"share_of_hottest_{HOT_SHARE:.0%}": {
            "all": round(hot_share(routes, experts), 3),
            **{name: round(hot_share(part, experts), 3) for name, part in of_domain.items()},
        },
        f"same_of_{GROUPS}_groups": {
            "greedy": round(same_group_share(routes, greedy_groups(routes, experts)), 3),
            "in_turn": round(same_group_share(routes, in_turn), 3),
        },
    }
