"""A real HTTP server on loopback that answers as OpenAI-compatible ones do, streamed, in one of several moods."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from loopback_http import LoopbackServer, Quiet

Answers = Callable[[Any], Iterator[bytes]]  # from the request's document to what is written, as it is


@dataclass
class ExpertServer(LoopbackServer):
    """`answers`: what it writes after the headers. `seen`: path, headers and document of every request.

    hold: while it is clear a stalling answer waits. closed: requests whose client went away in the middle.
    """

    answers: Answers
    status: int = 200
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "text/event-stream"})
    seen: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)
    stopping: threading.Event = field(default_factory=threading.Event)
    gone: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> ExpertServer:
        server = self

        class Handler(Quiet, BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.send_response(200)
                self.end_headers()

            def do_POST(self) -> None:
                document = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.seen.append((self.path, {k.lower(): v for k, v in self.headers.items()}, document))
                self.send_response(server.status)
                for name, value in server.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                try:
                    for part in server.answers(document):
                        self.wfile.write(part)
                        self.wfile.flush()
                except (BrokenPipeError, ConnectionResetError):
                    server.gone.set()

        self.start(Handler)
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self.stop()

    def stalling(self, first: str = "") -> Answers:
        """Says `first`, then nothing until its client goes away."""

        def answers(_: Any) -> Iterator[bytes]:
            if first:
                yield chunk(first)
            while not self.stopping.wait(0.02):
                yield b": still here\n\n"

        return answers


def event(document: Any) -> bytes:
    return b"data: " + json.dumps(document).encode() + b"\n\n"


def chunk(text: str, logprob: float | None = None, reason: str | None = None) -> bytes:
    choice: dict[str, Any] = {"index": 0, "delta": {"content": text}, "finish_reason": reason}
    if logprob is not None:
        choice["logprobs"] = {"content": [{"token": text, "logprob": logprob}]}
    return event({"object": "chat.completion.chunk", "choices": [choice]})


def saying(text: str, *, logprob: float | None = None, claims: int | None = None) -> Answers:
    """`text` by characters; `claims`: tokens that its usage names, where it has one."""

    def answers(document: Any) -> Iterator[bytes]:
        given = logprob if document.get("logprobs") else None
        said = text[: document["max_tokens"]]
        if "prompt" in document:
            for letter in said:
                logprobs = None if given is None else {"tokens": [letter], "token_logprobs": [given]}
                yield event({"choices": [{"index": 0, "text": letter, "logprobs": logprobs, "finish_reason": None}]})
            yield event({"choices": [{"index": 0, "text": "", "finish_reason": "stop"}]})
        else:
            for letter in said:
                yield chunk(letter, given)
            yield chunk("", None, "stop" if len(said) == len(text) else "length")
        usage = {"prompt_tokens": 7, "completion_tokens": len(said) if claims is None else claims}
        yield event({"choices": [], "usage": usage})
        yield b"data: [DONE]\n\n"

    return answers


def writing(*parts: bytes) -> Answers:
    return lambda _: iter(parts)
