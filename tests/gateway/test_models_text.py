"""Tokenizers and chat templates of several kinds, compared with transformers' own."""

# ruff: noqa: E501 - lines of templates

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ganglion.gateway.messages import Message, Tool
from ganglion.gateway.templates import TemplateRenderer, chat_variables
from ganglion.gateway.tokenizing import ModelTokenizer
from ganglion.wire.errors import InvalidRequest

BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = ["▁", "▁a", "a", "b", "▁▁", "é", "▁é", ".", "▁.", "n't", "\U0001f600"]
SPECIALS = ["<s>", "</s>", "<|mark|>"]


def byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "b"), ("Ġ", "a"), ("Ã", "©"), ("â", "Ĥ")]  # a character whole, and another's first half
    vocabulary = {text: at for at, text in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_fallback(*, metaspace: bool) -> Tokenizer:
    """BPE as sentencepiece writes it: the space in front is either the normalizer's work or the pre-tokenizer's."""
    vocabulary = {text: at for at, text in enumerate(["<unk>", *BYTE_TOKENS, *PIECES])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "a")], unk_token="<unk>", byte_fallback=True))
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def unigram() -> Tokenizer:
    scored = [("<unk>", 0.0), *((text, -9.0) for text in BYTE_TOKENS), *((text, -2.0) for text in PIECES)]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")])
    return tokenizer


KINDS = {
    "byte level": byte_level,
    "byte fallback": lambda: byte_fallback(metaspace=False),
    "metaspace": lambda: byte_fallback(metaspace=True),
    "unigram": unigram,
}
Pair = tuple[ModelTokenizer, PreTrainedTokenizerFast]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    found = {}
    for kind, make in KINDS.items():
        tokenizer = make()
        tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIALS])
        tokenizer.add_tokens([AddedToken("<tool>", special=False)])
        folder: Path = tmp_path_factory.mktemp("kind")
        tokenizer.save(str(folder / "tokenizer.json"))
        found[kind] = (ModelTokenizer(folder), PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    return found


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_streamed_as_transformers_decodes(pairs: dict[str, Pair], kind: str, data: st.DataObject) -> None:
    ours, theirs = pairs[kind]
    whole = st.text("ab é€\U0001f600.<tool>", max_size=6).map(lambda text: ours.encode(text, with_specials=False))
    one = st.integers(0, len(theirs) - 1).map(lambda token: [token])
    ids = [token for part in data.draw(st.lists(one | whole, max_size=10)) for token in part]
    expected = theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert ours.decode(ids) == expected
    detokenizer = ours.detokenizer()
    assert "".join([*map(detokenizer.push, ids), detokenizer.finish()]) == expected


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=16) | st.text("ab é€\U0001f600.<s></s><|mark|>", max_size=16))
def test_encoded_as_transformers_encodes(pairs: dict[str, Pair], kind: str, text: str) -> None:
    ours, theirs = pairs[kind]
    for specials in (False, True):
        assert ours.encode(text, with_specials=specials) == theirs.encode(text, add_special_tokens=specials)


# --- chat templates, written in the style of several models

QWEN_STYLE = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools>\\nAnswer with <tool_call>\\n{\\"name\\": ..., \\"arguments\\": ...}\\n</tool_call><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant' }}
        {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}{{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

LLAMA_STYLE = """{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + date_string + "\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
    {{- '{"name": function, "parameters": values}' }}
{%- endif %}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or message.tool_calls) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
    {%- elif message.tool_calls %}
        {%- if not message.tool_calls | length == 1 %}{{- raise_exception("one call at a time") }}{%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", ' }}
        {{- '"parameters": ' }}{{- call.arguments | tojson }}{{- "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}{{- message.content | tojson }}
        {%- else %}{{- message.content }}{%- endif %}{{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

MISTRAL_STYLE = """{%- set ns = namespace(last=-1) %}
{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'system' %}{%- continue %}{%- endif %}
    {%- if message.role == 'user' %}
        {%- if tools and loop.index0 == ns.last %}{{- '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{%- endif %}
        {{- '[INST]' + message.content + '[/INST]' }}
    {%- elif message.tool_calls is defined and message.tool_calls %}
        {{- '[TOOL_CALLS][' }}
        {%- for call in message.tool_calls %}
            {%- if call.id is not defined or call.id | length != 9 %}{{- raise_exception("ids of 9 letters") }}{%- endif %}
            {%- set out = call.function | tojson %}
            {{- out[:-1] + ', "id": "' + call.id + '"}' + (', ' if not loop.last else '') }}
        {%- endfor %}
        {{- ']' + eos_token }}
    {%- elif message.role == 'assistant' %}
        {%- generation %}{{- message.content + eos_token }}{%- endgeneration %}
    {%- elif message.role == 'tool' %}
        {{- '[TOOL_RESULTS]{"content": ' + (message.content | tojson) + ', "call_id": "' + message.tool_call_id + '"}' }}
    {%- endif %}
{%- endfor %}"""

GEMMA_STYLE = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

STYLES = {"qwen": QWEN_STYLE, "llama": LLAMA_STYLE, "mistral": MISTRAL_STYLE, "gemma": GEMMA_STYLE}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "now", "arguments": '{"zone": "é<&>", "n": 1.5}'}}
TALKS: dict[str, list[dict[str, Any]]] = {
    "short": [{"role": "user", "content": " héllo <b> {{ 7 * 7 }} "}],
    "system": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}],
    "longer": [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "what?"},
        {"role": "user", "content": [{"type": "text", "text": "the"}, {"type": "text", "text": "time"}]},
    ],
    "tools": [
        {"role": "user", "content": "time?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": '{"time": "noon"}'},
    ],
}
NOW = {
    "type": "function",
    "function": {
        "name": "now",
        "description": "The time <now>",
        "parameters": {"type": "object", "properties": {"zone": {"type": "string", "enum": ["é", "utc"]}}},
    },
}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def renderer() -> AsyncIterator[TemplateRenderer]:
    made = TemplateRenderer()
    yield made
    await made.close()


def with_template(folder: Path, template: Any) -> tuple[ModelTokenizer, PreTrainedTokenizerFast]:
    tokenizer = byte_level()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIALS])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return ModelTokenizer(folder), PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("tools", [None, [NOW]], ids=["bare", "tools"])
@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("style", STYLES)
async def test_rendered_as_transformers_renders(
    renderer: TemplateRenderer, tmp_path: Path, style: str, talk: str, tools: list[Any] | None
) -> None:
    ours, theirs = with_template(tmp_path, STYLES[style])
    assert ours.template is not None
    messages = [Message.model_validate(message).for_template() for message in TALKS[talk]]
    given_tools = None if tools is None else [Tool.model_validate(tool).for_template() for tool in tools]
    variables = chat_variables(messages, {}, given_tools)
    expected, refusal = rendered(theirs, messages, tools)
    if refusal:
        with pytest.raises(InvalidRequest) as raised:
            await renderer.render("m", ours.template, variables)
        assert refusal in raised.value.message
        assert raised.value.param == "messages"
    else:
        assert await renderer.render("m", ours.template, variables) == expected


def rendered(theirs: PreTrainedTokenizerFast, messages: list[Any], tools: list[Any] | None) -> tuple[str, str]:
    """What transformers makes of a conversation: a prompt, or the template's refusal."""
    try:
        prompt = theirs.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        return "", str(error)
    return str(prompt), ""


async def test_the_template_for_tools(renderer: TemplateRenderer, tmp_path: Path) -> None:
    named = [{"name": "default", "template": GEMMA_STYLE}, {"name": "tool_use", "template": QWEN_STYLE}]
    ours, theirs = with_template(tmp_path, named)
    assert ours.template is not None
    for tools, template in ((None, ours.template), ([NOW], ours.template.for_tools())):
        expected = theirs.apply_chat_template(TALKS["short"], tools=tools, add_generation_prompt=True, tokenize=False)
        assert await renderer.render("m", template, chat_variables(TALKS["short"], {}, tools)) == expected
    assert ours.template.calls.name == "hermes"
