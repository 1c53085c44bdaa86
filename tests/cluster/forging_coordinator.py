"""A dishonest coordinator: `ganglion`, but it signs devices' records itself, with a sealing key of its own in them."""

from __future__ import annotations

from typing import Any

from ganglion.cli.main import main
from ganglion.coordinator.roster import Roster
from ganglion.proto import identity_pb2
from ganglion.wire.identity import NodeKeys, OwnerKey

_honest = Roster.peer
_forger = OwnerKey.generate()
_sealing = NodeKeys.generate().sealing_public_key


def _forged(self: Roster, *arguments: Any, **options: Any) -> identity_pb2.Peer:
    peer = _honest(self, *arguments, **options)
    record = identity_pb2.DeviceRecord.FromString(peer.record.record)
    record.sealing_public_key = _sealing
    peer.record.CopyFrom(_forger.sign_record(record))
    return peer


Roster.peer = _forged  # type: ignore[method-assign]

if __name__ == "__main__":
    main()
