"""The models of the domains: each is the best of its size on its own held-out text; how that text is made."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tokenizers import Tokenizer

from ganglion.models import DOMAINS, UnknownDomainError, demo_path, heldout_path

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

MODELS = Path(__file__).resolve().parents[2] / "models"
EXPERT_OF = {"python": "demo-drafter", "c": "demo-c", "javascript": "demo-javascript", "english": "demo-english"}
ROWS, CONTEXT = 2, 1024

# What the shipped models have on these rows, and a tenth more.
MAX_PERPLEXITY = {
    "demo-drafter": {"python": 38.1},
    "demo-c": {"c": 11.0},
    "demo-javascript": {"javascript": 12.3},
    "demo-english": {"english": 21.4},
    "demo-mixture": {"python": 44.8, "c": 14.9, "javascript": 14.3, "english": 23.9},
}

PAGE = r""".\" A comment.
.TH LS 1 "May 2024"
Not before the first heading, however long this sentence goes on and on.
.SH DESCRIPTION
.PP
List information about the \fIfiles\fR (the current directory by default),
.B sorted
by name unless one of
.BR \-c ", or " \-\-sort
says how it is to be done\&.
.EX
ls -l | sort is verbatim and does not belong to the prose of the page.
.EE
.TP
.B \-a
Short.
.PP
The output\(aqs order may depend on the \(lqlocale\(rq of the user who runs the program.
"""


@pytest.fixture
def domains(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(MODELS)
    return pytest.importorskip("domains")


@cache
def rows_of(domain: str) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(demo_path("demo") / "tokenizer.json"))
    ids = tokenizer.encode(heldout_path(domain).read_text("utf-8")).ids
    return [[0, *ids[at : at + CONTEXT - 1]] for at in range(0, ROWS * (CONTEXT - 1), CONTEXT - 1)]


@cache
def model_of(name: str) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(demo_path(name), dtype=torch.float32)


@cache
def perplexity(name: str, domain: str) -> float:
    tokens = torch.tensor(rows_of(domain))
    with torch.no_grad():
        logits = model_of(name)(tokens).logits[:, :-1]
    return math.exp(float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())))


@pytest.mark.parametrize(
    ("name", "domain"), [(name, domain) for name in MAX_PERPLEXITY for domain in MAX_PERPLEXITY[name]]
)
def test_perplexity_on_held_out_text_is_below_its_bound(name: str, domain: str) -> None:
    assert perplexity(name, domain) <= MAX_PERPLEXITY[name][domain]


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_domains_expert_is_the_best_of_the_small_ones_on_it(domain: str) -> None:
    ranked = sorted(EXPERT_OF.values(), key=lambda name: perplexity(name, domain))
    assert ranked[0] == EXPERT_OF[domain]


def test_held_out_text_is_found_by_domain_and_a_wrong_one_gets_the_list() -> None:
    sizes = {domain: heldout_path(domain).stat().st_size for domain in DOMAINS}
    assert all(20_000 <= size <= 26_000 for size in sizes.values()), sizes
    with pytest.raises(UnknownDomainError, match=r"'rust'.*python, c, javascript, english"):
        heldout_path("rust")


def test_a_manual_page_becomes_its_sentences(domains: ModuleType) -> None:
    assert domains.prose(PAGE) == [
        "List information about the files (the current directory by default), sorted by name unless one of -c, or"
        " --sort says how it is to be done.",
        'The output\'s order may depend on the "locale" of the user who runs the program.',
    ]


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("/* Copyright 2020 A */\n\n#ifndef A\n", "#ifndef A\n"),
        ("// SPDX-License-Identifier: MIT\n// more\n\n/** What it is. */\nint a;\n", "int a;\n"),
        ("/** What it is. */\nint a; /* Copyright */\n", "/** What it is. */\nint a; /* Copyright */\n"),
    ],
)
def test_a_licence_at_the_head_of_a_file_is_left_out(domains: ModuleType, text: str, left: str) -> None:
    assert domains.without_notice(text) == left


def test_a_turn_asks_with_a_blocks_beginning_and_answers_with_the_block(domains: ModuleType) -> None:
    block = "int first(void)\n" + "/* a line of the block */\n" * 4
    document = domains.Document("a.h", f"{block}\n" * 40)
    turns = domains.chat_turns("c", (document,), 0.1, 0)
    assert turns
    assert set(turns) == {f"<|user|>int first(void)<|end|><|assistant|>{block.rstrip()}\n<|end|>"}
    assert sum(map(len, turns)) <= 0.1 * len(document.text)


def test_text_of_one_library_stays_below_its_limit(
    domains: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for library in ("big", "small"):
        (tmp_path / library).mkdir()
        for number in range(8 if library == "big" else 1):
            (tmp_path / library / f"{number}.h").write_text(f"int {library}{number};\n" * 40)
    (tmp_path / "big" / "copy.h").write_text("int  big0;\n" * 40)
    (tmp_path / "big" / "wide.h").write_text("int x;" * 200)
    monkeypatch.setattr(domains, "C_ROOT", tmp_path)
    monkeypatch.setattr(domains, "MAX_LIBRARY_BYTES", 2000)
    corpus = domains.load_domain("c")
    documents = corpus.train + corpus.validation
    assert sum(len(document.text) for document in documents if "/big/" in document.path) in range(1000, 2001)
    assert sum("/small/" in document.path for document in documents) == 1
    assert all(document.is_validation for document in corpus.validation)
