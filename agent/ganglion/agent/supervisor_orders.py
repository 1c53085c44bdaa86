"""Orders of the coordinator, parsed and verified: no record is used before the owner's signature on it was checked."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from ganglion.agent import control
from ganglion.agent.store.fetch import Holder
from ganglion.agent.store.needs import needed_pieces, whole_model_pieces
from ganglion.agent.supervisor_core import Key
from ganglion.proto import fleet_pb2, identity_pb2
from ganglion.wire.certificates import Role, TrustLabel
from ganglion.wire.errors import Exhausted, InvalidDocument, PermissionDenied
from ganglion.wire.identity import Identity, VerifiedRecord, verify_record
from ganglion.wire.limits import MANIFEST_BYTES, PLAN_BYTES
from ganglion.wire.nouns import DeviceProfile, Manifest, PieceRef, Plan, digest, drafting_fault, from_json
from ganglion.wire.session_serving import check_client

_DEPLOYMENT: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")  # it names a folder
_PEERS: Final = 1024


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a share needs; documents also as they came, for the worker. drafter: another model, at a lead."""

    key: Key
    plan: Plan
    plan_json: bytes
    manifest: Manifest
    manifest_json: bytes
    pieces: tuple[PieceRef, ...]
    holders: tuple[Holder, ...]
    gateways: tuple[control.PeerEntry, ...]
    drafter: Manifest | None = None
    drafter_json: bytes = b""
    drafter_pieces: tuple[PieceRef, ...] = ()
    drafter_holders: tuple[Holder, ...] = ()


def key_of(deployment: str, epoch: int) -> Key:
    """The key of an order; raises InvalidDocument for a name that is none."""
    if not _DEPLOYMENT.fullmatch(deployment):
        raise InvalidDocument(
            f"deployment {deployment[:80]!r}: expected lower-case letters, digits and '-', at most 63"
        )
    return Key(deployment, epoch)


def read_assign(order: fleet_pb2.Assign, identity: Identity, profile: DeviceProfile) -> Assignment:
    """Check an Assign against this device: documents, records, threads and memory.

    Raises InvalidDocument, NotFound (no share here), Unauthenticated (a record that the owner did not sign),
    PermissionDenied (a role that does not fit), Exhausted (beyond this agent's threads or memory).
    """
    key = key_of(order.deployment, order.epoch)
    plan = from_json(Plan, order.plan, limit_bytes=PLAN_BYTES)
    manifest = from_json(Manifest, order.manifest, limit_bytes=MANIFEST_BYTES)
    if digest(manifest) != plan.manifest_digest or plan.numeric_class != manifest.numeric_class:
        raise InvalidDocument(f"the plan is for manifest {plan.manifest_digest[:12]}, not for the one beside it")
    pieces = needed_pieces(manifest, plan, identity.node_id)
    drafter = _read_drafter(order, plan, manifest, identity.node_id)
    drafter_pieces = whole_model_pieces(drafter) if drafter is not None else ()
    threads = plan.threads.get(identity.node_id, 0)
    if not 1 <= threads <= profile.threads:
        raise Exhausted(f"the plan asks for {threads} threads here, this agent has {profile.threads}: see --threads")
    weights = sum(piece.size for piece in (*pieces, *drafter_pieces))
    if plan.lead == identity.node_id:
        embeddings = (manifest.embedding, *([drafter.embedding] if drafter is not None else []))
        weights -= sum(piece.size for embedding in embeddings for piece in embedding.pieces)  # mapped, not loaded
    if weights > profile.memory_budget_bytes:
        raise Exhausted(
            f"the share has {weights} bytes of weights, this agent's memory budget is {profile.memory_budget_bytes}:"
            " see --memory"
        )
    return Assignment(
        key=key,
        plan=plan,
        plan_json=order.plan,
        manifest=manifest,
        manifest_json=order.manifest,
        pieces=pieces,
        holders=tuple(read_holders(order.holders, identity)),
        gateways=tuple(read_gateways(order.gateways, identity)),
        drafter=drafter,
        drafter_json=order.drafter if drafter is not None else b"",
        drafter_pieces=drafter_pieces,
        drafter_holders=tuple(read_holders(order.drafter_holders, identity)),
    )


def _read_drafter(order: fleet_pb2.Assign, plan: Plan, manifest: Manifest, node_id: str) -> Manifest | None:
    """The other model that the plan's lead is to guess with, on the lead; raises InvalidDocument."""
    wanted = plan.drafter
    if plan.lead != node_id or wanted is None or wanted.kind != "model" or wanted.manifest_digest == digest(manifest):
        return None
    drafter = from_json(Manifest, order.drafter, limit_bytes=MANIFEST_BYTES)
    if digest(drafter) != wanted.manifest_digest:
        raise InvalidDocument(f"the plan's drafter is {wanted.manifest_digest[:12]}, not the manifest beside it")
    fault = drafting_fault(manifest, drafter)
    if fault:
        raise InvalidDocument(f"drafter: {fault}", param="drafter")
    return drafter


def read_verifier(order: fleet_pb2.Verifier, identity: Identity) -> control.Verifier:
    """Who verifies for what is drafted here; its lead sees every token, so it is the owner's or refused.

    Raises Unauthenticated, PermissionDenied.
    """
    lead = None
    if order.HasField("lead"):
        record = _verified(order.lead, identity, Role.AGENT)
        if record.label is not TrustLabel.OWNER:
            raise PermissionDenied(f"verifier: {order.lead.name} is labelled {record.label}, not owner")
        lead = _entry(order.lead)
    return control.Verifier(
        target=order.target,
        lead=lead,
        lead_deployment=order.lead_deployment,
        lead_epoch=order.lead_epoch,
        manifest_digest=order.manifest_digest,
        numeric_class=order.numeric_class,
        context=order.context,
        vocab=order.vocab,
        eos_ids=tuple(order.eos_ids),
        url=order.url,
        why_away=order.why_away,
    )


def read_connect(
    order: fleet_pb2.Connect, plan: Plan, identity: Identity
) -> tuple[tuple[control.PeerEntry, ...], tuple[control.PeerEntry, ...]]:
    """Peers in order of rank, and gateways; raises Unauthenticated, PermissionDenied, InvalidDocument."""
    records = [_verified(peer, identity, Role.AGENT) for peer in _bounded(order.peers)]
    if tuple(record.node_id for record in records) != plan.devices:
        raise InvalidDocument("connect: the peers are not the plan's devices in order of rank")
    if records[0].label is not TrustLabel.OWNER:
        raise PermissionDenied(f"connect: the lead {order.peers[0].name} is labelled {records[0].label}, not owner")
    return tuple(_entry(peer) for peer in order.peers), tuple(read_gateways(order.gateways, identity))


def read_holders(peers: Iterable[identity_pb2.Peer], identity: Identity) -> list[Holder]:
    """Devices whose piece services may be asked; raises Unauthenticated, PermissionDenied."""
    return [
        Holder(_verified(peer, identity, Role.AGENT).node_id, peer.address, peer.name or peer.address)
        for peer in _bounded(peers)
    ]


def read_gateways(peers: Iterable[identity_pb2.Peer], identity: Identity) -> list[control.PeerEntry]:
    """Who may open sessions: gateways and drafting agents; raises Unauthenticated, PermissionDenied."""
    found = []
    for peer in _bounded(peers):
        check_client(verify_record(peer.record, identity.owner_public_key), peer.name)
        found.append(_entry(peer))
    return found


def _verified(peer: identity_pb2.Peer, identity: Identity, role: Role) -> VerifiedRecord:
    record = verify_record(peer.record, identity.owner_public_key)
    if record.role is not role:
        raise PermissionDenied(f"{peer.name or record.node_id} is a {record.role}, where a {role} is expected")
    return record


def _bounded(peers: Iterable[identity_pb2.Peer]) -> list[identity_pb2.Peer]:
    found = list(peers)
    if len(found) > _PEERS:
        raise InvalidDocument(f"{len(found)} peers in one order, at most {_PEERS}")
    return found


def _entry(peer: identity_pb2.Peer) -> control.PeerEntry:
    return control.PeerEntry(record=peer.record.SerializeToString(), address=peer.address, name=peer.name)
