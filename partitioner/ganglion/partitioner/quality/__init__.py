"""The quality report: what a format costs, tensor by tensor and in what the model says; no torch, layer by layer."""

from ganglion.partitioner.quality.measure import Measured, TensorQuality, measure
from ganglion.partitioner.quality.suggest import Suggestion, suggest
from ganglion.partitioner.quality.text import default_text, read_text, rows_of_text

__all__ = ["Measured", "Suggestion", "TensorQuality", "default_text", "measure", "read_text", "rows_of_text", "suggest"]
