"""What runs on a device: a supervisor (control stream, store, heartbeat) and one worker per deployment."""

import os

# ONNX Runtime reports its use to its maker unless this is set before it is loaded. Nothing leaves a device unasked.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
