"""`Executor` on torch: a step's rows stay on the device from embedding to logits, but for what is exchanged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ganglion.agent.executor import seats
from ganglion.agent.executor.buffers import Delta
from ganglion.agent.executor.executor import rope_tables
from ganglion.agent.executor.kv import Take
from ganglion.agent.executor.mixing import Routed, check_places
from ganglion.agent.executor.prefix_blocks import Begin, Keep
from ganglion.agent.roles import Role
from ganglion.agent.torch_executor.attention import Attention, attend, mask, turned
from ganglion.agent.torch_executor.kv import TorchLedger, TorchState
from ganglion.agent.torch_executor.loader import TorchSegment, TorchSettings, TorchShard
from ganglion.wire.errors import Internal, ProtocolViolation
from ganglion.wire.nouns import PREFIX_BLOCK_TOKENS, Manifest, Plan
from ganglion.wire.shares import OpenPiece

_NOTHING: NDArray[np.float32] = np.zeros((0, 0), np.float32)


@dataclass(frozen=True, slots=True)
class TorchRows(seats.Rows[TorchState]):
    """Rows of a session; masks by window, made once a step."""

    masks: dict[tuple[int, int], Tensor | None] = field(default_factory=dict)


@dataclass(slots=True)
class TorchBatch:
    """The rows of a step.

    filled: residual rows on the host that are not on the device yet. given: what devices summed, on the host, which is
    the next delta. turns: cosine and sine of the rows' positions by rope.
    """

    entries: tuple[TorchRows, ...]
    rows: int
    role: Role
    residual: Tensor
    delta: Tensor
    filled: NDArray[np.float32] | None = None
    given: Delta | None = None
    carry: Tensor | None = None
    turns: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


class TorchExecutor:
    """A loaded shard with its key-value state; one thread uses it. Methods are those of `Executor`."""

    def __init__(
        self, manifest: Manifest, plan: Plan, shard: TorchShard, settings: TorchSettings, open_piece: OpenPiece
    ) -> None:
        geometry = manifest.geometry
        self._shard, self._plan, self._settings = shard, plan, settings
        self._hidden, self._class = geometry.hidden, manifest.numeric_class
        self._by_role: dict[Role, tuple[TorchSegment, ...]] = {"any": shard.segments}
        if manifest.numeric_class.prompt:
            self._by_role = {"prompt": shard.prompt, "generated": shard.segments}
        attends = [index for index, one in enumerate(shard.segments) if one.attention is not None]
        self._layers = {index: layer for layer, index in enumerate(attends)}
        groups = [shard.segments[index].groups for index in attends]
        blocks = plan.prefix_tokens // PREFIX_BLOCK_TOKENS
        self._ledger = TorchLedger(
            groups,
            geometry.head_dim,
            kv_tokens=plan.kv_tokens,
            blocks=blocks,
            device=settings.device,
            dtype=settings.dtype,
        )
        self._seats = seats.Seats(self._ledger, self._ledger, plan, pads=False, moved=lambda session: None)
        self.on_routes: Callable[[int, NDArray[np.int64]], None] | None = None  # (layer, chosen experts [rows, k])
        self._parts = manifest.handover == "parts"
        self._wide: type[np.float64 | np.float32] = np.float64 if self._class.exact else np.float32
        self._ropes = {
            name: tuple(
                torch.from_numpy(one).to(settings.device) for one in rope_tables(tables, plan.context, open_piece)
            )
            for name, tables in manifest.ropes.items()
        }

    @property
    def class_name(self) -> str:
        """The numeric class of what it computes: of torch's kernels, and never exact."""
        return f"{msgspec.structs.replace(self._class, exact=False).name}@{self._settings.name}"

    @property
    def segments(self) -> int:
        """Segments of the stage, those without a share of this device among them."""
        return len(self._shard.segments)

    @property
    def weights_bytes(self) -> int:
        """Bytes of weights on the device, as torch holds them."""
        return self._shard.weights_bytes

    @property
    def kv_bytes(self) -> int:
        """Bytes of key-value state that sessions hold now."""
        return self._ledger.kv_bytes

    @property
    def sessions(self) -> int:
        """Sessions that hold state now."""
        return self._seats.sessions

    @property
    def handed_width(self) -> int:
        """Numbers a row that travel between stages."""
        return self._hidden * (2 if self._parts else 1)

    def close(self, session: int) -> None:
        """Drop a session's state."""
        self._seats.close(session)

    @torch.inference_mode()
    def prepare(self, keeps: Sequence[Keep], closed: Sequence[int], begins: Sequence[Begin]) -> None:
        """See `Seats.prepare`."""
        self._seats.prepare(keeps, closed, begins)

    @torch.inference_mode()
    def copy(self, source: int, target: int, start: int, stop: int) -> None:
        """See `Seats.copy`."""
        self._seats.copy(source, target, start, stop)

    @torch.inference_mode()
    def begin(
        self, entries: Sequence[tuple[int, int, int]], role: Role = "any", takes: Mapping[int, Take] | None = None
    ) -> TorchBatch:
        """A batch for entries (session, start, count); a start below what is held takes the later tokens back.

        takes: by session, what it takes of another one before its rows; it is opened as a slot if it is not open.
        """
        seats.check_role(role, self._by_role)
        placed = self._seats.place(entries, takes or {}, TorchRows)
        rows = sum(one.count for one in placed)
        zeros = torch.zeros((rows, self._hidden), device=self._settings.device)
        filled = np.zeros((rows, self._hidden), np.float32)
        return TorchBatch(placed, rows, role, zeros, zeros, filled)

    def residual(self, batch: TorchBatch) -> NDArray[np.float32]:
        """The rows to begin with [rows, hidden] float32; to be filled before the first segment, or read back."""
        if batch.filled is None:
            batch.filled = batch.residual.cpu().numpy()
        return batch.filled

    @torch.inference_mode()
    def take(self, batch: TorchBatch, handed: NDArray[np.float32]) -> None:
        """Begin with what the stage before handed on, in the shape of `handed_width`."""
        batch.filled = None
        batch.residual = self._on_device(handed[:, : self._hidden])
        if self._parts:
            batch.delta = self._on_device(handed[:, self._hidden :])

    @torch.inference_mode()
    def hand_on(self, batch: TorchBatch) -> NDArray[np.float32]:
        """What the next stage begins with: [rows, handed_width] float32."""
        self._arrive(batch)
        left = (batch.residual, batch.delta)
        found: NDArray[np.float32] = (torch.cat(left, 1) if self._parts else left[0] + left[1]).cpu().numpy()
        return found

    @torch.inference_mode()
    def halves(self, batch: TorchBatch) -> tuple[TorchBatch, TorchBatch]:
        """The rows of a batch in two that run one after the other, segment by segment; `join` puts them together."""
        self._arrive(batch)
        middle = batch.rows // 4 * 2
        # Masks are of a step's rows: each half makes its own.
        sooner, later = (tuple(replace(one, masks={}) for one in half) for half in seats.halved(batch.entries, middle))
        return (
            TorchBatch(sooner, middle, batch.role, batch.residual[:middle], batch.delta[:middle]),
            TorchBatch(later, batch.rows - middle, batch.role, batch.residual[middle:], batch.delta[middle:]),
        )

    @torch.inference_mode()
    def join(self, batch: TorchBatch, halves: tuple[TorchBatch, TorchBatch]) -> None:
        """Put the rows of both halves, which have run alike, back into their batch."""
        for half in halves:
            self._arrive(half)
        batch.residual = torch.cat([half.residual for half in halves])
        batch.delta = torch.cat([half.delta for half in halves])

    def _on_device(self, rows: Delta) -> Tensor:
        return torch.from_numpy(np.array(rows, np.float32)).to(self._settings.device)

    def _arrive(self, batch: TorchBatch) -> None:
        """Bring to the device what the host was given since the last run."""
        if batch.filled is not None:
            batch.residual, batch.filled = self._on_device(batch.filled), None
        if batch.given is not None:
            batch.delta, batch.given = self._on_device(batch.given), None

    @torch.inference_mode()
    def run(self, batch: TorchBatch, index: int) -> Delta:
        """Run segment `index`; where its sum is exchanged, the partial sum on the host: [rows, width].

        Elsewhere nothing comes back: the sum stays on the device.
        """
        self._arrive(batch)
        one = self._by_role[batch.role][index]
        if one.segment.axis == "experts":
            self._run_mixture(batch, index, one)
        elif one.first is None:
            width = one.segment.width or self._hidden
            batch.delta = torch.zeros((batch.rows, width), device=self._settings.device)
        else:
            if one.segment.takes == "carry" and batch.carry is not None:
                found = one.first.run(delta=batch.delta, carry=batch.carry)
            else:
                found = one.first.run(delta=batch.delta, res=batch.residual)
            if one.attention is not None and one.last is not None:
                attended = self._attend(batch, index, one.attention, one.segment.rope, found["projected"])
                found |= one.last.run(attended=attended)
            batch.residual = found.get("res_out", batch.residual)
            batch.carry = found.get("carry")
            batch.delta = found["partial"]
        if self._shard.shares == 1 or not one.segment.exchange:
            return _NOTHING
        batch.given = batch.delta.cpu().numpy().astype(self._wide)
        return batch.given

    def _run_mixture(self, batch: TorchBatch, index: int, one: TorchSegment) -> None:
        if one.groups != one.segment.groups or one.last is None:
            raise Internal(f"segment {index}: {one.groups} of {one.segment.groups} experts lie here: route its rows")
        rows, chosen, weights = self._choose(batch, one)
        each = chosen.shape[1]
        given = one.last.run(rows=rows.repeat_interleave(each, 0), index=chosen.reshape(-1))["given"]
        batch.delta = (given.view(batch.rows, each, -1) * weights.unsqueeze(-1)).sum(1)

    def _choose(self, batch: TorchBatch, one: TorchSegment) -> tuple[Tensor, Tensor, Tensor]:
        """Take the residual; the rows, their experts and the weights of these."""
        if one.first is None:
            raise Internal(f"{one.segment.kind} of layer {one.layer}: this device does not choose its rows' experts")
        found = one.first.run(delta=batch.delta, res=batch.residual)
        batch.residual, batch.carry = found["res_out"], None
        if self.on_routes is not None:
            self.on_routes(one.layer, found["chosen"].cpu().numpy())
        return found["rows"], found["chosen"], found["weights"]

    def held(self, index: int) -> tuple[int, ...]:
        """See `Executor.held`."""
        return self._shard.segments[index].held

    @torch.inference_mode()
    def route(self, batch: TorchBatch, index: int) -> Routed:
        """See `Executor.route`."""
        self._arrive(batch)
        rows, chosen, weights = self._choose(batch, self._mixture(batch.role, index))
        return Routed(rows.float().cpu().numpy(), chosen.cpu().numpy(), weights.cpu().numpy())

    @torch.inference_mode()
    def experts(self, index: int, rows: NDArray[np.float32], place: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `Executor.experts`."""
        one = self._mixture("any", index)
        check_places(index, rows, place, len(one.held))
        if one.last is None or not place.size:
            return np.zeros(rows.shape, np.float32)
        where = torch.from_numpy(place.copy()).to(self._settings.device)
        given = one.last.run(rows=self._on_device(rows).to(self._settings.dtype), index=where)["given"]
        found: NDArray[np.float32] = given.cpu().numpy()
        return found

    def leave(self, batch: TorchBatch, index: int) -> Delta:
        """See `Executor.leave`."""
        self._mixture(batch.role, index)
        batch.given = np.zeros((batch.rows, self._hidden), self._wide)
        return batch.given

    def _mixture(self, role: Role, index: int) -> TorchSegment:
        one = self._by_role[role][index]
        if one.segment.axis != "experts":
            raise Internal(f"segment {index}: {one.segment.kind} is not cut by experts")
        return one

    def _attend(self, batch: TorchBatch, index: int, one: Attention, rope: str, projected: Tensor) -> Tensor:
        layer, dim = self._layers[index], one.head_dim
        widths = [one.heads * dim, one.groups * dim, one.groups * dim]
        queries, keys, values = (
            part.view(batch.rows, -1, dim) for part in torch.split_with_sizes(projected, widths, dim=1)
        )
        if rope and one.rotary:
            cos, sin = self._turns(batch, rope)
            queries = turned(queries, cos, sin, interleaved=one.interleaved)
            keys = turned(keys, cos, sin, interleaved=one.interleaved)
        found = []
        for entry in batch.entries:
            stop, last = entry.start + entry.count, entry.first + entry.count
            held_keys, held_values = entry.state.keys[layer], entry.state.values[layer]
            if entry.source is not None:
                taken = slice(entry.taken_first, entry.start)
                held_keys[:, taken] = entry.source.keys[layer][:, taken]
                held_values[:, taken] = entry.source.values[layer][:, taken]
            held_keys[:, entry.start : stop] = keys[entry.first : last].transpose(0, 1)
            held_values[:, entry.start : stop] = values[entry.first : last].transpose(0, 1)
            seen = max(0, entry.start + 1 - one.window) if one.window else 0
            key = (one.window, one.heads // one.groups)
            if key not in entry.masks:
                dtype = torch.float32 if one.softcap or one.sinks is not None else self._settings.dtype
                entry.masks[key] = mask(entry.start, entry.count, seen, one, dtype=dtype, device=self._settings.device)
            mine = queries[entry.first : last]
            found.append(attend(one, mine, held_keys[:, seen:stop], held_values[:, seen:stop], entry.masks[key]))
        return found[0] if len(found) == 1 else torch.cat(found)

    def _turns(self, batch: TorchBatch, rope: str) -> tuple[Tensor, Tensor]:
        found = batch.turns.get(rope)
        if found is None:
            places = np.concatenate([np.arange(one.start, one.start + one.count) for one in batch.entries])
            positions = torch.from_numpy(places).to(self._settings.device)
            cos, sin = (table.index_select(0, positions) for table in self._ropes[rope])
            found = batch.turns[rope] = cos, sin
        return found

    @torch.inference_mode()
    def logits(self, batch: TorchBatch, rows: Sequence[int]) -> NDArray[np.float32]:
        """The head on the given rows of the step: [len(rows), vocabulary rows of this share] float32."""
        head = self._shard.head
        if head is None or head.first is None:
            raise ProtocolViolation(f"logits of {len(rows)} rows were asked of a device that cannot give them")
        self._arrive(batch)
        chosen = torch.tensor(list(rows), device=self._settings.device)
        found = head.first.run(res=batch.residual.index_select(0, chosen), delta=batch.delta.index_select(0, chosen))
        logits: NDArray[np.float32] = found["logits"].cpu().numpy()
        return logits
