"""Chat templates: what transformers renders, and what a hostile one may not do."""

# ruff: noqa: N802 - the ids of faults in names of tests are upper case

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from ganglion.gateway.templates import TemplateRenderer, chat_variables
from ganglion.gateway.tokenizing import ChatTemplate
from ganglion.wire.errors import InvalidRequest

SPECIALS = {"bos_token": "<s>", "eos_token": "</s>"}
CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = """{% if messages[0]['role'] == 'system' %}
    {% set loop_messages = messages[1:] %}
    {% set system = messages[0]['content'] %}
{% else %}
    {% set loop_messages = messages %}
    {% set system = false %}
{% endif %}
{% for message in loop_messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate user/assistant') }}
    {% endif %}
    {% if message['role'] == 'user' %}
        {{- bos_token + '[INST] ' + ('<<SYS>>' + system + '<</SYS>>' if loop.index0 == 0 and system else '') }}
        {{- message['content'].strip() + ' [/INST]' }}
    {% elif message['role'] == 'assistant' %}
        {{- ' ' + message['content'] | trim + ' ' + eos_token }}
    {% endif %}
{% endfor %}"""
QWEN_LIKE = """{%- set ns = namespace(multi=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi and message.role == "user" %}
        {%- set ns.multi = false %}
        {%- set ns.last = index %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "assistant" and '</think>' in message.content %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content.split('</think>')[-1].lstrip('\\n') }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' }}
    {%- endif %}
{%- endfor %}
{%- if tools %}{{ tools | tojson }}{% endif %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
GENERATION = """{% for message in messages %}
{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% set x = 1 %}{% endgeneration %}
{% else %}{{ {'a': '<&>é', 'b': dict(c=1)} | tojson }}
{{ message.content | tojson(indent=2) }}{% if loop.last %}{% continue %}{% endif %}
{% endif %}
{{ x is defined }}{{ documents is none }}
{% endfor %}{{ strftime_now("%Y") }}"""

CONVERSATIONS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "héllo <b>"}],
    [{"role": "system", "content": "be kind"}, {"role": "user", "content": " a "}],
    [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "<think>x</think>\n2"},
        {"role": "user", "content": "{{ 7*7 }}"},
    ],
]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def renderer() -> AsyncIterator[TemplateRenderer]:
    made = TemplateRenderer()
    yield made
    pid = made.pid
    await made.close()
    if pid is not None:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def by_transformers(source: str, messages: list[dict[str, str]], **extra: Any) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, _ = render_jinja_template(
        [messages], chat_template=source, add_generation_prompt=True, **SPECIALS, **extra
    )
    return str(rendered[0])


async def ours(renderer: TemplateRenderer, source: str, messages: list[dict[str, str]], **extra: Any) -> str:
    return await renderer.render("m", ChatTemplate(source, SPECIALS), chat_variables(messages, extra))


@pytest.mark.parametrize("source", [CHATML, LLAMA2, QWEN_LIKE, GENERATION], ids=["chatml", "llama2", "qwen", "rest"])
@pytest.mark.parametrize("messages", CONVERSATIONS)
async def test_as_transformers(renderer: TemplateRenderer, source: str, messages: list[dict[str, str]]) -> None:
    assert await ours(renderer, source, messages) == by_transformers(source, messages)


async def test_extra_variables(renderer: TemplateRenderer) -> None:
    found = await ours(renderer, QWEN_LIKE, CONVERSATIONS[0], enable_thinking=False)
    assert found == by_transformers(QWEN_LIKE, CONVERSATIONS[0], enable_thinking=False)
    assert found.endswith("</think>\n\n")
    # what a request adds cannot take the place of the conversation
    assert await ours(renderer, CHATML, CONVERSATIONS[0], add_generation_prompt=False) == by_transformers(
        CHATML, CONVERSATIONS[0]
    )


async def test_a_template_may_refuse(renderer: TemplateRenderer) -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate") as raised:
        await ours(renderer, LLAMA2, CONVERSATIONS[0] * 2)
    assert raised.value.param == "messages"


HOSTILE = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ self.__init__.__globals__.__builtins__.__import__('os').system('id') }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['json'] }}",
    "{{ dict.__class__ }}",
    "{{ (messages|attr('__class__')) }}",
    "{{ messages.append(1) }}",
    "{% set x = namespace(__class__=1) %}",
    "{% set ns = namespace() %}{% set ns.__init__ = 1 %}{{ ns.__init__ }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ ('%s' | format).__class__ }}",
    "{{ [].__class__.__base__ }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{{ undefined_thing.x.y }}",
    "{{ range(10 ** 9) | list }}",
    "{{ 'x' * 2000000000 }}",
    "{% for i in range(99999) %}{{ 'x' * 100000 }}{% endfor %}",
    "{{ 9 ** 9 ** 9 }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% if %}",
    "{{ '\\ud800' }}" * 2,
]


@pytest.mark.parametrize("source", HOSTILE)
async def test_E6_hostile_template(renderer: TemplateRenderer, source: str) -> None:
    try:
        found = await ours(renderer, source, CONVERSATIONS[0])
    except InvalidRequest as error:
        found = error.message
        limit = 1000
    else:  # what the sandbox hides is undefined, and undefined things are written as nothing
        limit = 100
        assert "__" not in found
    assert len(found) < limit
    assert not any(word in found for word in ("uid=", "<class", "<module", "root:"))
    assert await ours(renderer, CHATML, CONVERSATIONS[0]) == by_transformers(CHATML, CONVERSATIONS[0])


async def test_E6_limits_are_named(renderer: TemplateRenderer) -> None:
    with pytest.raises(InvalidRequest, match="within 1 s"):
        await ours(renderer, "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", [])
    with pytest.raises(InvalidRequest, match="1048576 bytes"):
        await ours(renderer, "{% for i in range(99999) %}{{ 'x' * 100000 }}{% endfor %}", [])
    with pytest.raises(InvalidRequest, match="512 MiB"):
        await ours(renderer, "{{ 'x' * 2000000000 }}", [])


async def test_cancelled_rendering_leaves_nothing_behind(renderer: TemplateRenderer) -> None:
    """The reply that nobody took must not answer the next request."""
    for _ in range(3):
        task = asyncio.create_task(ours(renderer, CHATML, [{"role": "user", "content": "first"}]))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert "second" in await ours(renderer, CHATML, [{"role": "user", "content": "second"}])


async def test_largest_output_passes(renderer: TemplateRenderer) -> None:
    text = "é" * (1 << 19)
    assert await ours(renderer, "{{ messages[0].content }}", [{"role": "user", "content": text}]) == text


async def test_child_ends_with_its_input() -> None:
    made = TemplateRenderer()
    await made.warm()
    child = made._child
    assert child is not None
    assert child.stdin is not None
    child.stdin.close()
    async with asyncio.timeout(10):
        assert await child.wait() == 0
    assert await ours(made, CHATML, CONVERSATIONS[0]) == by_transformers(CHATML, CONVERSATIONS[0])
    await made.close()
