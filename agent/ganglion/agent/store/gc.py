"""Removing a model from a store: its manifest, the pieces that no other manifest there names, what was made of them."""

from __future__ import annotations

from dataclasses import dataclass

from ganglion.agent.store.manifests import ManifestShelf
from ganglion.agent.store.needs import all_pieces
from ganglion.agent.store.pieces import PieceStore
from ganglion.wire.nouns import PieceRef


@dataclass(frozen=True)
class Removed:
    """What went: pieces, and the bytes of them and of the parts that were made from them."""

    pieces: int
    size_bytes: int


def unshared_pieces(store: PieceStore, shelf: ManifestShelf, name: str) -> tuple[PieceRef, ...]:
    """The held pieces of the manifest of digest `name` that no other manifest of the shelf names.

    Raises NotFound; Corrupt when any manifest does not read back, since what it names is not known then.
    """
    kept = {piece.digest for other in shelf.digests() if other != name for piece in all_pieces(shelf.get(other))}
    return tuple(
        piece
        for piece in all_pieces(shelf.get(name))
        if piece.digest not in kept and store.has(piece.digest, piece.size)
    )


def remove_model(store: PieceStore, shelf: ManifestShelf, name: str) -> Removed:
    """Forget the manifest of digest `name`, then the pieces that are its alone; raises as `unshared_pieces` does.

    Broken off, it leaves pieces that no manifest names, never a manifest without pieces. Open mappings stay valid.
    """
    going = unshared_pieces(store, shelf, name)
    shelf.remove(name)
    made = store.prepacked.forget(frozenset(piece.digest for piece in going))
    gone = [piece for piece in going if store.remove(piece.digest)]
    return Removed(len(gone), sum(piece.size for piece in gone) + made)
