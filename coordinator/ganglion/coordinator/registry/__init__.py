"""The registry: devices, tokens, deployments and links, behind one interface with one conformance suite."""

from ganglion.coordinator.registry.interface import DeploymentRow, DeviceRow, LinkRow, Registry, TokenRow
from ganglion.coordinator.registry.memory import MemoryRegistry
from ganglion.coordinator.registry.sqlite import SqliteRegistry

__all__ = [
    "DeploymentRow",
    "DeviceRow",
    "LinkRow",
    "MemoryRegistry",
    "Registry",
    "SqliteRegistry",
    "TokenRow",
]
