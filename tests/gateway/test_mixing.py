"""Blend's frame: which experts draw together, and what becomes of the tokens that an engine gives."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from ganglion.gateway.deployments import ModelFacts, Phase, Route
from ganglion.gateway.experts.admission import Admitted
from ganglion.gateway.experts.call import Call
from ganglion.gateway.experts.mixing import Drawing, Lost, blend, prepare_all
from ganglion.gateway.experts.servers import Server
from ganglion.gateway.experts.table import Budget, Expert
from ganglion.gateway.generation import Began, Ended
from ganglion.gateway.parameters import parse_completion
from ganglion.gateway.preparing import Prepared
from ganglion.gateway.tokenizing import ModelTokenizer
from ganglion.gateway.transcript import Delta, Transcript
from ganglion.proto import lane_pb2
from ganglion.wire.errors import ContextExceeded, DeviceLost, Unsupported
from ganglion.wire.nouns import PieceRef

WEIGHTS = {"a": 0.5, "b": 0.3, "c": 0.2}


def call(*names: str, server: str = "") -> Call:
    admitted = {name: Admitted(Expert(name)) for name in names}
    if server:
        admitted[server] = Admitted(Expert(server, "http://x"), Server(server, "http://x"))
    asked = parse_completion({"model": "experts", "prompt": "hi", "stop": "EN"})
    return Call(asked, "id", "", 0.0, Budget(combine="blend"), 9, 7, admitted, WEIGHTS, WEIGHTS, {"gone": "away"})


def prepared(tokenizer: ModelTokenizer, name: str, digest: str) -> Prepared:
    facts = ModelFacts(name, {"tokenizer.json": PieceRef(digest * 64, 1)}, 260, (257,))
    route = Route(name, name, 1, Phase.READY, "", 0, None, facts, 64, (), None)
    transcript = Transcript(tokenizer.detokenizer(), ("EN",), (257,))
    request = lane_pb2.Open(prompt=b"hi!"[: 2 + (name == "b")], max_tokens=9)
    return Prepared(route, tokenizer, (request,), (transcript,), "hi")


@pytest.fixture
def tokenizer(bytes_tokenizer: Tokenizer, tmp_path: Path) -> ModelTokenizer:
    (tmp_path / "tokenizer.json").write_text(bytes_tokenizer.to_str())
    return ModelTokenizer(tmp_path)


async def test_those_with_the_heaviest_ones_tokenizer_draw_together(tokenizer: ModelTokenizer) -> None:
    async def ready(_: Call, name: str, seed: int) -> Prepared:
        assert seed == 7
        if name == "d":
            raise ContextExceeded("too long")
        return prepared(tokenizer, name, "0" if name == "c" else "1")

    asked = call("a", "b", "c", "d", server="s")
    found, dropped = await prepare_all(asked, ready)
    assert list(found) == ["a", "b"]
    assert set(dropped) == {"c", "d", "s"}
    assert "tokenizer" in dropped["c"]
    with pytest.raises(ContextExceeded):
        await prepare_all(call("d"), ready)
    with pytest.raises(Unsupported):
        await prepare_all(call(server="s"), ready)


@pytest.mark.parametrize(
    ("text", "ends", "said", "reason"), [("hé", "length", "hé", "length"), ("xEN", "stop", "x", "stop")]
)
async def test_tokens_become_text(tokenizer: ModelTokenizer, text: str, ends: Any, said: str, reason: str) -> None:
    class Engine:
        async def run(self, experts: Sequence[Drawing], lost: Lost) -> AsyncGenerator[Any, None]:
            assert [(one.name, one.weight, one.request.request_id) for one in experts] == [
                ("a", 0.6, "id-0"),
                ("b", 0.4, "id-1"),
            ]
            lost("b", DeviceLost("gone"))
            for byte in text.encode():
                yield byte
            yield ends

    both = {name: prepared(tokenizer, name, "1") for name in "ab"}
    parts = [part async for part in blend(call("a", "b"), Engine(), both, {"a": 0.6, "b": 0.4}, {"s": "a server"})]
    assert isinstance(parts[0], Began)
    assert "".join(part.text for part in parts if isinstance(part, Delta)) == said
    end = parts[-1]
    assert isinstance(end, Ended)
    assert (end.reason, end.completion_tokens) == (reason, 2 * len(text.encode()))
    assert end.experts is not None
    assert end.experts["dropped"] == {"gone": "away", "s": "a server", "b": "gone"}
    assert end.experts["usage"]["b"]["prompt_tokens"] == 3
