"""Edge experts, as the owner's command line and the gateways ask for them: a part of the Admin service."""

from __future__ import annotations

from typing import Any

import grpc

from ganglion.coordinator.selection import Experts
from ganglion.proto import admin_pb2

_Context = grpc.aio.ServicerContext[Any, Any]


class ExpertMethods:
    """The methods of admin.proto about experts, in its order; every message is bounded where it is read."""

    def __init__(self, experts: Experts) -> None:
        self.experts = experts

    async def PutExpert(  # noqa: N802
        self, request: admin_pb2.PutExpertRequest, context: _Context
    ) -> admin_pb2.ExpertState:
        """Add an expert or change what is said of it; raises InvalidRequest, Exhausted."""
        return await self.experts.put(request.spec)

    async def RemoveExpert(  # noqa: N802
        self, request: admin_pb2.RemoveExpertRequest, context: _Context
    ) -> admin_pb2.RemoveExpertReply:
        """Forget an expert; raises NotFound."""
        await self.experts.remove(request.name)
        return admin_pb2.RemoveExpertReply()

    async def PutBudget(  # noqa: N802
        self, request: admin_pb2.PutBudgetRequest, context: _Context
    ) -> admin_pb2.Selection:
        """Set what a class of requests may cost; raises InvalidRequest, Exhausted."""
        return await self.experts.put_budget(request.budget)

    async def RemoveBudget(  # noqa: N802
        self, request: admin_pb2.RemoveBudgetRequest, context: _Context
    ) -> admin_pb2.RemoveBudgetReply:
        """Forget a class; raises NotFound."""
        await self.experts.remove_budget(request.name)
        return admin_pb2.RemoveBudgetReply()

    async def Select(self, request: admin_pb2.SelectRequest, context: _Context) -> admin_pb2.Selection:  # noqa: N802
        """The subset for a budget of one's own; raises InvalidRequest."""
        return await self.experts.select(request.budget)

    async def Report(  # noqa: N802
        self, request: admin_pb2.OutcomeReport, context: _Context
    ) -> admin_pb2.ReportReply:
        """Figures of answers and links, and a gate's view of the experts; raises InvalidRequest."""
        await self.experts.report(request)
        return admin_pb2.ReportReply()
