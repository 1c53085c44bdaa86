"""What comes over the wire, parsed into frozen types and bounded; and back again."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Final, cast

import msgspec
import numpy as np

from ganglion.coordinator.selection.choosing import Choice, Profile
from ganglion.coordinator.selection.experts import EXPERTS, Expert, Spec
from ganglion.coordinator.selection.figures import Claim
from ganglion.coordinator.selection.request import DEFAULT_TOKENS, Budget, Combine
from ganglion.proto import admin_pb2
from ganglion.wire.address import split_address
from ganglion.wire.errors import InvalidRequest
from ganglion.wire.identity import TrustLabel

EXPERT_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
CLASS_NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,30}")
DOMAIN: Final = re.compile(r"[a-z0-9][a-z0-9+#._-]{0,30}")
DOMAINS: Final = 16
MODEL_CHARACTERS: Final = 128
URL_CHARACTERS: Final = 500
LARGEST: Final = 1e6  # of any figure
TOKENS: Final = 1 << 20  # of an answer
ROWS: Final = 512  # kinds of requests in a profile
OUTCOMES: Final = 1024  # in a report
WHY_CHARACTERS: Final = 200

_COMBINES: Final[dict[int, Combine]] = {
    admin_pb2.COMBINE_UNSPECIFIED: "best",
    admin_pb2.COMBINE_BEST: "best",
    admin_pb2.COMBINE_VOTE: "vote",
    admin_pb2.COMBINE_RERANK: "rerank",
    admin_pb2.COMBINE_BLEND: "blend",
}


def read_spec(message: admin_pb2.ExpertSpec) -> Spec:
    """An expert; raises InvalidRequest naming the field."""
    name = _matching(message.name, EXPERT_NAME, "name")
    model = message.model
    if len(model) > MODEL_CHARACTERS or not model.isprintable():
        raise InvalidRequest(
            f"model: {len(model)} characters, at most {MODEL_CHARACTERS} printable ones", param="model"
        )
    label = TrustLabel.of(message.label).value if message.label else TrustLabel.STRANGER.value
    claimed = message.claimed
    figures = {
        field: _figure(getattr(claimed, field), f"claimed.{field}")
        for field in ("tokens_per_s", "ttft_s", "ttft_p95_s", "tpot_p95_s", "link_s", "energy_j_per_token")
    }
    claim = msgspec.convert({"energy_measured": claimed.energy_measured, **figures}, Claim)
    return Spec(
        name=name, url=_url(message.url), model=model, domains=_domains(message.domains), label=label, claim=claim
    )


def spec_message(spec: Spec) -> admin_pb2.ExpertSpec:
    """The same for the wire."""
    claim = spec.claim
    return admin_pb2.ExpertSpec(
        name=spec.name,
        url=spec.url,
        model=spec.model,
        domains=spec.domains,
        label=TrustLabel(spec.label).number,
        claimed=admin_pb2.ExpertFigures(
            tokens_per_s=claim.tokens_per_s,
            ttft_s=claim.ttft_s,
            ttft_p95_s=claim.ttft_p95_s,
            tpot_p95_s=claim.tpot_p95_s,
            link_s=claim.link_s,
            energy_j_per_token=claim.energy_j_per_token,
            energy_measured=claim.energy_measured,
        ),
    )


def expert_message(expert: Expert) -> admin_pb2.ExpertState:
    """An expert as Watch shows it."""
    figures = expert.figures
    return admin_pb2.ExpertState(
        spec=spec_message(expert.spec),
        state=expert.state,
        why=expert.why,
        figures=admin_pb2.ExpertFigures(
            tokens_per_s=figures.tokens_per_s,
            ttft_s=figures.ttft_s,
            ttft_p95_s=figures.ttft_p95_s,
            tpot_p95_s=figures.tpot_p95_s,
            link_s=figures.link_s,
            energy_j_per_token=figures.energy_j_per_token,
            samples=figures.samples,
            energy_measured=figures.energy_measured,
        ),
        queue=expert.queue,
        deployment=expert.deployment,
        tokenizer_digest=expert.tokenizer_digest,
        node_id=expert.node_id,
    )


def read_budget(message: admin_pb2.Budget, *, named: bool) -> Budget:
    """A budget, of a class if `named`; raises InvalidRequest naming the field."""
    combine = _COMBINES.get(message.combine)
    if combine is None:
        raise InvalidRequest(f"combine {message.combine}: it is best, vote, rerank or blend", param="combine")
    if message.tokens > TOKENS:
        raise InvalidRequest(f"tokens {message.tokens}: at most {TOKENS}", param="tokens")
    if message.most > EXPERTS:
        raise InvalidRequest(f"most {message.most}: there are at most {EXPERTS} experts", param="most")
    return Budget(
        name=_matching(message.name, CLASS_NAME, "class") if named or message.name else "",
        latency_p95_s=_figure(message.latency_p95_s, "latency_s"),
        energy_j=_figure(message.energy_j, "energy_j"),
        tokens=message.tokens or DEFAULT_TOKENS,
        combine=combine,
        most=message.most,
        private=message.private,
        domains=_domains(message.domains),
    )


def budget_message(budget: Budget) -> admin_pb2.Budget:
    """The same for the wire."""
    return admin_pb2.Budget(
        name=budget.name,
        latency_p95_s=budget.latency_p95_s,
        energy_j=budget.energy_j,
        tokens=budget.tokens,
        combine=cast("admin_pb2.Combine", admin_pb2.Combine.Value(f"COMBINE_{budget.combine.upper()}")),
        most=budget.most,
        private=budget.private,
        domains=budget.domains,
    )


def selection_message(budget: Budget, choice: Choice, generation: int) -> admin_pb2.Selection:
    """The subset for a budget."""
    return admin_pb2.Selection(
        budget=budget_message(budget),
        experts=choice.experts,
        value=choice.value,
        latency_p95_s=choice.latency_p95_s,
        energy_j=choice.energy_j,
        optimal=choice.optimal,
        gap=choice.gap,
        refused=choice.refused,
        generation=generation,
        left_out=[admin_pb2.LeftOut(expert=name, why=why) for name, why in choice.left_out],
    )


def read_profile(message: admin_pb2.QualityProfile) -> Profile:
    """A gate's view; raises InvalidRequest."""
    if len(message.experts) > EXPERTS or len(message.rows) > ROWS:
        raise InvalidRequest(
            f"profile: {len(message.rows)} rows of {len(message.experts)} experts, at most {ROWS} of {EXPERTS}",
            param="profile",
        )
    names = tuple(_matching(name, EXPERT_NAME, "profile.experts") for name in message.experts)
    if len(set(names)) != len(names):
        raise InvalidRequest("profile: an expert is named twice", param="profile.experts")
    share = np.array([row.share for row in message.rows], np.float64)
    if any(len(row.quality) != len(names) for row in message.rows):
        raise InvalidRequest(f"profile: a row has not {len(names)} qualities", param="profile.rows")
    quality = np.array([row.quality for row in message.rows], np.float64).reshape(share.size, len(names))
    if not (np.all(np.isfinite(quality)) and np.all((quality >= 0.0) & (quality <= 1.0))):
        raise InvalidRequest("profile: a quality is not within 0 and 1", param="profile.rows")
    if not (np.all(np.isfinite(share)) and np.all(share >= 0.0) and abs(share.sum() - 1.0) <= 1e-3) or not names:
        raise InvalidRequest("profile: shares are not numbers of 0 or more that add up to 1", param="profile.rows")
    return Profile(names, share / share.sum(), quality)


def check_report(report: admin_pb2.OutcomeReport) -> None:
    """Bounds of what a gateway measured; raises InvalidRequest."""
    if max(len(report.outcomes), len(report.links)) > OUTCOMES:
        raise InvalidRequest(
            f"report: {len(report.outcomes)} outcomes and {len(report.links)} links, at most {OUTCOMES} each",
            param="outcomes",
        )
    for outcome in report.outcomes:
        _matching(outcome.expert, EXPERT_NAME, "outcomes.expert")
        _figure(outcome.ttft_s, "outcomes.ttft_s")
        _figure(outcome.tpot_s, "outcomes.tpot_s")
        if not outcome.failed and not (outcome.ttft_s > 0.0 and outcome.tokens):
            raise InvalidRequest(
                f"outcomes: an answer of {outcome.expert} with {outcome.tokens} tokens after {outcome.ttft_s} s",
                param="outcomes.ttft_s",
            )
    for link in report.links:
        _matching(link.expert, EXPERT_NAME, "links.expert")
        _figure(link.rtt_s, "links.rtt_s")


def one_line(text: str) -> str:
    """What a gateway said of a failure, fit to be shown: one line of WHY_CHARACTERS at most."""
    return " ".join("".join(each if each.isprintable() else " " for each in text[: 4 * WHY_CHARACTERS]).split())[
        :WHY_CHARACTERS
    ]


def _matching(text: str, pattern: re.Pattern[str], param: str) -> str:
    if not pattern.fullmatch(text):
        raise InvalidRequest(f"{param} {text[:80]!r} does not match {pattern.pattern}", param=param)
    return text


def _figure(number: float, param: str) -> float:
    if not (math.isfinite(number) and 0.0 <= number <= LARGEST):
        raise InvalidRequest(
            f"{param} {number}: it is a number from 0 to {LARGEST:g}; 0: not known, or no limit", param=param
        )
    return number


def _domains(domains: Iterable[str]) -> tuple[str, ...]:
    found = tuple(dict.fromkeys(_matching(each, DOMAIN, "domains") for each in domains))
    if len(found) > DOMAINS:
        raise InvalidRequest(f"domains: {len(found)}, at most {DOMAINS}", param="domains")
    return found


def _url(text: str) -> str:
    """`http://host[:port][/path]`, or https, without a slash at its end; no user, query or fragment."""
    if not text:
        return ""
    scheme, _, rest = text.partition("://")
    host, slash, path = rest.partition("/")
    plain = len(text) <= URL_CHARACTERS and re.fullmatch(r"[!-~]+", text) and not set("?#@\\") & set(rest)
    if scheme not in {"http", "https"} or not plain:
        raise InvalidRequest(
            f"url {text[:80]!r}: expected http://host[:port][/path] or https://..., at most {URL_CHARACTERS} "
            "characters, without user, query or fragment (a key is given with: ganglion experts key NAME)",
            param="url",
        )
    split_address(host, 443 if scheme == "https" else 80)
    return f"{scheme}://{host}{slash}{path}".rstrip("/")
