"""`--format auto`: the format that the devices here answer soonest in, by what the model is for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ganglion.cli import output
from ganglion.cli.deploying import SMALL_CHECKPOINT_BYTES, Wish
from ganglion.wire.identity import TrustLabel
from ganglion.wire.nouns import DeviceProfile, from_json

if TYPE_CHECKING:
    from ganglion.cli.admin import Admin
    from ganglion.cli.sourcing import Source
    from ganglion.partitioner.placement import Device
    from ganglion.proto import admin_pb2


async def decide(line: Admin, wish: Wish, found: Source | None) -> Wish:
    """The wish with its format chosen and the reason said, where that is wanted and the checkpoint is at hand."""
    if wish.weights != "auto":
        return wish
    from ganglion.partitioner.format_choice import choose_format, figures_of, workload_of

    workload = workload_of(wish.workload)
    if found is None:  # known by name only: whatever it is cut in
        return replace(wish, weights=None)
    figures = figures_of(found.path, fast=wish.fast, small_bytes=SMALL_CHECKPOINT_BYTES)
    devices = alive_devices((await line.fleet()).devices, private=wish.options.private)
    named = [one for one in devices if {one.name, one.node_id} & set(wish.options.devices)]
    chosen = choose_format(figures, named or devices, workload)
    output.say(f"format: {chosen.format}: {chosen.reason}")
    return replace(wish, weights=chosen.format, reason=chosen.reason)


def alive_devices(states: Sequence[admin_pb2.DeviceState], *, private: bool) -> list[Device]:
    """The devices that may be planned on now, as far as they are measured; private: those labelled owner only."""
    from ganglion.partitioner.placement import Device
    from ganglion.wire.limits import ADVERT_BYTES

    found = []
    for state in states:
        if state.state == "alive" and state.profile:
            label: Any = TrustLabel.of(state.label).value
            if not private or label == "owner":
                profile = from_json(DeviceProfile, state.profile, limit_bytes=ADVERT_BYTES)
                found.append(Device(state.node_id, state.name, label, profile))
    return found
