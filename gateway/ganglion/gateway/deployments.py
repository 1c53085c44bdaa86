"""Pure core: what the coordinator says of its deployments becomes a table of routes to leads.

Nothing of it is believed that the owner's key does not vouch for: a lead sees every token, so its record must be
signed for the role agent and the label owner.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from ganglion.proto import admin_pb2, identity_pb2
from ganglion.wire.errors import GanglionError, InvalidDocument, NotFound, Unauthenticated, Unavailable
from ganglion.wire.identity import Role, TrustLabel, VerifiedRecord
from ganglion.wire.limits import MANIFEST_BYTES, PLAN_BYTES
from ganglion.wire.nouns import Manifest, PieceRef, Plan, digest, from_json

Verify = Callable[[identity_pb2.SignedRecord], VerifiedRecord]


class Phase(StrEnum):
    """Of a deployment, in words."""

    UNKNOWN = "unknown"
    PLANNING = "planning"
    PREPARING = "preparing"
    CONNECTING = "connecting"
    READY = "ready"
    REPLANNING = "replanning"
    FAILED = "failed"
    STOPPED = "stopped"


_PHASES = {
    admin_pb2.DEPLOYMENT_PHASE_PLANNING: Phase.PLANNING,
    admin_pb2.DEPLOYMENT_PHASE_PREPARING: Phase.PREPARING,
    admin_pb2.DEPLOYMENT_PHASE_CONNECTING: Phase.CONNECTING,
    admin_pb2.DEPLOYMENT_PHASE_READY: Phase.READY,
    admin_pb2.DEPLOYMENT_PHASE_REPLANNING: Phase.REPLANNING,
    admin_pb2.DEPLOYMENT_PHASE_FAILED: Phase.FAILED,
    admin_pb2.DEPLOYMENT_PHASE_STOPPED: Phase.STOPPED,
}


@dataclass(frozen=True)
class ModelFacts:
    """What a gateway uses of a manifest. `vocab` in ids."""

    digest: str
    tokenizer: dict[str, PieceRef]
    vocab: int
    eos_ids: tuple[int, ...]


@dataclass(frozen=True)
class Route:
    """One deployment as the gateway sees it.

    `drafts_for`: the model that it drafts for. `hybrid`: a drafting deployment as the way to that model, which
    verifies; `local_class`: the numeric class of what its lead draws alone.
    `refusal` says why it is not used though the coordinator calls it ready. `context`: tokens of a session, prompt and
    answer; 0 while there is no plan. `holders`: verified piece services. `owned`: every device that computes is one of
    the owner's, by records that the owner signed; which devices these are is the coordinator's word.
    """

    deployment: str
    model: str
    epoch: int
    phase: Phase
    message: str
    sessions: int
    lead: identity_pb2.Peer | None
    facts: ModelFacts | None
    context: int
    holders: tuple[identity_pb2.Peer, ...]
    refusal: str | None
    drafts_for: str = ""
    hybrid: bool = False
    local_class: str = ""
    lead_id: str = ""
    owned: bool = False

    @property
    def usable(self) -> bool:
        """Whether sessions may be opened on its lead."""
        return self.phase is Phase.READY and self.refusal is None

    @property
    def key(self) -> tuple[str, int]:
        """What a session belongs to: deployment and epoch."""
        return self.deployment, self.epoch


@dataclass(frozen=True)
class _Target:
    """What stays known of a model while it is away."""

    facts: ModelFacts
    context: int
    holders: tuple[identity_pb2.Peer, ...]


class Deployments:
    """The table. Invariant: the lead of a usable route is verified and has an address."""

    def __init__(self, verify: Verify, prefers: str = "") -> None:
        """`prefers`: node id of the agent beside this gateway: what it drafts for is asked of it."""
        self._verify = verify
        self._prefers = prefers
        self._targets: dict[str, _Target] = {}  # what was last known of models that are drafted for
        self._facts: dict[str, ModelFacts] = {}
        self._routes: tuple[Route, ...] = ()
        self._labels: dict[bytes, str] = {}  # of records: the node id where it is an agent labelled owner, else ""
        self._owners: frozenset[str] = frozenset()
        self._heard = False

    @property
    def heard(self) -> bool:
        """Whether the coordinator has ever said anything."""
        return self._heard

    @property
    def routes(self) -> Sequence[Route]:
        """Wanted deployments, by name of the model."""
        return self._routes

    def update(self, fleet: admin_pb2.Fleetwide) -> frozenset[tuple[str, int]]:
        """Take the state of the fleet; the keys (deployment, epoch) whose sessions have ended because of it."""
        before = {route.key for route in self._routes if route.usable}
        self._owners = self._owned(fleet.devices)
        routes = [self._route(state) for state in fleet.deployments]
        wanted = [route for route in routes if route.phase is not Phase.STOPPED]
        wanted += self._hybrids(wanted)
        self._routes = tuple(sorted(wanted, key=lambda route: (route.model, route.deployment)))
        self._heard = True
        needed = {state.manifest_digest for state in fleet.deployments}
        needed |= {target.facts.digest for target in self._targets.values()}
        self._facts = {name: facts for name, facts in self._facts.items() if name in needed}
        return frozenset(before - {route.key for route in self._routes if route.usable})

    def find(self, model: str) -> Route:
        """The route for `model`: by the agent beside, else that with the fewest sessions.

        Raises NotFound or Unavailable saying what is going on.
        """
        routes = [route for route in self._routes if route.model == model]
        if not routes and not self._heard:
            raise Unavailable("the gateway has not heard from the coordinator yet; try again shortly")
        if not routes:
            names = ", ".join(sorted({route.model for route in self._routes})) or "none; deploy one with: ganglion run"
            raise NotFound(f"no model is called {model[:128]!r}; there are: {names}", param="model")
        usable = [route for route in routes if route.usable]
        if usable:
            # What drafts serves its own name too, where nothing else does.
            return min(usable, key=lambda one: (not one.hybrid, bool(one.drafts_for), one.sessions, one.deployment))
        raise Unavailable(describe(routes[0]))

    def _hybrids(self, routes: Sequence[Route]) -> list[Route]:
        """Routes to models through the agent beside this gateway, which drafts for them, also while they are away."""
        found = []
        names = {route.drafts_for for route in routes if route.drafts_for}
        for target in routes:
            if target.model in names and not target.drafts_for and target.facts is not None:
                before = self._targets.get(target.model)
                context = target.context or (before.context if before is not None else 0)
                self._targets[target.model] = _Target(target.facts, context, target.holders)
        self._targets = {name: target for name, target in self._targets.items() if name in names}
        for route in routes:
            if not route.drafts_for or not route.usable or not self._is_preferred(route):
                continue
            known = self._targets.get(route.drafts_for)
            found.append(
                replace(
                    route,
                    model=route.drafts_for,
                    facts=known.facts if known is not None else route.facts,
                    context=(known.context if known is not None else 0) or route.context,
                    holders=(*route.holders, *(known.holders if known is not None else ())),
                    drafts_for="",
                    hybrid=True,
                    owned=False,  # what verifies may be somebody else's server
                )
            )
        return found

    def _is_preferred(self, route: Route) -> bool:
        return bool(self._prefers) and route.lead_id == self._prefers

    def _route(self, state: admin_pb2.DeploymentState) -> Route:
        facts, context, refusal, numeric, lead_id = None, 0, None, "", ""
        devices: frozenset[str] = frozenset()
        lead = state.lead if state.HasField("lead") else None
        phase = _PHASES.get(state.phase, Phase.UNKNOWN)
        try:
            if state.manifest:
                facts = self._facts_of(state)
            if state.plan:
                plan = from_json(Plan, state.plan, limit_bytes=PLAN_BYTES)
                context, numeric = plan.context, plan.numeric_class.name
                devices = frozenset(share.device for stage in plan.stages for share in stage.shares)
            if phase is Phase.READY:
                lead_id = self._check_lead(lead)
                if facts is None or not context:
                    raise InvalidDocument("the coordinator sent no manifest or no plan for it")
        except GanglionError as error:
            refusal = error.message
        return Route(
            deployment=state.deployment,
            model=state.model,
            epoch=state.epoch,
            phase=phase,
            message=state.message,
            sessions=state.sessions,
            lead=lead,
            facts=facts,
            context=context,
            holders=tuple(holder for holder in state.holders if holder.address and self._is_ours(holder)),
            refusal=refusal,
            drafts_for=state.drafts_for,
            lead_id=lead_id,
            owned=bool(lead_id) and devices <= self._owners | {lead_id},
            local_class=numeric if state.drafts_for else "",
        )

    def _facts_of(self, state: admin_pb2.DeploymentState) -> ModelFacts:
        known = self._facts.get(state.manifest_digest)
        if known is not None:
            return known
        manifest = from_json(Manifest, state.manifest, limit_bytes=MANIFEST_BYTES)
        found = digest(manifest)
        if found != state.manifest_digest:
            raise InvalidDocument("the manifest is not the one that its digest names")
        facts = ModelFacts(found, manifest.tokenizer, manifest.geometry.vocab, manifest.eos_ids)
        self._facts[found] = facts
        return facts

    def _check_lead(self, lead: identity_pb2.Peer | None) -> str:
        """The node id of a lead that may see tokens."""
        if lead is None or not lead.address:
            raise InvalidDocument("the coordinator named no lead that can be dialled")
        record = self._verify(lead.record)
        if record.role is not Role.AGENT:
            raise Unauthenticated(f"its lead {lead.name!r} is a {record.role.value}, not an agent")
        if record.label is not TrustLabel.OWNER:
            raise Unauthenticated(
                f"its lead {lead.name!r} is labelled {record.label.value}: text goes to devices labelled owner only "
                f"(ganglion device trust)"
            )
        return record.node_id

    def _owned(self, devices: Sequence[admin_pb2.DeviceState]) -> frozenset[str]:
        """Node ids of agents that the owner's key calls the owner's; each record is verified once."""
        records = [state.record.SerializeToString(deterministic=True) for state in devices if state.HasField("record")]
        signed = [state.record for state in devices if state.HasField("record")]
        self._labels = {
            record: self._labels[record] if record in self._labels else self._owner_of(parsed)
            for record, parsed in zip(records, signed, strict=True)
        }
        return frozenset(node for node in self._labels.values() if node)

    def _owner_of(self, signed: identity_pb2.SignedRecord) -> str:
        try:
            record = self._verify(signed)
        except GanglionError:
            return ""
        return record.node_id if record.role is Role.AGENT and record.label is TrustLabel.OWNER else ""

    def _is_ours(self, peer: identity_pb2.Peer) -> bool:
        try:
            self._verify(peer.record)
        except Unauthenticated:
            return False
        return True


def describe(route: Route) -> str:
    """One line on a deployment that cannot be used now."""
    if route.refusal is not None:
        return f"{route.model} is refused: {route.refusal}"
    more = f": {route.message}" if route.message else ""
    if route.phase is Phase.REPLANNING:
        return f"{route.model} is being planned again after a device was lost (epoch {route.epoch}){more}"
    return f"{route.model} is {route.phase} (epoch {route.epoch}){more}"
