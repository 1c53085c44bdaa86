"""A server with OpenAI's API as the verifier of drafted tokens: exact for greedy decoding, refused for everything else.

    verifier = HttpVerifier("http://host:8000/v1", texts, key=...)
    stream = await verifier.open(Open(prompt=..., contract=...))       # then as with a lead of our own

The server knows nothing of drafts. This end holds the queue of them (`speculation.queue`), turns each window into one
request (`checking.Dialect`) and the answer into the outcome that a lead would have told. What the server draws is the
likeliest token of each position by its own log-probabilities; where two are level, the lower id.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from ganglion.agent.speculation.http.checking import Dialect
from ganglion.agent.speculation.http.client import HttpClient, Timeouts
from ganglion.agent.speculation.http.dialects import find_dialect
from ganglion.agent.speculation.http.refusals import check_open, check_terms
from ganglion.agent.speculation.http.stream import HttpStream
from ganglion.agent.speculation.http.texts import TokenTexts
from ganglion.proto import lane_pb2
from ganglion.wire.errors import Unavailable

WINDOW_TOKENS: Final = 16
CREDIT_TOKENS: Final = 128
log = logging.getLogger(__name__)


class HttpVerifier:
    """A `Verifier`. It asks the server what it is when the first session opens, and again after it was away."""

    def __init__(
        self,
        url: str,
        texts: TokenTexts,
        *,
        model: str | None = None,
        key: str | None = None,
        bos_id: int | None = None,
        tokenizer_digest: bytes = b"",
        window_tokens: int = WINDOW_TOKENS,
        credit_tokens: int = CREDIT_TOKENS,
        timeouts: Timeouts | None = None,
    ) -> None:
        """`texts`, `bos_id`, `tokenizer_digest`: of the tokenizer that drafter and server share. `model`: as the server
        names it; None: the only one. Raises InvalidRequest for a URL that is none.
        """
        self._client = HttpClient(url, key=key, timeouts=timeouts)
        self._texts = texts
        self._wanted = model
        self._bos_id = bos_id
        self._tokenizer_digest = tokenizer_digest
        self._window_tokens = window_tokens
        self._credit_tokens = credit_tokens
        self._found: Dialect | None = None
        self._finding = asyncio.Lock()
        self.name = self._client.where

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def dialect(self) -> Dialect:
        """How the server is spoken with; raises what `find_dialect` raises."""
        async with self._finding:
            if self._found is None:
                model, self._found = await find_dialect(
                    self._client,
                    self._texts,
                    model=self._wanted,
                    bos_id=self._bos_id,
                    window_tokens=self._window_tokens,
                )
                self.name = f"{model} at {self._client.where}"
                log.info("drafts are verified by %s: %s", self.name, self._found.title)
            return self._found

    async def open(self, request: lane_pb2.Open) -> HttpStream:
        """Begin a session.

        Raises Unsupported for what a server over HTTP cannot do, InvalidRequest, ContextExceeded, Unavailable (and its
        kinds) where the server is away, Exhausted, Unauthenticated.
        """
        check_open(request, self._texts, self._tokenizer_digest, self.name)
        try:
            dialect = await self.dialect()
        except Unavailable:
            self._found = None
            raise
        check_terms(request, dialect, self.name)
        return HttpStream(
            request, self._client, dialect, name=self.name, credit_tokens=self._credit_tokens, away=self._forget
        )

    def _forget(self) -> None:
        """The server was away: it may be another one when it is back."""
        self._found = None
