"""Addresses as people write them: `host:port`, `host`, `[::1]:port`."""

from __future__ import annotations

from ganglion.wire.errors import InvalidRequest


def split_address(text: str, default_port: int | None = None) -> tuple[str, int]:
    """Host and port of `text`; raises InvalidRequest naming what is wrong.

    A missing port is `default_port`, or an error when there is none. IPv6 hosts stand in brackets.
    """
    host, port_text = text.strip(), ""
    if host.startswith("["):
        host, bracket, port_text = host[1:].partition("]")
        if not bracket or (port_text and not port_text.startswith(":")):
            raise InvalidRequest(f"address {text!r}: an IPv6 address is written [host]:port")
        port_text = port_text[1:]
    elif host.count(":") == 1:
        host, _, port_text = host.partition(":")
    elif ":" in host:
        raise InvalidRequest(f"address {text!r}: an IPv6 address is written [host]:port")
    if not host or any(character.isspace() or character in "/@" for character in host):
        raise InvalidRequest(f"address {text!r} has no host; expected host:port")
    if not port_text and default_port is not None:
        return host, default_port
    if not (port_text.isascii() and port_text.isdigit() and 0 < int(port_text[:6]) < 1 << 16):
        raise InvalidRequest(f"address {text!r}: the port must be a number from 1 to 65535")
    return host, int(port_text)


def join_address(host: str, port: int) -> str:
    """`host:port`, with brackets around an IPv6 host."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
