"""The engine that a blend of deployments runs on: sessions with their leads, and `blending` over them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial
from typing import Literal

from ganglion.gateway.experts.blending import BlendStatistics, blend
from ganglion.gateway.experts.mixing import Drawing, Lost
from ganglion.gateway.experts.seat import BlendExpert
from ganglion.gateway.leads import LeadClients
from ganglion.proto import lane_pb2
from ganglion.wire.errors import Unavailable


class LeadEngine:
    """Draws from sessions in which this gateway chooses, over its kept channels to leads."""

    def __init__(self, leads: LeadClients) -> None:
        self._leads = leads

    async def run(
        self, experts: Sequence[Drawing], lost: Lost
    ) -> AsyncGenerator[int | Literal["stop", "length"], None]:
        """See `mixing.Engine`; the parameters of the first expert's request are everybody's."""
        request, statistics = experts[0].request, BlendStatistics()
        seats = [self._seat(one) for one in experts if one.weight > 0]
        drawn = blend(
            seats,
            request.prompt,
            request.sampling,
            stop_ids=request.stop_ids,
            max_tokens=request.max_tokens,
            on_drop=lost,
            request_id=request.request_id,
            tenant=request.tenant,
            statistics=statistics,
        )
        async with aclosing(drawn) as tokens:
            async for token in tokens:
                yield token.id
        yield "stop" if statistics.reason == lane_pb2.FINISH_REASON_STOP else "length"

    def _seat(self, one: Drawing) -> BlendExpert:
        lead, route = one.route.lead, one.route
        if lead is None:
            raise Unavailable(f"{one.name} has no lead")
        begin = partial(self._leads.open, route.deployment, route.epoch, lead)
        return BlendExpert(one.name, one.weight, begin, tuple(one.request.prompt))
