"""What a supervisor and its workers say to each other: JSON lines on the worker's standard input and output.

Standard error is the worker's log. End of file on standard input means: stop now. The worker's counters live in a small
mapped file (`BEAT`), so that a beat costs the token thread nothing.
"""

from __future__ import annotations

import struct
from typing import Final

import msgspec

from ganglion.wire.errors import ErrorBody
from ganglion.wire.lane_upgrade import LaneMode

# steps finished u64, sessions u64, key-value bytes u64, longest announced run in seconds f64 (0 when idle)
BEAT: Final = struct.Struct("<QQQd")


class PeerEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A peer as a worker needs it: serialized SignedRecord, host:port ("" if it cannot be dialled), a name."""

    record: bytes
    address: str
    name: str


class Load(msgspec.Struct, frozen=True, kw_only=True, tag="load"):
    """First command: put the shares of `node_id` together from the store, load them, open a port."""

    home: str
    deployment: str
    epoch: int
    plan: bytes
    manifest: bytes
    node_id: str
    bind: str
    beat_path: str
    lanes: LaneMode = "auto"
    store_budget_bytes: int = 0
    drafter: bytes = b""  # manifest of the model that guesses at the lead, where that is another one
    executor: str = "ort"  # as `parse_executor` reads it


class Connect(msgspec.Struct, frozen=True, kw_only=True, tag="connect"):
    """All listen: dial the peers of higher rank, accept the others. `peers` in order of plan.devices."""

    peers: tuple[PeerEntry, ...]
    gateways: tuple[PeerEntry, ...]


class Gateways(msgspec.Struct, frozen=True, kw_only=True, tag="gateways"):
    """Who may open sessions from now on."""

    gateways: tuple[PeerEntry, ...]


class Verifier(msgspec.Struct, frozen=True, kw_only=True, tag="verifier"):
    """Of a drafting deployment: who verifies from now on, as `Verifier` of fleet.proto says it.

    `lead` None and no `url`: nobody, for the reason `why_away`; what is known of the model stays.
    """

    target: str
    lead: PeerEntry | None = None
    lead_deployment: str = ""
    lead_epoch: int = 0
    manifest_digest: str = ""
    numeric_class: str = ""
    context: int = 0
    vocab: int = 0
    eos_ids: tuple[int, ...] = ()
    url: str = ""
    why_away: str = ""


Command = Load | Connect | Gateways | Verifier


class Loading(msgspec.Struct, frozen=True, kw_only=True, tag="loading"):
    """Progress of putting together and loading, in bytes."""

    done_bytes: int
    total_bytes: int


class Listening(msgspec.Struct, frozen=True, kw_only=True, tag="listening"):
    """Loaded; the port (on every interface of `bind`) takes lanes and sessions."""

    port: int


class Connected(msgspec.Struct, frozen=True, kw_only=True, tag="connected"):
    """Every lane is sealed."""


class PeerLost(msgspec.Struct, frozen=True, kw_only=True, tag="peer_lost"):
    """A lane broke; the epoch is over for this worker."""

    node_id: str
    reason: str


class Routes(msgspec.Struct, frozen=True, kw_only=True, tag="routes"):
    """Which experts tokens were sent to since the last one: a serialized RouteReport of fleet.proto."""

    report: bytes


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """The worker cannot go on and exits."""

    error: ErrorBody


Event = Loading | Listening | Connected | PeerLost | Routes | Failed


def encode(message: Command | Event) -> bytes:
    """One line, newline included."""
    return msgspec.json.encode(message) + b"\n"


_COMMANDS: msgspec.json.Decoder[Command] = msgspec.json.Decoder(Command)
_EVENTS: msgspec.json.Decoder[Event] = msgspec.json.Decoder(Event)


def decode_command(line: bytes) -> Command:
    """Parse one line; raises msgspec.DecodeError."""
    return _COMMANDS.decode(line)


def decode_event(line: bytes) -> Event:
    """Parse one line; raises msgspec.DecodeError."""
    return _EVENTS.decode(line)
