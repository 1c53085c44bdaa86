"""The training corpus (the standard library's own source), its split, and the tokenizer."""

from __future__ import annotations

import ast
import hashlib
import json
import random
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
END_OF_TURN = "<|end|>"
SPECIAL_TOKENS = (END_OF_TEXT, USER, ASSISTANT, END_OF_TURN)
VOCAB_SIZE = 2048
MAX_CONTEXT = 1024

# One piece per newline run with the indentation that follows it, per identifier (with the
# space or dot before it), per digit, per run of punctuation; other white space last.
PIECES = r"(?:\r?\n[ \t]*)+|[ .]?[\p{L}_]+|\p{N}| ?[^\s\p{L}\p{N}_]+|[^\S\r\n]+(?!\S)|\s+"

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    + ASSISTANT
    + "{% else %}"
    + USER
    + "{% endif %}"
    + "{{ message['content'] }}"
    + END_OF_TURN
    + "{% endfor %}"
    "{% if add_generation_prompt %}" + ASSISTANT + "{% endif %}"
)

# Tables and prose that teach nothing about writing Python.
SKIPPED_PARTS = frozenset({"site-packages", "encodings", "pydoc_data", "__pycache__", "encoded_modules", "bad_coding"})
TEST_PARTS = frozenset({"test", "tests", "idle_test"})
TEST_BYTES_SHARE = 0.30
VALIDATION_PERMILLE = 30

# For the last phase: functions up to this many characters, and a string literal that stands alone.
FUNCTION_CHARACTERS = 1000
LITERAL = re.compile(r"""([rRuU]?)(\"{3}|'{3}|"|')(.*)\2""", re.DOTALL)


@dataclass(frozen=True)
class Document:
    """One source file: its path inside the standard library and its text."""

    path: str
    text: str

    @property
    def is_test(self) -> bool:
        """Whether the file lies in a test folder."""
        return not TEST_PARTS.isdisjoint(Path(self.path).parts)

    @property
    def is_validation(self) -> bool:
        """Whether the file is held out; decided by a hash of its path, so it never moves."""
        return int.from_bytes(_digest(self.path)[:4], "big") % 1000 < VALIDATION_PERMILLE


@dataclass(frozen=True)
class Corpus:
    """The documents of both sides of the split, in a fixed shuffled order."""

    train: tuple[Document, ...]
    validation: tuple[Document, ...]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _source_files(root: Path) -> Iterator[Document]:
    """Every distinct UTF-8 file under `root` that this interpreter parses."""
    seen: set[bytes] = set()
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not SKIPPED_PARTS.isdisjoint(relative.parts) or relative.name.startswith("_sysconfigdata"):
            continue
        try:
            text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
            ast.parse(text)
        except (UnicodeDecodeError, SyntaxError, ValueError):
            continue  # deliberate test data: odd encodings and broken syntax
        digest = _digest(text)
        if text.strip() and digest not in seen:
            seen.add(digest)
            yield Document(relative.as_posix(), text)


def load_corpus() -> Corpus:
    """Read the running interpreter's standard library; test files stay a minority of the bytes."""
    documents = list(_source_files(Path(sysconfig.get_path("stdlib"))))
    documents.sort(key=lambda document: _digest("order:" + document.path))
    plain = [document for document in documents if not document.is_test]
    budget = int(sum(len(document.text) for document in plain) * TEST_BYTES_SHARE / (1 - TEST_BYTES_SHARE))
    chosen = list(plain)
    for document in documents:
        if document.is_test and len(document.text) <= budget:
            chosen.append(document)
            budget -= len(document.text)
    chosen.sort(key=lambda document: _digest("order:" + document.path))
    return Corpus(
        train=tuple(document for document in chosen if not document.is_validation),
        validation=tuple(document for document in chosen if document.is_validation and not document.is_test),
    )


@dataclass(frozen=True)
class Function:
    """One function, dedented: its header up to the colon, and the whole of its body."""

    header: str
    body: str


def functions(document: Document) -> Iterator[Function]:
    """The functions and methods of a document whose header ends its line, without docstring."""
    lines = document.text.splitlines(keepends=True)
    for node in ast.walk(ast.parse(document.text)):
        if not isinstance(node, ast.FunctionDef) or node.end_lineno is None or "\t" in lines[node.lineno - 1]:
            continue
        statements = node.body
        if ast.get_docstring(node, clean=False) is not None:
            statements = statements[1:]
        if not statements or min(s.lineno for s in node.body) == node.lineno:
            continue
        header = "".join(lines[node.lineno - 1 : node.body[0].lineno - 1])
        if not header.rstrip().endswith(":"):
            continue  # a comment, or a decorator, stands between header and body
        body = "".join(lines[statements[0].lineno - 1 : node.end_lineno])
        yield Function(_dedent(header, node.col_offset).rstrip(), _dedent(body, node.col_offset).rstrip())


def _dedent(text: str, columns: int) -> str:
    return "".join(
        line[columns:] if line[:columns].isspace() else line.lstrip() if not line.strip() else line
        for line in text.splitlines(keepends=True)
    )


def chat_documents(documents: tuple[Document, ...], share: float, seed: int) -> list[str]:
    """Turns made of a function's header (user) and its body (assistant), `share` of the corpus' characters."""
    candidates = [function for document in documents for function in functions(document) if len(function.body) < 1500]
    random.Random(seed).shuffle(candidates)  # noqa: S311 - an order, not a secret
    budget = int(share * sum(len(document.text) for document in documents))
    turns: list[str] = []
    for function in candidates:
        turn = f"{USER}{function.header}{END_OF_TURN}{ASSISTANT}{function.header}\n{function.body}\n{END_OF_TURN}"
        if budget < len(turn):
            break
        budget -= len(turn)
        turns.append(turn)
    return turns


def shorten_docstrings(text: str) -> str:
    """A module's source with docstrings of one line, and about half of its functions' docstrings dropped.

    A docstring keeps its quotes and the first line with anything on it. Which functions lose theirs is
    decided by a hash of the docstring; a function of nothing else keeps it. Docstrings that share a line
    with code stay as they are. The result parses; nothing but docstrings (and the blank lines after a
    dropped one) changes.
    """
    lines = text.split("\n")
    owners = [
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and ast.get_docstring(node, clean=False) is not None
    ]
    for owner in sorted(owners, key=lambda owner: owner.body[0].lineno, reverse=True):
        first, last = owner.body[0].lineno - 1, owner.body[0].end_lineno or owner.body[0].lineno
        literal = "\n".join(lines[first:last]).strip()
        if LITERAL.fullmatch(literal) is None:
            continue  # it shares a line with code or a comment, or stands in brackets
        is_function = isinstance(owner, ast.FunctionDef | ast.AsyncFunctionDef)
        if is_function and len(owner.body) > 1 and _digest(literal)[0] % 2:
            while last < len(lines) and not lines[last].strip():
                last += 1
            del lines[first:last]
        elif (short := _first_line(literal)) is not None:
            indentation = lines[first][: len(lines[first]) - len(lines[first].lstrip())]
            lines[first:last] = [indentation + short]
    shortened = "\n".join(lines)
    return shortened if _parses(shortened) else text


def _first_line(literal: str) -> str | None:
    """The string literal cut to its first line with anything on it, if that is a literal still."""
    match = LITERAL.fullmatch(literal)
    assert match is not None  # noqa: S101 - the caller matched it
    prefix, quotes, inner = match.groups()
    written = (line.strip().rstrip("\\").rstrip() for line in inner.split("\n"))
    short = f"{prefix}{quotes}{next((line for line in written if line), '')}{quotes}"
    return short if _parses(short) else None


def _parses(text: str) -> bool:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError):
        return False
    return True


def clean_documents(documents: tuple[Document, ...]) -> tuple[Document, ...]:
    """The documents with shortened docstrings."""
    return tuple(Document(document.path, shorten_docstrings(document.text)) for document in documents)


def function_documents(documents: tuple[Document, ...]) -> list[str]:
    """Each short function or method as a text of its own, from `def` to its last line, dedented; no tests.

    A bare header is then a usual beginning, and a function is usually followed by the end of the text.
    """
    texts: dict[str, None] = {}
    for document in documents:
        if document.is_test:
            continue
        lines = document.text.split("\n")
        for node in ast.walk(ast.parse(document.text)):
            if not isinstance(node, ast.FunctionDef) or node.body[0].lineno == node.lineno:
                continue
            source = "\n".join(lines[node.lineno - 1 : node.end_lineno])
            text = _dedent(source, node.col_offset).rstrip() + "\n"
            if "\t" not in text and len(text) <= FUNCTION_CHARACTERS and _parses(text):
                texts[text] = None
    return list(texts)


def train_tokenizer(documents: tuple[Document, ...]) -> Tokenizer:
    """A byte-level BPE of `VOCAB_SIZE` entries; any text round-trips, no token is added on encoding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    return tokenizer


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a special token. Raises `ValueError` if the tokenizer lacks it."""
    found = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"the tokenizer has no token {token}; delete its work folder and train it again")
    return int(found)


def shuffled(texts: list[str]) -> list[str]:
    """The texts in a fixed order that depends on their content alone."""
    return sorted(texts, key=_digest)


def tokenizer_config() -> str:
    """`tokenizer_config.json` for transformers."""
    fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "extra_special_tokens": {"user_token": USER, "assistant_token": ASSISTANT, "end_token": END_OF_TURN},
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_CONTEXT,
        "chat_template": CHAT_TEMPLATE,
    }
    return json.dumps(fields, indent=2) + "\n"
