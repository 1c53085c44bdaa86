"""Channels and servers: one set of options, limits by kind, mutual TLS, errors of the tree."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, Literal

import grpc

from ganglion.wire.address import join_address, split_address
from ganglion.wire.certificates import COORDINATOR_NAME, Role, certificate_name
from ganglion.wire.environment import tuned_environment
from ganglion.wire.errors import Conflict
from ganglion.wire.hello import check_hello, hello
from ganglion.wire.identity import Identity
from ganglion.wire.interceptors import GuardInterceptor, Recorder, read_recording
from ganglion.wire.limits import CONNECT_S, CONTROL_MESSAGE_BYTES, TENSOR_MESSAGE_BYTES
from ganglion.wire.status import abort, status_of, to_error

__all__ = [
    "BoundServer",
    "Kind",
    "Options",
    "PeerName",
    "abort",
    "channel",
    "check_hello",
    "client_options",
    "hello",
    "read_recording",
    "server",
    "status_of",
    "to_error",
    "tuned_environment",
]

Kind = Literal["control", "tensor"]
PeerName = Literal["coordinator"] | tuple[str, Role]
Options = list[tuple[str, int | str]]

_MESSAGE_BYTES: Final[dict[str, int]] = {"control": CONTROL_MESSAGE_BYTES, "tensor": TENSOR_MESSAGE_BYTES}

# A frozen process still acknowledges TCP: without ping_timeout_ms it is noticed after 60 s, with it within 2 s on a
# control stream and within 3 on a lane, where a busy machine that answers late would end an epoch without a fault. A
# killed peer is noticed at once by its sockets, a frozen device after 1 s by its beats.
_KEEPALIVE_MS: Final = 1000
_PING_TIMEOUT_MS: Final[dict[str, int]] = {"control": 1000, "tensor": 2000}
# "min_reconnect_backoff" is how long an attempt to connect may take: TCP's and TLS's handshakes are three round trips.
_CLIENT: Final[Options] = [
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", int(CONNECT_S * 1000)),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
]
_SERVER: Final[Options] = [
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 500),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),
]


def _options(kind: Kind) -> Options:
    size = _MESSAGE_BYTES[kind]
    return [
        ("grpc.max_send_message_length", size),
        ("grpc.max_receive_message_length", size),
        ("grpc.compression_enabled_algorithms_bitset", 1),  # identity only: a compressed message may be a bomb
        ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", _PING_TIMEOUT_MS[kind]),
        ("grpc.http2.ping_timeout_ms", _PING_TIMEOUT_MS[kind]),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]


def client_options(kind: Kind, expect: str) -> Options:
    """Options of a channel whose server must hold a certificate for the DNS name `expect`."""
    return [*_options(kind), *_CLIENT, ("grpc.ssl_target_name_override", expect)]


def channel(address: str, identity: Identity, *, peer: PeerName, kind: Kind = "control") -> grpc.aio.Channel:
    """A mutual-TLS channel to `address` (host:port) that accepts only `peer`: "coordinator" or (node id, role).

    Nothing is dialled yet. Raises InvalidRequest for an address that is none. Close it.
    """
    host, port = split_address(address)
    expect = COORDINATOR_NAME if peer == "coordinator" else certificate_name(peer[0], Role(peer[1]))
    return grpc.aio.secure_channel(
        join_address(host, port), identity.channel_credentials(), options=client_options(kind, expect)
    )


class BoundServer:
    """A gRPC server with its port. Keep the reference: a collected server closes its port in silence.

    Add servicers to `.server`, then `await start()`; `await stop()` ends it.
    """

    def __init__(self, bound: grpc.aio.Server, host: str, port: int, recorder: Recorder | None) -> None:
        self.server = bound
        self.host = host
        self.port = port
        self._recorder = recorder

    @property
    def address(self) -> str:
        """host:port as bound."""
        return join_address(self.host, self.port)

    async def start(self) -> None:
        """Take calls."""
        await self.server.start()

    async def stop(self, grace_s: float = 0.0) -> None:
        """End every call after at most `grace_s` seconds and close the port."""
        await self.server.stop(grace_s)
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None


def server(
    identity: Identity,
    *,
    bind: str,
    port: int,
    what: str,
    knob: str,
    allowed: Mapping[str, frozenset[Role]] | None,
    kind: Kind = "control",
    is_revoked: Callable[[str], bool] | None = None,
    record_to: Path | None = None,
    streams: int = 1024,
) -> BoundServer:
    """A server on `bind`:`port` (0: any free port), not yet started.

    `allowed`: full method name ("/ganglion.v1.Fleet/Control") → roles; mutual TLS. None: the enrolment port, server
    TLS only. `what` and `knob` name the port in an error ("the fleet port", "--fleet-port"). `record_to`: append all
    messages to this file (tests). `streams`: calls at once per connection. Raises Conflict when the port is in use.
    """
    recorder = None if record_to is None else Recorder(record_to)
    interceptors: list[grpc.aio.ServerInterceptor] = [] if recorder is None else [recorder]
    interceptors.append(GuardInterceptor(allowed, is_revoked, recorder))
    options = [*_options(kind), *_SERVER, ("grpc.max_concurrent_streams", streams)]
    made = grpc.aio.server(interceptors=interceptors, options=options)
    credentials = identity.enrolment_credentials() if allowed is None else identity.server_credentials()
    try:
        bound = made.add_secure_port(join_address(bind, port), credentials)
    except RuntimeError:
        bound = 0
    if bound == 0:
        if recorder is not None:
            recorder.close()
        raise Conflict(
            f"{what} {port} on {bind} cannot be opened: another process has it, or the address is not of this machine; "
            f"choose another with {knob}"
        )
    return BoundServer(made, bind, bound, recorder)
