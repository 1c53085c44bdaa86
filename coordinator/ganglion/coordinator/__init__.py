"""The control plane: enrols devices, decides who computes what, repairs the plan. It holds no text or activation."""

from ganglion.coordinator.run import Ready, run_coordinator

__all__ = ["Ready", "run_coordinator"]
