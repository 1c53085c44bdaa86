"""The model ids `experts` and `experts:CLASS`, which name no model but experts chosen for a class of requests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ganglion.gateway.experts.table import class_of
from ganglion.wire.errors import NotFound

if TYPE_CHECKING:
    from ganglion.cli.admin import Admin


async def is_class(line: Admin, model: str) -> bool:
    """Whether `model` names a class of requests. Raises NotFound where it has no budget, or there are no experts."""
    wanted = class_of(model)
    if wanted is None:
        return False
    state = await line.fleet()
    if not state.experts:
        raise NotFound(
            "there are no experts; add one: ganglion experts add NAME (or the embedded ones: ganglion experts demo)",
            param="model",
        )
    known = [each.budget.name for each in state.selections]
    if wanted not in known:
        raise NotFound(
            f"no class of requests {wanted!r}; there are: {', '.join(known)} (ganglion experts budget)", param="model"
        )
    return True
