"""The kept `Admin.Watch` stream: what the coordinator says while it is there, and again when it comes back."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable
from typing import Any

import grpc

from ganglion.proto import admin_pb2, admin_pb2_grpc
from ganglion.wire import rpc
from ganglion.wire.errors import GanglionError, Unavailable
from ganglion.wire.identity import Identity
from ganglion.wire.limits import CONNECT_S

BACKOFF_FIRST_S = 0.2
BACKOFF_MOST_S = 5.0
ASK_S = 5.0

_log = logging.getLogger(__name__)


class CoordinatorLink:
    """Follows the coordinator at `address` and hands every state to `on_fleet`.

    When it is away, what was last said stays in force: leads are talked to directly.
    """

    def __init__(self, identity: Identity, address: str, on_fleet: Callable[[admin_pb2.Fleetwide], None]) -> None:
        self.address = address
        self.connected = False
        self.trouble = "not reached yet"
        self._identity = identity
        self._on_fleet = on_fleet
        self._stub: admin_pb2_grpc.AdminStub | None = None  # while the coordinator is followed

    async def select(self, budget: admin_pb2.Budget) -> admin_pb2.Selection:
        """The subset of edge experts for a budget of one's own; raises Unavailable and what the coordinator says."""
        found: admin_pb2.Selection = await self._asked("Select", admin_pb2.SelectRequest(budget=budget))
        return found

    async def report(self, report: admin_pb2.OutcomeReport) -> None:
        """Tell what was measured of edge experts; raises Unavailable and what the coordinator says."""
        await self._asked("Report", report)

    async def _asked(self, name: str, request: Any) -> Any:
        stub = self._stub
        if stub is None:
            raise Unavailable(f"the coordinator at {self.address} is away ({self.trouble}); try again later")
        try:
            return await getattr(stub, name)(request, timeout=ASK_S)
        except grpc.RpcError as error:
            raise rpc.to_error(error, self.address) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # A channel that is closed cancels its calls, and with them whoever awaits one.
            raise Unavailable(f"the coordinator at {self.address} went away; try again later") from None

    async def run(self) -> None:
        """Follow until cancelled."""
        wait_s = BACKOFF_FIRST_S
        while True:
            began_s = time.monotonic()
            try:
                await self._follow()
                self.trouble = "it ended the stream"
            except grpc.RpcError as error:
                self.trouble = rpc.to_error(error, self.address).message
            except GanglionError as error:
                self.trouble = error.message
            except TimeoutError:
                self.trouble = f"{self.address} did not greet within {CONNECT_S:g} s"
            if self.connected or time.monotonic() - began_s > BACKOFF_MOST_S:
                wait_s = BACKOFF_FIRST_S
            self.connected = False
            _log.warning("the coordinator is away: %s", self.trouble)
            await asyncio.sleep(wait_s * random.uniform(0.5, 1.0))  # noqa: S311  (spreads reconnections, not a secret)
            wait_s = min(2 * wait_s, BACKOFF_MOST_S)

    async def _follow(self) -> None:
        async with rpc.channel(self.address, self._identity, peer="coordinator") as channel:
            stub = admin_pb2_grpc.AdminStub(channel)  # type: ignore[no-untyped-call]
            async with asyncio.timeout(CONNECT_S):
                rpc.check_hello(await stub.Greet(rpc.hello()))
            self._stub = stub
            try:
                async for fleet in stub.Watch(admin_pb2.WatchRequest()):
                    if not self.connected:
                        _log.info("following the coordinator at %s", self.address)
                    self.connected, self.trouble = True, ""
                    self._on_fleet(fleet)
            finally:
                self._stub = None
