"""Settings: a flag over `GANGLION_*` in the environment over `config.toml` over the default."""

from __future__ import annotations

import difflib
import ipaddress
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ganglion.wire.errors import InvalidRequest
from ganglion.wire.limits import API_PORT, ENROLMENT_PORT, FLEET_PORT

FILE = "config.toml"
PREFIX = "GANGLION_"
_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*$", re.IGNORECASE)


def parse_bytes(text: object) -> object:
    """`4GiB`, `512M` or `1073741824` as a number of bytes; powers of 1024, or of 1000 with KB, MB, GB, TB."""
    if not isinstance(text, str):
        return text
    match = _SIZE.match(text)
    if match is None:
        raise ValueError(f"{text!r} is not a size; write for example 4GiB or 512MiB")
    number, prefix, binary = match.groups()
    decimal = prefix and not binary and text.strip().lower().endswith("b")
    return int(float(number) * (1000 if decimal else 1024) ** " kmgt".index(prefix.lower() or " "))


def parse_rate(text: object) -> object:
    """`20MB/s` (or `20MB`) as bytes per second."""
    return parse_bytes(re.sub(r"\s*/\s*s\s*$", "", text)) if isinstance(text, str) else text


def _address(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError as error:
        raise ValueError(
            f"{text!r} is not an IP address; write for example 127.0.0.1, or 0.0.0.0 for every interface"
        ) from error


Address = Annotated[str, BeforeValidator(_address)]
Size = Annotated[int, BeforeValidator(parse_bytes), Field(ge=1 << 20)]
Rate = Annotated[int, BeforeValidator(parse_rate), Field(ge=64 << 10)]
Port = Annotated[int, Field(ge=0, le=65535)]  # 0: any free port


class Settings(BaseModel):
    """What can be set once for all commands. Ports of 0 mean any free port."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: Address = "127.0.0.1"  # the API's; anything but loopback needs an API key
    port: Port = API_PORT
    bind: Address = "0.0.0.0"  # noqa: S104 - devices come from other machines; every port behind it is mutual TLS or enrolment
    enrolment_port: Port = ENROLMENT_PORT
    fleet_port: Port = FLEET_PORT
    threads: Annotated[int, Field(ge=1, le=4096)] | None = None
    memory: Size | None = None
    store: Size | None = None
    bandwidth: Rate | None = None
    piece_port: Port = 0
    lanes: Literal["auto", "grpc", "socket"] = "auto"
    executor: Annotated[str, Field(pattern=r"^(ort|torch(:(cpu|cuda))?(:(bf16|fp16|fp32))?)$")] = "ort"


def load(root: Path, environment: Mapping[str, str], **flags: Any) -> Settings:
    """The settings of `root`; flags that are None were not given. Raises InvalidRequest naming key and source."""
    path = root / FILE
    written = _read(path)
    unknown = sorted(set(written) - set(Settings.model_fields))
    if unknown:
        near = difflib.get_close_matches(unknown[0], Settings.model_fields, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; the keys are: {', '.join(Settings.model_fields)}"
        raise InvalidRequest(f"{path}: unknown key {unknown[0]!r}{hint}")
    exported = {
        key: environment[name] for key in Settings.model_fields if (name := PREFIX + key.upper()) in environment
    }
    given = {key: value for key, value in flags.items() if value is not None}
    try:
        return Settings(**{**written, **exported, **given})
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        source = (
            f"--{key.replace('_', '-')}"
            if key in given
            else PREFIX + key.upper()
            if key in exported
            else f"{path}, {key}"
        )
        reason = str(first["msg"]).removeprefix("Value error, ")
        raise InvalidRequest(f"{source}: {reason}", param=key) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidRequest(f"{path}: {error}") from error
