"""Runs the same shards with torch, on a processor or an accelerator; loaded only when asked (`--executor torch`).

The segments' ONNX graphs are our own and hold few operators: `program.py` turns each into a list of torch calls once,
with the weights dequantized on the device. Sums over groups become one product, activations are not rounded, and pads
of exact classes are left out: another kernel family, whose numbers agree with ONNX Runtime's up to rounding.
"""
