"""Random-weight checkpoints in Hugging Face format, with a byte-level tokenizer: what every room's tests deploy.

Weights are scaled so that greedy text does not loop: rows of unit gain, a small embedding (a tied one smaller still),
uneven norms.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

BOS, EOS = 256, 257  # ids of the two special tokens; ids 0..255 are the bytes
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TINY: dict[str, Any] = {
    "vocab_size": 283,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
}
GEMMAS = ("gemma2", "gemma3_text")  # norms are stored less one, the embedding less a factor of sqrt(hidden_size)
# Llama 3.1's own figures, with an original context short enough that tiny contexts reach every branch.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def write_tokenizer(path: Path) -> None:
    """Write a tokenizer of the 256 bytes and two special tokens (`<s>` 256, `</s>` 257) into the folder `path`."""
    alphabet = _byte_alphabet()
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(described, indent=1))


def _byte_alphabet() -> list[str]:
    """The printable character that stands for each byte in byte-level BPE (as GPT-2 does it)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    free = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(free)) for b in range(256)]


def make_llama(path: Path, *, seed: int = 0, dtype: str = "float32", shard_bytes: int = 0, **config: Any) -> Path:
    """Write a random Llama to the folder `path` and return it; `config` overrides `TINY` (LlamaConfig's names)."""
    described = LlamaConfig(**(TINY | config))
    return _save(LlamaForCausalLM, described, path, seed=seed, dtype=dtype, shard_bytes=shard_bytes)


def make_qwen3(path: Path, *, seed: int = 0, dtype: str = "float32", shard_bytes: int = 0, **config: Any) -> Path:
    """Write a random Qwen3 to the folder `path` and return it; `config` overrides `TINY` (Qwen3Config's names)."""
    described = Qwen3Config(**(TINY | {"head_dim": 32} | config))
    return _save(Qwen3ForCausalLM, described, path, seed=seed, dtype=dtype, shard_bytes=shard_bytes)


def make(path: Path, family: str, *, seed: int = 0, dtype: str = "float32", **config: Any) -> Path:
    """Write a random model of `family` (transformers' class name without ForCausalLM) to the folder `path`.

    `config` overrides `TINY`, in the names of the family's own configuration.
    """
    kind = getattr(transformers, f"{family}ForCausalLM")
    described = kind.config_class(**(TINY | {"pad_token_id": None} | config))
    return _save(kind, described, path, seed=seed, dtype=dtype, shard_bytes=0)


def _save(kind: type[PreTrainedModel], config: Any, path: Path, *, seed: int, dtype: str, shard_bytes: int) -> Path:
    path = Path(path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, gemma = kind(config), config.model_type in GEMMAS
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "embed_tokens" in name:  # a large tied embedding would have every token say itself
                    gain = 0.1 if config.tie_word_embeddings else 0.3
                    weight.normal_(0.0, gain / config.hidden_size**0.5 if gemma else gain)
                elif weight.dim() == 2 and "norm" not in name:
                    weight.normal_(0.0, 1.5 / weight.shape[1] ** 0.5)
                elif name.endswith("bias"):
                    weight.normal_(0.0, 0.3)
                else:
                    weight.normal_(0.0 if gemma else 1.0, 0.2)
    model = model.to(getattr(torch, dtype))
    model.config.dtype = dtype
    options: dict[str, Any] = {"max_shard_size": shard_bytes} if shard_bytes else {}
    model.save_pretrained(path, **options)
    write_tokenizer(path)
    return path
