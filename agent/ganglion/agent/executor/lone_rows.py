"""Whether a row that runs alone gets the bits that it gets beside another, asked of the graphs themselves.

Exact classes promise that they do. Kernels differ: MatMulNBits with int4 in blocks of 32 keeps the promise on x86 with
AVX512, and on x86 with AVX2 only it has another kernel for one row (80 % of the elements differ in the last bit). Where
it does not hold a lone row is run beside one that nobody reads, which costs nothing anywhere else.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import numpy as np

_TYPES: Final = {"tensor(float)": np.float32, "tensor(double)": np.float64}


def lone_rows_differ(sessions: Iterable[Any]) -> bool:
    """Whether any of the graphs gives a row other bits alone than beside another one.

    sessions: of ONNX Runtime, whose inputs are all rows [S, columns] of floating-point numbers; others are passed over.
    """
    return any(_differs(session) for session in sessions)


def _differs(session: Any) -> bool:
    inputs = session.get_inputs()
    if any(one.type not in _TYPES or len(one.shape) != 2 or not isinstance(one.shape[1], int) for one in inputs):
        return False
    generator = np.random.default_rng(0)
    pair = {one.name: generator.standard_normal((2, one.shape[1])).astype(_TYPES[one.type]) for one in inputs}
    beside = session.run(None, pair)
    alone = session.run(None, {name: rows[:1] for name, rows in pair.items()})
    return any(not np.array_equal(one[0], both[0]) for one, both in zip(alone, beside, strict=True))
