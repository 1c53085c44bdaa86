"""Tokens as text: what a server's words may mean, and what cannot be known from them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from ganglion.agent.speculation.http.checking import Choice, Differs
from ganglion.agent.speculation.http.echo import Echo, Habits
from ganglion.agent.speculation.http.texts import TokenTexts
from ganglion.models import demo_path
from ganglion.wire.errors import Corrupt, ProtocolViolation

TOKENIZER = Tokenizer.from_file(str(demo_path("demo") / "tokenizer.json"))
TEXTS = TokenTexts((demo_path("demo") / "tokenizer.json").read_bytes(), 2050, eos_ids=(0, 3), name="demo")


@given(st.text(max_size=40))
def test_ids_spell_their_text(text: str) -> None:
    ids = TOKENIZER.encode(text).ids
    assert TEXTS.text(ids) == text
    for token in ids:
        assert TEXTS.shows(token, TEXTS.label(token), first=False)


@given(st.characters(min_codepoint=0x80, exclude_categories=["Cs"]))
def test_a_character_of_several_tokens(letter: str) -> None:
    ids = TOKENIZER.encode(letter).ids
    found = TEXTS.spelled(letter, len(ids))
    assert found is None or TEXTS.text(found) == letter
    if len(ids) == len(letter.encode()):  # a token for each byte is the only way to do it in so many
        assert found == ids
    if len(ids) > 1:
        assert TEXTS.text(ids[:1]) is None
        assert TEXTS.only(TEXTS.label(ids[0])) is None


def test_labels() -> None:
    word = TOKENIZER.token_to_id("Ġself")
    assert TEXTS.label(word) == " self"
    assert TEXTS.only(" self") == word
    assert TEXTS.shows(word, "self", first=True)
    assert not TEXTS.shows(word, "self", first=False)
    assert TEXTS.label(3) == TEXTS.label(2049) == ""  # special; a row without a token
    assert TEXTS.shows(3, "<|end|>", first=False)
    assert TEXTS.only("") is None
    assert TEXTS.text([3, word]) == "<|end|> self"
    assert TEXTS.text([2049]) is None
    with pytest.raises(Corrupt, match=r"tokenizer\.json of model odd"):
        TokenTexts(b"{}", 4, eos_ids=(0,), name="odd")


def reply(text: str, drawn: str, tokens: list[str], rows: list[dict[str, float] | None], prompt: int, **other: object):
    usage = {"prompt_tokens": prompt, "completion_tokens": other.pop("count", 1)}
    logprobs = {"tokens": tokens, "top_logprobs": rows}
    choice = {"text": text + drawn, "logprobs": logprobs, "finish_reason": "length"} | other
    return {"choices": [choice], "usage": usage}


A, B, C = (TOKENIZER.token_to_id(one) for one in ("a", "b", "c"))
HALF = TOKENIZER.encode("é").ids  # the two bytes
ECHO = Echo("m", TEXTS, Habits(bos_id=0), 16, 0)


def test_level_choices_go_to_the_lower_id() -> None:
    rows = [None, {"c": -1.0, "b": -1.0}, {"c": -0.5, "a": -2.0}]
    found = ECHO.read(reply("aa", "c", ["a", "a", "c"], rows, 2), [A], [A], top=0)
    assert found == [Choice(min(B, C), -1.0, 0.0), Choice(C, -0.5, 1.5)]


def test_two_tokens_of_one_text() -> None:
    """A half of a character is believed where no other token of its text could be likelier, and else not."""
    text, window = TEXTS.text([A, *HALF]) or "", HALF
    for logprob, told in ((-0.1, 3), (-0.9, 0)):
        rows = [None, {"": logprob, "b": -3.0}, {"": logprob, "c": -3.0}, {"b": -0.1}]
        found = ECHO.read(reply(text, "b", ["a", "", "", "b"], rows, 3), [A], window, top=0)
        assert [one.token for one in found] == [*HALF, B][:told]


def test_a_character_that_is_drawn_whole() -> None:
    rows = [None, {"": -0.1}, {"": -0.1}]
    found = ECHO.read(reply("a", "é", ["a", "", ""], rows, 1, count=2), [A], [], top=0)
    assert [one.token for one in found] == HALF


def test_other_tokens() -> None:
    rows = [None, {"b": -0.1}, {"b": -0.1}, {"c": -0.1}, {"c": -0.1}]
    said = reply("abbc", "c", ["a", "b", "bc", "c"], rows[:4], 3)
    found = ECHO.read(said, [A, B], [B, C], top=0)
    assert [one.token for one in found] == [B]  # after "ab"; the server goes on otherwise
    with pytest.raises(Differs, match="token 2 is 'b' here and 'bc' at the server"):
        ECHO.read(said, [A, B, B], [C], top=0)


@pytest.mark.parametrize(
    "said",
    [
        reply("a", "c", ["a", "b"], [None, {"b": -0.1}], 1),  # drew another than it says
        reply("a", "b", ["a"], [None, {"b": -0.1}], 1),
        reply("a", "b", ["a", "b"], [None, {"b": 2.0}], 1),
        reply("a", "b", ["a", "b"], [None, {"b": "high"}], 1),
        reply("x", "b", ["a", "b"], [None, {"b": -0.1}], 1),  # echoes another prompt
        reply("a", "", ["a"], [None], 1, count=0),
        {"choices": [{"text": "ab"}], "usage": {}},
        {"choices": [7]},
        [],
    ],
)
def test_answers_that_are_none(said: object) -> None:
    with pytest.raises(ProtocolViolation):
        ECHO.read(said, [A], [], top=0)
