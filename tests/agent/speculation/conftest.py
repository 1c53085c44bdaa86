"""Drafters cut from random checkpoints, and the dumb lead that their guesses are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from checkpoints import make, make_llama, make_qwen3
from family_shapes import SHAPES as FAMILY_SHAPES
from mixture_shapes import SHAPES as MIXTURE_SHAPES
from mixture_shapes import make_mixture
from reference_runner import Runner, cut_evenly

from ganglion.agent.executor.loader import start_runtime
from ganglion.agent.lead.candidates import answer
from ganglion.agent.lead.draw import Draw
from ganglion.agent.lead.sampler import Drawn, draw_token
from ganglion.agent.speculation.engine import DraftEngine, load_engine
from ganglion.agent.store import PieceStore
from ganglion.partitioner.cut import numeric_class, partition
from ganglion.wire.nouns import Manifest
from ganglion.wire.sampling.adjusting import Adjusting, VocabShare
from ganglion.wire.sampling.parameters import Sampling
from ganglion.wire.sampling.penalties import Penalties

GREEDY = Sampling()
LLAMA = {"num_key_value_heads": 4, "num_hidden_layers": 3, "max_position_embeddings": 1024}


@dataclass
class Model:
    """A cut model; its logits by the dumb runner, from nothing, as often as they are asked for."""

    path: Path
    manifest: Manifest
    store: PieceStore
    folder: Path
    opened: int = 0
    _runners: dict[str, Runner] = field(default_factory=dict)
    _logits: dict[tuple[str, tuple[int, ...], int], np.ndarray] = field(default_factory=dict)

    def engine(self, manifest: Manifest | None = None, **options: int) -> DraftEngine:
        start_runtime(1)
        self.opened += 1
        folder = self.folder / f"engine-{self.opened}"
        options = {"slots": 4, "context": 128, "chunk": 16} | options
        return load_engine(manifest or self.manifest, self.store.open, folder, **options)  # type: ignore[arg-type]

    def logits(self, ids: Sequence[int], manifest: Manifest | None = None, prompt: int | None = None) -> np.ndarray:
        """Of what follows `ids`: [vocab] float32; `prompt` where formats mix."""
        manifest = manifest or self.manifest
        key = manifest.name, tuple(ids), len(ids) if prompt is None else prompt
        if key not in self._logits:
            if manifest.name not in self._runners:
                pieces: Any = SimpleNamespace(file=self.store.path_of)
                folder = self.folder / f"reference-{manifest.name}"
                self._runners[manifest.name] = Runner(manifest, pieces, folder, cut_evenly(manifest, [1]))
            self._logits[key] = self._runners[manifest.name].forward(ids, prompt=key[2])[0][-1]
        return self._logits[key]

    def draw(self, ids: Sequence[int], sampling: Sampling, prompt: int = 0, manifest: Manifest | None = None) -> int:
        """The token that a lead of this model draws after `ids`."""
        logits = self.logits(ids, manifest)
        share = VocabShare(0, logits.size, self.manifest.geometry.vocab_group_rows)
        adjusting = None
        if sampling.penalized:
            penalties = Penalties(sampling, ids[:prompt])
            for token in ids[prompt:]:
                penalties.drawn(token)
            adjusting = Adjusting(sampling.repetition_penalty, penalties.take(), None)
        draw = Draw(share.count, sampling.temperature, sampling.seed, len(ids), mass=sampling.mass, adjusting=adjusting)
        found = draw_token([answer(logits, share, draw)], sampling, len(ids))
        assert isinstance(found, Drawn)
        return found.token

    def text(
        self, ids: Sequence[int], count: int, sampling: Sampling = GREEDY, manifest: Manifest | None = None
    ) -> list[int]:
        """The answer of a plain lead to the prompt `ids`."""
        text = list(ids)
        for _ in range(count):
            text.append(self.draw(text, sampling, len(ids), manifest))
        return text[len(ids) :]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Model]:
    made: dict[tuple[str, str], Model] = {}

    def get(shape: str = "llama", weights: str = "fp32") -> Model:
        if (shape, weights) not in made:
            folder = tmp_path_factory.mktemp(f"{shape}-{weights}")
            if shape == "llama":
                path = make_llama(folder / "checkpoint", **LLAMA)
            elif shape == "qwen3":
                path = make_qwen3(folder / "checkpoint", num_key_value_heads=2, dtype="bfloat16")
            elif shape in MIXTURE_SHAPES:
                path = make_mixture(folder / "checkpoint", MIXTURE_SHAPES[shape])
            else:
                named = FAMILY_SHAPES[shape]
                path = make(folder / "checkpoint", family=named.family, dtype=named.dtype, **named.config)
            store = PieceStore(folder / "store")
            kind = numeric_class(path, weights)  # type: ignore[arg-type]
            manifest = partition(path, store, name=shape, numeric_class=kind)
            made[shape, weights] = Model(path, manifest, store, folder)
        return made[shape, weights]

    return get
