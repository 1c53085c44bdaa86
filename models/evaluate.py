"""Measure the two demo checkpoints on the held-out files.

    python models/evaluate.py

Prints one JSON object: loss in nats per token and bits per byte; how many held-out function headers
become a function that parses, by greedy completion and by a chat turn; and how often drafter and
target agree on the next token.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from corpus import ASSISTANT, END_OF_TEXT, END_OF_TURN, USER, Corpus, Document, functions, load_corpus, token_id
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM

HERE = Path(__file__).resolve().parent
CHECKPOINTS = HERE / "ganglion" / "models"
CONTEXT = 1024


@dataclass(frozen=True)
class Completion:
    """The greedy continuation of one header."""

    text: str
    """Header and body, cut at the first dedented line, or at the last whole line if there is none."""
    finished: bool
    """Whether a dedented line, or the end of the text, came within the token limit."""
    prompt_tokens: int
    ids: Tensor
    """Prompt and continuation, uncut: [tokens] int64."""

    @property
    def parses(self) -> bool:
        """Whether Python parses the function."""
        try:
            ast.parse(self.text)
        except (SyntaxError, ValueError):
            return False
        return True


def held_out_headers(corpus: Corpus, count: int) -> list[str]:
    """`count` headers of distinct functions of the validation files, drawn by hash."""
    headers = {function.header for document in corpus.validation for function in functions(document)}
    return sorted(headers, key=lambda header: hashlib.sha256(header.encode()).digest())[:count]


def indentation(line: str) -> int:
    """How many columns of white space lead a line."""
    return len(line) - len(line.lstrip())


def cut_function(header: str, continuation: str, stopped: bool) -> tuple[str, bool]:
    """The function alone, and whether it ended by itself; `stopped`: the model ended the text."""
    rest_of_header, *body = continuation.split("\n")
    whole = body if stopped else body[:-1]  # the limit may have cut the last line
    written = [index for index, line in enumerate(whole) if line.strip()]
    dedented = [index for index in written if indentation(whole[index]) < max(1, indentation(whole[written[0]]))]
    end = dedented[0] if dedented else len(whole)
    return "\n".join([header + rest_of_header, *whole[:end]]), stopped or bool(dedented)


@torch.no_grad()
def complete(model: LlamaForCausalLM, tokenizer: Tokenizer, header: str, limit: int, *, chat: bool) -> Completion:
    """Up to `limit` greedy tokens after a header, or in answer to a chat turn that holds the header."""
    prompt_text = f"{END_OF_TEXT}{USER}{header}{END_OF_TURN}{ASSISTANT}" if chat else header
    prompt = torch.tensor(tokenizer.encode(prompt_text).ids)
    output = model.generate(prompt[None], max_new_tokens=limit, do_sample=False)[0]  # type: ignore[misc]
    continuation = tokenizer.decode(output[len(prompt) :].tolist(), skip_special_tokens=True)
    stopped = len(output) < len(prompt) + limit
    if chat:
        first_line, _, continuation = continuation.partition("\n")
        text, finished = cut_function(first_line, "\n" + continuation, stopped)
    else:
        text, finished = cut_function(header, continuation, stopped)
    return Completion(text, finished, len(prompt), output)


def share_parsed(completions: list[Completion]) -> dict[str, int]:
    """How many functions parse, of all and of those that came to an end within the limit."""
    finished = [completion for completion in completions if completion.finished]
    return {
        "headers": len(completions),
        "parsed": sum(completion.parses for completion in completions),
        "finished": len(finished),
        "finished_and_parsed": sum(completion.parses for completion in finished),
    }


def rows_of(documents: tuple[Document, ...], tokenizer: Tokenizer) -> tuple[list[Tensor], int]:
    """Every document in rows of at most `CONTEXT` predicted tokens, each led by the separator; and the byte count."""
    separator = token_id(tokenizer, END_OF_TEXT)
    rows: list[Tensor] = []
    for document in documents:
        ids = tokenizer.encode(document.text).ids
        rows += [torch.tensor([separator, *ids[at : at + CONTEXT - 1]]) for at in range(0, len(ids), CONTEXT - 1)]
    return rows, sum(len(document.text.encode()) for document in documents)


@torch.no_grad()
def next_token_choices(model: LlamaForCausalLM, row: Tensor) -> tuple[float, Tensor]:
    """Summed cross entropy in nats of a row, and the most likely next token at each of its places."""
    logits = model(row[None]).logits[0, :-1]
    return float(F.cross_entropy(logits, row[1:], reduction="sum")), logits.argmax(-1)


def evaluate(checkpoints: Path, count: int, limit: int) -> dict[str, object]:
    """All figures of the two models under `checkpoints`; `count` headers, completed by up to `limit` tokens each."""
    corpus = load_corpus()
    tokenizer = Tokenizer.from_file(str(checkpoints / "demo" / "tokenizer.json"))
    target = LlamaForCausalLM.from_pretrained(checkpoints / "demo", dtype=torch.float32)
    drafter = LlamaForCausalLM.from_pretrained(checkpoints / "demo-drafter", dtype=torch.float32)

    rows, byte_count = rows_of(corpus.validation, tokenizer)
    tokens = sum(len(row) - 1 for row in rows)
    nats = {"demo": 0.0, "demo-drafter": 0.0}
    agreed = 0
    for row in rows:
        target_nats, target_choices = next_token_choices(target, row)
        drafter_nats, drafter_choices = next_token_choices(drafter, row)
        nats["demo"] += target_nats
        nats["demo-drafter"] += drafter_nats
        agreed += int((target_choices == drafter_choices).sum())

    headers = held_out_headers(corpus, count)
    completions = [complete(target, tokenizer, header, limit, chat=False) for header in headers]
    answers = [complete(target, tokenizer, header, limit, chat=True) for header in headers]
    agreed_on_output = generated = 0
    for completion in completions + answers:
        _, choices = next_token_choices(drafter, completion.ids)
        start = completion.prompt_tokens
        agreed_on_output += int((choices[start - 1 :] == completion.ids[start:]).sum())
        generated += len(completion.ids) - start
    return {
        "validation_files": len(corpus.validation),
        "validation_bytes": byte_count,
        "validation_tokens": tokens,
        "nats_per_token": {name: round(total / tokens, 4) for name, total in nats.items()},
        "bits_per_byte": {name: round(total / byte_count / 0.6931471805599453, 4) for name, total in nats.items()},
        "top1_agreement_on_text": round(agreed / tokens, 4),
        "top1_agreement_on_greedy_output": round(agreed_on_output / generated, 4),
        "completion": share_parsed(completions),
        "chat": share_parsed(answers),
        "texts": [{"parses": item.parses, "text": item.text} for item in completions + answers],
    }


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=Path, default=CHECKPOINTS, help="folder that holds both models")
    parser.add_argument("--headers", type=int, default=40, help="how many held-out headers to complete")
    parser.add_argument("--limit", type=int, default=128, help="tokens per completion")
    parser.add_argument("--show", action="store_true", help="print the completions too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures = evaluate(arguments.checkpoints, arguments.headers, arguments.limit)
    if not arguments.show:
        del figures["texts"]
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
