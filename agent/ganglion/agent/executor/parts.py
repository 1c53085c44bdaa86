"""What a device runs of a manifest: the segments of its share, and what their graphs take and leave. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ganglion.wire.errors import InvalidDocument
from ganglion.wire.nouns import Manifest, Range, Segment, Share, Stage
from ganglion.wire.shares import Groups, check_experts, group_count, held_groups, only_experts, weights_size


@dataclass(frozen=True, slots=True)
class Part:
    """A segment of this device's share, named by its place: its groups, and bytes of weights; `layer`: of the model.

    held_only: the device holds experts and runs nothing else.
    """

    name: str
    segment: Segment
    share: Groups
    size: int
    layer: int = 0
    held_only: bool = False

    @property
    def count(self) -> int:
        """How many groups."""
        return group_count(self.share)

    @property
    def runs(self) -> bool:
        """Whether there is a graph to run."""
        return _runs(self.name, self.segment, self.share, held_only=self.held_only)

    @property
    def routes(self) -> bool:
        """Whether rows' experts are chosen here."""
        return self.segment.axis == "experts" and not self.held_only

    @property
    def held(self) -> tuple[int, ...]:
        """The experts that lie here, by rising number."""
        return () if isinstance(self.share, Range) else self.share


def parts_of(manifest: Manifest, stage: Stage, share: Share) -> Iterator[Part]:
    """Segments of the stage, then those of prompt tokens where formats mix, then the head; raises InvalidDocument."""
    if stage.layers.stop > len(manifest.layers):
        raise InvalidDocument(f"plan: layers ..{stage.layers.stop}, the manifest has {len(manifest.layers)}")
    check_experts(manifest, stage)
    held_only = only_experts(share)
    for prefix, layers in (("", manifest.layers), ("prompt-", manifest.prompt_layers)):
        for at, layer in enumerate(layers[stage.layers.start : stage.layers.stop]):
            number = stage.layers.start + at
            for index, segment in enumerate(layer.segments):
                groups = held_groups(share, segment, at)
                yield _part(f"{prefix}{number}-{index}", segment, groups, number, held_only=held_only)
    yield _part("head", manifest.head, share.vocab, len(manifest.layers), held_only=held_only)


def _part(name: str, segment: Segment, groups: Groups, layer: int, *, held_only: bool) -> Part:
    if isinstance(groups, Range) and groups.stop > segment.groups:
        raise InvalidDocument(f"plan: groups ..{groups.stop} of segment {name}, the manifest has {segment.groups}")
    size = weights_size(segment, groups) if _runs(name, segment, groups, held_only=held_only) else 0
    return Part(name, segment, groups, size, layer, held_only)


def _runs(name: str, segment: Segment, groups: Groups, *, held_only: bool) -> bool:
    """Whether there is a graph to run: without a group only where the residual must be kept as the others have it."""
    return group_count(groups) > 0 or not (held_only or segment.takes == "carry" or name == "head")


Ends = tuple[set[str], set[str]]
"""Names of a graph's inputs and outputs."""


def ends_of(part: Part) -> tuple[Ends, ...]:
    """The inputs and outputs of a segment's graphs, as `Manifest` has them."""
    segment = part.segment
    if part.name == "head":
        return (({"res", "delta"}, {"logits"}),)
    if segment.axis == "experts":
        routing = ({"res", "delta"}, {"res_out", "rows", "chosen", "weights"})
        return (routing, ({"rows", "index"}, {"given"}))[: 1 + bool(part.count)]
    inputs, outputs = {"res", "delta"}, {"res_out"}
    if segment.takes == "carry":
        inputs, outputs = {"carry", "delta"}, set()
    if part.count and segment.carry:
        outputs.add("carry")
    if not (part.count and segment.attends):
        return ((inputs, outputs | {"partial"}),)
    state = {"past_key", "past_value", "seqlens_k", "total"} | ({"cos", "sin"} if segment.rope else set())
    return (
        (inputs, outputs | {"projected"}),
        ({"projected", *state}, {"attended", "present_key", "present_value"}),
        ({"attended"}, {"partial"}),
    )
