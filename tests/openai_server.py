"""A small HTTP server over a cut model of ours that says what vLLM, llama.cpp's server and llama-cpp-python's say.

It runs the model (the dumb runner, the whole prompt each time) and answers as they do, habits included, so that what
verifies by them can be tested where they are not installed. Their shapes were taken from their sources, and those of
llama.cpp's two from running them: llama-cpp-python 0.3.36 and the llama.cpp that it holds.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any, Literal

import numpy as np
from loopback_http import LoopbackServer, Quiet
from reference_runner import Runner
from tokenizers import Tokenizer

Speaks = Literal["vllm", "llama-server", "llama-cpp-python", "echo"]
# what is said instead of an answer: (status, headers, body); "drop" closes the connection
Fault = Callable[[str, Any], tuple[int, dict[str, str], bytes] | Literal["drop"] | None]


@dataclass
class ModelServer(LoopbackServer):
    """One model behind a port of loopback; a context manager. `seen`: paths and documents of requests, in order.

    begins: it puts the beginning-of-text token before a text (llama-cpp-python with add_bos_token).
    """

    runner: Runner
    tokenizer: Tokenizer
    speaks: Speaks
    bos_id: int = 0
    begins: bool = False
    context: int = 1024
    slots: int = 8
    key: str | None = None
    name: str = "demo"
    fault: Fault = lambda path, document: None
    seen: list[tuple[str, Any]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    rows: dict[tuple[int, ...], np.ndarray] = field(default_factory=dict)  # servers of one model may share them

    def __enter__(self) -> ModelServer:
        server = self

        class Handler(Quiet, BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._answer(None)

            def do_POST(self) -> None:
                self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def _answer(self, document: Any) -> None:
                wrong = server.key is not None and self.headers.get("Authorization") != f"Bearer {server.key}"
                found = (401, {}, b'{"error": {"message": "bad key"}}') if wrong else server.answer(self.path, document)
                if found == "drop":
                    self.close_connection = True
                    return
                status, headers, body = found
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self.start(Handler)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def answer(self, path: str, document: Any) -> Any:
        with self.lock:  # as llama-cpp-python has it
            self.seen.append((path, document))
            if (fault := self.fault(path, document)) is not None:
                return fault
            try:
                found = self._found(path, document)
            except _RefusedError as refused:
                return (
                    refused.status,
                    {},
                    json.dumps({"error": {"message": str(refused), "code": refused.code}}).encode(),
                )
        if found is None:
            return 404, {}, b'{"detail":"Not Found"}'
        return 200, {"Content-Type": "application/json"}, json.dumps(found).encode()

    def _found(self, path: str, document: Any) -> Any:
        own = self.speaks == "llama-server"
        match path:
            case "/v1/models":
                model: dict[str, Any] = {"id": self.name, "object": "model"}
                model |= {"max_model_len": self.context} if self.speaks == "vllm" else {}
                model |= {"meta": {"n_vocab": self.runner.manifest.geometry.vocab}} if own else {}
                return {"object": "list", "data": [model]}
            case "/v1/completions" if self.speaks == "vllm":
                return self._vllm(document)
            case "/v1/completions" if own:
                return self._without_prompt(document)
            case "/v1/completions":
                return self._echo(document)
            case "/props" if own:
                return {"total_slots": self.slots, "default_generation_settings": {"n_ctx": self.context}}
            case "/detokenize" if own:
                return {"content": self.tokenizer.decode(document["tokens"], skip_special_tokens=False)}
            case "/completion" if own:
                prompts = document["prompt"]
                return [self._own(index, ids, document) for index, ids in reversed(list(enumerate(prompts)))]
        return None

    # The model.

    def logprobs(self, ids: Sequence[int]) -> np.ndarray:
        """Of the token after each: [tokens, vocab] float64. A row depends on what is before it only, so it is kept."""
        key, kept = tuple(ids), self.rows
        if any(key[: at + 1] not in kept for at in range(len(key))):
            logits = self.runner.forward(key)[0][:, : self.runner.manifest.geometry.vocab].astype(np.float64)
            logits -= logits.max(axis=1, keepdims=True)
            logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
            for at, row in enumerate(logits):
                kept.setdefault(key[: at + 1], row)
        return np.stack([kept[key[: at + 1]] for at in range(len(key))])

    def greedy(self, ids: Sequence[int], count: int, stops: Sequence[int] = ()) -> list[int]:
        """What the model draws after `ids`, without the stop."""
        out: list[int] = []
        while len(out) < count and (token := int(self.logprobs([*ids, *out])[-1].argmax())) not in stops:
            out.append(token)
        return out

    # What they say.

    def _vllm(self, document: Any) -> Any:
        ids, top = document["prompt"], document.get("prompt_logprobs", 0)
        if not isinstance(ids, list) or len(ids) >= self.context:
            raise _RefusedError(400, "This model's maximum context length is 1024 tokens", "400")
        rows, tokenizer = self.logprobs(ids), self.tokenizer
        said: list[Any] = [None]
        for row, token in zip(rows, ids[1:], strict=False):
            named = {int(one) for one in np.argsort(-row, kind="stable")[:top]} | {token}
            said.append({str(one): {"logprob": row[one], "decoded_token": tokenizer.decode([one])} for one in named})
        drawn = self.greedy(ids, document["max_tokens"])
        after = self.logprobs([*ids, *drawn])[len(ids) - 1 :]
        tops = [
            {f"token_id:{one}": row[one] for one in np.argsort(-row, kind="stable")[: document["logprobs"]]}
            for row in after[: len(drawn)]
        ]
        logprobs = {"tokens": [f"token_id:{one}" for one in drawn], "top_logprobs": tops}
        return {"choices": [{"text": tokenizer.decode(drawn), "logprobs": logprobs, "prompt_logprobs": said}]}

    def _own(self, index: int, ids: Sequence[int], document: Any) -> Any:
        if len(ids) >= self.context:
            raise _RefusedError(400, "the request exceeds the available context size", "exceed_context_size_error")
        drawn = self.greedy(ids, document["n_predict"])
        rows = self.logprobs([*ids, *drawn])[len(ids) - 1 :]
        probabilities = [
            {
                "id": token,
                "logprob": row[token],
                "top_logprobs": [
                    {"id": int(one), "logprob": row[one]}
                    for one in np.argsort(-row, kind="stable")[: document["n_probs"]]
                ],
            }
            for token, row in zip(drawn, rows, strict=False)
        ]
        text = b"".join(self._bytes(token) for token in drawn).decode("utf-8", "replace")
        if "\ufffd" in text:
            probabilities = []
        return {
            "index": index,
            "content": text,
            "tokens": drawn,
            "completion_probabilities": probabilities,
            "tokens_evaluated": len(ids),
            "stop_type": "limit",
        }

    def _without_prompt(self, document: Any) -> Any:
        """llama.cpp's server takes the parameters and gives log-probabilities of the answer only, and no echo."""
        if document.get("echo"):
            raise _RefusedError(400, "Only no echo is supported", "invalid_request_error")
        return {"choices": [{"text": "x", "logprobs": {"content": []}}], "usage": {"prompt_tokens": 1}}

    def _echo(self, document: Any) -> Any:
        if not isinstance(document["prompt"], str):
            raise _RefusedError(422, "Input should be a valid string", "string_type")
        prompt = self.tokenizer.encode(document["prompt"]).ids
        ids = [self.bos_id, *prompt] if self.begins else prompt
        if len(ids) >= self.context:
            raise _RefusedError(
                400, f"This model's maximum context length is {self.context} tokens", "context_length_exceeded"
            )
        stops = [0, 3]  # <|endoftext|> and, by its name, <|end|>
        most = min(document["max_tokens"], self.context - len(ids))
        drawn = self.greedy(ids, most, stops)
        while drawn and "\ufffd" in self.tokenizer.decode(drawn)[-1:] and len(drawn) < most + 3:
            more = self.greedy([*ids, *drawn], 1, stops)
            if not more:
                break
            drawn += more
        ended = len(drawn) < most
        rows = self.logprobs([*ids, *drawn])
        every = [*ids, *drawn]
        if self.speaks == "echo":  # as OpenAI had it
            listed, rows = every, np.concatenate([rows[:1] * np.nan, rows])
        else:
            listed = every[1:] if every[0] == self.bos_id else every
            rows = rows[: len(ids) + max(0, len(drawn) - 1)]
        labels, tops = [], []
        for token, row in zip(listed, rows, strict=False):
            if token == self.bos_id and self.speaks != "echo":
                continue
            labels.append(self._label(token))
            best = np.argsort(-row, kind="stable")[: document["logprobs"]]
            tops.append({self._label(int(one)): row[one] for one in best} | {labels[-1]: row[token]})
        tops[0] = None
        text = b"".join(self._bytes(token) for token in drawn).decode("utf-8", "ignore")
        return {
            "choices": [
                {
                    "text": document["prompt"] + text,
                    "logprobs": {"tokens": labels, "top_logprobs": tops},
                    "finish_reason": "stop" if ended else "length",
                }
            ],
            "usage": {"prompt_tokens": len(ids), "completion_tokens": len(drawn)},
        }

    def _label(self, token: int) -> str:
        return self._bytes(token).decode("utf-8", "ignore")

    def _bytes(self, token: int) -> bytes:
        """Of a byte-level token; special tokens have none here."""
        if token in self.tokenizer.get_added_tokens_decoder():
            return b""
        return bytes(_BYTES[one] for one in self.tokenizer.id_to_token(token) or "")


class _RefusedError(Exception):
    def __init__(self, status: int, message: str, code: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


def _byte_letters() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones are themselves, the others count up from 256."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [one for one in range(256) if one not in plain]
    return {chr(one): one for one in plain} | {chr(256 + at): one for at, one in enumerate(others)}


_BYTES = _byte_letters()
