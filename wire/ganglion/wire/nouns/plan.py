"""The plan: who runs which shard, and how they exchange."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from ganglion.wire.nouns.document import Document
from ganglion.wire.nouns.drafting import Drafter, Drafting, Window
from ganglion.wire.nouns.manifest import Count, Digest, NumericClass, Positive

NodeId = Annotated[str, msgspec.Meta(pattern="^[a-z2-7]{26}$")]
Topology = Literal["mesh", "star"]
Payload = Literal["full", "fp16", "int8"]
KV_GRAIN_TOKENS = 512  # key-value buffers hold 512 * 2**n tokens
PREFIX_BLOCK_TOKENS = 32  # key-value state is kept for later sessions in blocks of so many tokens


def kv_capacity_tokens(tokens: int) -> int:
    """The smallest capacity 512 * 2**n of a session's key-value buffers that holds `tokens`."""
    capacity = KV_GRAIN_TOKENS
    while capacity < tokens:
        capacity *= 2
    return capacity


class Range(Document, frozen=True, array_like=True):
    """Half-open range start..stop of groups or layers; empty when equal."""

    start: Count
    stop: Count

    def __post_init__(self) -> None:
        if self.stop < self.start:
            raise ValueError(f"range {self.start}..{self.stop} ends before it starts")

    @property
    def count(self) -> int:
        """How many groups or layers."""
        return self.stop - self.start


class Share(Document, frozen=True, kw_only=True):
    """One device's part of a stage: its groups along both axes, and of the output matrix (last stage only).

    experts: of a model that is cut by experts, those that lie here, of each layer of the stage by rising number (() of
    a layer without experts); () where the model is not cut so. An expert may lie on several devices.
    expert_cache_bytes: memory for them where not all are held there at a time, the others on disk; 0: all in memory.
    """

    device: NodeId
    heads: Range
    columns: Range
    vocab: Range
    experts: tuple[tuple[Count, ...], ...] = ()
    expert_cache_bytes: Count = 0


class Stage(Document, frozen=True, kw_only=True):
    """A range of layers, tensor parallel over `shares`; a pipeline is several stages.

    Invariant: the ranges of the shares partition each axis (vocab: in the last stage; empty in the others), and every
    expert lies on at least one share. topology: how the partial sums are exchanged; in a star the hub is the first
    share's device. Expert parallel is a star whose first share has all of heads, columns and vocabulary: it sends rows
    to those that hold their experts, and they send back what these give.
    """

    layers: Range
    shares: tuple[Share, ...]
    topology: Topology


class Plan(Document, frozen=True, kw_only=True):
    """Stages in order. The lead is the first share of the first stage and has rank 0.

    A device appears in one stage only. Hidden states pass from the first share of a stage to every share of the next;
    candidates for tokens pass from the shares of the last stage to the lead.
    """

    manifest_digest: Digest
    numeric_class: NumericClass
    context: Positive  # tokens a session may hold: prompt and answer
    sessions: Positive  # admitted at the same time
    kv_tokens: Positive  # of key-value state of all sessions together, in capacities of 512 * 2**n
    chunk: Positive  # rows of a step at most (prefill chunk)
    stages: tuple[Stage, ...]
    threads: dict[str, int]  # node id -> intra-op threads
    payload: Payload = "full"  # how partial sums travel; rounded in fast classes only
    overlap: bool = False  # large steps run in halves: while the sums of one travel, the other computes
    # tokens whose key-value state is kept for later sessions; 0: none
    prefix_tokens: Annotated[int, msgspec.Meta(ge=0, le=2**24, multiple_of=PREFIX_BLOCK_TOKENS)] = 0
    drafter: Drafter | None = None  # at the lead
    drafting: Drafting | None = None  # set: the lead also drafts for another model

    @property
    def devices(self) -> tuple[str, ...]:
        """Node ids in order of rank."""
        return tuple(share.device for stage in self.stages for share in stage.shares)

    @property
    def lead(self) -> str:
        """Node id of the lead."""
        return self.stages[0].shares[0].device


class PlanOptions(Document, frozen=True, kw_only=True):
    """What a person asked of the planner; the defaults leave the choice to it."""

    mode: Literal["auto", "single", "tensor", "pipeline", "expert"] = "auto"
    devices: tuple[str, ...] = ()  # names or node ids; () = any
    shares: tuple[Positive, ...] = ()  # relative shares, one per device of `devices`; () = by measured speed
    topology: Literal["auto", "mesh", "star"] = "auto"
    payload: Literal["auto", "full", "fp16", "int8"] = "auto"
    context: Annotated[int, msgspec.Meta(ge=0, le=2**24)] = 0  # 0: the model's own, at most what fits
    sessions: Annotated[int, msgspec.Meta(ge=0, le=64)] = 0  # at a time, sharing the memory for up to 4; 0: 16
    chunk: Annotated[int, msgspec.Meta(ge=0, le=4096)] = 0  # 0: 256
    # of each device, for the experts of a model that is cut by experts; those beyond stay on its disk; 0: for all
    expert_memory_bytes: Count = 0
    private: bool = False  # only devices labelled owner
    # None: as many as one session's context and 8192, and as fit after weights and sessions; rounded up to whole blocks
    prefix_tokens: Annotated[int, msgspec.Meta(ge=0, le=2**24)] | None = None
    # the lead's own: none; "ngram"; the first K layers; or the model whose manifest comes with the options
    drafter: Annotated[str, msgspec.Meta(pattern="^(|ngram|model|early:[1-9][0-9]{0,3})$")] = ""
    window_tokens: Window = 0  # of that drafter
    drafting: Drafting | None = None  # draft for another model: on one device that is labelled owner


class Candidate(Document, frozen=True, kw_only=True):
    """One way to run the model, with what was predicted and why it was or was not chosen."""

    mode: Literal["single", "tensor", "pipeline", "expert"]
    devices: tuple[str, ...]  # names
    feasible: bool
    chosen: bool
    reason: str  # one line for a person
    ms_per_token: float | None = None  # predicted; None when infeasible
    compute_ms: float | None = None
    exchange_ms: float | None = None
    memory_bytes: dict[str, int] = msgspec.field(
        default_factory=dict
    )  # by device name: weights, key-value state, overhead
    available_bytes: dict[str, int] = msgspec.field(default_factory=dict)
    plan: Plan | None = None


class PlanReport(Document, frozen=True, kw_only=True):
    """Every candidate, the chosen one first. `plan` is None when nothing is feasible."""

    model: str
    numeric_class: str
    candidates: tuple[Candidate, ...]
    plan: Plan | None
    notes: tuple[str, ...] = ()  # for example what the plan does not protect
