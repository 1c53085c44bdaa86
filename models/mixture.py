"""A compact Qwen3 mixture of experts for training: the Llama of this folder with experts for its feed-forward part."""

from __future__ import annotations

import math
from typing import cast

import torch
from llama import PRODUCTS, Layer, Linear, Llama, Shape
from torch import Tensor, nn
from torch.nn import functional as F

BALANCE = 0.01
"""Weight of the load-balancing loss, over the whole batch (Qwen's global-batch loss, arXiv 2501.11873)."""
CONCENTRATION = 0.02
"""Weight of the entropy of a row's experts above `log(experts / ROW_SHARE)`."""
ROW_SHARE = 4.0
ROUTER_Z = 1e-4
"""Weight of the router's z-loss (ST-MoE, arXiv 2202.08906)."""

BETWEEN = 0.2
"""What a layer between two that were taken over adds at the start, as a share of its usual size."""

LEANING = 3.0
"""How much higher an expert's logit is, at the start, for the mean token of its kind of text than for all tokens'."""


class Experts(nn.Module):
    """Top-k of gated SiLU experts; the chosen experts' softmax weights sum to one."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        std = shape.hidden**-0.5
        down_std = shape.intermediate**-0.5 * (2 * shape.layers) ** -0.5
        self.gate = Linear(shape.hidden, shape.experts, std)
        self.gate_up = nn.Parameter(torch.randn(shape.experts, 2, shape.intermediate, shape.hidden) * std)
        self.down = nn.Parameter(torch.randn(shape.experts, shape.hidden, shape.intermediate) * down_std)
        self.router_logits = torch.empty(0)
        """[batch, tokens, experts] float32 of the last call, for the losses and the traces."""
        self.routes = torch.empty(0)
        """[batch, tokens, k] int64 of the last call, heaviest first."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, tokens, hidden] -> the same shape and type; a row is multiplied by its own experts alone."""
        shape = self.shape
        flat = x.flatten(0, 1)
        logits = self.gate(flat).float()
        weights, routes = logits.softmax(-1).topk(shape.experts_per_token)
        self.router_logits, self.routes = logits.unflatten(0, x.shape[:2]), routes.unflatten(0, x.shape[:2])
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        # Rows sorted by expert: one product an expert, then back into the order of the tokens.
        order = routes.flatten().argsort(stable=True)
        counts = cast("list[int]", routes.flatten().bincount(minlength=shape.experts).tolist())
        rows = torch.split(flat.index_select(0, order // shape.experts_per_token), counts)
        gate_up, down = self.gate_up.to(PRODUCTS).flatten(1, 2).unbind(), self.down.to(PRODUCTS).unbind()
        outputs = []
        for expert, part in enumerate(rows):
            gate, up = F.linear(part, gate_up[expert]).chunk(2, dim=-1)
            outputs.append(F.linear(F.silu(gate) * up, down[expert]))
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        each = torch.cat(outputs).index_select(0, back).view(len(flat), shape.experts_per_token, shape.hidden)
        mixed: Tensor = (each * weights[..., None]).sum(1).view_as(x)
        return mixed


class Mixture(Llama):
    """A Qwen3-MoE causal language model with tied embeddings; every layer is a mixture."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        for layer in self.model.layers:
            layer.mlp = Experts(shape)

    def experts(self) -> list[Experts]:
        """The mixtures by layer."""
        return [cast(Experts, layer.mlp) for layer in self.model.layers]

    def training_loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy, balance over the batch, concentration within a row, and the router's z-loss."""
        loss = self.loss(tokens, targets)
        return loss + torch.stack([routing_loss(layer.router_logits, layer.routes) for layer in self.experts()]).mean()

    @torch.no_grad()
    def start_from(self, other: Llama) -> None:
        """Take over a mixture of this shape, or grow from a dense model of this hidden size and these heads.

        Its layers are spread over ours, and what lies between them begins with little effect. Each expert takes its
        own draw of the dense layer's columns, scaled to give the same mean (arXiv 2502.19261 mixes old and new so).
        """
        if other.shape == self.shape:
            super().start_from(other)
            return
        every = self.shape.layers // other.shape.layers
        self.model.embed_tokens.load_state_dict(other.model.embed_tokens.state_dict())
        self.model.norm.load_state_dict(other.model.norm.state_dict())
        for number, layer in enumerate(self.model.layers):
            ours, experts = cast(Layer, layer), cast(Experts, layer.mlp)
            if number % every:
                ours.self_attn.o_proj.weight.mul_(BETWEEN)
                experts.down.mul_(BETWEEN)
                continue
            dense = cast(Layer, other.model.layers[number // every])
            for part in ("input_layernorm", "post_attention_layernorm", "self_attn"):
                getattr(ours, part).load_state_dict(getattr(dense, part).state_dict(), strict=False)
            for norm, projection in (("q_norm", "q_proj"), ("k_norm", "k_proj")):
                # The root mean square that the projection gives an input of independent unit parts.
                weight = getattr(dense.self_attn, projection).weight * dense.input_layernorm.weight
                getattr(ours.self_attn, norm).weight.fill_(float(weight.square().sum(1).mean().sqrt()))
            scale = other.shape.intermediate / self.shape.intermediate
            for expert in range(self.shape.experts):
                columns = torch.randperm(other.shape.intermediate)[: self.shape.intermediate]
                experts.gate_up[expert, 0] = dense.mlp.gate_proj.weight[columns]
                experts.gate_up[expert, 1] = dense.mlp.up_proj.weight[columns]
                experts.down[expert] = dense.mlp.down_proj.weight[:, columns] * scale

    @torch.no_grad()
    def lean_routers(self, rows: Tensor) -> None:
        """Lean the routers so that every kind of text begins with experts of its own; rows: [kinds, rows, tokens].

        In each layer the experts are dealt to the kinds at random; an expert's router gains the linear discriminant of
        its kind (the direction that parts its tokens from the others' best), without a share of the overall mean.
        """
        kinds = len(rows)

        def lean(experts: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            tokens = inputs[0].float().view(kinds, -1, self.shape.hidden)
            means = tokens.mean(1)
            mean, parted = means.mean(0), means - means.mean(0)
            within = (tokens - means[:, None]).flatten(0, 1)
            covariance = within.mT @ within / len(within)
            covariance += 0.01 * covariance.diagonal().mean() * torch.eye(self.shape.hidden, device=rows.device)
            solved = torch.linalg.solve(covariance, torch.cat((parted, mean[None])).mT).mT
            toward_mean = solved[-1]
            directions = solved[:-1] - torch.outer(solved[:-1] @ mean / (toward_mean @ mean), toward_mean)
            directions /= (directions * parted).sum(-1, keepdim=True)
            kind_of = torch.randperm(self.shape.experts) % kinds
            cast(Experts, experts).gate.weight.add_(LEANING * directions[kind_of])

        hooks = [experts.register_forward_pre_hook(lean) for experts in self.experts()]
        self(rows.flatten(0, 1))
        for hook in hooks:
            hook.remove()

    def checkpoint(self) -> dict[str, Tensor]:
        """The weights by their Hugging Face names, a tensor for each expert."""
        weights: dict[str, Tensor] = {}
        for name, weight in self.state_dict().items():
            prefix, _, last = name.rpartition(".")
            for expert in range(self.shape.experts):
                if last == "gate_up":
                    weights[f"{prefix}.experts.{expert}.gate_proj.weight"] = weight[expert, 0]
                    weights[f"{prefix}.experts.{expert}.up_proj.weight"] = weight[expert, 1]
                elif last == "down":
                    weights[f"{prefix}.experts.{expert}.down_proj.weight"] = weight[expert]
            if last not in {"gate_up", "down"}:
                weights[name] = weight
        return weights

    def load_checkpoint(self, weights: dict[str, Tensor]) -> None:
        """Take over weights by their Hugging Face names."""
        # What `checkpoint` gives are views of the parameters.
        with torch.no_grad():
            for name, weight in self.checkpoint().items():
                weight.copy_(weights[name])


def routing_loss(logits: Tensor, routes: Tensor) -> Tensor:
    """One layer's router losses; logits: [batch, tokens, experts], routes: [batch, tokens, k].

    The load is balanced over the whole batch alone: within a row, hence within a domain, experts may specialize. A row
    is drawn to about `1 / ROW_SHARE` of the experts, so that rows of a kind share theirs: the entropy of its mean
    distribution costs nothing below `log(experts / ROW_SHARE)`.
    """
    experts = logits.shape[-1]
    share = logits.softmax(-1).mean(1)
    load = F.one_hot(routes, experts).float().mean((0, 1, 2))
    balance = experts * (load * share.mean(0)).sum()
    entropy = -(share * share.clamp_min(1e-9).log()).sum(-1)
    concentration = F.relu(entropy - math.log(experts / ROW_SHARE)).mean()
    z = logits.logsumexp(-1).square().mean()
    return BALANCE * balance + CONCENTRATION * concentration + ROUTER_Z * z
