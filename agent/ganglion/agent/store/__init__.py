"""The store of one agent: pieces named by SHA-256, manifests, and how pieces travel between devices."""

from ganglion.agent.store.manifests import ManifestShelf
from ganglion.agent.store.needs import all_pieces, needed_pieces
from ganglion.agent.store.pieces import PartialPiece, PieceStore

__all__ = ["ManifestShelf", "PartialPiece", "PieceStore", "all_pieces", "needed_pieces"]
