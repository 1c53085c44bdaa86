"""What a benchmark asks of the API: ids of every token as it is drawn, no end but the length, the lead's account."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any

import httpx

from ganglion.proto import lane_pb2

END = 257
SAID = [*"é".encode(), END, 65]  # half a character has no text yet, the end of the text never


def told(api: Any) -> Any:
    async def script(request: lane_pb2.Open) -> AsyncGenerator[lane_pb2.SessionEvent, None]:
        yield api.accepted()
        for token in SAID:
            yield api.tokens(token)
        done = api.finished(request, len(SAID), lane_pb2.FINISH_REASON_LENGTH)
        done.finished.timings.CopyFrom(lane_pb2.Timings(wall_s=2.0, compute_s=1.5, sent_bytes=77))
        yield done

    return script


async def ask(api: Any, **more: Any) -> httpx.Response:
    body = {"model": "tiny", "prompt": [1, 2], "max_tokens": len(SAID), **more}
    async with httpx.AsyncClient(base_url=api.base) as client:
        return await client.post("/v1/completions", json=body)


async def test_ids_of_every_token_in_chunks_of_their_own(api: Any) -> None:
    api.agent.script = told(api)
    measured = {"return_token_ids": True, "return_timings": True, "ignore_eos": True}
    answer = await ask(api, stream=True, stream_options={"include_usage": True}, **measured)
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    choices = [event["choices"][0] for event in events if event["choices"]]
    assert [choice["token_ids"] for choice in choices] == [*([token] for token in SAID), []]
    assert "".join(choice["text"] for choice in choices) == "éA"
    assert {key: events[-1]["timings"][key] for key in ("wall_s", "compute_s", "exchange_s", "sent_bytes")} == {
        "wall_s": 2.0, "compute_s": 1.5, "exchange_s": 0.0, "sent_bytes": 77,
    }  # fmt: skip
    assert list(api.agent.requests[-1].stop_ids) == []

    whole = (await ask(api, **measured)).json()
    assert whole["choices"][0]["token_ids"] == SAID
    assert whole["timings"] == events[-1]["timings"]


async def test_nothing_of_it_unasked(api: Any) -> None:
    api.agent.script = told(api)
    whole = (await ask(api)).json()
    assert "timings" not in whole
    assert "token_ids" not in whole["choices"][0]
    assert list(api.agent.requests[-1].stop_ids) == [END]
