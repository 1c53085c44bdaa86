"""The cost model: what a share weighs, and how long a token takes on it (D13). Pure; every figure is measured or named.

A decoded token reads every weight of a share once, so a segment costs its weight bytes over the measured streaming rate
of the format plus the key-value state over the memory bandwidth (the roofline of a one-row product), and the slowest
share decides. An exchange costs half a measured round trip and the bytes over the measured throughput.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from ganglion.wire.errors import InvalidDocument
from ganglion.wire.nouns import DeviceProfile, FormatRate, Manifest, NumericClass, Range, Segment

WEIGHTS_FACTOR: Final = 1.2  # anonymous memory per byte of weights after a default load (notes/onnxruntime.md, Memory)
MIXTURE_WEIGHTS_FACTOR: Final = 1.4  # QMoE keeps more of what it packs
EXPERT_ROW_BYTES: Final = 16  # a number of a row, for each expert that the row runs through: rows in, columns, rows out
WORKER_OVERHEAD_BYTES: Final = 160 << 20  # interpreter, ONNX Runtime, grpc: measured 120 MB, rounded up
RUN_S: Final = 20e-6  # starting one segment: bindings, a dummy row of attention
COLD_RUN_S: Final = 60e-6  # a thread pool that slept during an exchange
HOP_S: Final = 30e-6  # sealing, opening and waking at the end of a hop, beyond the measured round trip
DECODE_DEPTH_TOKENS: Final = 512  # tokens already held, when a candidate's time is predicted

# Assumed where a pair was not measured: a busy home network, so that an unknown link is never a reason to split.
PRIOR_RTT_S: Final = 5e-3
PRIOR_BYTES_PER_S: Final = 10e6
PRIOR_LOCAL_RTT_S: Final = 0.6e-3
PRIOR_LOCAL_BYTES_PER_S: Final = 500e6

HEAD_LAYER: Final = Range(0, 1)  # the output matrix is an axis of one layer

TrustLabel = Literal["owner", "friend", "stranger"]


@dataclass(frozen=True, slots=True)
class Device:
    """A device that may be planned on; `name` is for people."""

    node_id: str
    name: str
    label: TrustLabel
    profile: DeviceProfile


@dataclass(frozen=True, slots=True)
class LinkFigures:
    """What the first device of a pair measured of the second: seconds of a small round trip, bytes per second."""

    reachable: bool
    rtt_s: float = 0.0
    bytes_per_s: float = 0.0


Links = Mapping[tuple[str, str], LinkFigures]
"""By (node id that dialled, node id that answered); a pair measured from one side only counts for both."""


@dataclass(frozen=True, slots=True)
class Hop:
    """One link as the model uses it; `assumed` when nobody measured it."""

    latency_s: float
    bytes_per_s: float
    assumed: bool

    def seconds(self, size_bytes: int) -> float:
        """Time of one message of `size_bytes`, one way."""
        return self.latency_s + size_bytes / self.bytes_per_s


class Network:
    """Measured links with priors where a figure is missing."""

    def __init__(self, links: Links, devices: Sequence[Device]) -> None:
        self._links = links
        self._hosts = {device.node_id: device.profile.host_id for device in devices}

    def can_dial(self, dialer: str, listener: str) -> bool:
        """Whether `dialer` reaches `listener`; true when unknown."""
        for pair in ((dialer, listener), (listener, dialer)):
            if pair in self._links:
                return self._links[pair].reachable
        return True

    def apart(self, ids: Sequence[str]) -> bool:
        """Whether any two of them are different machines."""
        return len({self._hosts.get(one) for one in ids}) > 1

    def hop(self, a: str, b: str) -> Hop:
        """The link of two devices, the worse figure of both directions."""
        found = [self._links[pair] for pair in ((a, b), (b, a)) if pair in self._links]
        rtts = [link.rtt_s for link in found if link.reachable and link.rtt_s > 0]
        rates = [link.bytes_per_s for link in found if link.reachable and link.bytes_per_s > 0]
        local = self._hosts.get(a) == self._hosts.get(b)
        rtt_s = max(rtts) if rtts else PRIOR_LOCAL_RTT_S if local else PRIOR_RTT_S
        rate = min(rates) if rates else PRIOR_LOCAL_BYTES_PER_S if local else PRIOR_BYTES_PER_S
        return Hop(rtt_s / 2 + HOP_S, rate, assumed=not rtts)


def rate_key(numeric_class: NumericClass) -> str:
    """The key of `DeviceProfile.rates` for a class, for example "int4-32"; its exceptions count as the rest of it."""
    kind = "fp32" if numeric_class.format == "fp16" else numeric_class.format  # float32 once it is loaded
    return f"{kind}-{numeric_class.block}" if numeric_class.block else kind


def rate_of(profile: DeviceProfile, numeric_class: NumericClass) -> FormatRate | None:
    """What was measured of a class; of a block size without a figure of its own the slowest of its format."""
    key = rate_key(numeric_class)
    exact = profile.rates.get(key)
    if exact is not None and exact.decode_bytes_per_s > 0:
        return exact
    kin = [
        rate
        for other, rate in profile.rates.items()
        if other.split("-", 1)[0] == key.split("-", 1)[0] and rate.decode_bytes_per_s > 0
    ]
    return min(kin, key=lambda rate: rate.decode_bytes_per_s, default=None)


def decode_rate(profile: DeviceProfile, numeric_class: NumericClass) -> float:
    """Weight bytes per second of a one-row product in this class, generated tokens' where it mixes formats.

    Half the memory bandwidth where no figure of its format was measured; 0 when nothing was.
    """
    measured = rate_of(profile, numeric_class)
    return measured.decode_bytes_per_s if measured is not None else profile.memory_bytes_per_s / 2


class ModelSize:
    """Bytes of a manifest as loaded, by layer, axis and group, so that any share is weighed in constant time.

    heads, columns: what a share holds, with the layers of prompt tokens where the class mixes formats; heads_read,
    columns_read: what a generated token reads of it.
    """

    def __init__(self, manifest: Manifest) -> None:
        geometry = manifest.geometry
        self.geometry = geometry
        self.segments = [len(layer.segments) for layer in manifest.layers]
        self._layers = manifest.layers
        read = [layer.segments for layer in manifest.layers]
        prompts = [layer.segments for layer in manifest.prompt_layers] or [()] * len(read)
        held = [(*segments, *more) for segments, more in zip(read, prompts, strict=True)]
        groups = {"heads": geometry.head_groups, "columns": geometry.column_groups}
        # Of a model that is cut by experts: where the other axes are, every expert is too, unless a share says less.
        count = max((one.groups for segments in read for one in segments if one.axis == "experts"), default=0)
        self.every_expert = Range(0, count)
        self.experts = AxisBytes([_of_axis(one, "experts") for one in held], count)
        self.experts_read = AxisBytes([_of_axis(one, "experts") for one in read], count, active=True)
        self.heads, self.columns = (AxisBytes([_of_axis(one, axis) for one in held], groups[axis]) for axis in groups)
        self.heads_read, self.columns_read = (
            AxisBytes([_of_axis(one, axis) for one in read], groups[axis], active=True) for axis in groups
        )
        self.mixed = bool(manifest.prompt_layers)
        self.vocab = AxisBytes([(manifest.head,)], geometry.vocab_groups)
        self.chosen = max((segment.experts for layer in manifest.layers for segment in layer.segments), default=0)
        self.weights_factor = MIXTURE_WEIGHTS_FACTOR if self.chosen else WEIGHTS_FACTOR
        self.all_layers = Range(0, len(manifest.layers))
        self.embedding_bytes = sum(piece.size for piece in manifest.embedding.pieces)
        self.rope_bytes = sum(table.cos.size + table.sin.size for tables in manifest.ropes.values() for table in tables)
        self.wire_value_bytes = 8 if manifest.numeric_class.exact else 4
        heads_per_group = -(-geometry.kv_heads // geometry.head_groups)
        self.kv_token_group_bytes = 2 * 4 * heads_per_group * geometry.head_dim  # keys and values, float32, one layer

    def exchanges(self, layers: Range) -> Counter[int]:
        """Exchanges of one row by their size in bytes: how many of each."""
        values = (
            segment.width or self.geometry.hidden
            for layer in self._layers[layers.start : layers.stop]
            for segment in layer.segments
            if segment.exchange
        )
        return Counter(value * self.wire_value_bytes for value in values)

    def kv_bytes(self, layers: Range, heads: Range, *, tokens: int) -> int:
        """Key-value state of one session of `tokens` tokens."""
        return self.kv_token_group_bytes * layers.count * heads.count * tokens

    def activation_bytes(self, chunk: int) -> int:
        """Rows of a step, with their partial sums and the widest intermediate of a share, for `chunk` rows."""
        geometry = self.geometry
        wide = max(geometry.intermediate, geometry.heads * geometry.head_dim)
        repeated = self.chosen * geometry.hidden * EXPERT_ROW_BYTES
        return chunk * (6 * 8 * geometry.hidden + 3 * 4 * wide + repeated) + 4 * geometry.vocab

    def fixed_bytes(self, *, chunk: int, lead: bool) -> int:
        """What a worker needs whatever its share: overhead, activations, rope tables, and on the lead the embedding."""
        embedding = self.embedding_bytes if lead else 0
        return WORKER_OVERHEAD_BYTES + self.activation_bytes(chunk) + self.rope_bytes + embedding

    def share_bytes(
        self, layers: Range, heads: Range, columns: Range, vocab: Range, *, kv_tokens: int, experts: bool = True
    ) -> int:
        """Memory of a share but for `fixed_bytes`: loaded weights, and key-value state for `kv_tokens` in all.

        experts: whether it holds all of `layers` where the model is cut by experts.
        """
        weights = self.heads.total(layers, heads) + self.columns.total(layers, columns)
        weights += self.experts.total(layers, self.every_expert) if experts else 0
        weights += self.vocab.total(HEAD_LAYER, vocab)
        return int(self.weights_factor * weights) + self.kv_bytes(layers, heads, tokens=kv_tokens)


class AxisBytes:
    """Cumulative bytes over layers and groups; whole slots are counted once in every share that is not empty.

    active: only what one row reads, of a mixture its experts.
    """

    def __init__(self, layers: Sequence[Sequence[Segment]], groups: int, *, active: bool = False) -> None:
        grouped = np.zeros((len(layers) + 1, groups + 1), dtype=np.int64)
        whole = np.zeros(len(layers) + 1, dtype=np.int64)
        for index, segments in enumerate(layers):
            sizes = [0] * groups
            for segment in segments:
                for slot in segment.slots:
                    if slot.join == "whole":
                        whole[index + 1] += slot.growth * sum(piece.size for piece in slot.pieces)
                        continue
                    held = range(groups) if slot.groups is None else slot.groups
                    if len(slot.pieces) != len(held) and slot.join != "marks":
                        raise InvalidDocument(
                            f"manifest: slot {slot.name} of layer {index} has {len(slot.pieces)} pieces, "
                            f"its axis has {groups} groups"
                        )
                    for group, piece in zip(held, slot.pieces, strict=False):
                        part = segment.active if active else 1.0
                        sizes[group] += int(part * slot.growth * piece.size)
            grouped[index + 1, 1:] = np.cumsum(np.asarray(sizes, dtype=np.int64))
        self._grouped = np.cumsum(grouped, axis=0).tolist()  # plain ints: scalar indexing of arrays is ten times slower
        self._whole = np.cumsum(whole).tolist()

    def whole(self, layers: Range) -> int:
        """Bytes that every share of `layers` holds."""
        return int(self._whole[layers.stop] - self._whole[layers.start])

    def largest_group(self, layers: Range) -> int:
        """Bytes of the heaviest group over `layers`."""
        groups = range(len(self._grouped[0]) - 1)
        whole = self.whole(layers)
        return max(self.total(layers, Range(group, group + 1)) - whole for group in groups) if layers.count else 0

    def total(self, layers: Range, groups: Range) -> int:
        """Bytes of a share: `groups` of `layers`, whole slots included; 0 when either is empty."""
        if groups.count == 0 or layers.count == 0:
            return 0
        below, above = self._grouped[layers.start], self._grouped[layers.stop]
        grouped = above[groups.stop] - above[groups.start] - below[groups.stop] + below[groups.start]
        return int(grouped) + self.whole(layers)


def _of_axis(segments: Sequence[Segment], axis: str) -> tuple[Segment, ...]:
    return tuple(segment for segment in segments if segment.axis == axis)


@dataclass(frozen=True, slots=True)
class Slice:
    """What one device of a candidate can spend: rates already scaled to its part of a shared host."""

    device: Device
    weight_bytes_per_s: float
    memory_bytes_per_s: float
    threads: int
    available_bytes: int


def slices(devices: Sequence[Device], numeric_class: NumericClass) -> tuple[Slice, ...]:
    """Divide hosts among the agents of one candidate, in order of `devices`.

    Agents of one machine share its cores and its memory: where their threads exceed the cores, rates and threads shrink
    in proportion; where their budgets exceed the memory, the budgets do.
    """
    threads: dict[str, int] = {}
    budgets: dict[str, int] = {}
    cores: dict[str, int] = {}
    memory: dict[str, int] = {}
    for profile in (device.profile for device in devices):
        host = profile.host_id
        threads[host] = threads.get(host, 0) + profile.threads
        budgets[host] = budgets.get(host, 0) + profile.memory_budget_bytes
        cores[host] = max(cores.get(host, 1), profile.cores)
        memory[host] = max(memory.get(host, 0), profile.memory_bytes)
    found = []
    for device in devices:
        profile = device.profile
        host = profile.host_id
        alone = sum(1 for other in devices if other.profile.host_id == host) == 1
        speed = 1.0 if alone else min(1.0, cores[host] / threads[host])
        space = min(1.0, memory[host] / budgets[host]) if budgets[host] else 1.0
        found.append(
            Slice(
                device,
                decode_rate(profile, numeric_class) * speed,
                (profile.memory_bytes_per_s or decode_rate(profile, numeric_class)) * speed,
                max(1, int(profile.threads * speed)),
                int(profile.memory_budget_bytes * space),
            )
        )
    return tuple(found)


def exchange_s(network: Network, ids: Sequence[str], topology: Literal["mesh", "star"], size_bytes: int) -> float:
    """One exchange of partial sums of `size_bytes` among `ids` (a star's hub is the first)."""
    if len(ids) < 2:
        return 0.0
    if topology == "star":
        hops = [network.hop(ids[0], other) for other in ids[1:]]
        return 2 * (max(hop.latency_s for hop in hops) + sum(size_bytes / hop.bytes_per_s for hop in hops))
    slowest = 0.0
    for one in ids:
        hops = [network.hop(one, other) for other in ids if other != one]
        one_s = max(hop.latency_s for hop in hops) + sum(size_bytes / hop.bytes_per_s for hop in hops)
        slowest = max(slowest, one_s)
    return slowest
