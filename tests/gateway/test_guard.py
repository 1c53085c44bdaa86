"""Who may call: Host and Origin on loopback, keys elsewhere, every route covered."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import httpx
import pytest

from ganglion.gateway import create_key, list_keys, revoke_key
from ganglion.gateway.app import routes
from ganglion.gateway.guard import is_loopback
from ganglion.wire.errors import Conflict, Corrupt, InvalidRequest, NotFound, PermissionDenied
from ganglion.wire.home import Home

ELSEWHERE = "127.1"  # reached on loopback, but not known to be
ROUTES = [
    (method, route.path.replace("{model:path}", "tiny"))
    for route in routes(None)  # type: ignore[arg-type]
    for method in sorted(route.methods or ())
]


def test_routes_are_found() -> None:
    assert len(ROUTES) >= 7
    assert ("POST", "/v1/chat/completions") in ROUTES


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]", "LOCALHOST"])
async def test_b12_names_of_this_machine(api: Any, host: str) -> None:
    port = api.listening.port
    async with httpx.AsyncClient(base_url=api.base) as client:
        for headers in ({"host": f"{host}:{port}"}, {"host": f"{host}:{port}", "origin": f"http://{host}:{port}"}):
            assert (await client.get("/v1/models", headers=headers)).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "evil.example:{port}"},
        {"host": "localhost"},
        {"host": "localhost:1"},
        {"host": "localhost.evil.example:{port}"},
        {"host": "192.168.0.9:{port}"},
        {"host": ""},
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "https://localhost:{port}"},
        {"origin": "http://localhost:{port}.evil.example"},
        {"origin": "http://localhost:3000"},
        {"origin": ""},
        {"origin": "http://[::1"},
    ],
)
async def test_b12_other_names(api: Any, headers: dict[str, str]) -> None:
    sent = {name: value.replace("{port}", str(api.listening.port)) for name, value in headers.items()}
    async with httpx.AsyncClient(base_url=api.base) as client:
        for method, path in ROUTES:
            answer = await client.request(method, path, headers=sent)
            assert answer.status_code == 403
            if method != "HEAD":
                assert answer.json()["error"]["code"] == "permission_denied"


async def test_b11_every_route_needs_a_key_elsewhere(fleet: Any) -> None:
    """On any address that is not plainly loopback (here an old spelling of it), with a key made for it."""
    listening = await fleet.start(host=ELSEWHERE)
    key = listening.new_key
    assert key is not None
    assert key not in (fleet.home.path / "keys.json").read_text()
    other = create_key(fleet.home, "laptop")
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{listening.port}") as client:
        for method, path in [*ROUTES, ("GET", "/nothing"), ("DELETE", "/v1/models")]:
            bodies = {"json": {}} if method == "POST" else {}
            for bad in ({}, {"authorization": "Bearer"}, {"authorization": f"Bearer {key}x"}, {"authorization": key}):
                answer = await client.request(method, path, headers=bad, **bodies)
                assert (answer.status_code == 401) == (path != "/healthz"), (method, path, bad)
            for good in (key, other):
                answer = await client.request(method, path, headers={"authorization": f"Bearer {good}"}, **bodies)
                assert answer.status_code not in (401, 403)
        revoke_key(fleet.home, "laptop")
        authorization = {"authorization": f"Bearer {other}"}
        assert (await client.get("/v1/models", headers=authorization)).status_code == 401
        fleet.home.path.joinpath("keys.json").chmod(0o644)
        os.utime(fleet.home.path / "keys.json", ns=(1, 1))
        answer = await client.get("/v1/models", headers={"authorization": f"Bearer {key}"})
        assert answer.status_code == 403
        assert "chmod" in answer.json()["error"]["message"]
        fleet.home.path.joinpath("keys.json").chmod(0o600)


async def test_second_start_makes_no_second_key(fleet: Any) -> None:
    create_key(fleet.home, "mine")
    assert (await fleet.start(host=ELSEWHERE)).new_key is None
    await fleet.stop()
    assert [key.name for key in list_keys(fleet.home)] == ["mine"]
    assert (await fleet.start()).new_key is None  # loopback


def test_keys(tmp_path: Path) -> None:
    home = Home(tmp_path / "g")
    assert list_keys(home) == ()
    key = create_key(home, "a")
    assert key.startswith("gk-")
    assert len(key) > 40
    assert stat.S_IMODE((home.path / "keys.json").stat().st_mode) == 0o600
    with pytest.raises(Conflict, match="called a"):
        create_key(home, "a")
    for bad in ("", "A", "a b", "-a", "a" * 64):
        with pytest.raises(InvalidRequest):
            create_key(home, bad)
    create_key(home, "b")
    assert [kept.name for kept in list_keys(home)] == ["a", "b"]
    assert key.startswith(list_keys(home)[0].shown)
    revoke_key(home, "a")
    with pytest.raises(NotFound, match="there are: b"):
        revoke_key(home, "a")
    (home.path / "keys.json").write_text("{")
    with pytest.raises(Corrupt, match=r"keys\.json"):
        list_keys(home)
    (home.path / "keys.json").chmod(0o640)
    with pytest.raises(PermissionDenied, match="chmod"):
        list_keys(home)


def test_is_loopback() -> None:
    assert all(map(is_loopback, ["localhost", "127.0.0.1", "127.9.9.9", "::1", "[::1]"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", ELSEWHERE, "10.0.0.1", "myhost", "localhost.evil", ""]))
