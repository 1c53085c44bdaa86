"""Selection among edge experts: who there is, what they cost, and the best subset for a class of requests."""

from ganglion.coordinator.selection.driver import Experts

__all__ = ["Experts"]
