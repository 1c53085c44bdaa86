"""Which dialect a server speaks: it is asked once, by the smallest requests that show it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from ganglion.agent.speculation.http.checking import Dialect, field, only_choice
from ganglion.agent.speculation.http.client import HttpClient
from ganglion.agent.speculation.http.echo import Echo, Habits
from ganglion.agent.speculation.http.llama_server import Prefixes
from ganglion.agent.speculation.http.texts import TokenTexts
from ganglion.agent.speculation.http.vllm import PromptLogprobs
from ganglion.wire.errors import (
    DeviceLost,
    GanglionError,
    InvalidRequest,
    NotFound,
    ProtocolViolation,
    Unavailable,
    Unreachable,
    Unsupported,
)

SAMPLE: Final = 12  # tokens by which vocabularies are compared
_TEXTS: Final = ("The answer is 12, and then", "def add(a, b):\n    return a", "one two three four")


async def find_dialect(
    client: HttpClient, texts: TokenTexts, *, model: str | None, bos_id: int | None, window_tokens: int
) -> tuple[str, Dialect]:
    """The server's name of its model and the dialect to speak with it.

    model: None where it serves one only. Raises Unsupported for a server that gives no log-probabilities of a prompt
    and for one with another vocabulary, NotFound for another model, what the client raises for one that is away.
    """
    model, described = await _model(client, model)
    limit = described.get("max_model_len")
    context = limit if isinstance(limit, int) else 0
    sample = _sample(texts)
    ids = PromptLogprobs(model, texts.vocab, window_tokens, context)
    text = Echo(model, texts, Habits(bos_id), window_tokens, context)
    finders: dict[str, Callable[[], Awaitable[Dialect]]] = {
        "prompt_logprobs": lambda: _by_prompt_logprobs(client, ids, texts, sample),
        "/completion of llama.cpp's server": lambda: _by_prefixes(client, texts, sample, window_tokens, described),
        "echo": lambda: _by_echo(client, text),
    }
    refused: dict[str, GanglionError] = {}
    for name, find in finders.items():
        try:
            return model, await find()
        except (Unreachable, DeviceLost, Unsupported):
            raise
        except (InvalidRequest, NotFound, ProtocolViolation, Unavailable) as error:  # what it does not know
            refused[name] = error
    raise _none(f"{client.where} ({model})", refused)


def _none(server: str, refused: Mapping[str, GanglionError]) -> GanglionError:
    told = " | ".join(f"{name}: {error.message}" for name, error in refused.items())
    if "logits_all" in told:
        return Unsupported(
            f"{server} keeps no logits of a prompt; start llama-cpp-python's server with --logits_all true"
        )
    if all(type(error) is Unavailable for error in refused.values()):
        return Unavailable(f"{server} fails at every request: {told}")
    return Unsupported(f"{server} gives no log-probabilities of a prompt, by which drafts are verified: {told}")


async def _model(client: HttpClient, model: str | None) -> tuple[str, dict[str, Any]]:
    listed = [one for one in field(await client.get("/models"), "data", list) if isinstance(one, dict)]
    by_name = {name: one for one in listed if isinstance(name := one.get("id"), str)}
    if model is None and len(by_name) == 1:
        model = next(iter(by_name))
    if model is None or model not in by_name:
        wanted = "none was named" if model is None else f"{model!r} is not among them"
        raise NotFound(f"{client.where} serves {', '.join(sorted(by_name)) or 'no model'}; {wanted}", param="model")
    return model, by_name[model]


def _sample(texts: TokenTexts) -> list[int]:
    """Some tokens of the whole vocabulary whose texts are their own, the last among them."""
    plain = [token for token in range(texts.vocab) if texts.only(texts.label(token)) == token]
    step = max(1, len(plain) // SAMPLE)
    return plain[::-step][:SAMPLE][::-1]


def _same(client: HttpClient, texts: TokenTexts, token: int, theirs: Any) -> None:
    if not isinstance(theirs, str) or not texts.shows(token, theirs, first=True):
        raise Unsupported(
            f"{client.where} has another tokenizer: token {token} is {texts.label(token)!r} of {texts.name} and"
            f" {str(theirs)[:40]!r} there; verify on a server of the same model",
            param="contract.tokenizer_digest",
        )


async def _by_prompt_logprobs(
    client: HttpClient, dialect: PromptLogprobs, texts: TokenTexts, sample: Sequence[int]
) -> Dialect:
    ask = dialect.ask(sample[:1], sample[1:], top=0)
    reply = await client.post(ask.path, ask.document)
    rows = only_choice(reply).get("prompt_logprobs")
    if not isinstance(rows, list):
        raise ProtocolViolation("its answer has none")
    dialect.read(reply, sample[:1], sample[1:], top=0)
    for token, row in zip(sample[1:], rows[1:], strict=True):
        theirs = row[str(token)].get("decoded_token")
        if theirs is not None:
            _same(client, texts, token, theirs)
    return dialect


async def _by_prefixes(
    client: HttpClient, texts: TokenTexts, sample: Sequence[int], window_tokens: int, described: dict[str, Any]
) -> Dialect:
    props = await client.get("/props", root=True)
    slots = field(props, "total_slots", int)
    meta = described.get("meta")
    vocab = meta.get("n_vocab") if isinstance(meta, dict) else None
    if isinstance(vocab, int) and vocab != texts.vocab:
        raise Unsupported(
            f"{client.where} has a vocabulary of {vocab} tokens, {texts.name} one of {texts.vocab}",
            param="contract.vocab",
        )
    for token in sample:
        told = await client.post("/detokenize", {"tokens": [token]}, root=True)
        _same(client, texts, token, field(told, "content", str))
    settings = props.get("default_generation_settings")
    context = settings.get("n_ctx", 0) if isinstance(settings, dict) else 0
    if slots < 2:
        raise Unsupported(
            f"{client.where} has {slots} slot, and a window needs one for each token and one more; give it --parallel 8"
        )
    dialect = Prefixes(texts.vocab, min(window_tokens, slots - 1), context if isinstance(context, int) else 0)
    ask = dialect.ask(sample[:1], sample[1:2], top=0)
    dialect.read(await client.post(ask.path, ask.document, root=True), sample[:1], sample[1:2], top=0)
    return dialect


async def _by_echo(client: HttpClient, dialect: Echo) -> Dialect:
    texts, bos_id = dialect.texts, dialect.habits.bos_id
    for text in _TEXTS:
        ask = dialect.asking(text)
        reply = await client.post(ask.path, ask.document)
        choice, usage = only_choice(reply), field(reply, "usage", dict)
        labels = field(field(choice, "logprobs", dict), "tokens", list)
        drawn = field(choice, "text", str)[len(text) :]
        prompt = field(usage, "prompt_tokens", int)
        if not all(isinstance(label, str) for label in labels) or len(labels) < 2:
            raise ProtocolViolation("it does not list the tokens of the prompt")
        if not drawn or usage.get("completion_tokens") != 1:
            continue
        strange = next((label for label in labels if not texts.knows(label)), None)
        if strange is not None:
            raise Unsupported(
                f"{client.where} has another tokenizer: {strange[:40]!r} is no token of {texts.name};"
                " verify on a server of the same model",
                param="contract.tokenizer_digest",
            )
        spelled = "".join(labels)
        if len(labels) == prompt + 1 and spelled == text + drawn:
            habits = Habits()
        elif len(labels) == prompt and spelled == text + drawn:
            habits = Habits(bos_id=bos_id, begins=True)
        elif len(labels) == prompt and spelled == text:
            habits = Habits(bos_id=bos_id, shifted=True)
        else:
            raise ProtocolViolation(f"it lists {len(labels)} tokens for a prompt of {prompt} tokens and one more")
        return replace(dialect, habits=habits)
    raise ProtocolViolation("it ends every answer at once")
