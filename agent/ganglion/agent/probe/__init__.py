"""What this device is and measured: cores, memory, rates of each weight format, disk, kernel family."""

from ganglion.agent.probe.profile import probe_device

__all__ = ["probe_device"]
