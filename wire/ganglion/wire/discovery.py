"""Discovery on the local network: the coordinator's enrolment port as `_ganglion._tcp` (mDNS, RFC 6762 and 6763).

Discovery finds; it says nothing about who is alive or honest. `--coordinator host:port` is the way around it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Final

from zeroconf import (
    BadTypeInNameException,
    DNSQuestionType,
    InterfaceChoice,
    NonUniqueNameException,
    ServiceStateChange,
    Zeroconf,
)
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from ganglion.wire.address import join_address
from ganglion.wire.errors import Unavailable
from ganglion.wire.hello import distribution_version

SERVICE: Final = "_ganglion._tcp.local."
_RESOLVE_MS: Final = 2000
# Of several sockets of one machine on mDNS's port an answer to one asker reaches any; one to the group reaches all.
_ASKED: Final = DNSQuestionType.QM


@dataclass(frozen=True)
class Found:
    """A coordinator that announces itself."""

    name: str
    addresses: tuple[str, ...]  # host:port of the enrolment port
    authority_pin: bytes  # as it claims; a token's pin decides
    version: str


def _interfaces(interfaces: Sequence[str] | None) -> InterfaceChoice | list[str]:
    return InterfaceChoice.All if interfaces is None else list(interfaces)


@contextlib.asynccontextmanager
async def _zeroconf(interfaces: Sequence[str] | None) -> AsyncIterator[AsyncZeroconf]:
    try:
        opened = AsyncZeroconf(interfaces=_interfaces(interfaces))
    except OSError as error:
        raise Unavailable(
            f"discovery cannot use the network ({error}); give the address instead: --coordinator host:port"
        ) from error
    try:
        yield opened
    finally:
        await opened.async_close()


@contextlib.asynccontextmanager
async def advertise(
    *, name: str, addresses: Sequence[str], port: int, authority_pin: bytes, interfaces: Sequence[str] | None = None
) -> AsyncIterator[None]:
    """Announce an enrolment `port` at `addresses` (IP addresses of this machine) while the block runs.

    Registering takes about 1.7 s and happens beside the event loop's other work. Raises Unavailable.
    """
    properties = {"pin": authority_pin.hex(), "version": distribution_version()}
    family = {True: socket.AF_INET6, False: socket.AF_INET}
    info = AsyncServiceInfo(
        SERVICE,
        f"{name}-{authority_pin.hex()[:8]}.{SERVICE}",
        addresses=[socket.inet_pton(family[":" in address], address) for address in addresses],
        port=port,
        properties=properties,
        server=f"ganglion-{authority_pin.hex()[:8]}.local.",
    )
    async with _zeroconf(interfaces) as zeroconf:
        try:
            await (await zeroconf.async_register_service(info))
        except (OSError, NonUniqueNameException, BadTypeInNameException) as error:
            raise Unavailable(f"discovery cannot announce {name!r}: {error!r}") from error
        try:
            yield
        finally:
            await (await zeroconf.async_unregister_service(info))


async def browse(*, seconds: float, interfaces: Sequence[str] | None = None) -> list[Found]:
    """Coordinators that announce themselves within `seconds`, sorted by name. Raises Unavailable without a network."""
    names: set[str] = set()

    def changed(*, name: str, state_change: ServiceStateChange, **_: object) -> None:
        if state_change is ServiceStateChange.Removed:
            names.discard(name)
        else:
            names.add(name)

    async with _zeroconf(interfaces) as zeroconf:
        browser = AsyncServiceBrowser(zeroconf.zeroconf, SERVICE, handlers=[changed], question_type=_ASKED)
        try:
            await asyncio.sleep(seconds)
        finally:
            await browser.async_cancel()
        found = await asyncio.gather(*(_resolve(zeroconf.zeroconf, name) for name in sorted(names)))
    return [coordinator for coordinator in found if coordinator is not None]


async def find(*, timeout_s: float, interfaces: Sequence[str] | None = None) -> Found:
    """The first coordinator that answers; raises Unavailable after `timeout_s` seconds, naming the way around."""
    answers: asyncio.Queue[str] = asyncio.Queue()

    def changed(*, name: str, state_change: ServiceStateChange, **_: object) -> None:
        if state_change is not ServiceStateChange.Removed:
            answers.put_nowait(name)

    async with _zeroconf(interfaces) as zeroconf:
        browser = AsyncServiceBrowser(zeroconf.zeroconf, SERVICE, handlers=[changed], question_type=_ASKED)
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    coordinator = await _resolve(zeroconf.zeroconf, await answers.get())
                    if coordinator is not None:
                        return coordinator
        except TimeoutError:
            raise Unavailable(
                f"no coordinator announced itself within {timeout_s:g} s; give its address: --coordinator host:port"
            ) from None
        finally:
            await browser.async_cancel()


async def _resolve(zeroconf: Zeroconf, name: str) -> Found | None:
    info = AsyncServiceInfo(SERVICE, name)
    if not await info.async_request(zeroconf, _RESOLVE_MS, question_type=_ASKED) or info.port is None:
        return None
    # What strangers announce is bounded and parsed here; a malformed announcement is none.
    properties = info.decoded_properties
    try:
        pin = bytes.fromhex(properties.get("pin") or "")
    except ValueError:
        return None
    addresses = tuple(join_address(address, info.port) for address in info.parsed_addresses()[:8])
    if not addresses or len(pin) != 16:
        return None
    return Found(name.removesuffix("." + SERVICE)[:63], addresses, pin, (properties.get("version") or "")[:32])
