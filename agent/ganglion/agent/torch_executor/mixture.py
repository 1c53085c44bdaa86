"""The experts of a mixture: rows that are repeated for each of their experts, each run through its one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ganglion.agent.torch_executor import weights as dequantized
from ganglion.agent.torch_executor.graph import Node
from ganglion.wire.errors import Unsupported

if TYPE_CHECKING:
    from ganglion.agent.torch_executor.program import Compiler


def emit_experts(c: Compiler, node: Node) -> None:
    """MoE, QMoE with one expert a row (k = 1) and SwiGLU of interleaved halves; raises Unsupported for others."""
    said = node.attributes
    if (said.get("k"), said.get("activation_type"), said.get("swiglu_fusion")) != (1, "swiglu", 1):
        raise Unsupported(f"{node.op}: the torch executor runs one expert a row with interleaved SwiGLU")
    names = [*node.inputs, *[""] * 8]
    if node.op == "QMoE":
        bits = said["expert_weight_bits"]
        inner, outer = (
            dequantized.experts(c.products.value(names[at]), c.products.value(names[at + 1]), bits) for at in (2, 5)
        )
        biases = (names[4], names[7])
    else:
        inner, outer = (torch.from_numpy(c.products.value(names[at]).copy()) for at in (2, 4))
        biases = (names[3], names[5])
    stacked = [one.to(c.dtype).to(c.device) for one in (inner, outer)]
    added = [c.weight(one) if one else None for one in biases]
    alpha, beta = said.get("activation_alpha", 1.0), said.get("activation_beta", 0.0)
    limit: float | None = said.get("swiglu_limit")

    def call(rows: Tensor, logits: Tensor, inner: Tensor, outer: Tensor, *biases: Tensor | None) -> Tensor:
        inner_bias, outer_bias = biases
        chosen = logits.argmax(-1)
        out = torch.empty((rows.shape[0], outer.shape[1]), dtype=rows.dtype, device=rows.device)
        for expert in torch.unique(chosen).tolist():  # the one place where a step waits for the device
            mine = chosen == expert
            both = F.linear(rows[mine], inner[expert], None if inner_bias is None else inner_bias[expert])
            gate, up = both[:, 0::2], both[:, 1::2]
            if limit is not None:
                gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            gated = gate * torch.sigmoid(alpha * gate) * (up + beta)
            out[mine] = F.linear(gated, outer[expert], None if outer_bias is None else outer_bias[expert])
        return out

    taken = [c.place(names[0]), c.place(names[1]), *(c.kept(one) for one in (*stacked, *added))]
    c.emit(call, taken, node.outputs)
