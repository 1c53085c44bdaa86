"""A compact Llama for training, named so that its state dict is the Hugging Face checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Shape:
    """The sizes of one model; the rest is shared by all."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    head_dim: int = 32
    vocab: int = 2048
    context: int = 1024
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    head_norms: bool = False
    """Whether queries and keys are normed per head, as Qwen3 does."""
    experts: int = 0
    """Experts a layer, each `intermediate` wide; 0 for a dense model."""
    experts_per_token: int = 0


EDGE_EXPERTS = ("demo-c", "demo-javascript", "demo-english")

SHAPES = {
    "demo": Shape(hidden=256, layers=6, heads=8, kv_heads=4, intermediate=1024),
    "demo-drafter": Shape(hidden=128, layers=3, heads=4, kv_heads=4, intermediate=256),
    **{name: Shape(hidden=128, layers=3, heads=4, kv_heads=4, intermediate=256) for name in EDGE_EXPERTS},
    "demo-mixture": Shape(
        hidden=128, layers=6, heads=4, kv_heads=4, intermediate=96, head_norms=True, experts=16, experts_per_token=2
    ),
}

# The processors that multiply bfloat16 in hardware; elsewhere it is ten times slower than float32.
PRODUCTS = torch.bfloat16 if torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported() else torch.float32


class Linear(nn.Module):
    """A float32 matrix without bias, multiplied in `PRODUCTS`."""

    def __init__(self, inputs: int, outputs: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) * std)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., inputs] -> [..., outputs], both `PRODUCTS`."""
        return F.linear(x, self.weight.to(PRODUCTS))


class RMSNorm(nn.Module):
    """Root-mean-square norm of the float32 residual stream, or of each head; `PRODUCTS` out."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., size] -> the same shape, `PRODUCTS`; the norm is float32."""
        x = x.float()
        return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight).to(PRODUCTS)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding in the half-split layout; x: [batch, heads, tokens, head_dim]."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        std = shape.hidden**-0.5
        self.q_proj = Linear(shape.hidden, shape.heads * shape.head_dim, std)
        self.k_proj = Linear(shape.hidden, shape.kv_heads * shape.head_dim, std)
        self.v_proj = Linear(shape.hidden, shape.kv_heads * shape.head_dim, std)
        self.o_proj = Linear(shape.heads * shape.head_dim, shape.hidden, std * (2 * shape.layers) ** -0.5)
        self.q_norm = RMSNorm(shape.head_dim, shape.norm_eps) if shape.head_norms else nn.Identity()
        self.k_norm = RMSNorm(shape.head_dim, shape.norm_eps) if shape.head_norms else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: [batch, tokens, hidden] `PRODUCTS` -> the same shape and type."""
        batch, tokens, _ = x.shape
        shape = self.shape
        q = self.q_norm(self.q_proj(x).view(batch, tokens, shape.heads, shape.head_dim))
        k = self.k_norm(self.k_proj(x).view(batch, tokens, shape.kv_heads, shape.head_dim))
        q, k = rotate(q.transpose(1, 2), cos, sin), rotate(k.transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(batch, tokens, shape.kv_heads, shape.head_dim).transpose(1, 2)
        groups = shape.heads // shape.kv_heads
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(batch, tokens, shape.heads * shape.head_dim))
        return out


class FeedForward(nn.Module):
    """The gated SiLU network."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        std = shape.hidden**-0.5
        self.gate_proj = Linear(shape.hidden, shape.intermediate, std)
        self.up_proj = Linear(shape.hidden, shape.intermediate, std)
        self.down_proj = Linear(shape.intermediate, shape.hidden, shape.intermediate**-0.5 * (2 * shape.layers) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, tokens, hidden] `PRODUCTS` -> the same shape and type."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """One transformer layer on the residual stream [batch, tokens, hidden] float32."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden, shape.norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden, shape.norm_eps)
        self.mlp = FeedForward(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: the residual stream, in and out."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Decoder(nn.Module):
    """Everything under the `model.` prefix of the checkpoint."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.hidden, shape.norm_eps)


class Llama(nn.Module):
    """A Llama-architecture causal language model with tied embeddings."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Decoder(shape)
        frequency = shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2).float() / shape.head_dim)
        angle = torch.outer(torch.arange(shape.context).float(), frequency)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: [batch, tokens] int64 -> logits [batch, tokens, vocab] `PRODUCTS`."""
        length = tokens.shape[1]
        cos, sin = self.cos[:length], self.sin[:length]
        x = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight.to(PRODUCTS))

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy in nats per token."""
        return F.cross_entropy(self(tokens).flatten(0, 1).float(), targets.flatten())

    def training_loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """What training minimizes."""
        return self.loss(tokens, targets)

    def start_from(self, other: Llama) -> None:
        """Take over a trained model's weights as a start."""
        self.load_state_dict(other.state_dict())

    def checkpoint(self) -> dict[str, Tensor]:
        """The weights by their Hugging Face names."""
        return dict(self.state_dict())

    def load_checkpoint(self, weights: dict[str, Tensor]) -> None:
        """Take over weights by their Hugging Face names."""
        self.load_state_dict(weights)
