"""Grammars at the lead: llguidance over the model's tokenizer says which tokens may come next.

What llguidance makes of a tokenizer: byte-level and byte-fallback tokens stand for their bytes, so that any text can be
said, half characters on the way. Special tokens, and added ones that are spelled <like this>, are no text: they are
drawn only where a grammar names them. The end-of-sequence tokens of the manifest may be drawn where the grammar is
complete. Text that a grammar forces is drawn in the tokens that the tokenizer itself would make of it.

Masks are computed when a token has been drawn, before the next step is announced, which carries them: normally in 20 to
300 microseconds for 128,000 tokens, as much as a hand-over between threads. Tokens that llguidance could append by
itself (fast-forward) are not used: a forced token has a mask of one, so the text is the same, and its row has to be run
whoever chooses it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

from ganglion.wire.deep_thread import STACK_BYTES, in_deep_thread
from ganglion.wire.errors import Corrupt, Exhausted, GanglionError, Internal, InvalidRequest, Unsupported
from ganglion.wire.limits import (
    GRAMMAR_BYTES,
    GRAMMAR_COMPILE_S,
    GRAMMAR_MASK_S,
    GRAMMAR_RULES,
    SESSIONS_QUEUED,
)
from ganglion.wire.nouns import TOKENIZER_FILE, Manifest
from ganglion.wire.shares import OpenPiece

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_MESSAGE_CHARACTERS: Final = 400


T = TypeVar("T")


class Constraint:
    """A session's place in its grammar. `allowed` [vocab] bool: the tokens that may be drawn next, never none."""

    def __init__(self, tokenizer: LLTokenizer, matcher: LLMatcher, vocab: int) -> None:
        """Raises InvalidRequest when no token of the model can begin an answer, or the grammar is too complex."""
        self._tokenizer = tokenizer
        self._matcher = matcher
        self._vocab = vocab
        self._tokens = 0
        self._looked: tuple[tuple[int, ...], list[NDArray[np.bool_]]] | None = None  # what `ahead` found here
        self.allowed: NDArray[np.bool_] = self._next()

    def take(self, token: int) -> bool:
        """Go on by a drawn token; True when nothing can follow.

        Raises InvalidRequest when the grammar has become too complex, Internal when nothing can follow and must.
        """
        began = time.perf_counter()
        self._tokens += 1
        self._looked = None
        if not self._matcher.consume_token(token):
            self._raise()
        if self._matcher.is_stopped():
            return True
        self.allowed = self._next()
        took_s = time.perf_counter() - began
        if took_s > GRAMMAR_MASK_S:
            raise InvalidRequest(
                f"the grammar is too complex: the mask after {self._tokens} tokens took {took_s:.1f} s,"
                f" at most {GRAMMAR_MASK_S} s are spent on one",
                param="grammar",
            )
        return False

    def ahead(self, tokens: Sequence[int]) -> list[NDArray[np.bool_]]:
        """What may be drawn after each of `tokens`, as far as they may be drawn and something can follow them."""
        if self._looked and self._looked[0] == tuple(tokens):
            return self._looked[1]
        found: list[NDArray[np.bool_]] = []
        here, allowed = self._matcher, self.allowed
        self._matcher = here.deep_copy()
        try:
            for token in tokens:
                if not allowed[token] or not self._matcher.consume_token(token) or self._matcher.is_stopped():
                    break
                allowed = self._next()
                found.append(allowed)
        except GanglionError:
            pass  # if it comes to that, the token is drawn and the error said then
        finally:
            self._matcher = here
        self._looked = tuple(tokens[: len(found)]), found
        return found

    def _next(self) -> NDArray[np.bool_]:
        packed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            self._raise()  # its mask would let the answer end here
        bits = np.unpackbits(packed, bitorder="little")[: self._vocab]
        allowed = np.zeros(self._vocab, np.bool_)  # rows beyond the tokenizer's ids are padding
        allowed[: bits.size] = bits
        these = np.flatnonzero(allowed[: bits.size])
        if these.size == 1 and not self._matcher.validate_tokens(these.tolist()):
            # Forced text that is spelled like a special token was tokenized to it, which the matcher then refuses.
            forced = self._matcher.compute_ff_bytes().decode(errors="ignore")
            allowed[these] = False
            allowed[[token for token in self._tokenizer.greedy_tokenize(forced)[:1] if token < self._vocab]] = True
        if not allowed.any():
            self._raise_dead_end()
        return allowed

    def _raise(self) -> NoReturn:
        reason = self._matcher.get_error()
        if reason.startswith("NoExtension"):
            self._raise_dead_end()
        raise InvalidRequest(
            f"the grammar cannot be followed after {self._tokens} tokens: {_bounded(reason)}", param="grammar"
        )

    def _raise_dead_end(self) -> NoReturn:
        if self._tokens == 0:
            raise InvalidRequest("the grammar allows no answer: no token of the model can begin one", param="grammar")
        raise Internal(
            f"the grammar is at a dead end after {self._tokens} tokens: none of the model's {self._vocab} fits next"
        )


class Grammars:
    """Compiles the grammars of one model; its tokenizer is read at the first one."""

    def __init__(self, manifest: Manifest, open_piece: OpenPiece) -> None:
        self._manifest = manifest
        self._open_piece = open_piece
        self._tokenizer: LLTokenizer | None = None
        self._turn = asyncio.Lock()
        self._waiting = 0
        self._late: Future[Constraint] | None = None

    async def compile(self, grammar: str) -> Constraint:
        """The beginning of `grammar` (llguidance's JSON).

        Raises InvalidRequest (param grammar: too long, does not compile, takes too long), Unsupported (no tokenizer or
        no end-of-sequence token), Exhausted (too many wait).
        """
        check_grammar(grammar)
        if self._waiting >= SESSIONS_QUEUED:
            raise Exhausted(f"{self._waiting} grammars wait to be compiled; try again later")
        self._waiting += 1
        try:
            async with self._turn:
                return await self._compile(grammar)
        finally:
            self._waiting -= 1

    async def _read(self) -> LLTokenizer:
        if self._tokenizer is not None:
            return self._tokenizer
        # llguidance holds Python's lock while it reads a tokenizer, so other sessions wait for it, once.
        tokenizer = await asyncio.wrap_future(_in_thread(self._load))
        self._tokenizer = tokenizer
        return tokenizer

    async def _compile(self, grammar: str) -> Constraint:
        if self._late is not None:  # nothing ends a thread; two of them would take two cores
            done, _ = await asyncio.wait((asyncio.wrap_future(self._late),), timeout=GRAMMAR_COMPILE_S)
            if not done:
                raise Exhausted("a grammar of another request is still being compiled; try again later")
        tokenizer = await self._read()
        self._late = _in_thread(lambda: self._start(tokenizer, grammar))
        try:
            return await asyncio.wait_for(asyncio.wrap_future(self._late), GRAMMAR_COMPILE_S)
        except TimeoutError:
            raise InvalidRequest(
                f"the grammar took more than {GRAMMAR_COMPILE_S} s to compile; make it simpler", param="grammar"
            ) from None
        finally:
            if self._late.done():
                self._late = None

    def _load(self) -> LLTokenizer:
        from llguidance import LLTokenizer  # an agent without grammars does not load it

        name, piece = self._manifest.name, self._manifest.tokenizer.get(TOKENIZER_FILE)
        if piece is None or not self._manifest.eos_ids:
            missing = TOKENIZER_FILE if piece is None else "end-of-sequence token"
            raise Unsupported(f"model {name} has no {missing}, which a grammar needs", param="grammar")
        with self._open_piece(piece.digest) as view:
            text = readable_tokenizer(bytes(view), name)
        try:
            return LLTokenizer(text, eos_token=list(self._manifest.eos_ids))
        except ValueError as error:
            raise Corrupt(f"{TOKENIZER_FILE} of model {name}: {_bounded(str(error))}") from error

    def _start(self, tokenizer: LLTokenizer, grammar: str) -> Constraint:
        from llguidance import LLMatcher, LLParserLimits

        # Messages without the parser's state: they go to the client.
        matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))
        if matcher.is_error():
            raise InvalidRequest(f"the grammar does not compile: {_bounded(matcher.get_error())}", param="grammar")
        return Constraint(tokenizer, matcher, self._manifest.geometry.vocab)


def check_grammar(grammar: str) -> None:
    """Raises InvalidRequest (param grammar) for text that is too long, of another form, or of too many Lark rules."""
    if len(grammar) > GRAMMAR_BYTES or len(grammar.encode()) > GRAMMAR_BYTES:
        raise InvalidRequest(f"the grammar has more than {GRAMMAR_BYTES} bytes", param="grammar")
    try:
        parsed = json.loads(grammar)
        # A rule begins on a line of its own.
        lines = [line for one in parsed["grammars"] for line in (one.get("lark_grammar") or "").splitlines()]
        rules = sum(":" in line for line in lines)
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        raise InvalidRequest(
            'the grammar is not of the form {"grammars": [{"json_schema": ...} or {"lark_grammar": ...}]}',
            param="grammar",
        ) from None
    if rules > GRAMMAR_RULES:
        raise InvalidRequest(f"the grammar has {rules} rules, at most {GRAMMAR_RULES} are compiled", param="grammar")


def readable_tokenizer(stored: bytes, model: str) -> str:
    """A tokenizer.json as llguidance reads it rightly; raises Corrupt for what is no JSON object.

    llguidance would open text that is no object as a path, and takes the space of a Metaspace decoder for a letter.
    """
    try:
        text = stored.decode()
        if not text.startswith("{"):
            raise ValueError("it is no JSON object")
        if '"Metaspace"' not in text:
            return text
        parsed = json.loads(text)
        parsed["decoder"] = _without_metaspace(parsed.get("decoder"))
        return json.dumps(parsed)
    except (ValueError, RecursionError) as error:
        raise Corrupt(f"{TOKENIZER_FILE} of model {model}: {_bounded(str(error))}") from error


def _without_metaspace(decoder: Any) -> Any:
    if not isinstance(decoder, dict):
        return decoder
    if decoder.get("type") == "Sequence":
        return decoder | {"decoders": [_without_metaspace(one) for one in decoder.get("decoders", ())]}
    if decoder.get("type") == "Metaspace":
        return {"type": "Replace", "pattern": {"String": decoder.get("replacement", "\u2581")}, "content": " "}
    return decoder


def _bounded(message: str) -> str:
    """A message of llguidance, which may quote the whole grammar, cut to what a person reads."""
    line = " ".join(message.replace("<non-verbose/>", "").split())
    return line if len(line) <= _MESSAGE_CHARACTERS else line[:_MESSAGE_CHARACTERS] + " ..."


def _in_thread(function: Callable[[], T]) -> Future[T]:
    try:
        return in_deep_thread(function, panicked=lambda error: Internal(f"llguidance failed: {_bounded(str(error))}"))
    except RuntimeError as error:
        raise Exhausted(f"no thread with a stack of {STACK_BYTES >> 20} MiB for a grammar: {error}") from error
