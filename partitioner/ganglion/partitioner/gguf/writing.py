"""A checkpoint written as a GGUF file, one tensor at a time, laid out as llama.cpp's own converter lays it out.

For llama.cpp and what is built on it: a comparison on the same weights, or a server that verifies drafts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from ganglion.partitioner.checkpoint import Checkpoint
from ganglion.partitioner.config import Config
from ganglion.partitioner.families.reading import read_dense
from ganglion.partitioner.gguf.names import LAYER, PAIRED, TOP
from ganglion.partitioner.gguf.tokenizer_writing import NONE, add_tokenizer
from ganglion.partitioner.rope import read_ropes
from ganglion.partitioner.weights import Floats, Weights
from ganglion.wire.errors import InvalidRequest, Unsupported

Advance = Callable[[int, int], None]
Kind = Literal["F16", "Q4_0", "Q8_0"]
KINDS: Final[tuple[Kind, ...]] = ("F16", "Q4_0", "Q8_0")
BITS: Final[dict[Kind, float]] = {"F16": 16.0, "Q4_0": 4.5, "Q8_0": 8.5}  # a weight of a matrix, scales included
BLOCK: Final = 32
ARCHITECTURES: Final = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_PARTS: Final = {theirs: ours for ours, theirs in LAYER.items()}
_TOP: Final = {theirs: ours for ours, theirs in TOP.items()}


@dataclass(frozen=True)
class _Entry:
    """One tensor to write: its GGUF name, how it is stored, and the heads whose rows are paired (0: none)."""

    name: str
    tensor: Weights
    kind: Any
    heads: int


def write_gguf(
    checkpoint: Checkpoint, path: Path, kind: Kind, *, tokenizer: str = NONE, progress: Advance | None = None
) -> Path:
    """Write `checkpoint` to `path`, its matrices in `kind` (rounded by the gguf package), vectors in float32.

    tokenizer: how llama.cpp is to split text (`tokenizer_writing`: AUTO or a name); NONE: without one, so that prompts
    are token ids. Returns `path`, which is there only when it is whole. Raises InvalidRequest for a kind that there is
    not, Unsupported for an architecture, tensor or rope that is not written here, and what `add_tokenizer` raises.
    """
    import gguf

    if kind not in KINDS:
        raise InvalidRequest(f"kind {kind!r}: it is {', '.join(KINDS)}", param="kind")
    architecture = next(iter(checkpoint.config.names("architectures")), "")
    if architecture not in ARCHITECTURES:
        raise Unsupported(
            f"{checkpoint.path}: {architecture or 'no architecture'} is not written as GGUF; "
            f"{', '.join(ARCHITECTURES)} are"
        )
    entries = [_entry(checkpoint, architecture, tensor, kind) for tensor in _weights(checkpoint)]
    begun = path.with_suffix(".part")
    writer = gguf.GGUFWriter(begun, ARCHITECTURES[architecture])
    try:
        factors = _metadata(writer, checkpoint.config)
        if tokenizer == NONE:
            writer.add_tokenizer_model(NONE)
        else:
            add_tokenizer(writer, checkpoint, tokenizer)
        for entry in entries:
            width = gguf.quant_shape_to_byte_shape(entry.tensor.shape, entry.kind)
            size = int(np.prod(width))
            writer.add_tensor_info(entry.name, entry.tensor.shape, np.dtype(np.float32), size, raw_dtype=entry.kind)
        if factors is not None:
            writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        done, total = 0, sum(entry.tensor.stored_bytes for entry in entries)
        for entry in entries:
            writer.write_tensor_data(gguf.quants.quantize(_rows(entry), entry.kind))
            done += entry.tensor.stored_bytes
            if progress is not None:
                progress(done, total)
        if factors is not None:
            writer.write_tensor_data(factors)
    except BaseException:
        writer.close()
        begun.unlink(missing_ok=True)
        raise
    writer.close()
    begun.replace(path)
    return path


def _weights(checkpoint: Checkpoint) -> list[Weights]:
    """What is written; a tied head is the embedding, as llama.cpp has it."""
    tied = checkpoint.config.flag("tie_word_embeddings", False)
    return [tensor for name, tensor in checkpoint.tensors.items() if not (tied and name == "lm_head.weight")]


def _entry(checkpoint: Checkpoint, architecture: str, tensor: Weights, kind: Kind) -> _Entry:
    from gguf import GGMLQuantizationType

    base, _, suffix = tensor.name.rpartition(".")
    parts = base.split(".", 3)
    name = _TOP.get(base)
    if name is None and parts[:2] == ["model", "layers"] and len(parts) == 4 and parts[3] in _PARTS:
        name = f"blk.{parts[2]}.{_PARTS[parts[3]]}"
    if name is None or suffix not in {"weight", "bias"}:
        raise Unsupported(f"{checkpoint.path}: tensor {tensor.name} has no place in a GGUF file of {architecture}")
    heads = 0
    if architecture in PAIRED or architecture == "MistralForCausalLM":
        field = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(base.rsplit(".", 1)[-1])
        heads = checkpoint.config.whole(field) if field else 0
    if len(tensor.shape) == 1:
        stored = GGMLQuantizationType.F32
    elif tensor.shape[-1] % BLOCK:
        stored = GGMLQuantizationType.F16
    else:
        stored = GGMLQuantizationType[kind]
    return _Entry(f"{name}.{suffix}", tensor, stored, heads)


def _rows(entry: _Entry) -> Floats:
    rows = entry.tensor.rows(0, entry.tensor.shape[0])
    return np.ascontiguousarray(paired(rows, entry.heads) if entry.heads else rows)


def paired(rows: Floats, heads: int) -> Floats:
    """Rows of `heads` heads (or a bias) with row i of a head's first half beside row i of its second."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _metadata(writer: Any, config: Config) -> npt.NDArray[np.float32] | None:
    """Write the keys that llama.cpp reads; returns what the frequencies are divided by, None where they are plain."""
    model = read_dense(config, family="gguf")
    scaled = read_ropes(config, model.head_dim, model.context, kinds=("default", "llama3"))[0][1]
    parameters = config.object("rope_scaling") or config.object("rope_parameters") or Config({}, config.where)
    theta = (parameters if parameters.has("rope_theta") else config).number("rope_theta", 10000.0)
    writer.add_block_count(model.layers)
    writer.add_context_length(model.context)
    writer.add_embedding_length(model.hidden)
    writer.add_feed_forward_length(model.intermediate)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_rope_freq_base(theta)
    writer.add_layer_norm_rms_eps(model.epsilon)
    writer.add_vocab_size(model.vocab)
    plain = theta ** -(np.arange(0, model.head_dim, 2) / model.head_dim)
    factors = (plain / np.array(scaled.inverse_frequencies)).astype(np.float32)
    return None if np.allclose(factors, 1.0, rtol=1e-5) else factors
