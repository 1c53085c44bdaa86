"""What guesses at a plan's lead: whether it fits the model, what it weighs, and how many sequences it holds. Pure.

A drafter runs whole on the lead, in its process. Its weights are another model's, or the plan's own where the lead
drafts for another model or guesses by its early layers; those are mapped once however many use them, so they weigh
only on a lead that has a share of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ganglion.partitioner.cost import ModelSize
from ganglion.wire.errors import InvalidRequest
from ganglion.wire.nouns import Drafter, Manifest, PlanOptions, Range, digest, drafting_fault, kv_capacity_tokens

EARLY: Final = "early:"
POST_NORM: Final = "post_norm"  # the slot of a head that holds the norm after the last layer
SLOTS_A_SESSION: Final = 4  # of a device that drafts for another model: the main chain and likely branches


@dataclass(frozen=True, slots=True)
class Seat:
    """A drafter with its place: what it takes in all, and a line for a person."""

    drafter: Drafter
    size_bytes: int
    remark: str


@dataclass(frozen=True, slots=True)
class DrafterLoad:
    """A drafter as the planner weighs it.

    size: of the model whose first `layers` layers it runs, None for n-grams. shared: that model is the plan's own.
    """

    name: str
    kind: str
    size: ModelSize | None
    manifest_digest: str
    layers: int
    shared: bool
    slots_a_session: int
    window_tokens: int

    def weights_bytes(self, *, alone: bool) -> int:
        """What it loads on the lead; `alone`: the lead has the whole of the plan's model."""
        if self.size is None or (self.shared and alone):
            return 0
        size, geometry = self.size, self.size.geometry
        layers = Range(0, self.layers)
        whole = size.share_bytes(
            layers,
            Range(0, geometry.head_groups),
            Range(0, geometry.column_groups),
            Range(0, geometry.vocab_groups),
            kv_tokens=0,
        )
        return whole if self.shared else whole + size.embedding_bytes + size.rope_bytes

    def fixed_bytes(self, *, chunk: int, alone: bool) -> int:
        """Weights and rows of a step."""
        rows = self.size.activation_bytes(chunk) if self.size is not None else 0
        return self.weights_bytes(alone=alone) + rows

    def context(self, plan_context: int) -> int:
        """Tokens that a sequence may have; 0 where no state is held."""
        return min(plan_context, self.size.geometry.context) if self.size is not None else 0

    def slot_bytes(self, plan_context: int) -> int:
        """Key-value rows of one sequence."""
        if self.size is None:
            return 0
        heads, layers = Range(0, self.size.geometry.head_groups), Range(0, self.layers)
        return self.size.kv_bytes(layers, heads, tokens=kv_capacity_tokens(self.context(plan_context)))

    def least_bytes(self, plan_context: int, *, chunk: int, alone: bool) -> int:
        """Below this it cannot run: one sequence."""
        return self.fixed_bytes(chunk=chunk, alone=alone) + self.slot_bytes(plan_context)

    def seat(self, sessions: int, spare_bytes: int, plan_context: int, *, chunk: int, alone: bool) -> Seat:
        """State for every session, or for as many as fit into `spare_bytes`, one at least."""
        if self.size is None:
            return Seat(
                Drafter(kind="ngram", window_tokens=self.window_tokens), 0, "drafts by n-grams, without a model"
            )
        fixed_bytes = self.fixed_bytes(chunk=chunk, alone=alone)
        slot_bytes = self.slot_bytes(plan_context)
        wanted = sessions * self.slots_a_session
        slots = max(1, min(wanted, (spare_bytes - fixed_bytes) // max(1, slot_bytes)))
        drafter = Drafter(
            kind="early" if self.kind == "early" else "model",
            manifest_digest=self.manifest_digest,
            layers=self.layers if self.kind == "early" else 0,
            slots=slots,
            context=self.context(plan_context),
            window_tokens=self.window_tokens,
        )
        short = f" of {wanted} wanted" if slots < wanted else ""
        remark = (
            f"drafts by {self.name}: {fixed_bytes / 1e6:.0f} MB, and {slots * slot_bytes / 1e6:.0f} MB of key-value"
            f" rows for {slots} sequences{short},"
        )
        return Seat(drafter, fixed_bytes + slots * slot_bytes, remark)


def drafter_load(manifest: Manifest, options: PlanOptions, drafter: Manifest | None) -> DrafterLoad | None:
    """The drafter that was asked for, None without one; raises InvalidRequest for one that does not fit the model."""
    if (options.drafter == "model") != (drafter is not None):
        raise InvalidRequest('drafter: "model" and a manifest of it come together', param="drafter")
    if options.drafting is not None:
        if options.drafter:
            raise InvalidRequest(f"drafter: {manifest.name} drafts itself, it takes no drafter", param="drafter")
        window = options.drafting.window_tokens
        return _model(manifest, "own", len(manifest.layers), shared=True, slots=SLOTS_A_SESSION, window=window)
    window = options.window_tokens
    if options.drafter == "ngram":
        return DrafterLoad("n-grams", "ngram", None, "", 0, shared=False, slots_a_session=0, window_tokens=window)
    if options.drafter.startswith(EARLY):
        layers, own = int(options.drafter.removeprefix(EARLY)), len(manifest.layers)
        if not 1 <= layers < own:
            raise InvalidRequest(f"drafter: early:{layers} of {manifest.name}, which has {own} layers", param="drafter")
        if any(slot.name == POST_NORM for slot in manifest.head.slots):
            raise InvalidRequest(
                f"drafter: early layers of {manifest.name}: its head begins with the norm of its last layer, which fits"
                " no other; use another drafter",
                param="drafter",
            )
        return _model(manifest, "early", layers, shared=True, slots=1, window=window)
    if drafter is not None:
        fault = drafting_fault(manifest, drafter)
        if fault:
            raise InvalidRequest(f"drafter: {fault}", param="drafter")
        return _model(drafter, "model", len(drafter.layers), shared=False, slots=1, window=window)
    return None


def _model(manifest: Manifest, kind: str, layers: int, *, shared: bool, slots: int, window: int) -> DrafterLoad:
    name = f"the first {layers} layers" if kind == "early" else manifest.name
    known = "" if kind == "early" else digest(manifest)
    return DrafterLoad(name, kind, ModelSize(manifest), known, layers, shared, slots, window)
