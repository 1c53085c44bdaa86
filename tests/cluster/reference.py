"""What transformers says of a checkpoint, in fp32: ids, texts, hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM


@dataclass(frozen=True)
class Answer:
    """A greedy answer. hidden: [rows, hidden] float32, the residual after every layer at every position."""

    prompt_ids: list[int]
    ids: list[int]
    text: str
    hidden: np.ndarray[Any, np.dtype[np.float32]]


def answer(checkpoint: Path, prompt: str, count: int) -> Answer:
    """`count` greedy tokens after `prompt`."""
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    given = torch.tensor([prompt_ids])
    with torch.no_grad():
        out = model.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=count, do_sample=False, pad_token_id=0
        )
        states = model(out, output_hidden_states=True).hidden_states
    ids = [int(number) for number in out[0, len(prompt_ids) :]]
    # The last state is normalized; the others are what travels between devices.
    hidden = torch.cat([state[0] for state in states[:-1]]).numpy().astype(np.float32)
    return Answer(prompt_ids, ids, tokenizer.decode(ids, skip_special_tokens=True), hidden)
