"""Hostile tokenizers meet the limits of a child process; honest ones are tried once."""

# ruff: noqa: N802 - the ids of faults in names of tests are upper case

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from ganglion.gateway import trials
from ganglion.gateway.tokenizer_child import trial
from ganglion.gateway.tokenizing import ModelTokenizer
from ganglion.gateway.trials import PASSED_FILE, try_tokenizer
from ganglion.wire.errors import Corrupt


def replace(pattern: Any, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def write(folder: Path, tokenizer: Tokenizer, **parts: Any) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(tokenizer.to_str()) | parts))
    return path


HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "doubling": (
        {"normalizer": {"type": "Sequence", "normalizers": [replace({"String": "q"}, "qq")] * 30}},
        "times longer",
    ),
    "one letter, a book": ({"normalizer": replace({"Regex": "\\x{3a9}"}, "x" * 5000)}, "times longer"),
    "many steps": (
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}] * 80}},
        "steps",
    ),
    "decoding": ({"decoder": {"type": "Sequence", "decoders": [replace({"String": "a"}, "aa")] * 20}}, "times longer"),
    "in front of all": ({"normalizer": {"type": "Prepend", "prepend": "x" * 9_000_000}}, "before every text"),
    "many tokens": ({"normalizer": replace({"Regex": "[a-z]"}, "x" * 90)}, "tokens of"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_E6_what_a_trial_finds(name: str, tmp_path: Path, bytes_tokenizer: Tokenizer) -> None:
    parts, words = HOSTILE[name]
    assert words in trial(write(tmp_path, bytes_tokenizer, **parts))


async def test_E6_a_pattern_without_end_is_refused(tmp_path: Path, bytes_tokenizer: Tokenizer) -> None:
    split = {"type": "Split", "pattern": {"Regex": "(?:a|a)*(?:\\b\\B)"}, "behavior": "Isolated", "invert": False}
    write(tmp_path, bytes_tokenizer, pre_tokenizer=split)
    with pytest.raises(Corrupt, match="gives up"):
        await try_tokenizer(tmp_path)


async def test_E6_hostile_tokenizers_are_refused(tmp_path: Path, bytes_tokenizer: Tokenizer) -> None:
    write(tmp_path, bytes_tokenizer, **HOSTILE["doubling"][0])
    with pytest.raises(Corrupt, match="times longer"):
        await try_tokenizer(tmp_path)
    assert not (tmp_path / PASSED_FILE).exists()


@pytest.mark.parametrize(("limit", "value"), [("CPU_S", 1), ("MEMORY_BYTES", 200 << 20)])
async def test_E6_limits_end_the_child(
    limit: str, value: int, tmp_path: Path, bytes_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pattern that backtracks for ever, and a text that fills the memory, in children with small limits."""
    if limit == "CPU_S":
        split = {
            "type": "Split",
            "pattern": {"Regex": "(?:a+)+(?<!a)$"},
            "behavior": "Isolated",
            "invert": False,
        }
        parts: dict[str, Any] = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split] * 50}}
    else:
        parts = {"normalizer": replace({"Regex": "[a-z]"}, "x" * 1000)}
    write(tmp_path, bytes_tokenizer, **parts)
    script = tmp_path / "child.py"
    script.write_text(
        f"from ganglion.gateway import tokenizer_child\ntokenizer_child.{limit} = {value}\n"
        "tokenizer_child.TOKENS_PER_BYTE = 1 << 30\ntokenizer_child.main()\n"
    )
    started = trials.asyncio.create_subprocess_exec

    async def with_limit(*command: str, **options: Any) -> Any:
        return await started(command[0], str(script), *command[4:], **options)

    monkeypatch.setattr(trials.asyncio, "create_subprocess_exec", with_limit)
    with pytest.raises(Corrupt, match="processor time or"):
        await try_tokenizer(tmp_path)


async def test_honest_tokenizers_are_tried_once(
    tmp_path: Path, bytes_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, bytes_tokenizer)
    await try_tokenizer(tmp_path)
    assert ModelTokenizer(tmp_path).encode("a", with_specials=False) == [97]
    monkeypatch.setattr(trials.asyncio, "create_subprocess_exec", None)
    await try_tokenizer(tmp_path)


async def test_what_cannot_be_read_is_left_to_who_loads_it(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    await try_tokenizer(tmp_path)
    with pytest.raises(Corrupt, match="cannot be read"):
        ModelTokenizer(tmp_path)
