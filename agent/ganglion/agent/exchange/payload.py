"""Partial sums as they travel: as they are, in 16 bits, or in 8 bits with a scale for each block. Pure.

Only fast classes round. Every device adds what travelled, its own part too, so that all hold the same sum.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ganglion.wire.errors import InvalidDocument
from ganglion.wire.nouns import Manifest, Plan
from ganglion.wire.nouns.plan import Payload
from ganglion.wire.payload import BLOCK

_LEVELS: Final = np.float32(127.0)
_TINY: Final = np.float32(1e-30)
_LARGEST: Final = np.float32(np.finfo(np.float16).max)


def payload_of(manifest: Manifest, plan: Plan) -> Payload:
    """How the partial sums of a deployment travel; raises InvalidDocument where an exact class would be rounded."""
    if plan.payload != "full" and manifest.numeric_class.exact:
        raise InvalidDocument(f"plan: sums of {manifest.numeric_class.name} cannot travel as {plan.payload}")
    return plan.payload


def encode(payload: Payload, sums: NDArray[Any], into: NDArray[Any]) -> None:
    """Write `sums` [rows, columns] float32 to `into` [rows, width_of] of dtype_of; numbers beyond float16 saturate."""
    if payload == "fp16":
        np.clip(sums, -_LARGEST, _LARGEST, out=sums)
        into[...] = sums
        return
    rows, columns = sums.shape
    blocks = -(-columns // BLOCK)
    padded = sums
    if columns % BLOCK:
        padded = np.zeros((rows, blocks * BLOCK), np.float32)
        padded[:, :columns] = sums
    by_block = padded.reshape(rows, blocks, BLOCK)
    scales = np.maximum(np.abs(by_block).max(axis=2), _TINY) / _LEVELS
    with np.errstate(invalid="ignore"):  # what is no number makes its block's scale none
        levels = np.rint(by_block / scales[:, :, None]).astype(np.int8)
    into[:, :columns] = levels.reshape(rows, -1)[:, :columns].view(np.uint8)
    into[:, columns:] = scales.astype(np.float32).view(np.uint8)


def decode(payload: Payload, travelled: NDArray[Any], into: NDArray[np.float32]) -> None:
    """The numbers of `travelled` [rows, width_of], to `into` [rows, columns] float32."""
    if payload == "fp16":
        into[...] = travelled
        return
    rows, columns = into.shape
    scales = np.ascontiguousarray(travelled[:, columns:]).view(np.float32)
    into[...] = travelled[:, :columns].view(np.int8)
    if columns % BLOCK:
        into *= np.repeat(scales, BLOCK, axis=1)[:, :columns]
    else:
        by_block = into.reshape(rows, -1, BLOCK)
        by_block *= scales[:, :, None]
