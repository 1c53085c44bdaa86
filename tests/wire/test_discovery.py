"""Discovery on loopback alone."""

from __future__ import annotations

import asyncio
import secrets

import pytest

from ganglion.wire.discovery import advertise, browse, find
from ganglion.wire.errors import Unavailable

LOOPBACK = ["127.0.0.1"]


async def test_what_is_advertised_is_found_and_withdrawn() -> None:
    pin = secrets.token_bytes(16)
    async with asyncio.timeout(60):
        async with advertise(name="home", addresses=LOOPBACK, port=7461, authority_pin=pin, interfaces=LOOPBACK):
            # Others may announce themselves on this machine too.
            async with asyncio.timeout(20):
                while True:
                    found = [one for one in await browse(seconds=0.3, interfaces=LOOPBACK) if one.authority_pin == pin]
                    if found:
                        break
            assert found[0].addresses == ("127.0.0.1:7461",)
            assert found[0].name.startswith("home-")
            assert found[0].version
            assert (await find(timeout_s=20, interfaces=LOOPBACK)).addresses
        assert pin not in [one.authority_pin for one in await browse(seconds=0.3, interfaces=LOOPBACK)]


async def test_an_interface_that_is_not_here_says_the_way_around() -> None:
    with pytest.raises(Unavailable, match="--coordinator"):
        await find(timeout_s=0.2, interfaces=["192.0.2.1"])
