"""The manifest: a model cut into pieces and graphs, and how a share is put together from them.

A *piece* is one slot's bytes for one group, named by SHA-256. A *graph* is an ONNX file for a share of `count` groups
of a segment kind; all layers with the same kind share it. A segment that attends has three, run one after the other:
the first and the last on the rows of all sessions of a step at once, the one between them on those of each session. The
initializers of a segment's graphs lie in one external file, by convention named `weights.bin`, put together on the
device: for each slot in order, the pieces of groups start..stop-1 joined along the slot's axis, no padding between
slots.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from ganglion.wire.nouns.document import Document

WEIGHTS_FILE = "weights.bin"
TOKENIZER_FILE = "tokenizer.json"  # of Manifest.tokenizer: what ids mean, and what a grammar's masks are made from
MANIFEST_FORMAT: Literal[3] = 3
EXACT_POSITIONS = 66  # of a session's buffers and of cos, sin: exact attention writes so many even for fewer tokens

Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**40)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=2**40)]


class PieceRef(Document, frozen=True, array_like=True):
    """One stored file: SHA-256 and size in bytes."""

    digest: Digest
    size: Count


class Slot(Document, frozen=True, kw_only=True):
    """One matrix (or its scales, or a norm) of a segment.

    `join`: how pieces of neighbouring groups are joined: "rows" (bytes one after the other; the output dimension is
    outermost, or each group is an initializer of its own), "columns" (every one of `rows` rows is the groups' rows side
    by side), "whole" (one piece, in every share), "marks" (no pieces: a float32 for each group held, 1 for those in
    `groups`, else 0). `stored`: "" where pieces are the bytes of `weights.bin`; otherwise
    they hold numbers of this type, which become float32 there. groups: those that have a piece, in order; None for all.
    """

    name: str
    join: Literal["rows", "columns", "whole", "marks"]
    rows: Positive
    pieces: tuple[PieceRef, ...]
    stored: Literal["", "float16", "bfloat16"] = ""
    groups: tuple[Count, ...] | None = None

    @property
    def growth(self) -> int:
        """Bytes of `weights.bin` for one byte of a piece."""
        return 2 if self.stored else 1


class Segment(Document, frozen=True, kw_only=True):
    """One part of a layer, between two exchanges; it leaves a partial sum.

    kind: names its graphs (`Manifest.graphs["{kind}/{count}"]`). groups: how many it is split in. axis: which range of
    a share applies, "heads" (key-value head groups), "columns" (MLP column groups) or "experts" (a group is an expert,
    and a share holds a set of them, `Share.experts`). attends: it has key-value state.
    rope: which of `Manifest.ropes` it takes, "" for none. takes: "add" takes residual and delta and gives the new
    residual; "keep" gives the residual as it was, and adds delta (what the segment before left on this device, not yet
    exchanged) to its partial sum; "carry" takes what the segment before carried, and delta, the sums that that one
    asked for. exchange: whether devices sum what it leaves. width: of the partial sum, 0 for the hidden size. carry:
    numbers of each group and row that the next segment takes on the same device, 0 for none. experts: that each row
    runs through, 0 where it is no mixture; active: the part of its groups' weights that they are.
    """

    kind: str
    axis: Literal["heads", "columns", "experts"]
    groups: Positive
    slots: tuple[Slot, ...]
    attends: bool = False
    rope: str = ""
    takes: Literal["add", "keep", "carry"] = "add"
    exchange: bool = True
    width: Count = 0
    carry: Count = 0
    experts: Count = 0
    active: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0


class Layer(Document, frozen=True, kw_only=True):
    """Segments in the order in which they run."""

    segments: tuple[Segment, ...]


class Geometry(Document, frozen=True, kw_only=True):
    """What every side must know of the model's shape. Sizes in elements; `context` in tokens."""

    hidden: Positive
    layers: Positive
    heads: Positive
    kv_heads: Positive
    head_dim: Positive
    intermediate: Positive
    vocab: Positive
    context: Positive
    head_groups: Positive  # groups of the "heads" axis (normally kv_heads)
    column_groups: Positive  # groups of the "columns" axis (normally 16)
    vocab_groups: Positive  # groups of the output matrix and the embedding
    vocab_group_rows: Positive  # rows per vocabulary group; the last group may be padded with zero rows


class NumericClass(Document, frozen=True, kw_only=True):
    """What the numbers depend on, but for the kernel family.

    exact: each group its own product, products added in float64, partial sums travel as float64, attention with at
    least two rows. fast: one product per share, float32 sums. format: of matrices; fp16 is stored in 16 bits and
    multiplied as fp32; int8 without a block rounds rows to 8 bits, each with its own scale. exceptions: marks matrices
    of other formats and the rounding: the first digits of a SHA-256 over both, "" where there are none. prompt: of
    matrices as prompt tokens run through them (int8 without a block), "" where all tokens run in `format`. It goes by a
    token's role, never by its batch: prompt tokens are those that a session began with, also when it is replayed.
    """

    format: Literal["fp32", "fp16", "int4", "int8"]
    block: Literal[0, 16, 32, 64, 128]
    exact: bool
    exceptions: Annotated[str, msgspec.Meta(pattern="^([0-9a-f]{8})?$")] = ""
    prompt: Literal["", "int8"] = ""

    @property
    def name(self) -> str:
        """For example "fp32-exact", "int4-128-fast", "int4-32+1b2f0c3d-exact"; mixed "int8:int4-32-exact"."""
        prompt = f"{self.prompt}:" if self.prompt else ""
        block = f"-{self.block}" if self.block else ""
        exceptions = f"+{self.exceptions}" if self.exceptions else ""
        return f"{prompt}{self.format}{block}{exceptions}-{'exact' if self.exact else 'fast'}"

    @property
    def choice(self) -> str:
        """What a person asks for to get it: its format, or "mixed"."""
        return "mixed" if self.prompt else self.format


class Embedding(Document, frozen=True, kw_only=True):
    """The embedding as stored in the checkpoint, by vocabulary groups: pieces [vocab_group_rows, hidden]."""

    dtype: Literal["float32", "float16", "bfloat16"]
    pieces: tuple[PieceRef, ...]
    scale: float = 1.0  # float32, multiplies every row


class RopeTable(Document, frozen=True, kw_only=True):
    """Cosine and sine of positions, each f32 [context, rotary dimensions / 2], for deployments of up to `context`."""

    context: Positive
    cos: PieceRef
    sin: PieceRef


class Manifest(Document, frozen=True, kw_only=True):
    """A cut model. Its digest (of the canonical JSON) names it.

    prompt_layers: those that prompt tokens run through where the class mixes formats, else (); their segments differ
    from those of `layers` in kind and slots only. Embedding, ropes, key-value state and head are common.
    Graph inputs and outputs (rows: S; g groups; "delta", "partial" are float64 in exact classes, else float32):
      every segment:  res f32[S,H], delta[S,H] -> res_out f32[S,H], partial[S,width]; of a segment that takes "carry"
                      carry f32[S,g*carry], delta[S,width] (both of the segment before) -> partial
      with carry:     -> carry f32[S,g*carry]
      that attends:   its first graph gives projected f32[S,g*(q+k+v)] in place of partial; its second takes that,
                      past_key f32[1,g,cap,hd], past_value, seqlens_k i32[1] (= total-1), total i32[1]
                      (total_sequence_length), with a rope cos f32[context,half], sin -> attended f32[S,g*q],
                      present_key, present_value (bound to the same buffers as past); its third attended -> partial
      head (kind "head", axis "columns"): res, delta -> logits f32[S, g * vocab_group_rows] (final norm inside)
    "{kind}/0" is what a device without a group runs: res, delta -> res_out, partial.
    A segment of the axis "experts" has two graphs, run one after the other, "{kind}/0" the first of them only:
      routing:        res, delta -> res_out, rows f32[S,H] (what experts take), chosen i64[S,k], weights f32[S,k]
      experts:        rows f32[R,H], index i64[R] (of each row its expert, by place among those held) -> given f32[R,H]
    Where its experts are of two formats, each has slots of its own (`Slot.groups`), and the graphs of a share are named
    "{kind}/{n}+{m}": n experts held of the class's format, m of the other (`wire.shares.graph_name`). They are the same
    whichever these are, for a slot says of each expert held which format it has.
    Each row of `rows` goes once to each of its experts; the segment's partial sum is that of float32(weight * given),
    added in float64 in exact classes, whoever holds them.
    Exact attention pads an odd S with a row of its own at position total: the buffers and cos, sin hold that position
    too (there is one: the last token of a full context is drawn and never run). At head dimensions above 128 it pads up
    to EXACT_POSITIONS positions in all, which they always hold.
    The first segment gets delta = 0. The residual is replicated: every device of a stage holds all of it. Between
    stages travels, by `handover`, "sum" f32[S,H] (res + delta; the next stage begins with delta = 0), or "parts"
    f32[S,2H] (res, then delta in float32, where a layer does more to the sum than to add it).
    """

    format_version: Literal[3]
    name: str  # as a person calls it; the API's model id
    family: str
    source_digest: Digest  # of the checkpoint's headers and config
    numeric_class: NumericClass
    opset: Positive
    geometry: Geometry
    layers: tuple[Layer, ...]
    prompt_layers: tuple[Layer, ...] = ()
    head: Segment
    embedding: Embedding
    ropes: dict[str, tuple[RopeTable, ...]]  # by rising context: a deployment takes the first that is long enough
    handover: Literal["sum", "parts"]
    graphs: dict[str, tuple[PieceRef, ...]]
    tokenizer: dict[str, PieceRef]  # file name -> piece: tokenizer.json, tokenizer_config.json, ...
    bos_id: int | None
    eos_ids: tuple[int, ...]
    parameters: Count

    def __post_init__(self) -> None:
        if bool(self.prompt_layers) != bool(self.numeric_class.prompt):
            raise ValueError(f"{len(self.prompt_layers)} prompt layers in class {self.numeric_class.name}")
        if self.prompt_layers and list(map(_outline, self.layers)) != list(map(_outline, self.prompt_layers)):
            raise ValueError("prompt layers: segments differ from those of the layers in more than kind and slots")


def _outline(layer: Layer) -> list[Segment]:
    return [msgspec.structs.replace(segment, kind="", slots=()) for segment in layer.segments]
