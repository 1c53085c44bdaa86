"""What a session over HTTP must be: greedy, plain, of the same tokenizer. Pure."""

from __future__ import annotations

from ganglion.agent.speculation.http.checking import Dialect
from ganglion.agent.speculation.http.texts import TokenTexts
from ganglion.proto import lane_pb2
from ganglion.wire.errors import ContextExceeded, InvalidRequest, Unsupported


def check_open(request: lane_pb2.Open, texts: TokenTexts, tokenizer_digest: bytes, server: str) -> None:
    """Raises Unsupported for what no server over HTTP can verify, InvalidRequest for what is no request."""
    _check_sampling(request)
    highest = max(request.prompt, default=texts.vocab)
    if highest >= texts.vocab:
        told = f"token id {highest}" if request.prompt else "no token"
        raise InvalidRequest(f"the prompt has {told}; the vocabulary has {texts.vocab}", param="prompt")
    if request.max_tokens < 1:
        raise InvalidRequest("max_tokens is 0; use at least 1", param="max_tokens")
    contract = request.contract
    if contract.manifest_digest or contract.numeric_class:
        raise Unsupported(
            f"{server} cannot show that it runs a model by its digest or in a numeric class; leave both empty",
            param="contract.manifest_digest" if contract.manifest_digest else "contract.numeric_class",
        )
    if contract.vocab != texts.vocab:
        raise Unsupported(
            f"the device drafts {contract.vocab} token ids, {server} is spoken with by {texts.vocab} of {texts.name}",
            param="contract.vocab",
        )
    if contract.tokenizer_digest and tokenizer_digest and contract.tokenizer_digest != tokenizer_digest:
        raise Unsupported(
            f"the device drafts with another tokenizer than that of {texts.name}, by which {server} is spoken with",
            param="contract.tokenizer_digest",
        )


def check_terms(request: lane_pb2.Open, dialect: Dialect, server: str) -> None:
    """Raises Unsupported and ContextExceeded for what this server cannot do."""
    wanted = request.sampling.top_logprobs
    if wanted > dialect.top:
        raise Unsupported(
            f"{server} names {dialect.top} likeliest tokens at most ({dialect.title}), {wanted} are asked for",
            param="sampling.top_logprobs",
        )
    if dialect.context and len(request.prompt) >= dialect.context:
        raise ContextExceeded(
            f"the prompt has {len(request.prompt)} tokens and {server} holds {dialect.context}, answer included",
            param="prompt",
        )


def _check_sampling(request: lane_pb2.Open) -> None:
    sampling = request.sampling
    if sampling.temperature > 0:
        raise Unsupported(
            f"temperature {sampling.temperature:g} is not verified over HTTP: such a server does not draw with our"
            " noise, so its tokens are not ours; use temperature 0, or verify on an agent",
            param="sampling.temperature",
        )
    steered = {
        "sampling.repetition_penalty": sampling.repetition_penalty not in {0.0, 1.0},
        "sampling.presence_penalty": sampling.presence_penalty != 0,
        "sampling.frequency_penalty": sampling.frequency_penalty != 0,
        "sampling.logit_bias": bool(sampling.logit_bias),
        "grammar": bool(request.grammar),
    }
    for name, asked in steered.items():
        if asked:
            raise Unsupported(
                f"{name.removeprefix('sampling.')} is not verified over HTTP: log-probabilities of a prompt are those"
                " of the plain distribution; leave it out, or verify on an agent",
                param=name,
            )
