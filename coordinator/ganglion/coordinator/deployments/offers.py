"""Offers to draft: which devices would, for which models they do, and why not for the others. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import msgspec

from ganglion.proto import admin_pb2, fleet_pb2
from ganglion.wire.errors import InvalidDocument
from ganglion.wire.limits import MANIFEST_BYTES, PLAN_BYTES
from ganglion.wire.nouns import Drafting, Manifest, PlanOptions, drafting_fault, from_json

SESSIONS = 4  # at a time on a device that drafts, where its offer leaves it open


@dataclass(frozen=True)
class Offer:
    """A drafter that lies whole on a device, and how it would draft."""

    manifest: Manifest
    manifest_json: bytes
    drafting: Drafting


@dataclass(frozen=True)
class Wanted:
    """A drafting deployment that an offer leads to."""

    node_id: str
    manifest_json: bytes
    options: PlanOptions


def read_offer(message: fleet_pb2.DraftOffer) -> Offer | None:
    """The offer, None when it is taken back; raises InvalidDocument."""
    if not message.manifest:
        return None
    manifest = from_json(Manifest, message.manifest, limit_bytes=MANIFEST_BYTES)
    drafting = from_json(Drafting, message.drafting or b"{}", limit_bytes=PLAN_BYTES)
    if drafting.url and not drafting.target:
        raise InvalidDocument("Drafting: an HTTP verifier needs a name for its model", param="target")
    return Offer(manifest, message.manifest, drafting)


class Offers:
    """Every offer that stands, by node id. Answers are told once, and again when they become others."""

    def __init__(self, label_of: Callable[[str], str], name_of: Callable[[str], str]) -> None:
        """`label_of`: a device's trust label; `name_of`: its name, for messages."""
        self._label_of = label_of
        self._name_of = name_of
        self._offers: dict[str, Offer] = {}
        self._answers: dict[tuple[str, str], str] = {}  # (node id, target) -> why not; "": it drafts
        self._told: dict[tuple[str, str], str] = {}

    @property
    def node_ids(self) -> tuple[str, ...]:
        """Devices that would draft."""
        return tuple(self._offers)

    def put(self, node_id: str, offer: Offer) -> None:
        """An offer stands from now on, in place of the one before; it is answered anew."""
        self.forget(node_id)
        self._offers[node_id] = offer

    def forget(self, node_id: str) -> None:
        """The device is gone, or would not draft any more."""
        self._offers.pop(node_id, None)
        for known in (self._answers, self._told):
            for key in [key for key in known if key[0] == node_id]:
                del known[key]

    def match(self, node_ids: Collection[str], targets: Mapping[str, Manifest]) -> list[Wanted]:
        """What the offers of `node_ids` lead to; `targets`: the wanted models by name."""
        found = []
        for node_id in node_ids:
            offer = self._offers.get(node_id)
            if offer is not None:
                found += self._match(node_id, offer, targets)
        return found

    def _match(self, node_id: str, offer: Offer, targets: Mapping[str, Manifest]) -> list[Wanted]:
        label = self._label_of(node_id)
        if label != "owner":
            name = self._name_of(node_id)
            self._answers[node_id, ""] = (
                f"{name} is labelled {label}, and who drafts sees every token: ganglion device trust {name} owner"
            )
            return []
        self._answers.pop((node_id, ""), None)
        if offer.drafting.url:
            return [_wanted(node_id, offer, offer.drafting.target)]
        asked = offer.drafting.target
        faults = {
            name: drafting_fault(target, offer.manifest)
            for name, target in targets.items()
            if name != offer.manifest.name and asked in ("", name)
        }
        if offer.manifest.name in targets and (asked in ("", offer.manifest.name)):
            faults.setdefault(offer.manifest.name, f"its drafter is called {offer.manifest.name} too")
        fitting = [name for name, fault in faults.items() if not fault]
        if not fitting:  # with one that fits the others are no news
            self._answers |= {(node_id, name): fault for name, fault in faults.items()}
        return [_wanted(node_id, offer, name) for name in fitting]

    def answer(self, node_id: str, target: str, refused: str) -> None:
        """What came of a wanted deployment; `refused`: why it was not made."""
        if node_id in self._offers:
            self._answers[node_id, target] = refused

    def news(self) -> list[tuple[str, fleet_pb2.DraftAnswer]]:
        """Answers that their devices have not been told, by node id; they count as told now."""
        fresh = [(key, why) for key, why in self._answers.items() if self._told.get(key) != why]
        self._told |= dict(fresh)
        return [(node_id, fleet_pb2.DraftAnswer(target=target, refused=why)) for (node_id, target), why in fresh]

    def refused(self) -> list[admin_pb2.RefusedOffer]:
        """Offers of which nothing came, as Watch shows them."""
        return [
            admin_pb2.RefusedOffer(
                node_id=node_id, model=self._offers[node_id].manifest.name, target=target, reason=why
            )
            for (node_id, target), why in self._answers.items()
            if why
        ]


def _wanted(node_id: str, offer: Offer, target: str) -> Wanted:
    drafting = msgspec.structs.replace(offer.drafting, target=target, offered=True)
    return Wanted(node_id, offer.manifest_json, PlanOptions(devices=(node_id,), sessions=SESSIONS, drafting=drafting))
