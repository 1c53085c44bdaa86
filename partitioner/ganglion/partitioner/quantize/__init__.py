"""Weight formats: what each holds, how numbers are rounded to it or taken over from a source's own blocks."""

from ganglion.partitioner.quantize.blocks import dequantize, quantize
from ganglion.partitioner.quantize.formats import Format, Rounding, parse_format
from ganglion.partitioner.quantize.recipe import Recipe, Rules, packed_bits, read_rules, recipe_of, write_rules

__all__ = [
    "Format",
    "Recipe",
    "Rounding",
    "Rules",
    "dequantize",
    "packed_bits",
    "parse_format",
    "quantize",
    "read_rules",
    "recipe_of",
    "write_rules",
]
