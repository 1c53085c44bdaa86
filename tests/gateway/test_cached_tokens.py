"""What a client is told of prompts that were kept ready, and whose prompts they are."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Callable
from typing import Any

import httpx
import openai

from ganglion.gateway import create_key
from ganglion.proto import lane_pb2
from ganglion.wire.limits import TENANT_BYTES

ASK: list[Any] = [{"role": "user", "content": "hi"}]
ELSEWHERE = "127.1"  # reached on loopback, but not known to be


def client(api: Any, key: str = "unused") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=api.url, api_key=key, max_retries=0)


def cached_of(answer: Any) -> int:
    found = answer.usage.prompt_tokens_details.cached_tokens
    assert isinstance(found, int)
    return found


def keeping(api: Any, cached: Callable[[str], int]) -> Any:
    """A lead that says "hello", and of each choice (by its request id) how many tokens it did not run again."""

    async def script(request: lane_pb2.Open) -> AsyncGenerator[lane_pb2.SessionEvent, None]:
        count = cached(request.request_id)
        yield api.accepted()
        for byte in b"hello":
            said = api.tokens(byte)
            said.tokens.cached_tokens = count
            yield said
        yield api.finished(request, 5, cached=count)

    return script


async def test_usage_and_metrics_say_what_was_cached(api: Any) -> None:
    api.agent.script = keeping(api, lambda _: 3)
    before = await counted(api)
    async with client(api) as ai:
        chat = await ai.chat.completions.create(model="tiny", messages=ASK)
        text = await ai.completions.create(model="tiny", prompt="x" * 8)
        cut = await ai.completions.create(model="tiny", prompt="x" * 8, stop="ell")  # the session is cancelled
        stream = await ai.chat.completions.create(
            model="tiny", messages=ASK, stream=True, stream_options={"include_usage": True}
        )
        last = [chunk async for chunk in stream][-1]
    assert [cached_of(each) for each in (chat, text, cut, last)] == [3, 3, 3, 3]
    prompts = [each.usage.prompt_tokens for each in (chat, text, cut, last) if each.usage]
    assert await counted(api) == (before[0] + sum(prompts), before[1] + 12)


async def test_of_several_choices_what_none_ran(api: Any) -> None:
    api.agent.script = keeping(api, lambda identifier: 1 + int(identifier[-1]))
    async with client(api) as ai:
        assert cached_of(await ai.chat.completions.create(model="tiny", messages=ASK, n=3)) == 1


async def counted(api: Any) -> tuple[float, float]:
    """Prompt tokens, and those of them that were cached, as /metrics counts them."""
    async with httpx.AsyncClient() as http:
        text = (await http.get(f"{api.base}/metrics")).text
    names = ("ganglion_gateway_prompt_tokens_total", "ganglion_gateway_cached_prompt_tokens_total")
    prompt, cached = (re.search(rf"^{name} (\S+)$", text, re.MULTILINE) for name in names)
    assert prompt is not None
    assert cached is not None
    return float(prompt[1]), float(cached[1])


async def test_f5_a_key_is_a_tenant(fleet: Any) -> None:
    """Each key is its own, and gives neither the key away nor what is kept of it."""
    fleet.agent.script = fleet.scripts["saying"]("hello")
    fleet.coordinator.say(fleet.state("tiny"))
    listening = await fleet.start(host=ELSEWHERE)
    keys = [listening.new_key, create_key(fleet.home, "laptop")]
    url = f"http://127.0.0.1:{listening.port}/v1"
    ready = {"authorization": f"Bearer {keys[0]}"}
    async with httpx.AsyncClient(headers=ready) as http:
        while (await http.get(f"{url.removesuffix('/v1')}/readyz")).status_code != 200:
            pass
    for key in (*keys, *keys):
        async with openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0) as ai:
            await ai.chat.completions.create(model="tiny", messages=ASK)
    tenants = [request.tenant for request in fleet.agent.requests]
    assert tenants[:2] == tenants[2:]
    assert len(set(tenants)) == 2
    kept = (fleet.home.path / "keys.json").read_text()
    for tenant, key in zip(tenants, keys, strict=False):
        assert 16 < len(tenant.encode()) <= TENANT_BYTES
        assert tenant not in kept
        assert tenant not in key


async def test_on_loopback_everybody_is_one(api: Any) -> None:
    for key in ("a", "b"):
        async with client(api, key) as ai:
            await ai.chat.completions.create(model="tiny", messages=ASK)
    assert [request.tenant for request in api.agent.requests] == ["", ""]
