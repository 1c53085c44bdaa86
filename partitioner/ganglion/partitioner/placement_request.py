"""What the candidates of a plan share, and what is predicted of each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal

from ganglion.partitioner.cost import Device, ModelSize, Network
from ganglion.partitioner.expert_placement_routes import RouteSets
from ganglion.partitioner.placement_drafter import DrafterLoad
from ganglion.wire.nouns import PREFIX_BLOCK_TOKENS, Manifest, Plan, PlanOptions, kv_capacity_tokens

FULL_CONTEXTS: Final = 4  # that fit in the key-value memory of all sessions, at most

Rung = tuple[int, int]
"""(context in tokens, full contexts that fit in the key-value memory)."""


@dataclass(frozen=True, slots=True)
class Request:
    """What every candidate of one call shares; `rungs` from the most wanted to the least."""

    manifest: Manifest
    manifest_digest: str
    size: ModelSize
    network: Network
    options: PlanOptions
    rungs: tuple[Rung, ...]
    drafter: DrafterLoad | None = None  # at the lead
    routes: tuple[RouteSets, ...] = ()  # of every layer, counted; () where nobody counted
    routed_tokens: int = 0  # that they were counted of
    soon: bool = False  # answers wait for the plan
    paging: bool = False  # experts may stay on disk, though no option says so: nothing fits otherwise

    def chunk(self, context: int) -> int:
        """Rows of a step at most."""
        return min(self.options.chunk or 256, context)

    def kv_tokens(self, rung: Rung) -> int:
        """Tokens of key-value state that must fit: of the sessions, and those asked to be kept of earlier ones."""
        return rung[1] * kv_capacity_tokens(rung[0]) + self.prefix_tokens

    def lead_room(self, room_bytes: int, rung: Rung, *, alone: bool) -> int:
        """What is left of a lead's room beside the least of a drafter; `alone`: the lead has the whole model."""
        if self.drafter is None:
            return room_bytes
        return room_bytes - self.drafter.least_bytes(rung[0], chunk=self.chunk(rung[0]), alone=alone)

    @property
    def prefix_tokens(self) -> int:
        """Tokens that were asked to be kept of earlier sessions, in whole blocks."""
        return -(-(self.options.prefix_tokens or 0) // PREFIX_BLOCK_TOKENS) * PREFIX_BLOCK_TOKENS


@dataclass(slots=True)
class Outcome:
    """A predicted candidate; without a plan, `problem` says why there is none."""

    mode: Literal["single", "tensor", "pipeline", "expert"]
    devices: tuple[Device, ...]
    plan: Plan | None = None
    problem: str = ""
    compute_s: float = 0.0
    exchange_s: float = 0.0
    exchanges: str = ""
    remarks: list[str] = field(default_factory=list)
    memory_bytes: dict[str, int] = field(default_factory=dict)
    available_bytes: dict[str, int] = field(default_factory=dict)

    @property
    def ms_per_token(self) -> float:
        """Predicted milliseconds of a decoded token."""
        return (self.compute_s + self.exchange_s) * 1e3

    @property
    def title(self) -> str:
        """For example "tensor over a, b"."""
        return f"{self.mode} {'on' if self.mode == 'single' else 'over'} {', '.join(d.name for d in self.devices)}"
