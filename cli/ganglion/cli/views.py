"""What listings show: stable JSON documents made from the coordinator's messages, and cells for tables.

The keys of these documents, and their order, are a contract: keys may be added, never renamed.
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from ganglion.cli.output import human_bytes
from ganglion.proto import admin_pb2
from ganglion.wire.certificates import Role, TrustLabel
from ganglion.wire.errors import InvalidRequest, NotFound
from ganglion.wire.limits import ADVERT_BYTES, MANIFEST_BYTES, PLAN_BYTES
from ganglion.wire.nouns import DeviceProfile, Drafter, Drafting, Manifest, Plan, from_json

ROLE_AGENT = Role.AGENT.number

DEVICE_COLUMNS = ("NAME", "STATE", "LABEL", "ROLE", "THREADS", "MEMORY", "ADDRESS", "SEEN", "NODE")
DEPLOYMENT_COLUMNS = ("MODEL", "STATE", "CLASS", "MODE", "DEVICES", "DRAFT", "CONTEXT", "SESSIONS", "EPOCH", "MESSAGE")
TOKEN_COLUMNS = ("TOKEN", "STATE", "LABEL", "ROLE", "USED", "EXPIRES")
CANDIDATE_COLUMNS = ("", "MODE", "DEVICES", "MS/TOKEN", "COMPUTE", "EXCHANGE", "MEMORY", "WHY")


def device(state: admin_pb2.DeviceState) -> dict[str, Any]:
    """One device as a document."""
    profile = from_json(DeviceProfile, state.profile, limit_bytes=ADVERT_BYTES) if state.profile else None
    return {
        "name": state.name,
        "node_id": state.node_id,
        "role": _role(state.role),
        "label": _label(state.label),
        "state": state.state,
        "address": state.address or None,
        "last_seen_s": round(state.last_seen_s, 1),
        "system": profile.system if profile else None,
        "kernel_family": profile.kernel_family if profile else None,
        "cores": profile.cores if profile else None,
        "threads": profile.threads if profile else None,
        "memory_bytes": profile.memory_bytes if profile else None,
        "memory_budget_bytes": profile.memory_budget_bytes if profile else None,
        "memory_bytes_per_s": profile.memory_bytes_per_s if profile else None,
    }


def device_cells(row: dict[str, Any]) -> list[str]:
    """One device under DEVICE_COLUMNS."""
    budget = row["memory_budget_bytes"]
    return [
        row["name"],
        row["state"],
        _cell(row["label"]),
        row["role"],
        _cell(row["threads"]),
        human_bytes(budget) if budget else "-",
        _cell(row["address"]),
        f"{row['last_seen_s']:.0f} s ago" if row["state"] not in ("pending", "revoked") else "-",
        row["node_id"],
    ]


def deployment(state: admin_pb2.DeploymentState, names: dict[str, str]) -> dict[str, Any]:
    """One deployment as a document; `names` gives the devices' names by node id."""
    plan = from_json(Plan, state.plan, limit_bytes=PLAN_BYTES) if state.plan else None
    return {
        "model": state.model,
        "deployment": state.deployment,
        "epoch": state.epoch,
        "phase": phase(state.phase),
        "message": state.message,
        "manifest_digest": state.manifest_digest,
        "numeric_class": plan.numeric_class.name if plan else None,
        "mode": mode(plan) if plan else None,
        "context": plan.context if plan else None,
        "prefix_tokens": plan.prefix_tokens if plan else None,
        "sessions": state.sessions,
        "lead": names.get(plan.lead, plan.lead) if plan else None,
        "shards": _shards(plan, names) if plan else [],
        "drafter": _drafter(plan.drafter, state) if plan and plan.drafter and not plan.drafting else None,
        "drafts_for": state.drafts_for or None,
        "drafting": _drafting(plan.drafting) if plan and plan.drafting else None,
    }


def deployment_cells(row: dict[str, Any]) -> list[str]:
    """One deployment under DEPLOYMENT_COLUMNS."""
    return [
        row["model"],
        row["phase"],
        _cell(row["numeric_class"]),
        _cell(row["mode"]),
        ", ".join(shard["device"] for shard in row["shards"]) or "-",
        _draft_cell(row),
        _cell(row["context"]),
        str(row["sessions"]),
        str(row["epoch"]),
        row["message"] or "-",
    ]


def _drafter(drafter: Drafter, state: admin_pb2.DeploymentState) -> dict[str, Any]:
    return {
        "kind": drafter.kind,
        "model": state.drafter or None,
        "manifest_digest": drafter.manifest_digest or None,
        "layers": drafter.layers or None,
        "slots": drafter.slots or None,
        "context": drafter.context or None,
        "window_tokens": drafter.window_tokens or None,
    }


def _drafting(drafting: Drafting) -> dict[str, Any]:
    return {
        "mode": drafting.mode,
        "away": drafting.away,
        "wait_s": drafting.wait_s,
        "window_tokens": drafting.window_tokens or None,
        "memory_bytes": drafting.memory_bytes or None,
        "url": drafting.url or None,
        "offered": drafting.offered,
    }


def _draft_cell(row: dict[str, Any]) -> str:
    """What guesses here, or for whom this guesses and how."""
    if row["drafts_for"]:
        mode = f" ({row['drafting']['mode']})" if row["drafting"] else ""
        return f"for {row['drafts_for']}{mode}"
    drafter = row["drafter"]
    if drafter is None:
        return "-"
    kinds = {"ngram": "ngram", "early": f"early:{drafter['layers']}", "model": drafter["model"]}
    return _cell(kinds[drafter["kind"]])


def refused_offer(offer: admin_pb2.RefusedOffer, names: dict[str, str]) -> dict[str, Any]:
    """A device that would draft and does not, as a document."""
    return {
        "device": names.get(offer.node_id, offer.node_id),
        "model": offer.model,
        "drafts_for": offer.target or None,
        "reason": offer.reason,
    }


def refused_line(row: dict[str, Any]) -> str:
    """The same as a line."""
    target = f" for {row['drafts_for']}" if row["drafts_for"] else ""
    return f"{row['device']} does not draft{target} with {row['model']}: {row['reason']}"


def token(state: admin_pb2.TokenState, *, now_s: float) -> dict[str, Any]:
    """One join token as a document; the secret itself is not kept anywhere and cannot be shown again."""
    grant = state.grant
    expired = grant.expires_unix_s <= now_s
    spent = state.used >= grant.uses
    return {
        "token_id": grant.token_id,
        "state": "revoked" if state.revoked else "used" if spent else "expired" if expired else "unused",
        "label": _label(grant.label),
        "role": _role(grant.role),
        "used": state.used,
        "uses": grant.uses,
        "expires_unix_s": grant.expires_unix_s,
    }


def token_cells(row: dict[str, Any]) -> list[str]:
    """One join token under TOKEN_COLUMNS."""
    expires = datetime.fromtimestamp(row["expires_unix_s"], tz=UTC).strftime("%Y-%m-%d %H:%M UTC")
    return [row["token_id"], row["state"], _cell(row["label"]), row["role"], f"{row['used']} of {row['uses']}", expires]


def candidate_cells(row: dict[str, Any]) -> list[str]:
    """One candidate of a PlanReport (as decoded JSON) under CANDIDATE_COLUMNS."""
    memory = row.get("memory_bytes") or {}
    available = row.get("available_bytes") or {}
    return [
        "→" if row["chosen"] else "",
        row["mode"],
        ", ".join(row["devices"]),
        _milliseconds(row.get("ms_per_token")),
        _milliseconds(row.get("compute_ms")),
        _milliseconds(row.get("exchange_ms")),
        ", ".join(
            f"{name} {human_bytes(size)}" + (f" of {human_bytes(available[name])}" if name in available else "")
            for name, size in memory.items()
        )
        or "-",
        row["reason"],
    ]


def fleet(state: admin_pb2.Fleetwide, *, api: str | None, coordinator: str) -> dict[str, Any]:
    """Everything at a glance as a document."""
    devices = [device(each) for each in state.devices]
    names = names_of(state.devices)
    return {
        "api": api,
        "coordinator": coordinator,
        "version": state.coordinator_version,
        "devices": [row for row in devices if row["role"] == "agent"],
        "deployments": [deployment(each, names) for each in state.deployments],
        "tokens_unused": state.tokens_unused,
        "refused_offers": [refused_offer(each, names) for each in state.refused_offers],
    }


def names_of(devices: Iterable[admin_pb2.DeviceState]) -> dict[str, str]:
    """Names by node id."""
    return {each.node_id: each.name for each in devices}


def phase(number: admin_pb2.DeploymentPhase) -> str:
    """A deployment's phase as people and programs read it, for example "ready"."""
    return admin_pb2.DeploymentPhase.Name(number).removeprefix("DEPLOYMENT_PHASE_").lower()


def mode(plan: Plan) -> str:
    """single, tensor, pipeline, expert, or pipeline of tensor stages as `pipeline+tensor`."""
    if any(share.experts for share in plan.stages[0].shares[1:]):
        return "expert"
    tensor = any(len(stage.shares) > 1 for stage in plan.stages)
    if len(plan.stages) == 1:
        return "tensor" if tensor else "single"
    return "pipeline+tensor" if tensor else "pipeline"


def label_of(name: str) -> TrustLabel:
    """A trust label by its name. Raises InvalidRequest naming the choices."""
    if name not in list(TrustLabel):
        raise InvalidRequest(f"label {name!r}: it is one of {', '.join(TrustLabel)}", param="label")
    return TrustLabel(name)


def role_of(name: str) -> Role:
    """A role that a token can give, by its name. Raises InvalidRequest naming the choices."""
    choices = [role for role in Role if role is not Role.COORDINATOR]
    if name not in choices:
        raise InvalidRequest(f"role {name!r}: it is one of {', '.join(choices)}", param="role")
    return Role(name)


def find_device(devices: Sequence[admin_pb2.DeviceState], wanted: str) -> admin_pb2.DeviceState:
    """The device with this name, node id, or beginning of a node id (6 characters at least). Raises NotFound."""
    for each in devices:
        if wanted in (each.name, each.node_id):
            return each
    begins = [each for each in devices if len(wanted) >= 6 and each.node_id.startswith(wanted)]
    if len(begins) == 1:
        return begins[0]
    raise NotFound(
        f"no device is called {wanted!r}; {_instead(wanted, [each.name for each in devices])}", param="device"
    )


def find_deployment(deployments: Sequence[admin_pb2.DeploymentState], wanted: str) -> admin_pb2.DeploymentState:
    """The deployment of this model, or with this id. Raises NotFound."""
    for each in deployments:
        if wanted in (each.model, each.deployment):
            return each
    raise NotFound(
        f"no deployment of {wanted!r}; {_instead(wanted, [each.model for each in deployments])}", param="model"
    )


def manifest_of(state: admin_pb2.DeploymentState) -> Manifest:
    """The manifest inside a deployment's state."""
    return from_json(Manifest, state.manifest, limit_bytes=MANIFEST_BYTES)


def unix_now_s() -> float:
    """Seconds since 1970."""
    return time.time()


def _instead(wanted: str, known: list[str]) -> str:
    near = difflib.get_close_matches(wanted, known, n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"there are: {', '.join(sorted(known))}" if known else "there are none"


def _shards(plan: Plan, names: dict[str, str]) -> list[dict[str, Any]]:
    return [
        {
            "device": names.get(share.device, share.device),
            "node_id": share.device,
            "layers": [stage.layers.start, stage.layers.stop],
            "heads": [share.heads.start, share.heads.stop],
            "columns": [share.columns.start, share.columns.stop],
            "vocab": [share.vocab.start, share.vocab.stop],
            "experts": sum(map(len, share.experts)),
            "threads": plan.threads.get(share.device),
        }
        for stage in plan.stages
        for share in stage.shares
    ]


def _role(number: int) -> str:
    return Role.of(number).value


def _label(number: int) -> str | None:
    return TrustLabel.of(number).value if number else None


def _cell(value: object) -> str:
    return "-" if value is None or value == "" else str(value)


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
