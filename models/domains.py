"""The text of each domain as an ordinary Linux machine has it: headers, manual pages, JavaScript, Python."""

from __future__ import annotations

import gzip
import hashlib
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from corpus import ASSISTANT, END_OF_TURN, USER, Corpus, Document, chat_documents, load_corpus

from ganglion.models import DOMAINS, UnknownDomainError

MAX_DOMAIN_BYTES = 12_000_000
MAX_LIBRARY_BYTES = 3_000_000
FILE_CHARACTERS = range(200, 100_000)
MAX_LINE_CHARACTERS = 400

C_ROOT = Path("/usr/include")
C_SUFFIXES = frozenset({".h", ".hh", ".hpp", ".hxx", ".tcc", ".inl"})
JAVASCRIPT_ROOTS = (Path("/usr/share/nodejs"), Path("/usr/share/javascript"), Path("/usr/lib/node_modules"))
MANUAL_ROOT = Path("/usr/share/man")

# Builds of the same source for other architectures and module systems: they would stand on both sides of the split.
SKIPPED_PARTS = frozenset({"archs", "esm", "esm-browser", "libesm", "umd", "uapi"})
NOTICE = re.compile(r"copyright|licen[cs]e|SPDX|all rights reserved", re.IGNORECASE)
LEADING_COMMENTS = re.compile(r"(?:\s*(?:/\*.*?\*/|(?://[^\n]*\n)+))+\s*", re.DOTALL)

# Several hundred pages of one program's subcommands are mostly the same sentences.
PAGES_PER_PROGRAM = 60
PARAGRAPH_WORDS = range(8, 400)
PARAGRAPH_MACROS = frozenset(["PP", "P", "LP", "sp", "TP", "IP", "HP", "TQ", "RS", "RE", "Pp", "It", "El", "Bl"])
HEADING_MACROS = frozenset(["SH", "SS", "Sh", "Ss"])
TWO_FONT_MACROS = frozenset({"BR", "RB", "BI", "IB", "IR", "RI"})
MDOC_MACROS = frozenset(
    {"Nm", "Ar", "Pa", "Em", "Sy", "Va", "Fn", "Ev", "Cm", "Li", "Dv", "Xr", "Fl", "Ns", "Ic", "Qq", "Dq", "Sq"}
)
INLINE_MACROS = TWO_FONT_MACROS | MDOC_MACROS | {"B", "I", "R", "SM", "SB"}
VERBATIM = {"nf": "fi", "EX": "EE", "Bd": "Ed", "TS": "TE", "de": ".", "ig": ".", "de1": ".", "UR": "UE", "PS": "PE"}
ESCAPES = (
    (re.compile(r'\\".*'), ""),
    (re.compile(r"\\f(?:\(..|\[[^]]*\]|.)|\\s(?:[-+]?\d+|\([^)]*\))|\\[&|^/,:%)c]|\\[mF]\[[^]]*\]"), ""),
    (re.compile(r"\\\(aq|\\\[aq\]|\\\*\(Aq|\\\(cq|\\\[cq\]|\\\(oq|\\\[oq\]|\\'"), "'"),
    (re.compile(r"\\\((?:lq|rq|dq)|\\\[(?:lq|rq|dq)\]|\\\*[LR]\"|\\\*\([LR]\"|\\\*\([lr]q|\\\*\[[lr]q\]"), '"'),
    (re.compile(r"\\\((?:en|em|mi|hy)|\\\[(?:en|em|mi|hy)\]|\\-"), "-"),
    (re.compile(r"\\\(bu|\\\[bu\]"), "-"),
    (re.compile(r"\\[ ~0]"), " "),
    (re.compile(r"\\e|\\\(rs|\\\[rs\]"), r"\\"),
    (re.compile(r"\\\(ti|\\\[ti\]"), "~"),
    (re.compile(r"\\\(ha|\\\[ha\]"), "^"),
    (re.compile(r"\\\(ga|\\\[ga\]|\\`"), "`"),
)
PROSE_WORD = re.compile(r"[\"'(]?[A-Za-z]+(?:['-][A-Za-z]+)*[\"')]*[.,;:!?]?[\"')]*")


def load_domain(domain: str) -> Corpus:
    """The documents of one of `DOMAINS`, at most `MAX_DOMAIN_BYTES` of each side, in a fixed order by hash of the path.

    A file is held out by a hash of its path, so it never moves. Raises `UnknownDomainError`.
    """
    if domain not in DOMAINS:
        raise UnknownDomainError(domain)
    if domain == "python":
        return load_corpus()
    documents = {"c": _headers, "javascript": _scripts, "english": _manual_pages}[domain]()
    ordered = _ordered(documents)
    return Corpus(
        train=_capped([document for document in ordered if not document.is_validation], MAX_DOMAIN_BYTES),
        validation=_capped([document for document in ordered if document.is_validation], MAX_DOMAIN_BYTES),
    )


def chat_turns(domain: str, documents: tuple[Document, ...], share: float, seed: int) -> list[str]:
    """Turns of a block's beginning (user) and the whole block (assistant), `share` of the documents' characters.

    Python's blocks are functions (`chat_documents`); elsewhere a block stands between blank lines and begins with its
    first line, or with its first sentence where it has one line.
    """
    if domain == "python":
        return chat_documents(documents, share, seed)
    blocks = [block for document in documents for block in document.text.split("\n\n") if 80 <= len(block) < 1500]
    random.Random(seed).shuffle(blocks)  # noqa: S311 - an order, not a secret
    budget = int(share * sum(len(document.text) for document in documents))
    turns: list[str] = []
    for block in blocks:
        text = block.strip("\n")
        first = text.split("\n")[0] if "\n" in text else text.split(". ")[0]
        turn = f"{USER}{first}{END_OF_TURN}{ASSISTANT}{text}\n{END_OF_TURN}"
        if budget < len(turn):
            break
        budget -= len(turn)
        turns.append(turn)
    return turns


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _ordered(documents: list[Document]) -> list[Document]:
    return sorted(documents, key=lambda document: _digest("order:" + document.path))


def _capped(documents: list[Document], limit_bytes: int) -> tuple[Document, ...]:
    """The first documents that fit `limit_bytes` together."""
    left = limit_bytes
    chosen = []
    for document in documents:
        size = len(document.text.encode())
        if size <= left:
            left -= size
            chosen.append(document)
    return tuple(chosen)


def _source_texts(root: Path, suffixes: frozenset[str]) -> Iterator[Document]:
    """Every distinct file under `root` a person wrote: not minified, not a table of thousands of lines."""
    seen: set[bytes] = set()
    for path in sorted(root.rglob("*")):
        if path.suffix not in suffixes or not SKIPPED_PARTS.isdisjoint(path.parts) or ".min." in path.name:
            continue
        try:
            text = without_notice(path.read_text("utf-8").replace("\r\n", "\n"))
        except (OSError, UnicodeDecodeError):
            continue  # a dangling link, a folder of that name, or an older encoding
        digest = _digest("".join(text.split()))
        readable = max((len(line) for line in text.split("\n")), default=0) <= MAX_LINE_CHARACTERS
        if len(text) in FILE_CHARACTERS and readable and digest not in seen:
            seen.add(digest)
            yield Document(path.relative_to(root.parent).as_posix(), text)


def without_notice(text: str) -> str:
    """The text without the comments at its head, where they hold a licence: one notice stands on thousands of files."""
    head = LEADING_COMMENTS.match(text)
    return text[head.end() :] if head is not None and NOTICE.search(head.group()) else text


def _headers() -> list[Document]:
    """C and C++ headers; one library (a folder of `/usr/include`) gives at most `MAX_LIBRARY_BYTES`."""
    by_library: dict[str, list[Document]] = {}
    for document in _source_texts(C_ROOT, C_SUFFIXES):
        parts = Path(document.path).parts
        by_library.setdefault(parts[1] if len(parts) > 2 else "", []).append(document)
    return [document for library in by_library.values() for document in _capped(_ordered(library), MAX_LIBRARY_BYTES)]


def _scripts() -> list[Document]:
    return [document for root in JAVASCRIPT_ROOTS for document in _source_texts(root, frozenset({".js"}))]


def _manual_pages() -> list[Document]:
    """The prose of the English manual pages; a paragraph that stands on several pages is kept once."""
    pages = sorted(MANUAL_ROOT.glob("man*/*.gz"), key=lambda path: _digest("order:" + path.name))
    programs: Counter[str] = Counter()
    seen: set[bytes] = set()
    documents = []
    for path in pages:
        program = re.split(r"[-_.:]", path.name)[0]
        if programs[program] >= PAGES_PER_PROGRAM:
            continue
        programs[program] += 1
        try:
            source = gzip.decompress(path.read_bytes()).decode("utf-8")
        except (OSError, UnicodeDecodeError):
            continue  # a dangling link, or an older encoding
        kept = []
        for paragraph in prose(source):
            digest = _digest(paragraph)
            if digest not in seen:
                seen.add(digest)
                kept.append(paragraph)
        text = "\n\n".join(kept) + "\n"
        if len(text) >= FILE_CHARACTERS.start:
            documents.append(Document(path.relative_to(MANUAL_ROOT).as_posix(), text))
    return documents


def prose(source: str) -> list[str]:
    """The paragraphs of a manual page (man or mdoc macros) that are sentences, one line each, without markup."""
    paragraphs: list[str] = []
    words: list[str] = []
    until: str | None = None
    begun = False

    def end_paragraph() -> None:
        paragraph = re.sub(r"\s+([.,;:!?)])", r"\1", " ".join(" ".join(words).split()))
        words.clear()
        if _is_prose(paragraph):
            paragraphs.append(paragraph)

    for line in source.split("\n"):
        macro = line[1:].split(maxsplit=1) if line.startswith((".", "'")) else None
        name = (macro[0] if macro else "") if macro is not None else None
        if until is not None:
            until = None if name is not None and (name == until or line.rstrip() == "..") else until
            continue
        if name is None:
            if not line.strip():
                end_paragraph()
            elif begun and not line[0].isspace():
                words.append(_unescaped(line))
            continue
        begun = begun or name in HEADING_MACROS
        if name in VERBATIM:
            until = VERBATIM[name]
            if name != "UR":
                end_paragraph()
        elif name in HEADING_MACROS or name in PARAGRAPH_MACROS:
            end_paragraph()
        elif name in INLINE_MACROS and macro is not None and len(macro) > 1:
            words.append(_inline(name, macro[1]))
    end_paragraph()
    return paragraphs


def _inline(name: str, rest: str) -> str:
    """The text of a font macro's arguments: two-font macros join them, the others part them by a space."""
    arguments = [quoted or plain for quoted, plain in re.findall(r'"([^"]*)"|(\S+)', _unescaped(rest))]
    return ("" if name in TWO_FONT_MACROS else " ").join(arguments)


def _unescaped(text: str) -> str:
    for pattern, replacement in ESCAPES:
        text = pattern.sub(replacement, text)
    return text


def _is_prose(paragraph: str) -> bool:
    """Whether it reads as sentences: enough words, nearly all of them letters, and an end."""
    words = paragraph.split(" ")
    if len(words) not in PARAGRAPH_WORDS or not paragraph.rstrip("\"')").endswith((".", ":", "!", "?")):
        return False
    if not paragraph[0].isupper() or "\\" in paragraph or NOTICE.search(paragraph):
        return False
    return sum(PROSE_WORD.fullmatch(word) is not None for word in words) >= 0.8 * len(words)
