"""A trial of a foreign tokenizer.json in a process of its own: `python -m ganglion.gateway.tokenizer_child PATH`.

The gateway loads a tokenizer only after this process has loaded it and used it within CPU_S seconds of processor time
and MEMORY_BYTES of address space. It says {} or {"fault": ...} in one JSON line; no line: a limit was met.

A pass holds for texts like those that are tried, which hold every string that the file's own rules name. A regular
expression that is slow on one text only can still be slow on it.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CPU_S = 20
MEMORY_BYTES = 4 << 30
STEPS = 64  # of normalizer, pre-tokenizer, post-processor and decoder together
GROWTH = 4096  # of a text by replacements, at most
PREPENDED_CHARACTERS = 64
TOKENS_PER_BYTE = 32  # of a tried text; NFKD makes 18 characters of one
TRIED_STRINGS = 4096
RUN_CHARACTERS = 4096

_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_RUNS = ("a", " ", "1", "\n", "é", "!", "ab ", "\U0001f600", "_")
_TEXT = (
    "The quick brown fox, 1234567.89! <s></s> naïve façade — «ok» 你好世界 \U0001f468‍\U0001f469‍\U0001f467 ﷺ\n\n\t"
    + "".join(map(chr, range(32, 127)))
)


def main() -> None:
    """Confine this process, try the file, say what was found."""
    _confine()
    try:
        fault = trial(Path(sys.argv[1]))
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        fault = "its library gives up on a page of plain text"  # Oniguruma counts its steps back
    sys.stdout.write(json.dumps({"fault": fault} if fault else {}) + "\n")


def trial(path: Path) -> str:
    """What is wrong with a tokenizer.json as far as its cost goes; empty when nothing is."""
    described = json.loads(path.read_bytes())
    nodes = [node for part in _PARTS for node in _nodes(described.get(part))]
    if len(nodes) > STEPS:
        return f"it has {len(nodes)} steps; at most {STEPS} are accepted"
    longest = max((len(str(node.get("prepend", ""))) for node in nodes), default=0)
    if longest > PREPENDED_CHARACTERS:
        return f"it puts {longest} characters before every text; at most {PREPENDED_CHARACTERS} are accepted"
    growth = math.prod(map(_growth, nodes))
    if growth > GROWTH:
        return f"its replacements can make a text {growth:.3g} times longer; at most {GROWTH} are accepted"

    from tokenizers import Tokenizer

    tokenizer: Any = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    named = [text for part in _PARTS for text in _strings(described.get(part))][:TRIED_STRINGS]
    for text in (_TEXT, *(run * (RUN_CHARACTERS // len(run)) for run in _RUNS), " ".join(named)[: 1 << 20]):
        ids = tokenizer.encode(text, add_special_tokens=True).ids
        if len(ids) > TOKENS_PER_BYTE * (len(text.encode()) + 16):
            return f"it makes {len(ids)} tokens of {len(text.encode())} bytes"
        tokenizer.decode(ids, skip_special_tokens=True)
    for token in range(min(tokenizer.get_vocab_size(), TRIED_STRINGS)):
        tokenizer.decode([token])
    return ""


def _confine() -> None:
    if sys.platform == "win32":
        return  # the parent's wall clock limit remains
    import resource

    for limit, value in (
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_CPU, CPU_S),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))


def _nodes(part: Any) -> Iterator[dict[str, Any]]:
    """Every step of a part, those inside of others too."""
    if isinstance(part, dict):
        if isinstance(part.get("type"), str):
            yield part
        part = list(part.values())
    if isinstance(part, list):
        for inner in part:
            yield from _nodes(inner)


def _strings(part: Any) -> Iterator[str]:
    if isinstance(part, str):
        yield part
    elif isinstance(part, dict | list):
        for inner in part.values() if isinstance(part, dict) else part:
            yield from _strings(inner)


def _growth(node: dict[str, Any]) -> float:
    """By how much one step can make a text longer, where a chain of such steps could be without bound."""
    if node["type"] == "ByteLevel":
        return 2.0
    if node["type"] != "Replace":
        return 1.0
    pattern, content = node.get("pattern"), node.get("content")
    taken = len(str(pattern.get("String", ""))) if isinstance(pattern, dict) else 0
    return max(1.0, len(str(content)) / max(1, taken))


if __name__ == "__main__":
    main()
