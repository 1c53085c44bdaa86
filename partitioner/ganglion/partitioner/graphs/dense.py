"""Graphs of gated MLPs and of the output matrix."""

from __future__ import annotations

from ganglion.partitioner.families.plans import Activation, GatedMlp, Head
from ganglion.partitioner.graphs.builder import MICROSOFT, Builder


def build_mlp(builder: Builder, core: GatedMlp) -> None:
    """down(activation(gate x) * up x)."""
    gate, up = builder.joined_apart(builder.entry())
    builder.summed(builder.node("Mul", [activate(builder, gate, core.activation), up])[0])


def activate(builder: Builder, rows: str, activation: Activation) -> str:
    """The activation of `rows`."""
    if activation == "silu":  # x * sigmoid(x) in one pass
        return builder.node("QuickGelu", [rows], domain=MICROSOFT, alpha=1.0)[0]
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return builder.node("Gelu", [rows], approximate=approximate)[0]


def build_head(builder: Builder, core: Head) -> None:
    """Final norm and the share's rows of the output matrix."""
    width = builder.count * builder.plan.joined[0].width
    logits = builder.joined(builder.entry(residual=False))
    if core.scale != 1.0:
        logits = builder.node("Mul", [logits, builder.constant(core.scale)])[0]
    if core.softcap:
        capped = builder.node("Tanh", [builder.node("Div", [logits, builder.constant(core.softcap)])[0]])[0]
        logits = builder.node("Mul", [capped, builder.constant(core.softcap)])[0]
    builder.rename(logits, "logits")
    builder.output("logits", ["S", width])
