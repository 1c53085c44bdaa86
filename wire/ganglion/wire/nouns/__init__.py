"""The shared nouns: frozen types that every room speaks of. Importing them loads neither grpc nor cryptography."""

from ganglion.wire.nouns.device import BATCH_ROWS, PREFILL_ROWS, DeviceProfile, FormatRate
from ganglion.wire.nouns.document import Document, digest, from_json, to_json
from ganglion.wire.nouns.manifest import (
    EXACT_POSITIONS,
    MANIFEST_FORMAT,
    WEIGHTS_FILE,
    Embedding,
    Geometry,
    Layer,
    Manifest,
    NumericClass,
    PieceRef,
    RopeTable,
    Segment,
    Slot,
)
from ganglion.wire.nouns.plan import (
    PREFIX_BLOCK_TOKENS,
    Candidate,
    Plan,
    PlanOptions,
    PlanReport,
    Range,
    Share,
    Stage,
)

__all__ = [
    "BATCH_ROWS",
    "EXACT_POSITIONS",
    "MANIFEST_FORMAT",
    "PREFILL_ROWS",
    "PREFIX_BLOCK_TOKENS",
    "WEIGHTS_FILE",
    "Candidate",
    "DeviceProfile",
    "Document",
    "Embedding",
    "FormatRate",
    "Geometry",
    "Layer",
    "Manifest",
    "NumericClass",
    "PieceRef",
    "Plan",
    "PlanOptions",
    "PlanReport",
    "Range",
    "RopeTable",
    "Segment",
    "Share",
    "Slot",
    "Stage",
    "digest",
    "from_json",
    "to_json",
]
