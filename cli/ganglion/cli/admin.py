"""The owner's line to the coordinator: one mutual TLS channel, errors as those of the tree."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from pathlib import Path
from typing import Any, TypeVar

import grpc

from ganglion.cli.owner import coordinator_home, owner_identity
from ganglion.cli.serving import read_serving
from ganglion.proto import admin_pb2, admin_pb2_grpc
from ganglion.wire import rpc
from ganglion.wire.address import join_address
from ganglion.wire.errors import Unavailable
from ganglion.wire.hello import check_hello, hello

T = TypeVar("T")


class Admin:
    """The calls of the Admin service; every one raises GanglionError."""

    def __init__(self, channel: grpc.aio.Channel, address: str) -> None:
        self.address = address
        self._stub: Any = admin_pb2_grpc.AdminStub(channel)  # type: ignore[no-untyped-call]

    async def fleet(self) -> admin_pb2.Fleetwide:
        """The state of everything now."""
        async with contextlib.aclosing(self.watch(once=True)) as states:
            async for state in states:
                return state
        raise Unavailable(f"the coordinator at {self.address} ended the call without an answer; try again")

    async def watch(self, *, once: bool = False) -> AsyncGenerator[admin_pb2.Fleetwide]:
        """The state now and at every change."""
        async for state in self._stream(self._stub.Watch(admin_pb2.WatchRequest(once=once))):
            yield state

    async def deploy(self, request: admin_pb2.DeployRequest) -> AsyncGenerator[admin_pb2.DeployEvent]:
        """Deploy; events until it is ready or failed."""
        async for event in self._stream(self._stub.Deploy(request)):
            yield event

    async def explain(self, request: admin_pb2.DeployRequest) -> admin_pb2.ExplainReply:
        """Plan without deploying."""
        return await self._call(self._stub.Explain(request))

    async def stop(self, deployment: str) -> None:
        """End a deployment."""
        await self._call(self._stub.Stop(admin_pb2.StopRequest(deployment=deployment)))

    async def tokens(self) -> list[admin_pb2.TokenState]:
        """The join tokens that the coordinator knows."""
        reply: admin_pb2.ListTokensReply = await self._call(self._stub.ListTokens(admin_pb2.ListTokensRequest()))
        return list(reply.tokens)

    async def register_token(self, request: admin_pb2.RegisterTokenRequest) -> None:
        """Make a token known, so that it is listed and can be revoked."""
        await self._call(self._stub.RegisterToken(request))

    async def revoke_token(self, token_id: str) -> None:
        """Let nobody in by this token any more."""
        await self._call(self._stub.RevokeToken(admin_pb2.RevokeTokenRequest(token_id=token_id)))

    async def put_record(self, request: admin_pb2.PutRecordRequest) -> admin_pb2.DeviceState:
        """Put an owner-signed record in force."""
        return await self._call(self._stub.PutRecord(request))

    async def rename(self, node_id: str, name: str) -> admin_pb2.DeviceState:
        """Give a device another name."""
        return await self._call(self._stub.Rename(admin_pb2.RenameRequest(node_id=node_id, name=name)))

    async def revoke(self, node_id: str) -> admin_pb2.DeviceState:
        """Take a device's right to be here."""
        return await self._call(self._stub.Revoke(admin_pb2.RevokeRequest(node_id=node_id)))

    async def put_expert(self, spec: admin_pb2.ExpertSpec) -> admin_pb2.ExpertState:
        """Add an expert, or change one."""
        return await self._call(self._stub.PutExpert(admin_pb2.PutExpertRequest(spec=spec)))

    async def remove_expert(self, name: str) -> None:
        """Forget an expert."""
        await self._call(self._stub.RemoveExpert(admin_pb2.RemoveExpertRequest(name=name)))

    async def put_budget(self, budget: admin_pb2.Budget) -> admin_pb2.Selection:
        """Set what a class of requests may cost; the subset chosen for it."""
        return await self._call(self._stub.PutBudget(admin_pb2.PutBudgetRequest(budget=budget)))

    async def remove_budget(self, name: str) -> None:
        """Forget a class of requests."""
        await self._call(self._stub.RemoveBudget(admin_pb2.RemoveBudgetRequest(name=name)))

    async def greet(self) -> None:
        """Say hello; raises Unsupported when the releases do not work together."""
        check_hello(await self._call(self._stub.Greet(hello())))

    async def _call(self, call: Awaitable[T]) -> T:
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise rpc.to_error(error, self.address) from error

    async def _stream(self, call: Any) -> AsyncIterator[Any]:
        try:
            async for message in call:
                yield message
        except grpc.aio.AioRpcError as error:
            raise rpc.to_error(error, self.address) from error
        finally:
            call.cancel()


@contextlib.asynccontextmanager
async def admin(root: Path) -> AsyncIterator[Admin]:
    """A channel to the coordinator of `root`. Raises NotFound (no owner key), Unreachable, Unauthenticated."""
    identity = await owner_identity(root)
    address = coordinator_address(root) or identity.coordinator
    async with rpc.channel(address, identity, peer="coordinator", kind="control") as channel:
        yield Admin(channel, address)


def coordinator_address(root: Path) -> str | None:
    """Where the coordinator that runs under `root` is; None when none does (it may run elsewhere)."""
    serving = read_serving(coordinator_home(root))
    if serving is None:
        return None
    bind = str(serving["bind"])
    return join_address({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(bind, bind), int(serving["fleet_port"]))  # noqa: S104
