"""What holds for every test."""

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # the reference runner loads ONNX Runtime without the agent
