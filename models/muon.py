"""Muon for matrices and stacks of matrices, in float32 where the processor has no bfloat16 products."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from llama import PRODUCTS
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonalized(update: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix of each [..., rows, columns], roughly: five Newton-Schulz iterations."""
    a, b, c = COEFFICIENTS
    x: Tensor = update.to(PRODUCTS)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalized (Jordan et al. 2024), with decoupled weight decay."""

    def __init__(self, parameters: Iterable[Tensor], lr: float, weight_decay: float, momentum: float) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; parameters of one shape go through the iterations together."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(momentum, group["momentum"])
                by_shape.setdefault(parameter.shape, []).append((parameter, update))
            for shape, pairs in by_shape.items():
                rate = group["lr"] * max(1.0, shape[-2] / shape[-1]) ** 0.5
                updates = orthogonalized(torch.stack([update for _, update in pairs])).float()
                for (parameter, _), update in zip(pairs, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)
