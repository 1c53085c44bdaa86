"""Structured answers of the demo model, on one device and on three: valid, ended, and the same tokens."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import jsonschema
import openai
from cluster.conftest import start_three
from cluster.harness import Cluster
from gateway.schemas import bounded
from hypothesis import HealthCheck, Phase, given, settings

SCHEMAS = 200
TOKENS = 800  # more than the longest answer that a bounded schema allows
TOGETHER = 4  # requests in flight to each deployment
FUNCTION = "def describe(item):\n    '''Return the description of the item as JSON.'''"


def schemas() -> list[dict[str, Any]]:
    """Bounded schemas, the same in every run."""
    found: list[dict[str, Any]] = []

    @settings(
        max_examples=SCHEMAS,
        phases=[Phase.generate],
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(schema=bounded())
    def collect(schema: dict[str, Any]) -> None:
        found.append(schema)

    collect()
    return found[:SCHEMAS]


async def answers(api: str, model: str, asked: list[dict[str, Any]]) -> list[Any]:
    """A choice for each schema, or the error that names an unsupported keyword."""
    slots = asyncio.Semaphore(TOGETHER)
    async with openai.AsyncOpenAI(base_url=f"{api}/v1", api_key="none", max_retries=0, timeout=120) as client:

        async def one(number: int, schema: dict[str, Any]) -> Any:
            async with slots:
                try:
                    answer = await client.chat.completions.create(
                        model=model,
                        messages=[{"role": "user", "content": FUNCTION}],
                        response_format={
                            "type": "json_schema",
                            "json_schema": {"name": "item", "schema": schema, "strict": True},
                        },
                        max_tokens=TOKENS,
                        temperature=0.8,
                        seed=number,
                    )
                except openai.BadRequestError as error:
                    return error
                return answer.choices[0]

        return await asyncio.gather(*(one(number, schema) for number, schema in enumerate(asked)))


def test_200_schemas_on_one_device_and_on_three(cluster: Cluster) -> None:
    asked = schemas()
    assert len(asked) == SCHEMAS
    start_three(cluster)
    sessions = ["--sessions", str(TOGETHER)]
    cluster.cli("run", "demo", "--name", "alone", "--devices", "one", *sessions)
    cluster.cli("run", "demo", "--name", "split", "--devices", "one,two,three", "--mode", "tensor", *sessions)
    alone = asyncio.run(answers(cluster.api, "alone", asked))
    split = asyncio.run(answers(cluster.api, "split", asked))
    refused = 0
    for schema, one, other in zip(asked, alone, split, strict=True):
        if isinstance(one, openai.BadRequestError):
            assert one.param is not None, one
            assert isinstance(other, openai.BadRequestError)
            refused += 1
            continue
        assert one.finish_reason == other.finish_reason == "stop", (schema, one.message.content)
        assert one.message.content == other.message.content, schema
        jsonschema.Draft202012Validator(schema).validate(json.loads(one.message.content))
    assert refused < SCHEMAS // 10
