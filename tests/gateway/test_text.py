"""From tokens to text: stop strings, detokenizing, log-probability entries, each against a dumb reference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from ganglion.gateway.detokenizing import PROMPT_TAIL_TOKENS
from ganglion.gateway.stopping import StopMatcher
from ganglion.gateway.tokenizing import ModelTokenizer
from ganglion.gateway.transcript import Drawn, Transcript
from ganglion.wire.errors import Corrupt, NotFound

FEW = settings(max_examples=150, deadline=None)


def cut_by_hand(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The dumb reference: with the whole text at hand, cut at the first completed stop string."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


@FEW
@given(
    parts=st.lists(st.text("abc", max_size=4), max_size=12),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=4),
)
@example(parts=["ab", "abc"], stops=["abc"])
@example(parts=["abc"], stops=["abc", "b"])
def test_stop_strings_across_borders(parts: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    given_out = ""
    for at, part in enumerate(parts):
        given_out += matcher.push(part)
        expected, stopped = cut_by_hand("".join(parts[: at + 1]), stops)
        assert matcher.stopped == stopped
        # never too early, and never held without a reason
        assert expected.startswith(given_out)
        held = expected[len(given_out) :]
        assert not held or any(stop.startswith(held) for stop in stops)
    given_out += matcher.finish()
    assert given_out == cut_by_hand("".join(parts), stops)[0]


# --- detokenizing


def byte_fallback_tokenizer() -> Tokenizer:
    """As Llama 2's: pieces with U+2581 for spaces, single bytes as <0xNN>, the first space stripped."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        "\u2581a",
        "b",
        "é",
        "\u2581\u2581",
    ]
    tokenizer = Tokenizer(models.BPE(vocab={name: at for at, name in enumerate(pieces)}, merges=[], byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return tokenizer


def metaspace_tokenizer() -> Tokenizer:
    pieces = ["<unk>", "</s>", "\u2581", "\u2581a", "b", "\u2581b", "é"]
    tokenizer = Tokenizer(models.BPE(vocab={name: at for at, name in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    return tokenizer


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory, bytes_tokenizer: Tokenizer) -> dict[str, ModelTokenizer]:
    made = {"bytes": bytes_tokenizer, "fallback": byte_fallback_tokenizer(), "metaspace": metaspace_tokenizer()}
    found = {}
    for name, tokenizer in made.items():
        folder = tmp_path_factory.mktemp(name)
        tokenizer.save(str(folder / "tokenizer.json"))
        found[name] = ModelTokenizer(folder)
    return found


def streamed(tokenizer: ModelTokenizer, ids: Sequence[int], prompt: Sequence[int] = ()) -> list[str]:
    detokenizer = tokenizer.detokenizer(prompt)
    return [detokenizer.push(token) for token in ids] + [detokenizer.finish()]


@FEW
@given(content=st.binary(max_size=24), text=st.text(max_size=12), specials=st.booleans())
@example(content=b"\xff\xf0\x9f\x98", text="\U0001f600", specials=True)
@example(content="a\ufffdb".encode(), text="", specials=False)
def test_streamed_bytes_are_the_whole_text(
    loaded: dict[str, ModelTokenizer], content: bytes, text: str, specials: bool
) -> None:
    ids = [*content, *([257] if specials else []), *text.encode(), *content]
    assert "".join(streamed(loaded["bytes"], ids)) == loaded["bytes"].decode(ids)


@FEW
@given(name=st.sampled_from(["fallback", "metaspace"]), data=st.data())
def test_streamed_pieces_are_the_whole_text(loaded: dict[str, ModelTokenizer], name: str, data: st.DataObject) -> None:
    highest = 263 if name == "fallback" else 6
    interesting = st.sampled_from([2, 259, 260, 261, 262, 263, 0x0A + 3, 0xE2 + 3, 0x82 + 3, 0xAC + 3, 0xFF + 3])
    token = interesting if name == "fallback" else st.integers(0, highest)
    ids = data.draw(st.lists(token, max_size=20))
    tokenizer = loaded[name]
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def test_text_that_goes_on_keeps_its_space(loaded: dict[str, ModelTokenizer]) -> None:
    tokenizer = loaded["fallback"]
    assert "".join(streamed(tokenizer, [260, 261], prompt=[260] * (PROMPT_TAIL_TOKENS + 2))) == " ab"
    assert "".join(streamed(tokenizer, [260, 261])) == "ab"
    half = [0xE2 + 3, 0x82 + 3]
    assert "".join(streamed(tokenizer, [0xAC + 3, 261], prompt=[260, *half])) == "€b"


def test_characters_come_when_they_are_complete(loaded: dict[str, ModelTokenizer]) -> None:
    assert streamed(loaded["bytes"], list("a€b".encode())) == ["a", "", "", "€", "b", ""]


def test_token_bytes(loaded: dict[str, ModelTokenizer]) -> None:
    assert [loaded["bytes"].token_bytes(byte) for byte in range(256)] == [bytes([byte]) for byte in range(256)]
    assert loaded["bytes"].token_bytes(257) == b"</s>"
    assert loaded["fallback"].token_bytes(0xE2 + 3) == b"\xe2"
    assert loaded["fallback"].token_bytes(260) == b" a"
    assert loaded["fallback"].token_bytes(99999) == b""


# --- transcripts


@FEW
@given(
    text=st.text("abé€", max_size=20),
    stops=st.lists(st.text("abé€", min_size=1, max_size=3), max_size=2),
    ended=st.booleans(),
)
def test_transcript_against_reference(
    loaded: dict[str, ModelTokenizer], text: str, stops: list[str], ended: bool
) -> None:
    ids = [*text.encode(), *([257] if ended else [])]
    transcript = Transcript(loaded["bytes"].detokenizer(), stops, [257])
    found, offsets, taken = "", [], []
    for token in ids:
        delta = transcript.push(Drawn(token))
        found += delta.text
        offsets += [placed.offset for placed in delta.tokens]
        taken += [placed.drawn.token for placed in delta.tokens]
        assert all(offset < len(found) for offset in offsets)
        if transcript.stopped:
            break
    rest = transcript.finish()
    offsets += [placed.offset for placed in rest.tokens]
    taken += [placed.drawn.token for placed in rest.tokens]
    expected, stopped = cut_by_hand(text, stops)
    assert found + rest.text == expected
    assert transcript.stopped == stopped
    # an entry for every byte whose character begins before the cut, with that character's place
    by_hand = [(at, byte) for at, character in enumerate(expected) for byte in character.encode()]
    assert list(zip(offsets, taken, strict=True)) == by_hand
    assert transcript.tokens <= len(ids)


# --- files of a tokenizer


def test_foreign_files(tmp_path: Path, bytes_tokenizer: Tokenizer) -> None:
    with pytest.raises(NotFound, match=r"tokenizer\.json"):
        ModelTokenizer(tmp_path)
    for content in (b"", b"{}", b"[1", b'{"model": {"type": "BPE", "vocab": 3}}', b"\xff\xfe"):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(Corrupt, match=r"tokenizer\.json"):
            ModelTokenizer(tmp_path)
    bytes_tokenizer.save(str(tmp_path / "tokenizer.json"))
    for content in (b"[]", b"{", b"\xff"):
        (tmp_path / "tokenizer_config.json").write_bytes(content)
        with pytest.raises(Corrupt, match=r"tokenizer_config\.json"):
            ModelTokenizer(tmp_path)


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path, bytes_tokenizer: Any) -> None:
    changed = Tokenizer.from_str(bytes_tokenizer.to_str())
    changed.enable_truncation(4)
    changed.enable_padding(length=64)
    changed.save(str(tmp_path / "tokenizer.json"))
    tokenizer = ModelTokenizer(tmp_path)
    assert tokenizer.encode("hello world", with_specials=True) == [256, *b"hello world"]
    assert tokenizer.encode("hello <s>", with_specials=False) == [*b"hello ", 256]


def test_where_the_template_comes_from(tmp_path: Path, bytes_tokenizer: Tokenizer) -> None:
    bytes_tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = tmp_path / "tokenizer_config.json"
    config.write_text(
        '{"chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]}'
    )
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": {"content": "<s>"}, "eos_token": "</s>"}')
    template = ModelTokenizer(tmp_path).template
    assert template is not None
    assert (template.source, template.specials) == ("D", {"bos_token": "<s>", "eos_token": "</s>"})
    (tmp_path / "chat_template.jinja").write_text("J")
    template = ModelTokenizer(tmp_path).template
    assert template is not None
    assert template.source == "J"
