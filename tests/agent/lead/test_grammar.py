"""Grammars over small tokenizers: masks against languages that are listed, what cannot be compiled, what is hostile."""

from __future__ import annotations

import asyncio
import hashlib
import json
from types import SimpleNamespace

import pytest
from checkpoints import write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from ganglion.agent.lead import grammar as grammar_module
from ganglion.agent.lead.grammar import Constraint, Grammars, readable_tokenizer
from ganglion.wire.errors import Corrupt, Exhausted, Internal, InvalidRequest, Unsupported
from ganglion.wire.limits import GRAMMAR_BYTES
from ganglion.wire.nouns import PieceRef

EOS = 257
DEADLINE_S = 20.0


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return (folder / "tokenizer.json").read_bytes()


def grammars(stored: bytes, vocab: int = 283, eos: tuple[int, ...] = (EOS,)) -> Grammars:
    piece = PieceRef(hashlib.sha256(stored).hexdigest(), len(stored))
    facts = SimpleNamespace(
        name="m", tokenizer={"tokenizer.json": piece}, eos_ids=eos, geometry=SimpleNamespace(vocab=vocab)
    )
    return Grammars(facts, {piece.digest: memoryview(stored)}.__getitem__)


def lark(text: str) -> str:
    return json.dumps({"grammars": [{"lark_grammar": text}]})


def regex(pattern: str) -> str:
    return lark(f"start: /{pattern}/")


def schema(described) -> str:
    return json.dumps({"grammars": [{"json_schema": described}]})


def compiled(stored: bytes, text: str, **options) -> Constraint:
    async def compile_it() -> Constraint:
        async with asyncio.timeout(DEADLINE_S):
            return await grammars(stored, **options).compile(text)

    return asyncio.run(compile_it())


def allowed(constraint: Constraint) -> set[int]:
    return set(constraint.allowed.nonzero()[0].tolist())


words = st.lists(st.text("ab{é", min_size=0, max_size=4), min_size=1, max_size=6, unique=True)


@settings(max_examples=40, deadline=None)
@given(words=words)
def test_a_mask_is_what_the_language_says(byte_tokenizer, words):
    language = [word.encode() for word in words]
    constraint, said = compiled(byte_tokenizer, lark("start: " + " | ".join(json.dumps(word) for word in words))), b""
    while True:
        following = {word[len(said)] for word in language if word.startswith(said) and len(word) > len(said)}
        assert allowed(constraint) == following | ({EOS} if said in language else set())
        if not following:
            break
        said += bytes([max(following)])
        if constraint.take(said[-1]):
            assert [word for word in language if word.startswith(said)] == [said]
            break


def test_the_end_of_sequence_ends_it(byte_tokenizer):
    constraint = compiled(byte_tokenizer, regex("a*"), eos=(256, EOS))
    assert allowed(constraint) == {ord("a"), 256, EOS}
    assert not constraint.take(ord("a"))
    assert constraint.take(256)


@pytest.mark.parametrize("vocab", [258, 259, 283, 1000])
def test_rows_without_a_token_are_never_allowed(byte_tokenizer, vocab):
    constraint = compiled(byte_tokenizer, regex(r"(.|\n)*"), vocab=vocab)
    assert constraint.allowed.size == vocab
    # Bytes that UTF-8 never begins with are no text; the beginning-of-sequence token is none either.
    assert allowed(constraint) == {*range(0x80), *range(0xC2, 0xF5), EOS}


def test_a_vocabulary_smaller_than_the_tokenizer(byte_tokenizer):
    constraint = compiled(byte_tokenizer, regex("[a-z]é"), vocab=100)
    assert allowed(constraint) == {97, 98, 99}
    with pytest.raises(Internal, match="dead end after 1 tokens"):
        constraint.take(97)


def pieces(extra: list[str], decoder, **options) -> Tokenizer:
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *extra]
    tokenizer = Tokenizer(
        models.BPE(vocab={n: i for i, n in enumerate(names)}, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.decoder = decoder
    for name, value in options.items():
        setattr(tokenizer, name, value)
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<unk>", "<s>", "</s>")])
    return tokenizer


SENTENCEPIECE = {
    "replace": lambda: pieces(
        ["▁", "▁the", "a", "▁a", "é"],
        decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
        normalizer=normalizers.Replace(" ", "▁"),
    ),
    "metaspace": lambda: pieces(
        ["▁", "▁the", "a", "▁a", "é"],
        decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
        pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="never", split=False),
    ),
}


@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_sentencepiece_spaces_and_fallback_bytes(kind):
    tokenizer = SENTENCEPIECE[kind]()
    stored = tokenizer.to_str().encode()
    options = {"vocab": 300, "eos": (2,)}

    def said(text: str, *taken: int) -> set[str]:
        constraint = compiled(stored, regex(text), **options)
        for token in taken:
            assert not constraint.take(token)
        return {tokenizer.id_to_token(token) for token in allowed(constraint)}

    assert said("( [a-z]+)") == {"▁", "▁the", "▁a", "<0x20>"}
    assert said(
        "[^ab]",
    ) >= {"é", "▁", "<0xC3>", "<0x20>"}
    assert not said(r"(.|\n)*") & {"<unk>", "<s>"}
    assert said("中") == {"<0xE4>"}
    assert said("中", 3 + 0xE4, 3 + 0xB8) == {"<0xAD>"}
    assert "<0xA9>" in said("[é中]", 3 + 0xC3)


def test_special_tokens_are_drawn_only_where_they_are_named(byte_tokenizer):
    tokenizer = Tokenizer.from_str(byte_tokenizer.decode())
    tokenizer.add_special_tokens([AddedToken("<|call|>", special=True)])
    tokenizer.add_tokens([AddedToken("<tool>", special=False), AddedToken("  ", special=False)])
    call, tool, spaces = (tokenizer.token_to_id(name) for name in ("<|call|>", "<tool>", "  "))
    stored = tokenizer.to_str().encode()
    assert {one for one in allowed(compiled(stored, regex(r"(.|\n)*"))) if one > 255} == {EOS, spaces}
    constraint = compiled(stored, lark('start: <|call|> "x" <tool>'))
    for token in (call, ord("x"), tool):
        assert allowed(constraint) == {token}
        ended = constraint.take(token)
    assert ended


@pytest.mark.parametrize("text", ["<tool>x", "a<|call|>", "<tool><tool>", "</s>"])
def test_forced_text_that_is_spelled_like_a_special_token_is_text(byte_tokenizer, text):
    tokenizer = Tokenizer.from_str(byte_tokenizer.decode())
    tokenizer.add_special_tokens([AddedToken("<|call|>", special=True)])
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    constraint = compiled(tokenizer.to_str().encode(), schema({"const": text}))
    spelled, ended = json.dumps(text).encode(), False
    for byte in spelled:
        assert not ended
        assert allowed(constraint) == {byte}
        ended = constraint.take(byte)
    assert ended


def chain(rules: int) -> str:
    return lark("start: a0\n" + "\n".join(f"a{i}: a{i + 1}" for i in range(rules)) + f'\na{rules}: "z"')


REFUSED = {
    "not json": ("start: /a/", "form"),
    "no grammars": ("{}", "form"),
    "deep json": ("[" * 100_000, "form"),
    "a list": ("[1]", "form"),
    "none": ('{"grammars": []}', "empty grammars"),
    "a regex": (regex("("), "does not compile.*unclosed"),
    "a name": (lark("start: nothing"), "unknown name"),
    "a keyword": (schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
    "long": (regex("x" * GRAMMAR_BYTES), f"{GRAMMAR_BYTES} bytes"),
    "many rules": (chain(600), "602 rules"),
    "deep": (schema(json.loads('{"items":' * 300 + "{}" + "}" * 300)), "recursion"),
    "empty language": (lark("start: A\nA: /a/ & /b/"), "allows no answer"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_compile_is_refused_by_name(byte_tokenizer, kind):
    text, words = REFUSED[kind]
    with pytest.raises(InvalidRequest, match=words) as caught:
        compiled(byte_tokenizer, text)
    assert caught.value.param == "grammar"
    assert len(caught.value.message) < 600


def test_a_long_chain_of_references_is_no_crash(byte_tokenizer):
    count = 3500
    definitions = {f"a{i}": {"type": "array", "items": {"$ref": f"#/$defs/a{i + 1}"}} for i in range(count)}
    described = {"$ref": "#/$defs/a0", "$defs": definitions | {f"a{count}": {"type": "null"}}}
    assert ord("[") in allowed(compiled(byte_tokenizer, schema(described)))


DOUBLING = "start: a0\n" + "\n".join(f"a{i}: a{i + 1} a{i + 1}" for i in range(60)) + '\na60: "a"'


@pytest.mark.parametrize("text", [regex("((a{1,100}){1,100}){1,100}"), lark(DOUBLING)], ids=["lexer", "parser"])
def test_a_grammar_that_grows_too_complex_on_the_way(byte_tokenizer, text):
    constraint = compiled(byte_tokenizer, text)

    def to_the_end() -> None:
        while not constraint.take(ord("a")):
            pass

    with pytest.raises(InvalidRequest, match=r"cannot be followed after \d+ tokens") as caught:
        to_the_end()
    assert caught.value.param == "grammar"


async def test_a_grammar_that_takes_too_long_delays_the_next_one_and_no_more(byte_tokenizer, monkeypatch):
    # A chain of starred token rules takes time in the square of its length.
    slow = lark("start: R0\n" + "\n".join(f'R{i}: (R{i + 1} "a"|"b")*' for i in range(300)) + '\nR300: "z"')
    found = grammars(byte_tokenizer)
    await found.compile(regex("a"))
    monkeypatch.setattr(grammar_module, "GRAMMAR_COMPILE_S", 0.001)
    with pytest.raises(InvalidRequest, match=r"0.001 s to compile"):
        await found.compile(slow)
    with pytest.raises(Exhausted, match="another request"):
        await found.compile(regex("a"))
    monkeypatch.undo()
    async with asyncio.timeout(DEADLINE_S):
        assert allowed(await found.compile(regex("a"))) == {ord("a")}
        leaving = asyncio.create_task(found.compile(slow))
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        assert allowed(await found.compile(regex("b"))) == {ord("b")}


def test_a_model_that_cannot_follow_grammars_says_why(byte_tokenizer):
    with pytest.raises(Unsupported, match="end-of-sequence"):
        compiled(byte_tokenizer, regex("a"), eos=())
    with pytest.raises(Corrupt, match="300 is out of range"):
        compiled(byte_tokenizer, regex("a"), eos=(300,))
    for stored in (b"/etc/passwd", b"{}", b"\xff", b"[]", b"{" * 100_000, b'{"decoder": "Metaspace"' + b"[" * 5):
        with pytest.raises(Corrupt, match=r"tokenizer\.json of model m"):
            compiled(stored, regex("a"))
    nothing = Grammars(SimpleNamespace(name="m", tokenizer={}, eos_ids=(1,)), {}.__getitem__)
    with pytest.raises(Unsupported, match=r"no tokenizer\.json"):
        asyncio.run(nothing.compile(regex("a")))


def test_a_tokenizer_without_metaspace_is_taken_as_it_is(byte_tokenizer):
    assert readable_tokenizer(byte_tokenizer, "m") == byte_tokenizer.decode()
