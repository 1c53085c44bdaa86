"""A GGUF file's tensors as a Hugging Face checkpoint has them: renamed, and what llama.cpp's converter did undone.

It moves the rows of queries and keys (`RopeRows`), adds one to Gemma's norms, stacks experts, and splits the latent
attention's matrix in two.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from ganglion.partitioner.config import Config
from ganglion.partitioner.gguf.blocks import BlockTensor
from ganglion.partitioner.views import Computed, Interleaved, RopeRows, Shifted, Transposed
from ganglion.partitioner.weights import Floats, Weights
from ganglion.wire.errors import InvalidDocument, Unsupported

TOP: Final = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
AFTER_NORMS: Final = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
BEFORE_AND_AFTER_NORMS: Final = AFTER_NORMS | {"ffn_norm": "pre_feedforward_layernorm"}
EXPERTS: Final = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{expert}.gate_proj",
    "ffn_up_exps": "mlp.experts.{expert}.up_proj",
    "ffn_down_exps": "mlp.experts.{expert}.down_proj",
}
OWN: Final[dict[str, dict[str, str]]] = {
    "LlamaForCausalLM": {},
    "MixtralForCausalLM": {
        "ffn_gate_inp": "block_sparse_moe.gate",
        "ffn_gate_exps": "block_sparse_moe.experts.{expert}.w1",
        "ffn_up_exps": "block_sparse_moe.experts.{expert}.w3",
        "ffn_down_exps": "block_sparse_moe.experts.{expert}.w2",
    },
    "Qwen2ForCausalLM": {},
    "Qwen3ForCausalLM": {},
    "Qwen3MoeForCausalLM": EXPERTS,
    "Gemma2ForCausalLM": BEFORE_AND_AFTER_NORMS,
    "Gemma3ForCausalLM": BEFORE_AND_AFTER_NORMS,
    "Phi3ForCausalLM": {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
    "Olmo2ForCausalLM": AFTER_NORMS,
    "Olmo3ForCausalLM": AFTER_NORMS,
    "OlmoeForCausalLM": EXPERTS,
    "GraniteForCausalLM": {},
    "SmolLM3ForCausalLM": {},
    "CohereForCausalLM": {},
    "Cohere2ForCausalLM": {},
    "GptOssForCausalLM": {
        "post_attention_norm": "post_attention_layernorm",
        "attn_sinks": "self_attn.sinks",
        "ffn_gate_inp": "mlp.router",
        "ffn_gate_exps": "mlp.experts.gate",
        "ffn_up_exps": "mlp.experts.up",
        "ffn_down_exps": "mlp.experts.down",
    },
    "DeepseekV2ForCausalLM": EXPERTS
    | {
        "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
        "ffn_up_shexp": "mlp.shared_experts.up_proj",
        "ffn_down_shexp": "mlp.shared_experts.down_proj",
        "attn_q_a": "self_attn.q_a_proj",
        "attn_q_a_norm": "self_attn.q_a_layernorm",
        "attn_q_b": "self_attn.q_b_proj",
        "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
        "attn_kv_a_norm": "self_attn.kv_a_layernorm",
        "attn_kv_b": "self_attn.kv_b_proj",
        "attn_k_b": "self_attn.k_b",
        "attn_v_b": "self_attn.v_b",
    },
}
PAIRED: Final = ("LlamaForCausalLM", "MixtralForCausalLM", "GraniteForCausalLM", "SmolLM3ForCausalLM")
ADDED_ONE: Final = ("Gemma2ForCausalLM", "Gemma3ForCausalLM")
# What configs.py reads, and tables that are computed anew.
NOT_WEIGHTS: Final = re.compile(r"rope_freqs\.weight|rope_factors_(long|short)\.weight|blk\.\d+\.attn_rot_embd\.weight")
LAYER_NAME: Final = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.([a-z_]+)\.(weight|bias)")


def rename(path: Path, tensors: dict[str, BlockTensor], config: Config) -> dict[str, Weights]:
    """The tensors of the file `path` by Hugging Face's names; raises Unsupported naming one that it does not know."""
    architecture, found = config.names("architectures")[0], dict[str, Weights]()
    for name, tensor in tensors.items():
        if NOT_WEIGHTS.fullmatch(name):
            continue
        ours = _name(name, architecture, config.whole("num_hidden_layers"))
        if ours is None:
            raise Unsupported(f"{path}: tensor {name[:80]} belongs to no part of a {architecture} that is read here")
        for expert, part in enumerate(_experts(path, tensor, config) if "{expert}" in ours else (tensor,)):
            full = ours.format(expert=expert)
            if full in found:
                raise InvalidDocument(f"{path}: tensor {name} and another one are both {full}")
            found[full] = replace(part, name=full)
    return _undone(path, found, architecture, config)


def _name(name: str, architecture: str, layers: int) -> str | None:
    base, _, kind = name.rpartition(".")
    if base in TOP and kind in {"weight", "bias"}:
        return f"{TOP[base]}.{kind}"
    at = LAYER_NAME.fullmatch(name)
    part = (LAYER | OWN[architecture]).get(at[2]) if at else None
    if at is None or part is None or int(at[1]) >= layers:
        return None
    full = f"model.layers.{at[1]}.{part}"
    return full if at[2] == "attn_sinks" else f"{full}.{at[3]}"


def _experts(path: Path, tensor: BlockTensor, config: Config) -> Iterator[BlockTensor]:
    names = ("n_routed_experts", "num_local_experts", "num_experts")
    count = config.whole(next(name for name in names if config.has(name)), at_most=4096)
    if len(tensor.shape) != 3 or tensor.shape[0] != count:
        raise InvalidDocument(
            f"{path}: tensor {tensor.name} has shape {list(tensor.shape)}, a stack of {count} experts is expected"
        )
    return (tensor.part(expert) for expert in range(count))


def _undone(path: Path, found: dict[str, Weights], architecture: str, config: Config) -> dict[str, Weights]:
    """Undo what the converter does to values and layouts."""
    if architecture in PAIRED:
        for name, tensor in found.items():
            heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
            if heads is not None:
                count = config.whole(heads)
                if tensor.shape[0] % (2 * count):
                    raise InvalidDocument(f"{path}: tensor {name} has {tensor.shape[0]} rows for {count} heads")
                found[name] = RopeRows(tensor, count)
    if architecture in ADDED_ONE:
        found = {n: Shifted(t, -1.0) if n.endswith("norm.weight") else t for n, t in found.items()}
    if architecture == "GptOssForCausalLM":
        return _gpt_oss(path, found)
    if architecture == "DeepseekV2ForCausalLM":
        return _latent(path, found)
    return found


def _gpt_oss(path: Path, found: dict[str, Weights]) -> dict[str, Weights]:
    """Experts as [experts, inputs, outputs], the gate's and the up projection's outputs in turn."""
    for name in [name for name in found if name.endswith("experts.gate.weight")]:
        at = name.removesuffix("gate.weight")
        parts = {p: found.pop(f"{at}{p}", None) for p in ("gate.weight", "up.weight", "down.weight")}
        biases = {p: found.pop(f"{at}{p}", None) for p in ("gate.bias", "up.bias", "down.bias")}
        gate, up, down = (_present(path, f"{at}{p}", tensor, 3) for p, tensor in parts.items())
        gate_bias, up_bias, down_bias = (_present(path, f"{at}{p}", tensor, 2) for p, tensor in biases.items())
        if gate.shape != up.shape or gate_bias.shape != up_bias.shape:
            raise InvalidDocument(f"{path}: {at}gate and up differ in shape ({list(gate.shape)}, {list(up.shape)})")
        found[f"{at}gate_up_proj"] = Transposed(Interleaved(f"{at}gate_up_proj", gate, up, 1))
        found[f"{at}gate_up_proj_bias"] = Interleaved(f"{at}gate_up_proj_bias", gate_bias, up_bias, 1)
        found[f"{at}down_proj"] = Transposed(down)
        found[f"{at}down_proj_bias"] = down_bias
    return found


def _latent(path: Path, found: dict[str, Weights]) -> dict[str, Weights]:
    for name in [name for name in found if name.endswith(".k_b.weight")]:
        at = name.removesuffix("k_b.weight")
        keys = _present(path, name, found.pop(name), 3)
        values = _present(path, f"{at}v_b.weight", found.pop(f"{at}v_b.weight", None), 3)
        if keys.shape[0] != values.shape[0] or keys.shape[1] != values.shape[2]:
            raise InvalidDocument(f"{path}: {at}k_b and v_b do not fit ({list(keys.shape)}, {list(values.shape)})")
        found[f"{at}kv_b_proj.weight"] = KeysAndValues(f"{at}kv_b_proj.weight", keys, values)
    return found


def _present(path: Path, name: str, tensor: Weights | None, dimensions: int) -> Weights:
    if tensor is None or len(tensor.shape) != dimensions:
        shape = "missing" if tensor is None else f"of shape {list(tensor.shape)}"
        raise InvalidDocument(f"{path}: tensor {name} is {shape}, {dimensions} dimensions are expected")
    return tensor


@dataclass(frozen=True)
class KeysAndValues(Computed):
    """A latent attention's up projection [heads * (key + value), rank]: of each head its keys, then its values.

    keys: [heads, rank, key], turned for the product that llama.cpp absorbs into the queries. values: [heads, value,
    rank].
    """

    name: str
    keys: Weights
    values: Weights

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Rows of all heads, the rank."""
        heads, rank, key = self.keys.shape
        return heads * (key + self.values.shape[1]), rank

    @property
    def stored_bytes(self) -> int:
        """Bytes that reading all of it reads."""
        return self.keys.stored_bytes + self.values.stored_bytes

    def rows(self, start: int, stop: int) -> Floats:
        """Rows start..stop as float32."""
        width = self.shape[0] // self.keys.shape[0]
        first, last = start // width, -(-stop // width)
        heads = [self.keys.rows(first, last).swapaxes(1, 2), self.values.rows(first, last)]
        return np.concatenate(heads, axis=1).reshape(-1, self.shape[1])[start - first * width : stop - first * width]

    def columns(self, start: int, stop: int) -> Floats:
        """Columns start..stop as float32 [rows, stop - start]."""
        heads: list[Floats] = []
        for head in range(self.keys.shape[0]):
            heads += [self.keys.part(head).rows(start, stop).T, self.values.part(head).columns(start, stop)]
        return np.concatenate(heads)
