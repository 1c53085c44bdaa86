"""Settings: a flag over the environment over the file over the default; what is wrong is named with its source."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ganglion.cli.settings import load, parse_bytes
from ganglion.wire.errors import InvalidRequest


def write(root: Path, text: str) -> None:
    (root / "config.toml").write_text(text, encoding="utf-8")


def test_defaults_listen_on_loopback_for_the_api() -> None:
    settings = load(Path("/nowhere"), {})
    assert (settings.host, settings.port, settings.enrolment_port, settings.fleet_port) == (
        "127.0.0.1",
        7460,
        7461,
        7462,
    )


def test_flag_over_environment_over_file(tmp_path: Path) -> None:
    write(tmp_path, 'port = 1001\nfleet_port = 1002\nthreads = 3\nmemory = "2GiB"\n')
    environment = {"GANGLION_PORT": "2001", "GANGLION_FLEET_PORT": "2002", "GANGLION_HOME": str(tmp_path)}
    settings = load(tmp_path, environment, port=3001, bind=None)
    assert (settings.port, settings.fleet_port, settings.threads, settings.memory) == (3001, 2002, 3, 2 << 30)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prot = 1\n", "unknown key 'prot'; did you mean 'port'?"),
        ("colour = 1\n", "unknown key 'colour'; the keys are: host, port"),
        ("port = 99999\n", "config.toml, port: Input should be less than or equal to 65535"),
        ('memory = "much"\n', "config.toml, memory: 'much' is not a size; write for example 4GiB"),
        ('bind = "here"\n', "config.toml, bind: 'here' is not an IP address"),
        ('lanes = "tcp"\n', "config.toml, lanes: Input should be 'auto', 'grpc' or 'socket'"),
        ("port = \n", "config.toml: Invalid value"),
    ],
)
def test_a_wrong_file_is_named_with_key_and_bound(tmp_path: Path, text: str, said: str) -> None:
    write(tmp_path, text)
    with pytest.raises(InvalidRequest) as raised:
        load(tmp_path, {})
    assert said in raised.value.message


def test_a_wrong_variable_and_a_wrong_flag_are_named() -> None:
    with pytest.raises(InvalidRequest, match="GANGLION_THREADS: Input should be"):
        load(Path("/nowhere"), {"GANGLION_THREADS": "0"})
    with pytest.raises(InvalidRequest, match="--enrolment-port: Input should be"):
        load(Path("/nowhere"), {}, enrolment_port=-1)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GiB", 4 << 30),
        ("4G", 4 << 30),
        ("4GB", 4 * 10**9),
        ("512 MiB", 512 << 20),
        ("1.5k", 1536),
        ("77", 77),
        ("77B", 77),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_a_clear_refusal(text: str) -> None:
    try:
        found, refusal = parse_bytes(text), "is not a size"
    except ValueError as error:
        found, refusal = 0, str(error)
    assert isinstance(found, int)
    assert "is not a size" in refusal
