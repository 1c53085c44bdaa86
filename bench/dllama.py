"""distributed-llama's own files, from the same weights: a model in Q40 and a tokenizer that only counts.

Its converter (converter/ of its repository) needs torch and packs block by block in Python; a Q40 block is GGUF's Q4_0
block bit for bit, so here the gguf package rounds.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

from ganglion.partitioner.checkpoint import Checkpoint
from ganglion.partitioner.families.reading import read_dense
from ganglion.partitioner.gguf.writing import paired
from ganglion.wire.errors import Unsupported

MODEL_MAGIC, TOKENIZER_MAGIC = 0xA00ABCD, 0x567124
LLAMA, SILU, Q40 = 0xABCD00, 1, 2
KEYS = {
    "version": 0, "arch_type": 1, "dim": 2, "hidden_dim": 3, "n_layers": 4, "n_heads": 5, "n_kv_heads": 6,
    "n_experts": 7, "n_active_experts": 8, "vocab_size": 9, "max_seq_len": 10, "hidden_act": 11, "rope_theta": 12,
    "weights_float_type": 13, "head_dim": 19, "norm_epsilon": 20,
}  # fmt: skip
TOKENIZER_KEYS = {"version": 0, "vocab_size": 1, "max_token_length": 2, "bos_id": 3, "n_eos_tokens": 9, "add_bos": 10}


def write_model(checkpoint: Checkpoint, path: Path) -> Path:
    """Write a Llama of plain frequencies; matrices in Q40 but the embedding, which it keeps in float32."""
    config = checkpoint.config
    if config.names("architectures") != ("LlamaForCausalLM",) or config.object("rope_scaling"):
        raise Unsupported(f"{checkpoint.path}: only Llama with plain frequencies is written for distributed-llama")
    model = read_dense(config, family="llama")
    theta = config.object("rope_parameters") or config
    header = {
        "version": 0, "arch_type": LLAMA, "hidden_act": SILU, "dim": model.hidden, "hidden_dim": model.intermediate,
        "n_layers": model.layers, "n_heads": model.heads, "n_kv_heads": model.kv_heads, "weights_float_type": Q40,
        "max_seq_len": model.context, "vocab_size": model.vocab, "n_experts": 0, "n_active_experts": 0,
        "rope_theta": int(theta.number("rope_theta", 10000.0)), "head_dim": model.head_dim,
        "norm_epsilon": {1e-5: 5, 1e-6: 6}[model.epsilon],
    }  # fmt: skip
    begun = path.with_suffix(".part")
    with begun.open("wb") as file:
        file.write(_header(MODEL_MAGIC, KEYS, header))
        for name, heads, plain in _order(model):
            found = checkpoint.tensors.get(name) or checkpoint.tensors["model.embed_tokens.weight"]
            rows = found.rows(0, found.shape[0])
            if heads:
                rows = paired(rows, heads)
            file.write(
                rows.tobytes() if plain else gguf.quants.quantize(np.ascontiguousarray(rows), Kind.Q4_0).tobytes()
            )
    begun.replace(path)
    return path


def _order(model: Any) -> Iterator[tuple[str, int, bool]]:
    """(tensor, heads whose rows are paired, whether it is float32) in the order of its converter."""
    yield "model.embed_tokens.weight", 0, True
    for layer in range(model.layers):
        at = f"model.layers.{layer}."
        yield f"{at}self_attn.q_proj.weight", model.heads, False
        yield f"{at}self_attn.k_proj.weight", model.kv_heads, False
        for name in ("self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj", "mlp.up_proj"):
            yield f"{at}{name}.weight", 0, False
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{at}{name}.weight", 0, True
    yield "model.norm.weight", 0, True
    yield "lm_head.weight", 0, False


def write_tokenizer(path: Path, vocab: int) -> Path:
    """Write a tokenizer of bytes and of numbered tokens: n letters are n tokens, after the one that begins them."""
    tokens = [bytes([byte]) for byte in range(1, 256)]
    tokens += [f"<{number}>".encode() for number in range(len(tokens), vocab)]
    values = {
        "version": 1, "vocab_size": vocab, "max_token_length": max(map(len, tokens)), "bos_id": vocab - 2,
        "n_eos_tokens": 1, "add_bos": 1,
    }  # fmt: skip
    with path.open("wb") as file:
        file.write(_header(TOKENIZER_MAGIC, TOKENIZER_KEYS, values))
        file.write(struct.pack("i", vocab - 1))
        for token in tokens:
            file.write(struct.pack("fI", 0.0, len(token)) + token)
    return path


def _header(magic: int, keys: dict[str, int], values: dict[str, int]) -> bytes:
    data = b"".join(struct.pack("ii", keys[name], value) for name, value in values.items())
    return struct.pack("ii", magic, 8 + len(data)) + data
