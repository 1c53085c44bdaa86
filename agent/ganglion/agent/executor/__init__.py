"""Runs a device's shard: graphs and weights on ONNX Runtime, key-value buffers, rows of several sessions in a step."""
