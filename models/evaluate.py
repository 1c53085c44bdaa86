"""Measure the demo checkpoints on held-out text.

    python models/evaluate.py
    python models/evaluate.py --domains
    python models/evaluate.py --routes tests/data/routes.npz

The first prints one JSON object of `demo` and its drafter on this machine's held-out Python: loss in nats
per token and bits per byte; how many held-out function headers become a function that parses, by greedy
completion and by a chat turn; and how often drafter and target agree on the next token. `--domains`
prints perplexity and bits per byte of every model on the shipped held-out text of every domain. `--routes`
records which experts the mixture chose for each token of that text, and prints how structured they are.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from corpus import ASSISTANT, END_OF_TEXT, END_OF_TURN, USER, Corpus, Document, functions, load_corpus, token_id
from routing import routes_of, structure
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel, Qwen3MoeForCausalLM

from ganglion.models import DEMO_NAMES, DOMAINS, demo_path, heldout_path

CHECKPOINTS = demo_path("demo").parent
LN2 = 0.6931471805599453
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
    output = model.generate(prompt[None], max_new_tokens=limit, do_sample=False)[0]
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
def next_token_choices(model: PreTrainedModel, row: Tensor) -> tuple[float, Tensor]:
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
        "bits_per_byte": {name: round(total / byte_count / LN2, 4) for name, total in nats.items()},
        "top1_agreement_on_text": round(agreed / tokens, 4),
        "top1_agreement_on_greedy_output": round(agreed_on_output / generated, 4),
        "completion": share_parsed(completions),
        "chat": share_parsed(answers),
        "texts": [{"parses": item.parses, "text": item.text} for item in completions + answers],
    }


def held_out_rows(checkpoints: Path, domain: str) -> tuple[list[Tensor], int]:
    """The shipped held-out text of a domain as rows for a model, and its size in bytes."""
    tokenizer = Tokenizer.from_file(str(checkpoints / "demo" / "tokenizer.json"))
    return rows_of((Document(domain, heldout_path(domain).read_text("utf-8")),), tokenizer)


def evaluate_domains(checkpoints: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Perplexity and bits per byte of every model on the shipped held-out text of every domain."""
    texts = {domain: held_out_rows(checkpoints, domain) for domain in DOMAINS}
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for name in DEMO_NAMES:
        model = AutoModelForCausalLM.from_pretrained(checkpoints / name, dtype=torch.float32)
        figures[name] = {}
        for domain, (rows, byte_count) in texts.items():
            nats = sum(next_token_choices(model, row)[0] for row in rows)
            tokens = sum(len(row) - 1 for row in rows)
            figures[name][domain] = {
                "perplexity": round(float(np.exp(nats / tokens)), 3),
                "bits_per_byte": round(nats / byte_count / LN2, 4),
            }
    return figures


def record_routes(checkpoints: Path, path: Path) -> dict[str, Any]:
    """Write the mixture's routes on the shipped held-out text, and return how structured they are.

    The file holds `routes` uint8 [tokens, layers, k], heaviest first; `domains` uint8 [tokens], an index into
    `ganglion.models.DOMAINS`; and `experts`, how many a layer has. The separators that lead the rows are left out.
    """
    model = Qwen3MoeForCausalLM.from_pretrained(checkpoints / "demo-mixture", dtype=torch.float32)
    parts = {
        domain: np.concatenate([routes_of(model, row)[1:] for row in held_out_rows(checkpoints, domain)[0]])
        for domain in DOMAINS
    }
    routes = np.concatenate(list(parts.values()))
    domains = np.repeat(np.arange(len(DOMAINS), dtype=np.uint8), [len(part) for part in parts.values()])
    experts = int(model.config.num_experts)
    np.savez_compressed(path, routes=routes, domains=domains, experts=np.int64(experts))
    return {"tokens": len(routes)} | structure(routes, domains, DOMAINS, experts)


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=Path, default=CHECKPOINTS, help="folder that holds the models")
    parser.add_argument("--domains", action="store_true", help="every model on every domain's shipped text")
    parser.add_argument("--routes", type=Path, metavar="FILE", help="record the mixture's routes to this .npz file")
    parser.add_argument("--headers", type=int, default=40, help="how many held-out headers to complete")
    parser.add_argument("--limit", type=int, default=128, help="tokens per completion")
    parser.add_argument("--show", action="store_true", help="print the completions too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, Any]
    if arguments.domains:
        figures = evaluate_domains(arguments.checkpoints)
    elif arguments.routes is not None:
        figures = record_routes(arguments.checkpoints, arguments.routes)
    else:
        figures = evaluate(arguments.checkpoints, arguments.headers, arguments.limit)
        if not arguments.show:
            del figures["texts"]
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
