"""The embedding, memory-mapped as the checkpoint stored it; rows become float32 when they are looked up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ganglion.wire.errors import Corrupt
from ganglion.wire.nouns import Manifest

_STORED: Final[dict[str, type[np.generic]]] = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


class EmbeddingTable:
    """Looks ids up in the pieces of the embedding; only the lead has one."""

    def __init__(self, manifest: Manifest, open_piece: Callable[[str], memoryview]) -> None:
        """Map every piece; raises Corrupt when one has another size than its group, NotFound when one is missing."""
        geometry = manifest.geometry
        self._dtype: np.dtype[Any] = np.dtype(_STORED[manifest.embedding.dtype])
        self._group_rows = geometry.vocab_group_rows
        self._hidden = geometry.hidden
        self._scale = np.float32(manifest.embedding.scale)
        self._groups: list[NDArray[Any]] = []
        expected = self._group_rows * self._hidden * self._dtype.itemsize
        for piece in manifest.embedding.pieces:
            data = open_piece(piece.digest)
            if len(data) != expected:
                raise Corrupt(f"embedding piece {piece.digest[:12]}: {len(data)} bytes, expected {expected}")
            self._groups.append(np.frombuffer(data, self._dtype).reshape(self._group_rows, self._hidden))

    def rows(self, ids: Sequence[int], into: NDArray[np.float32]) -> None:
        """Write the rows of `ids` to `into` [>= len(ids), hidden] float32."""
        for row, token in enumerate(ids):
            stored = self._groups[token // self._group_rows][token % self._group_rows]
            if self._dtype == np.uint16:  # bfloat16 is the upper half of a float32
                np.left_shift(stored, 16, out=into[row].view(np.uint32), dtype=np.uint32, casting="unsafe")
            else:
                into[row] = stored
        if self._scale != 1.0:
            into[: len(ids)] *= self._scale
