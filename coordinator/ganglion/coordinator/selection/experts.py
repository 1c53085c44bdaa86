"""Who could answer: specs, what deployments say of themselves, and what gateways measured. Pure; no prompt is known."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Literal

import msgspec

from ganglion.coordinator.selection.figures import SAMPLES, Claim, Figures, Sample, figures_of
from ganglion.coordinator.selection.standing import Standing
from ganglion.wire.errors import Exhausted, NotFound

EXPERTS: Final = 64
AGING_S: Final = 30.0  # figures are weighed anew by the age of their answers so often
LABELS: Final = ("stranger", "friend", "owner")  # the least trusted first

State = Literal["ready", "away", "dropped"]

_SAMPLES: Final = msgspec.json.Decoder(list[Sample])


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What the owner says of an expert. url: of a server; "": a deployment.

    model: what the server, or this fleet, calls it, where that is not `name`. label: how far a server is trusted.
    """

    name: str
    url: str = ""
    model: str = ""
    domains: tuple[str, ...] = ()
    label: str = "stranger"
    claim: Claim = field(default_factory=Claim)

    @property
    def served_model(self) -> str:
        """The model that answers."""
        return self.model or self.name


@dataclass(frozen=True, kw_only=True)
class Present:
    """A deployment as far as an expert depends on it. why: "" when it is ready, else one line.

    label: the least of its devices'. ms_per_token: predicted; 0: not. slots: answers at a time.
    """

    deployment: str
    why: str
    node_id: str = ""
    label: str = "owner"
    tokenizer_digest: str = ""
    sessions: int = 0
    slots: int = 0
    devices: int = 1
    ms_per_token: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Expert:
    """One expert now."""

    spec: Spec
    state: State
    why: str
    label: str
    figures: Figures
    queue: int = 0
    slots: int = 0
    deployment: str = ""
    tokenizer_digest: str = ""
    node_id: str = ""

    @property
    def name(self) -> str:
        """Of its spec."""
        return self.spec.name


@dataclass
class _Known:
    spec: Spec
    samples: deque[Sample] = field(default_factory=lambda: deque(maxlen=SAMPLES))
    standing: Standing = field(default_factory=Standing)
    link_s: float = 0.0
    answers: int = 0
    unsaved: bool = False
    figures: tuple[object, Figures] | None = None  # with what they depend on

    def figures_now(self, claim: Claim, now_s: float) -> Figures:
        """Kept for AGING_S: every watcher asks for them at every change."""
        depends = (claim, self.link_s, self.answers, now_s // AGING_S)
        if self.figures is None or self.figures[0] != depends:
            self.figures = (depends, figures_of(claim, self.samples, self.link_s, now_s))
        return self.figures[1]


class ExpertTable:
    """Every expert by name. Times are Unix seconds."""

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def put(self, spec: Spec, measured: bytes = b"") -> None:
        """Add an expert, or replace its spec; one that was dropped may be asked again at once.

        What was measured of it is kept unless another model answers now. Raises Exhausted beyond EXPERTS.
        """
        known = self._known.get(spec.name)
        if known is None and len(self._known) >= EXPERTS:
            raise Exhausted(f"{EXPERTS} experts are known already: remove one (ganglion experts rm NAME)")
        fresh = _Known(spec)
        if known is not None and (known.spec.url, known.spec.served_model) == (spec.url, spec.served_model):
            fresh.samples, fresh.link_s = known.samples, known.link_s
        if measured:
            fresh.samples.extend(_SAMPLES.decode(measured))
        self._known[spec.name] = fresh

    def remove(self, name: str) -> None:
        """Forget an expert; raises NotFound naming those there are."""
        if self._known.pop(name, None) is None:
            have = ", ".join(sorted(self._known)) or "none"
            raise NotFound(f"no expert {name!r}; there are: {have}", param="name")

    def answered(self, name: str, ttft_s: float, tpot_s: float, now_s: float) -> bool:
        """An answer was measured; returns whether its state changed. Unknown names are no error: they were removed."""
        known = self._known.get(name)
        if known is None:
            return False
        known.samples.append(Sample(now_s, ttft_s, tpot_s))
        known.answers += 1
        known.unsaved = True
        return known.standing.answered()

    def failed(self, name: str, code: str, why: str, now_s: float) -> bool:
        """It failed; returns whether its state changed."""
        known = self._known.get(name)
        return known is not None and known.standing.failed(code, why, now_s)

    def linked(self, name: str, rtt_s: float) -> None:
        """The round trip between gateway and expert was measured."""
        if name in self._known:
            self._known[name].link_s = rtt_s

    def tick(self, now_s: float) -> bool:
        """Time passed; returns whether any state changed."""
        return sum(known.standing.tick(now_s) for known in self._known.values()) > 0  # every one ticks

    def unsaved(self) -> Iterable[tuple[str, bytes]]:
        """(name, measurements) of experts measured since the last call."""
        for name, known in self._known.items():
            if known.unsaved:
                known.unsaved = False
                yield name, self.measured(name)

    def measured(self, name: str) -> bytes:
        """What was measured of an expert, for `put` after a restart."""
        return msgspec.json.encode(list(self._known[name].samples))

    def served_models(self) -> set[str]:
        """Models of this fleet that experts name."""
        return {known.spec.served_model for known in self._known.values() if not known.spec.url}

    def experts(self, present: Mapping[str, Present], now_s: float) -> list[Expert]:
        """Everyone, by name. present: this fleet's deployments, by model."""
        return [self._expert(known, present, now_s) for _, known in sorted(self._known.items())]

    def _expert(self, known: _Known, present: Mapping[str, Present], now_s: float) -> Expert:
        spec, standing = known.spec, known.standing
        held = None if spec.url else present.get(spec.served_model)
        claim = spec.claim
        if held is not None:
            if held.ms_per_token and not claim.tokens_per_s:
                claim = replace(claim, tokens_per_s=1000.0 / held.ms_per_token)
            claim = replace(claim, devices=held.devices)
        state: State = "ready"
        why = standing.line(spec.name, now_s)
        if not spec.url and (held is None or held.why):
            state = "away"
            why = held.why if held is not None else f"it is not deployed: ganglion run {spec.served_model}"
        elif standing.state == "dropped":
            state = "dropped"
        figures = known.figures_now(claim, now_s)
        if held is None:
            return Expert(spec=spec, state=state, why=why, label=spec.label, figures=figures)
        return Expert(
            spec=spec,
            state=state,
            why=why,
            label=held.label,
            figures=figures,
            queue=held.sessions,
            slots=held.slots,
            deployment=held.deployment,
            tokenizer_digest=held.tokenizer_digest,
            node_id=held.node_id,
        )
