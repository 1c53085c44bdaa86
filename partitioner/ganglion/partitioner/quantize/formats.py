"""The formats in which a matrix is cut, and their names: fp32, fp16, int8, int8-32, int4-32, int4-32z."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal, cast

from ganglion.partitioner.weights import Packing
from ganglion.wire.errors import InvalidRequest

Kind = Literal["fp32", "fp16", "int4", "int8"]
Block = Literal[0, 16, 32, 64, 128]
Rounding = Literal["nearest", "search"]

BLOCKS: Final[tuple[Block, ...]] = (128, 64, 32, 16)
EXACT_BLOCK: Final = 32  # beyond it MatMulNBits gives a row other bits alone than in a batch
_NAME: Final = re.compile(r"(fp32|fp16|int4|int8)(?:-(\d{2,3})(z?))?")


@dataclass(frozen=True)
class Format:
    """How the numbers of a matrix are stored and multiplied.

    fp32; fp16: 16 bits on disk and on the way (bfloat16 where the source has it, so nothing is rounded), float32 in
    products. int4, int8 with a block: that many numbers along the inputs share a scale, and with zero_points an integer
    zero; products by MatMulNBits. int8 without a block: a scale for each output, products of integers with rows that
    are rounded to 8 bits by a scale of each row's own; weights have 7 bits (`blocks.LEVELS`) in a byte each.
    """

    kind: Kind
    block: Block = 0
    zero_points: bool = False

    @property
    def name(self) -> str:
        """As people write it."""
        return self.kind + (f"-{self.block}" if self.block else "") + ("z" if self.zero_points else "")

    @property
    def bits(self) -> Literal[4, 8]:
        """Bits of a number of an integer format."""
        return 4 if self.kind == "int4" else 8

    @property
    def per_row(self) -> bool:
        """Whether its products round rows to 8 bits with a scale for each row."""
        return self.kind == "int8" and not self.block

    @property
    def slots(self) -> tuple[str, ...]:
        """Suffixes of a matrix's slots: its values, and what goes with them."""
        if self.kind in ("fp32", "fp16"):
            return ("",)
        return ("", "_scales", "_zeros") if self.zero_points else ("", "_scales")

    def weight_bytes(self, outputs: int, inputs: int) -> int:
        """Bytes of a matrix as stored in pieces, but for padding."""
        if self.kind in ("fp32", "fp16"):
            return outputs * inputs * (4 if self.kind == "fp32" else 2)
        if not self.block:
            return outputs * (inputs + 4)
        blocks = -(-inputs // self.block)
        per_row = blocks * (self.block * self.bits // 8 + 4) + (-(-blocks * self.bits // 8) if self.zero_points else 0)
        return outputs * per_row

    def holds(self, packing: Packing | None) -> bool:
        """Whether numbers of this packing are this format's numbers, bit for bit.

        A block is cut in smaller ones with the same scale; 4 bits go into 8. Nothing goes into the format of integer
        products, whose weights have less than 8 bits (`blocks.LEVELS`).
        """
        if packing is None or self.kind in ("fp32", "fp16") or not self.block:
            return False
        wide = self.bits > packing.bits  # any 4-bit zero point is absorbed by 8 bits
        fits = packing.block == 0 or packing.block % self.block == 0
        return self.bits >= packing.bits and fits and (self.zero_points or wide or not packing.zero_points)


def parse_format(text: str, *, param: str = "format") -> Format:
    """The format of this name; raises InvalidRequest with the names that there are."""
    found = _NAME.fullmatch(text)
    block = int(found[2] or 0) if found else 0
    if not found or (block and block not in BLOCKS) or (found[1] == "int4") > bool(block) or (block and "fp" in text):
        raise InvalidRequest(
            f"format {text!r}: fp32, fp16, int8, int8-BLOCK or int4-BLOCK with a block of 16, 32, 64 or 128 (and z "
            "behind it for integer zero points)",
            param=param,
        )
    known: dict[int, Block] = {0: 0, **{one: one for one in BLOCKS}}
    return Format(cast(Kind, found[1]), known[block], bool(found[3]))
