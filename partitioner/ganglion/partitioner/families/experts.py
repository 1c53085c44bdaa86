"""Mixtures of experts: the plan of such a layer, what a model's split must heed, and the usual segment.

By columns, a layer is cut through every expert: a group holds the same run of intermediate columns of each, so any
share of groups works, a device that holds all of them holds the layer's experts whole, and every device chooses experts
from the same rows with the same router (float32 in every class), bit for bit. By experts, a group is a whole expert,
any set of which may lie on a device; the rows of a step are sent to those that hold what was chosen for them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from ganglion.partitioner.config import Config
from ganglion.partitioner.families.base import layer_norm_names, norm
from ganglion.partitioner.families.model import Experts, Model, Split, column_width
from ganglion.partitioner.families.plans import Core, Entry, SegmentPlan
from ganglion.partitioner.families.reading import read_dense
from ganglion.wire.errors import InvalidDocument, Unsupported
from ganglion.wire.nouns import NumericClass

EXACT_GROUPS: Final = 4  # each is a product of its own in exact classes: 4 cost 1.3 to 1.5 times one, 8 cost 2
FAST_GROUPS: Final = 16
PADDING: Final = 0.03  # of all columns, what more groups may cost


@dataclass(frozen=True)
class Routing:
    """How a row's experts are chosen, and what their outputs are multiplied with.

    chosen: experts of a row. softmax: over the logits of all experts, or of the chosen ones only, which is the same as
    dividing the chosen weights by their sum. scale: multiplies them. groups, chosen_groups: experts lie in so many
    runs, and only those of the runs whose best are highest may be chosen (0: of all).
    """

    chosen: int
    softmax: Literal["all", "chosen"] = "all"
    scale: float = 1.0
    groups: int = 1
    chosen_groups: int = 0


@dataclass(frozen=True)
class Separate:
    """Matrices [outputs, inputs] of one expert, or of experts side by side, by tensor name without ".weight"."""

    gate: str
    up: str
    down: str

    def of(self, expert: int) -> Separate:
        """The names of one expert."""
        return Separate(*(name.replace("{expert}", str(expert)) for name in (self.gate, self.up, self.down)))


@dataclass(frozen=True)
class Stacked:
    """Stacks [experts, inputs, outputs] by tensor name, gate's and up's outputs in turn; biases beside them."""

    gate_up: str
    down: str


@dataclass(frozen=True)
class Mixture(Core):
    """The sum over a row's experts of weight * down(act(gate x) * (up x + beta)), act(g) = g * sigmoid(alpha * g).

    experts: that are chosen from. shared: more of the same size that every row takes with weight 1. intermediate and
    width: columns of an expert, and of one group of it. stored: names with {expert}; stored_shared: of all shared ones
    side by side. bias: of every matrix. limit: gate is at most this, up within it on both sides; None for none.
    """

    routing: Routing
    experts: int
    hidden: int
    intermediate: int
    width: int
    router: str
    stored: Separate | Stacked
    shared: int = 0
    stored_shared: Separate | None = None
    router_bias: bool = False
    bias: bool = False
    alpha: float = 1.0
    beta: float = 0.0
    limit: float | None = None

    @property
    def stacked(self) -> int:
        """Experts of a layer, the shared ones last."""
        return self.experts + self.shared

    @property
    def active(self) -> tuple[int, int]:
        """Experts that a row runs through, and how many there are."""
        return self.routing.chosen + self.shared, self.stacked

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the checkpoint that it is cut from."""
        found: dict[str, tuple[int, ...]] = {f"{self.router}.weight": (self.experts, self.hidden)}
        if self.router_bias:
            found[f"{self.router}.bias"] = (self.experts,)
        if isinstance(self.stored, Stacked):
            found[self.stored.gate_up] = (self.experts, self.hidden, 2 * self.intermediate)
            found[self.stored.down] = (self.experts, self.intermediate, self.hidden)
            if self.bias:
                found[f"{self.stored.gate_up}_bias"] = (self.experts, 2 * self.intermediate)
                found[f"{self.stored.down}_bias"] = (self.experts, self.hidden)
        else:
            for expert in range(self.experts):
                found |= self._matrices(self.stored.of(expert), 1)
        if self.stored_shared is not None:
            found |= self._matrices(self.stored_shared, self.shared)
        return found

    def of_expert(self, expert: int) -> dict[str, tuple[int, ...]]:
        """Name and shape of the tensors that hold an expert, others beside it where they are stored as one."""
        if expert < self.experts and isinstance(self.stored, Separate):
            return self._matrices(self.stored.of(expert), 1)
        if expert >= self.experts and self.stored_shared is not None:
            return self._matrices(self.stored_shared, self.shared)
        stacks = (self.stored.gate_up, self.stored.down) if isinstance(self.stored, Stacked) else ()
        return {name: shape for name, shape in self.tensors().items() if name.startswith(stacks)}

    def names_of(self, expert: int) -> tuple[str, ...]:
        """What rules call an expert: its tensors, those of a stack with its number before their last name."""
        if isinstance(self.stored, Stacked) and expert < self.experts:
            parts = [name.rpartition(".") for name in (self.stored.gate_up, self.stored.down)]
            return tuple(f"{path}.{expert}.{last}" for path, _, last in parts)
        return tuple(self.of_expert(expert))

    def _matrices(self, stored: Separate, beside: int) -> dict[str, tuple[int, ...]]:
        columns = beside * self.intermediate
        return {
            f"{stored.gate}.weight": (columns, self.hidden),
            f"{stored.up}.weight": (columns, self.hidden),
            f"{stored.down}.weight": (self.hidden, columns),
        }

    def at_layer(self, layer: int) -> Mixture:
        """The same with the tensor names of one layer."""

        def named(stored: Any) -> Any:
            return stored and replace(stored, **{k: v.replace("{layer}", str(layer)) for k, v in vars(stored).items()})

        return replace(
            self,
            router=self.router.replace("{layer}", str(layer)),
            stored=named(self.stored),
            stored_shared=named(self.stored_shared),
        )


@dataclass(frozen=True, kw_only=True)
class MixtureModel(Model):
    """A model with layers of experts. sparse: of every layer, whether it is one; `intermediate` is of the others."""

    experts: int
    shared: int = 0
    expert_intermediate: int
    routing: Routing
    sparse: tuple[bool, ...]

    @property
    def block_inputs(self) -> int:
        """What a block of a fast class must divide: experts take no padded inputs."""
        return math.gcd(super().block_inputs, self.hidden)

    @property
    def per_row(self) -> bool:
        """Experts are multiplied in blocks."""
        return False

    def column_groups(self, numeric_class: NumericClass, quantum: int, experts: Experts) -> int:
        """The most groups whose padding is small in experts and in dense layers alike; whole experts have none."""
        if experts == "whole":
            return 1 if all(self.sparse) else super().column_groups(numeric_class, quantum, experts)
        sizes = [self.expert_intermediate, *([self.intermediate] if not all(self.sparse) else [])]
        least = sum(column_width(size, 1, quantum) for size in sizes)

        def fits(groups: int) -> bool:
            widths = [column_width(size, groups, quantum) for size in sizes]
            filled = all((groups - 1) * width < size for width, size in zip(widths, sizes, strict=True))
            return filled and groups * sum(widths) <= (1 + PADDING) * least

        at_most = EXACT_GROUPS if numeric_class.exact else FAST_GROUPS
        return next(groups for groups in range(at_most, 0, -1) if fits(groups))

    def check_class(self, numeric_class: NumericClass) -> None:
        """Raise Unsupported for a class in which experts cannot be run."""
        if numeric_class.format == "fp16" or (numeric_class.format == "int8" and not numeric_class.block):
            raise Unsupported(
                f"{numeric_class.name}: experts run in fp32, int4, and int8 with a block of 16 to 128", param="format"
            )
        if numeric_class.block and self.hidden % numeric_class.block:
            raise Unsupported(
                f"{numeric_class.name}: block {numeric_class.block} does not divide the hidden size {self.hidden}, the "
                "inputs of an expert; use another block or fp32"
            )


def read_mixture(
    config: Config,
    *,
    family: str,
    experts: int,
    routing: Routing,
    intermediate: int | None = None,
    sparse: tuple[bool, ...] = (),
    shared: int = 0,
    head_dim: int | None = None,
    **facts: Any,
) -> MixtureModel:
    """Read the fields that mixtures share with dense decoders; `facts` as in `read_dense`.

    intermediate: of an expert, None for the model's own. sparse: of every layer, () where all are.
    """
    dense = read_dense(config, family=family, head_dim=head_dim, **facts)
    if dense.activation != "silu":
        raise Unsupported(f"{config.where}: experts with activation {dense.activation}; supported is silu")
    _check_routing(config, experts, routing)
    return MixtureModel(
        **vars(dense),
        experts=experts,
        shared=shared,
        expert_intermediate=intermediate or dense.intermediate,
        routing=routing,
        sparse=sparse or (True,) * dense.layers,
    )


def _check_routing(config: Config, experts: int, routing: Routing) -> None:
    size, some = experts // routing.groups, routing.chosen_groups
    if routing.chosen > experts:
        raise InvalidDocument(f"{config.where}: {routing.chosen} experts are chosen of {experts}")
    if experts % routing.groups:
        raise InvalidDocument(f"{config.where}: {experts} experts do not divide into {routing.groups} groups")
    if some > routing.groups:
        raise InvalidDocument(f"{config.where}: experts are chosen of {some} of {routing.groups} groups")
    if some and some * size < routing.chosen:
        raise InvalidDocument(f"{config.where}: {routing.chosen} experts are chosen of {some} groups of {size}")


def mixture(model: MixtureModel, split: Split, *, router: str, stored: Separate | Stacked, **facts: Any) -> SegmentPlan:
    """The segment of a layer's experts after `post_attention_layernorm`; `facts` of `Mixture`."""
    whole = split.experts == "whole"
    width = column_width(model.expert_intermediate, 1, split.quantum) if whole else 0
    return SegmentPlan(
        kind="mixture",
        axis="experts" if whole else "columns",
        groups=model.experts + model.shared if whole else split.geometry.column_groups,
        entry=Entry(norm=norm(model, layer_norm_names("post_attention_layernorm")), scale=model.residual_scale),
        core=Mixture(
            routing=model.routing,
            experts=model.experts,
            shared=model.shared,
            hidden=model.hidden,
            intermediate=model.expert_intermediate,
            width=width or split.width_of(model.expert_intermediate),
            router=router,
            stored=stored,
            **facts,
        ),
    )


def named(at: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> Separate:
    """The three matrices below the name `at`."""
    return Separate(f"{at}.{gate}", f"{at}.{up}", f"{at}.{down}")
