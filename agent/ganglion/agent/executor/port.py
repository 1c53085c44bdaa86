"""What a worker needs of an executor, whichever computes: `Executor` on ONNX Runtime, `TorchExecutor` on torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ganglion.agent.executor.buffers import Delta
from ganglion.agent.executor.kv import Take
from ganglion.agent.executor.mixing import Routed
from ganglion.agent.executor.prefix_blocks import Begin, Keep
from ganglion.agent.roles import Role


class Placed(Protocol):
    """Rows start..start+count-1 of a session; `first`: its first row of the step."""

    @property
    def session(self) -> int: ...  # noqa: D102
    @property
    def start(self) -> int: ...  # noqa: D102
    @property
    def count(self) -> int: ...  # noqa: D102
    @property
    def first(self) -> int: ...  # noqa: D102


class StepBatch(Protocol):
    """The rows of a step; what else it holds is its executor's own."""

    @property
    def entries(self) -> Sequence[Placed]: ...  # noqa: D102
    @property
    def rows(self) -> int: ...  # noqa: D102


class StepExecutor(Protocol):
    """A loaded shard; methods as `Executor` describes them. A batch is given back to the executor that made it."""

    @property
    def class_name(self) -> str: ...  # noqa: D102
    @property
    def segments(self) -> int: ...  # noqa: D102
    @property
    def weights_bytes(self) -> int: ...  # noqa: D102
    @property
    def kv_bytes(self) -> int: ...  # noqa: D102
    @property
    def sessions(self) -> int: ...  # noqa: D102
    @property
    def handed_width(self) -> int: ...  # noqa: D102
    def close(self, session: int) -> None: ...  # noqa: D102
    def copy(self, source: int, target: int, start: int, stop: int) -> None: ...  # noqa: D102
    def prepare(self, keeps: Sequence[Keep], closed: Sequence[int], begins: Sequence[Begin]) -> None: ...  # noqa: D102
    def begin(  # noqa: D102
        self, entries: Sequence[tuple[int, int, int]], role: Role = "any", takes: Mapping[int, Take] | None = None
    ) -> StepBatch: ...
    def residual(self, batch: Any) -> NDArray[np.float32]: ...  # noqa: D102
    def halves(self, batch: Any) -> tuple[StepBatch, StepBatch]: ...  # noqa: D102
    def join(self, batch: Any, halves: Any) -> None: ...  # noqa: D102
    def take(self, batch: Any, handed: NDArray[np.float32]) -> None: ...  # noqa: D102
    def hand_on(self, batch: Any) -> NDArray[np.float32]: ...  # noqa: D102
    def run(self, batch: Any, index: int) -> Delta: ...  # noqa: D102

    on_routes: Callable[[int, NDArray[np.int64]], None] | None

    def held(self, index: int) -> tuple[int, ...]: ...  # noqa: D102
    def route(self, batch: Any, index: int) -> Routed: ...  # noqa: D102
    def experts(self, index: int, rows: NDArray[np.float32], place: NDArray[np.int64]) -> NDArray[np.float32]: ...  # noqa: D102
    def leave(self, batch: Any, index: int) -> Delta: ...  # noqa: D102
    def logits(self, batch: Any, rows: Sequence[int]) -> NDArray[np.float32]: ...  # noqa: D102
