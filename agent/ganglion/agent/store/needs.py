"""Which pieces a share needs: derived from plan and manifest alone. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ganglion.wire.errors import InvalidDocument, NotFound
from ganglion.wire.nouns import TOKENIZER_FILE, Manifest, PieceRef, Plan, Range, Segment, Share, Stage
from ganglion.wire.shares import (
    Groups,
    check_experts,
    graph_name,
    group_count,
    held_groups,
    only_experts,
    share_pieces,
    whole_share,
)


def needed_pieces(manifest: Manifest, plan: Plan, node_id: str) -> tuple[PieceRef, ...]:
    """The pieces and graphs of the share of `node_id`, each once, in the order in which they are used.

    The lead also needs the whole embedding, and the tokenizer, for grammars; and the first layers with the whole output
    matrix, where it guesses by these. Raises NotFound when the plan has no such
    device, InvalidDocument when plan and manifest do not belong together.
    """
    for stage in plan.stages:
        for share in stage.shares:
            if share.device == node_id:
                is_lead = node_id == plan.lead
                early = plan.drafter.layers if is_lead and plan.drafter is not None else 0
                own = _of_share(manifest, stage, share, lead=is_lead)
                return _unique((*own, *_of_whole(manifest, early, node_id)) if early else own)
    raise NotFound(f"the plan has no share for device {node_id}; it names {', '.join(plan.devices)}")


def whole_model_pieces(manifest: Manifest) -> tuple[PieceRef, ...]:
    """The pieces and graphs with which one device runs all of `manifest`, each once. Raises InvalidDocument."""
    return _unique((*manifest.embedding.pieces, *_of_whole(manifest, len(manifest.layers), "a" * 26)))


def _of_whole(manifest: Manifest, layers: int, node_id: str) -> Iterator[PieceRef]:
    """Of the first `layers` layers and the output matrix, all groups."""
    share = whole_share(manifest, node_id, Range(0, layers))
    stage = Stage(layers=Range(0, layers), shares=(share,), topology="mesh")
    yield from _of_share(manifest, stage, share, lead=False)


def all_pieces(manifest: Manifest) -> tuple[PieceRef, ...]:
    """Every piece that `manifest` names, each once: what a holder of the whole model holds."""

    def every() -> Iterator[PieceRef]:
        for layer in (*manifest.layers, *manifest.prompt_layers):
            for segment in layer.segments:
                for slot in segment.slots:
                    yield from slot.pieces
        for slot in manifest.head.slots:
            yield from slot.pieces
        yield from manifest.embedding.pieces
        yield from _ropes(manifest)
        for graphs in manifest.graphs.values():
            yield from graphs
        yield from manifest.tokenizer.values()

    return _unique(every())


def _of_share(manifest: Manifest, stage: Stage, share: Share, *, lead: bool) -> Iterator[PieceRef]:
    if stage.layers.stop > len(manifest.layers):
        raise InvalidDocument(
            f"plan: layers {stage.layers.start}..{stage.layers.stop}, {manifest.name} has {len(manifest.layers)}"
        )
    check_experts(manifest, stage)
    if lead:
        yield from manifest.embedding.pieces
        if TOKENIZER_FILE in manifest.tokenizer:
            yield manifest.tokenizer[TOKENIZER_FILE]
    holds_only = only_experts(share)
    if not holds_only:
        yield from _ropes(manifest)
    for layers in (manifest.layers, manifest.prompt_layers):
        for number, layer in enumerate(layers[stage.layers.start : stage.layers.stop]):
            for segment in layer.segments:
                groups = held_groups(share, segment, number)
                if group_count(groups) or not holds_only:
                    yield from _of_segment(manifest, segment, groups, first=int(holds_only))
    yield from _of_segment(manifest, manifest.head, share.vocab)


def _of_segment(manifest: Manifest, segment: Segment, groups: Groups, *, first: int = 0) -> Iterator[PieceRef]:
    """first: of its graphs; a device with experts only runs none that routes."""
    count = group_count(groups)
    if count == 0 and (segment.takes == "carry" or segment is manifest.head):
        return
    name = graph_name(segment, groups)
    if name not in manifest.graphs:
        raise InvalidDocument(f"manifest {manifest.name} has no graph {name}, which the plan's share of {count} uses")
    yield from manifest.graphs[name][first:]
    for slot in segment.slots:
        yield from share_pieces(slot, groups)


def _ropes(manifest: Manifest) -> Iterator[PieceRef]:
    for tables in manifest.ropes.values():
        for table in tables:
            yield from (table.cos, table.sin)


def _unique(pieces: Iterable[PieceRef]) -> tuple[PieceRef, ...]:
    return tuple({piece.digest: piece for piece in pieces}.values())
