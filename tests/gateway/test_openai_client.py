"""The official client against the real server: every shape, synchronous and not, streaming and not."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from ganglion.wire.errors import DeviceLost, Exhausted

ASK: list[Any] = [{"role": "user", "content": "hi"}]


def client(api: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=api.url, api_key="unused", max_retries=0)


async def test_chat(api: Any) -> None:
    async with client(api) as ai:
        answer = await ai.chat.completions.create(model="tiny", messages=ASK, seed=-1, temperature=0.5)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "hello", "stop")
    assert choice.logprobs is None
    sent = api.agent.requests[0]
    assert bytes(token for token in sent.prompt if token < 256) == b"user: hi\nassistant: "
    assert list(sent.prompt).count(256) == 1  # the template's, and not the tokenizer's a second time
    assert (sent.sampling.seed, sent.sampling.temperature, sent.sampling.top_logprobs) == (2**64 - 1, 0.5, -1)
    assert list(sent.stop_ids) == [257]
    assert sent.max_tokens == 256 - len(sent.prompt)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(sent.prompt), 6)
    assert answer.system_fingerprint is not None
    assert answer.system_fingerprint.startswith("fp_")
    assert answer.object == "chat.completion"
    assert answer.id == sent.request_id
    assert answer._request_id


async def test_chat_stream(api: Any) -> None:
    api.agent.script = api.scripts["saying"]("héllo \U0001f600")
    async with client(api) as ai:
        stream = await ai.chat.completions.create(
            model="tiny", messages=ASK, stream=True, stream_options={"include_usage": True}, max_completion_tokens=99
        )
        chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:-1])
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "héllo \U0001f600"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({(chunk.id, chunk.created, chunk.system_fingerprint) for chunk in chunks}) == 1
    assert all("\ufffd" not in (chunk.choices[0].delta.content or "") for chunk in chunks[:-1])


async def test_chat_logprobs(api: Any) -> None:
    api.agent.script = api.scripts["saying"]("aé")
    async with client(api) as ai:
        answer = await ai.chat.completions.create(model="tiny", messages=ASK, logprobs=True, top_logprobs=1)
        stream = await ai.chat.completions.create(
            model="tiny", messages=ASK, logprobs=True, top_logprobs=1, stream=True
        )
        chunks = [chunk async for chunk in stream]
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content or []
    assert [entry.bytes for entry in content] == [[0x61], [0xC3], [0xA9]]
    assert [entry.token for entry in content] == ["a", "\ufffd", "\ufffd"]
    assert [len(entry.top_logprobs) for entry in content] == [1, 1, 1]
    assert content[0].top_logprobs[0].logprob == content[0].logprob == -0.5
    assert api.agent.requests[0].sampling.top_logprobs == 1
    streamed = [
        entry
        for chunk in chunks
        if chunk.choices[0].logprobs is not None
        for entry in chunk.choices[0].logprobs.content or []
    ]
    assert [entry.bytes for entry in streamed] == [entry.bytes for entry in content]


async def test_completion(api: Any) -> None:
    async with client(api) as ai:
        answer = await ai.completions.create(model="tiny", prompt="héy", logprobs=2, user="me", n=1, best_of=1)
        cut = await ai.completions.create(model="tiny", prompt=["once"], max_tokens=3, echo=False)
        ids = await ai.completions.create(model="tiny", prompt=[1, 2, 3])
        one = await ai.completions.create(model="tiny", prompt=[[1, 2]], logprobs=0)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("hello", "stop")
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.tokens == list("hello")
    assert found.text_offset == [0, 1, 2, 3, 4]
    assert found.token_logprobs == [-0.5] * 5
    assert found.top_logprobs is not None
    assert found.top_logprobs[0] == {"h": -0.5, "i": -1.5}
    first, second, third, fourth = api.agent.requests
    assert list(first.prompt) == [256, *"héy".encode()]
    assert (first.max_tokens, first.sampling.temperature, first.sampling.top_logprobs) == (16, 1.0, 2)
    assert (cut.choices[0].text, cut.choices[0].finish_reason) == ("hel", "length")
    assert list(second.prompt) == [256, *b"once"]
    assert list(third.prompt) == [1, 2, 3]
    assert list(fourth.prompt) == [1, 2]
    assert ids.usage is not None
    assert ids.usage.prompt_tokens == 3
    assert one.choices[0].logprobs is not None
    assert one.choices[0].logprobs.top_logprobs is None
    assert first.sampling.seed != third.sampling.seed  # drawn at random when none is given


async def test_completion_stream(api: Any) -> None:
    async with client(api) as ai:
        stream = await ai.completions.create(model="tiny", prompt="x", stream=True, logprobs=0)
        chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks) == "hello"
    found = [chunk.choices[0].logprobs for chunk in chunks]
    offsets = [at for logprobs in found if logprobs for at in logprobs.text_offset or []]
    assert offsets == [0, 1, 2, 3, 4]


async def test_synchronous_client(api: Any) -> None:
    def talk() -> tuple[str | None, str]:
        with openai.OpenAI(base_url=api.url, api_key="unused", max_retries=0) as ai:
            whole = ai.chat.completions.create(model="tiny", messages=ASK)
            stream = ai.chat.completions.create(model="tiny", messages=ASK, stream=True)
            return whole.choices[0].message.content, "".join(c.choices[0].delta.content or "" for c in stream)

    assert await asyncio.to_thread(talk) == ("hello", "hello")


async def test_models(api: Any) -> None:
    async with client(api) as ai:
        names = [model.id async for model in ai.models.list()]
        one = await ai.models.retrieve("org/bare")
        with pytest.raises(openai.NotFoundError, match="org/bare, tiny"):
            await ai.models.retrieve("nope")
        with pytest.raises(openai.NotFoundError, match="org/bare, tiny"):
            await ai.chat.completions.create(model="nope", messages=ASK)
    assert names == ["org/bare", "tiny"]
    assert one.id == "org/bare"


async def test_model_without_template(api: Any) -> None:
    async with client(api) as ai:
        with pytest.raises(openai.BadRequestError, match=r"org/bare has no chat template.*/v1/completions"):
            await ai.chat.completions.create(model="org/bare", messages=ASK)
        assert (await ai.completions.create(model="org/bare", prompt="x")).choices[0].text == "hello"


async def test_stop_string_cancels_the_session(api: Any) -> None:
    api.agent.script = api.scripts["talking_for_ever"](1, b"abcd")
    async with client(api) as ai:
        answer = await ai.completions.create(model="tiny", prompt="x", stop=["zz", "cda"], max_tokens=200)
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("ab", "stop")
        assert await api.next_end() == answer.id
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 5
        stream = await ai.chat.completions.create(model="tiny", messages=ASK, stop="cda", stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == "ab"
    await api.next_end()


async def test_sampling_goes_through(api: Any) -> None:
    async with client(api) as ai:
        await ai.completions.create(
            model="tiny", prompt="x", top_p=0.5, seed=7, temperature=0, extra_body={"top_k": 5, "min_p": 0.1}
        )
    sampling = api.agent.requests[0].sampling
    assert (sampling.top_p, sampling.top_k, sampling.min_p, sampling.seed) == (0.5, 5, 0.1, 7)
    assert sampling.temperature == 0


async def test_too_many_requests(api: Any) -> None:
    api.agent.script = api.scripts["failing"](Exhausted("32 sessions wait; raise --sessions"))
    async with client(api) as ai:
        for stream in (False, True):
            with pytest.raises(openai.RateLimitError, match="32 sessions wait") as raised:
                await ai.chat.completions.create(model="tiny", messages=ASK, stream=stream)
            assert raised.value.response.headers["retry-after"] == "1"
            assert raised.value.type == "rate_limit_error"


async def test_device_lost_before_and_during(api: Any) -> None:
    async with client(api) as ai:
        api.agent.script = api.scripts["failing"](DeviceLost("laptop went away"))
        with pytest.raises(openai.InternalServerError, match="laptop") as raised:
            await ai.chat.completions.create(model="tiny", messages=ASK, stream=True)
        assert raised.value.status_code == 503
        api.agent.script = api.scripts["failing"](DeviceLost("laptop went away"), b"hel")
        stream = await ai.chat.completions.create(model="tiny", messages=ASK, stream=True)
        text = ""
        with pytest.raises(openai.APIError, match="laptop") as broken:  # noqa: PT012
            async for chunk in stream:
                text += chunk.choices[0].delta.content or ""
        assert text == "hel"
        assert broken.value.code == "device_lost"
        with pytest.raises(openai.InternalServerError, match="laptop"):
            await ai.chat.completions.create(model="tiny", messages=ASK)
        api.agent.script = api.scripts["failing"](RuntimeError("secret of the lead"), b"hel")
        with pytest.raises(openai.InternalServerError, match="internal error") as defect:
            await ai.chat.completions.create(model="tiny", messages=ASK)
        assert "secret" not in str(defect.value)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("after", [b"", b"some"])
async def test_client_that_leaves_cancels(api: Any, stream: bool, after: bytes) -> None:
    api.agent.script = api.scripts["stalling"](after)

    async def ask() -> None:
        async with client(api) as ai:
            answer = await ai.chat.completions.create(model="tiny", messages=ASK, stream=stream)  # type: ignore[call-overload]
            async for _ in answer:
                pass

    asking = asyncio.create_task(ask())
    await api.until(lambda: api.agent.open == 1)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await api.next_end()
    assert api.agent.open == 0
