"""The quality report: what a format costs, tensor by tensor and in what the model says; no torch, layer by layer."""

from ganglion.partitioner.quality.experts import ExpertError, Line, WidthChoice, choose_widths, expert_errors
from ganglion.partitioner.quality.measure import Measured, TensorQuality, measure
from ganglion.partitioner.quality.stream import OpenSession
from ganglion.partitioner.quality.suggest import Suggestion, suggest
from ganglion.partitioner.quality.text import default_text, read_text, rows_of_text

__all__ = [
    "ExpertError",
    "Line",
    "Measured",
    "OpenSession",
    "Suggestion",
    "TensorQuality",
    "WidthChoice",
    "choose_widths",
    "default_text",
    "expert_errors",
    "measure",
    "read_text",
    "rows_of_text",
    "suggest",
]
