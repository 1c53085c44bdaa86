"""What kept prompts save: `python bench/prefix.py [--shape llama-3.2-1b] [--work FOLDER]`; it prints figures and JSON.

Real processes and HTTP, one device. A round is a chat of two turns about a text that nobody sent before: the first turn
with all of `--tokens` tokens to run; an answer; the second turn, which is the first with the answer and a new question.
Time to first token is the time of a request for one token. Two kinds of rounds, also with nothing kept:

* ids: completions of token ids, the answer's ids as they were drawn;
* text: chats, through the template and the tokenizer. Random weights say no text, so the answer is one that the model
  did not draw, all of it to be run: what a client sees that edits or shortens answers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from contextlib import aclosing
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "bench")]

from cluster.harness import Cluster, until  # noqa: E402
from shapes import SHAPES, write_checkpoint  # noqa: E402

from ganglion.models import demo_path  # noqa: E402
from ganglion.proto import admin_pb2, admin_pb2_grpc, lane_pb2  # noqa: E402
from ganglion.wire import rpc  # noqa: E402
from ganglion.wire.identity import Identity  # noqa: E402
from ganglion.wire.session import SessionClient  # noqa: E402

ANSWER_TOKENS, QUESTION_TOKENS = 32, 24
PARTS = ("queue_s", "compute_s", "sample_s", "other_s", "ttft_s")


class Talk:
    """Requests for one deployed model, with the time of each."""

    def __init__(self, cluster: Cluster, model: str) -> None:
        self._cluster, self._model = cluster, model
        self._http = httpx.Client(base_url=cluster.api, timeout=600)

    def first_token(self, path: str, **body: Any) -> tuple[float, dict[str, Any]]:
        """Seconds of a request for one token, and its usage."""
        began = time.perf_counter()
        answer = self._http.post(path, json={"model": self._model, "max_tokens": 1, "temperature": 0} | body)
        took_s = time.perf_counter() - began
        if answer.is_error:
            raise RuntimeError(f"{answer.text}\n{self._cluster.logs(12)}")
        return took_s, answer.json()["usage"]

    def answer(self, prompt: list[int], count: int = ANSWER_TOKENS) -> tuple[list[int], dict[str, float]]:
        """Ids that are drawn, and the lead's own account in ms, asked for as the gateway does."""
        return asyncio.run(self._answer(prompt, count))

    async def _answer(self, prompt: list[int], count: int) -> tuple[list[int], dict[str, float]]:
        identity = Identity.load(self._cluster.home / "gateway" / "identity")
        async with rpc.channel(identity.coordinator, identity, peer="coordinator") as channel:
            stub: Any = admin_pb2_grpc.AdminStub(channel)  # type: ignore[no-untyped-call]
            state = await anext(aiter(stub.Watch(admin_pb2.WatchRequest(once=True))))
        deployment = next(each for each in state.deployments if each.model == self._model)
        client = SessionClient(identity, deployment.lead, deployment.deployment, deployment.epoch)
        request = lane_pb2.Open(request_id="bench", prompt=prompt, max_tokens=count)
        request.sampling.top_p = 1.0
        request.sampling.top_logprobs = -1
        drawn, parts = list[int](), dict[str, float]()
        try:
            async with aclosing(client.run(request)) as events:
                async for event in events:
                    drawn += [token.id for token in event.tokens.tokens]
                    if event.HasField("finished"):
                        parts = {part: getattr(event.finished.timings, part) * 1e3 for part in PARTS}
        finally:
            await client.close()
        return drawn, parts


def ids_round(talk: Talk, dice: random.Random, tokens: int, vocab: int) -> dict[str, Any]:
    """A chat of token ids."""
    prompt = [dice.randrange(vocab) for _ in range(tokens)]
    first_s, first = talk.first_token("/v1/completions", prompt=prompt)
    answer, _ = talk.answer(prompt)
    second = prompt + answer + [dice.randrange(vocab) for _ in range(QUESTION_TOKENS)]
    second_s, usage = talk.first_token("/v1/completions", prompt=second)
    return _found(first_s, first, second_s, usage)


def text_round(talk: Talk, dice: random.Random, tokens: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """A chat of text."""
    words = (ROOT / "README.md").read_text().split()

    def text(count: int) -> str:
        made = str(dice.randrange(10**6))
        while len(tokenizer.encode(made).ids) < count:
            made += " " + dice.choice(words)
        return made

    messages = [{"role": "user", "content": text(tokens)}]
    first_s, first = talk.first_token("/v1/chat/completions", messages=messages)
    messages.append({"role": "assistant", "content": text(ANSWER_TOKENS)})
    messages.append({"role": "user", "content": text(QUESTION_TOKENS)})
    second_s, usage = talk.first_token("/v1/chat/completions", messages=messages)
    return _found(first_s, first, second_s, usage)


def _found(first_s: float, first: dict[str, Any], second_s: float, second: dict[str, Any]) -> dict[str, Any]:
    if first["prompt_tokens_details"]["cached_tokens"] > 32:
        raise RuntimeError("the first turn was kept ready: its text is not new")
    return {
        "first_ms": first_s * 1e3,
        "second_ms": second_s * 1e3,
        "ratio": second_s / first_s,
        "tokens": [first["prompt_tokens"], second["prompt_tokens"]],
        "cached": second["prompt_tokens_details"]["cached_tokens"],
    }


def fixed_ms(talk: Talk, dice: random.Random, tokens: int, vocab: int) -> dict[str, float]:
    """Where the time goes of a prompt that is kept but for what is always run: HTTP and the lead's own account."""
    prompt = [dice.randrange(vocab) for _ in range(tokens)]
    talk.first_token("/v1/completions", prompt=prompt)
    took_s = [talk.first_token("/v1/completions", prompt=prompt)[0] for _ in range(3)]
    _, parts = talk.answer(prompt, 1)
    return {"http_ms": statistics.median(took_s) * 1e3} | parts


def main() -> None:
    """Run the rounds and print a table, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*sorted(SHAPES), "demo"], default="llama-3.2-1b")
    parser.add_argument("--work", type=Path, help="where the checkpoint is kept between runs (default: a new folder)")
    parser.add_argument("--tokens", type=int, default=1000, help="of the first turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--kept-only", action="store_true", help="no rounds with nothing kept")
    parser.add_argument("--options", default="--format int4 --fast", help="of `ganglion run`")
    chosen = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(demo_path("demo") / "tokenizer.json"))
    vocab = tokenizer.get_vocab_size()
    results: dict[str, list[dict[str, Any]]] = {}
    fixed: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(prefix="ganglion-bench-", dir=chosen.work) as scratch:
        work = Path(scratch)
        checkpoint = demo_path("demo")
        if chosen.shape != "demo":
            checkpoint = write_checkpoint(chosen.work or work, chosen.shape, demo_path("demo"))
        with Cluster(work / "cluster") as cluster:
            cluster.coordinator()
            cluster.join("whole", options=("--threads", str(chosen.threads)))
            cluster.gateway()
            until("measured", lambda: cluster.alive() == ["whole"])
            talks = {}
            kinds: dict[str, tuple[str, ...]] = {"kept": (), "nothing kept": ("--prefix-tokens", "0")}
            if chosen.kept_only:
                del kinds["nothing kept"]
            for name, more in kinds.items():
                model = name.replace(" ", "-")
                options = [*chosen.options.split(), "--context", str(chosen.context), "--sessions", "1", *more]
                cluster.cli("run", str(checkpoint), "--name", model, *options, timeout_s=900)
                talks[name] = Talk(cluster, model)
                talks[name].answer(list(range(64)), 8)  # warm
            for number in range(chosen.rounds):
                for name, talk in talks.items():
                    for kind, run in (("ids", ids_round), ("text", text_round)):
                        dice = random.Random(f"{number} {kind}")
                        found = run(talk, dice, chosen.tokens, vocab if kind == "ids" else tokenizer)  # type: ignore[operator]
                        print(f"{name}, {kind}: {found}", file=sys.stderr, flush=True)
                        results.setdefault(f"{name}, {kind}", []).append(found)
                fixed.append(fixed_ms(talks["kept"], random.Random(f"{number} fixed"), chosen.tokens, vocab))
                print(f"kept whole: {fixed[-1]}", file=sys.stderr, flush=True)
    table = Table("what", "first turn, ms", "second turn, ms", "ratio", "tokens", "cached")
    for name, rounds in results.items():
        middle = {key: statistics.median(each[key] for each in rounds) for key in ("first_ms", "second_ms", "ratio")}
        counts = (str(rounds[-1]["tokens"]), str(rounds[-1]["cached"]))
        table.add_row(
            name, f"{middle['first_ms']:.0f}", f"{middle['second_ms']:.0f}", f"{middle['ratio']:.3f}", *counts
        )
    Console().print(table)
    print(json.dumps({"rounds": results, "kept whole": fixed}))


if __name__ == "__main__":
    main()
