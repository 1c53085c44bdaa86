"""The models that are cut on this machine: in which agent's store, from what, and when they were last asked for."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ganglion.agent.store import ManifestShelf, PieceStore, all_pieces
from ganglion.cli.owner import agents_home, owner_home
from ganglion.cli.serving import read_serving
from ganglion.cli.sourcing import Source
from ganglion.wire.errors import Conflict, GanglionError, InvalidRequest, NotFound
from ganglion.wire.home import make_private_folder, write_secret
from ganglion.wire.nouns import Manifest, NumericClass, to_json

DIGEST_CHARACTERS: Final = 6  # of a manifest's digest, at least, where it stands for the model


@dataclass(frozen=True)
class CutModel:
    """A model in the store of one agent of this machine. `origin`, `used_unix_s`: None where it was not cut here."""

    home: Path
    digest: str
    manifest: Manifest
    origin: str | None
    used_unix_s: float | None

    @property
    def store(self) -> PieceStore:
        """Where its pieces are."""
        return PieceStore(self.home / "store")

    def held(self) -> tuple[int, int]:
        """(bytes of its pieces that are here, bytes of all its pieces)."""
        store, pieces = self.store, all_pieces(self.manifest)
        here = sum(piece.size for piece in pieces if store.has(piece.digest, piece.size))
        return here, sum(piece.size for piece in pieces)


class Memory:
    """`owner/manifests/`: which checkpoint, as it lay there, was cut into which manifest, and when that was used."""

    def __init__(self, root: Path) -> None:
        self._path = owner_home(root) / "manifests"

    def recall(self, key: str) -> str | None:
        """The digest of the manifest that was cut under `key`; it counts as used now."""
        place = self._path / key
        digest = _read(place).get("manifest")
        if not isinstance(digest, str):
            return None
        os.utime(place)
        return digest

    def note(self, key: str, digest: str, source: Source) -> None:
        """Remember what was cut from what."""
        document = {"manifest": digest, "origin": source.origin}
        write_secret(make_private_folder(self._path) / key, json.dumps(document).encode())

    def origins(self) -> dict[str, tuple[str, float]]:
        """(origin, when used in seconds since 1970) by digest; the latest of several."""
        found: dict[str, tuple[str, float]] = {}
        for place in self._entries():
            document, used = _read(place), place.stat().st_mtime
            digest, origin = document.get("manifest"), document.get("origin")
            if isinstance(digest, str) and isinstance(origin, str) and used > found.get(digest, ("", -1.0))[1]:
                found[digest] = (origin, used)
        return found

    def forget(self, digest: str) -> None:
        """Forget whatever led to a manifest."""
        for place in self._entries():
            if _read(place).get("manifest") == digest:
                place.unlink(missing_ok=True)

    def _entries(self) -> list[Path]:
        return [place for place in self._path.iterdir() if place.is_file()] if self._path.is_dir() else []


def key_of(source: Source, numeric: NumericClass, experts: str = "columns") -> str:
    """A name for (this checkpoint as it lies there now, its name, this cut): changes when any of its files does."""
    from ganglion.partitioner.sources.choice import split_parts
    from ganglion.wire.hello import distribution_version

    path = source.path
    files = sorted((path if path.is_dir() else path.parent).iterdir())
    if not path.is_dir():
        parts = split_parts(path.name, [file.name for file in files])
        files = [file for file in files if file.name in parts]
    marks = [distribution_version(), str(path), source.name, to_json(numeric).decode(), experts]
    for file in files:
        if file.is_file():
            stat = file.stat()
            marks.append(f"{file.name}\0{stat.st_size}\0{stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(marks).encode()).hexdigest()


def agent_homes(root: Path) -> list[Path]:
    """Homes of the agents of this machine that have a store, sorted by name."""
    folder = agents_home(root)
    return sorted(home for home in folder.iterdir() if (home / "store").is_dir()) if folder.is_dir() else []


def cut_models(root: Path) -> Iterator[CutModel]:
    """Every model in the stores of this machine; a manifest that does not read back is passed over."""
    origins = Memory(root).origins()
    for home in agent_homes(root):
        shelf = ManifestShelf(home / "store")
        for digest in shelf.digests():
            with contextlib.suppress(GanglionError):
                origin, used = origins.get(digest, (None, None))
                yield CutModel(home, digest, shelf.get(digest), origin, used)


def find_cut(root: Path, model: str) -> list[CutModel]:
    """The cut models called `model`: their name, the beginning of their digest, or what they were cut from."""
    found, local = list(cut_models(root)), _resolved(model)
    by_name = [each for each in found if model == each.manifest.name or (each.origin and each.origin in (model, local))]
    if by_name or len(model) < DIGEST_CHARACTERS:
        return by_name
    by_digest = [each for each in found if each.digest.startswith(model)]
    return by_digest or [each for each in found if each.origin and _names(model, each.origin)]


def require_cut(root: Path, model: str) -> list[CutModel]:
    """The same; raises NotFound naming the models there are."""
    found = find_cut(root, model)
    if not found:
        known = sorted({each.manifest.name for each in cut_models(root)})
        there = f"there are: {', '.join(known)}" if known else "there are none"
        raise NotFound(f"no model that is cut here is called {model!r}; {there}", param="model")
    return found


def refuse_in_use(each: CutModel, deployed: frozenset[str] | None) -> None:
    """Raise Conflict when a deployment may use this model.

    deployed: digests of the manifests of all deployments; None when no coordinator could be asked, and then an agent
    that runs anything keeps all its models.
    """
    name, run = each.manifest.name, each.home / "run"
    if deployed is not None and each.digest in deployed:
        raise Conflict(f"{name} is deployed; stop it first with: ganglion stop {name}", param="model")
    if deployed is None and read_serving(each.home) is not None and run.is_dir() and any(run.iterdir()):
        raise Conflict(
            f"the agent {each.home.name} runs a deployment, and its coordinator cannot be asked of which model: stop"
            " the deployment, or the agent, first"
        )


def _resolved(model: str) -> str | None:
    try:
        return str(Path(model).expanduser().resolve())
    except (OSError, ValueError, RuntimeError):
        return None


def _names(model: str, origin: str) -> bool:
    from ganglion.partitioner.sources import Repository, parse_reference

    try:
        wanted, found = parse_reference(model), parse_reference(origin)
    except InvalidRequest:
        return False
    if not (isinstance(wanted, Repository) and isinstance(found, Repository)):
        return False
    # The origin's revision is a commit: a branch that was asked for is not told from another one here.
    same_commit = wanted.revision is None or wanted.revision == found.revision
    return wanted.id == found.id and same_commit and (wanted.variant or found.variant) == found.variant


def _read(place: Path) -> dict[str, Any]:
    try:
        found = json.loads(place.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
