"""Random checkpoints, cut once per session and class, and what transformers says of them; graphs that agents accept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from ganglion.agent.executor.graph_file import check_graph
from ganglion.partitioner.cut import numeric_class, partition
from ganglion.partitioner.families.model import Experts
from ganglion.partitioner.sink import DirectorySink
from ganglion.wire.nouns import Manifest, Range, Segment
from ganglion.wire.shares import weights_size


@dataclass(frozen=True)
class CutModel:
    path: Path
    manifest: Manifest
    pieces: DirectorySink

    def check_graphs(self) -> dict[str, Segment]:
        """Have an agent's scan of foreign graphs accept each one; the segments by kind."""
        layers = (*self.manifest.layers, *self.manifest.prompt_layers)
        segments = {one.kind: one for layer in layers for one in layer.segments}
        segments[self.manifest.head.kind] = self.manifest.head
        for graph, refs in self.manifest.graphs.items():
            kind, count = graph.split("/")
            for ref in refs:
                data = self.pieces.file(ref.digest).read_bytes()
                check_graph(data, weights_size(segments[kind], Range(0, int(count))))
        return segments


@dataclass(frozen=True)
class CutModels:
    """Everything lazily, once per session."""

    checkpoint: Callable[[str], Path]
    cut: Callable[..., CutModel]
    reference: Callable[[str], Any]

    @classmethod
    def of(cls, root: Path, make: Callable[[str, Path], Path], **implementations: str) -> CutModels:
        """Models below `root`; `make` writes one by name into a folder, `implementations` are transformers' own."""

        @cache
        def checkpoint(name: str) -> Path:
            return make(name, root / name)

        @cache
        def cut(
            name: str,
            weight_format: str = "fp32",
            fast: bool = False,
            block: int | None = None,
            experts: Experts = "columns",
        ) -> CutModel:
            path = checkpoint(name)
            chosen = numeric_class(path, weight_format, fast=fast, block=block)  # type: ignore[arg-type]
            sink = DirectorySink(root / "pieces")
            return CutModel(path, partition(path, sink, name=name, numeric_class=chosen, experts=experts), sink)

        @cache
        def reference(name: str) -> Any:
            return AutoModelForCausalLM.from_pretrained(checkpoint(name), dtype=torch.float32, **implementations).eval()

        return cls(checkpoint, cut, reference)


@dataclass(frozen=True)
class ShapedModels(CutModels):
    """Those of a table of shapes, each with a text and transformers' logits of it."""

    ids: Callable[[str], list[int]]
    expected: Callable[[str], np.ndarray]

    @classmethod
    def in_table(
        cls, shapes: dict[str, Any], root: Path, make: Callable[[str, Path], Path], **implementations: str
    ) -> ShapedModels:
        """Models of `shapes` (by name, each with `config` and `tokens`)."""
        models = CutModels.of(root, make, **implementations)

        def ids(name: str) -> list[int]:
            vocab = shapes[name].config.get("vocab_size", 283)
            return [int(i) for i in np.random.default_rng(7).integers(0, vocab, shapes[name].tokens)]

        @cache
        def expected(name: str) -> np.ndarray:
            with torch.no_grad():
                return models.reference(name)(torch.tensor([ids(name)]), use_cache=False).logits[0].numpy()

        return cls(models.checkpoint, models.cut, models.reference, ids, expected)
