"""The registry: devices, tokens, deployments, links, edge experts: one interface with one conformance suite."""

from ganglion.coordinator.registry.interface import (
    BudgetRow,
    DeploymentRow,
    DeviceRow,
    ExpertRow,
    LinkRow,
    Registry,
    TokenRow,
)
from ganglion.coordinator.registry.memory import MemoryRegistry
from ganglion.coordinator.registry.sqlite import SqliteRegistry

__all__ = [
    "BudgetRow",
    "DeploymentRow",
    "DeviceRow",
    "ExpertRow",
    "LinkRow",
    "MemoryRegistry",
    "Registry",
    "SqliteRegistry",
    "TokenRow",
]
