"""Manifests on disk: `<store>/manifests/<digest>.json`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from ganglion.wire.errors import Corrupt, InvalidRequest, NotFound
from ganglion.wire.home import write_secret
from ganglion.wire.limits import MANIFEST_BYTES
from ganglion.wire.nouns import Manifest, digest, from_json, to_json

_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


class ManifestShelf:
    """The manifests that a store knows, by digest."""

    def __init__(self, store: Path) -> None:
        self.path = Path(store) / "manifests"
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def put(self, manifest: Manifest) -> str:
        """Keep `manifest` durably; returns its digest, raises InvalidRequest when it is larger than a peer takes."""
        body = to_json(manifest)
        if len(body) > MANIFEST_BYTES:
            raise InvalidRequest(
                f"the manifest of {manifest.name} has {len(body)} bytes, at most {MANIFEST_BYTES} travel:"
                " cut fewer groups"
            )
        name = digest(manifest)
        if not (self.path / f"{name}.json").exists():
            write_secret(self.path / f"{name}.json", body)
        return name

    def get(self, name: str) -> Manifest:
        """The manifest of digest `name`; raises NotFound, Corrupt when the file is not what its name says."""
        try:
            body = self._place(name).read_bytes()
        except FileNotFoundError:
            raise NotFound(f"manifest {name[:12]} is not in {self.path}") from None
        manifest = from_json(Manifest, body, limit_bytes=MANIFEST_BYTES)
        if digest(manifest) != name:
            raise Corrupt(f"{self._place(name)} is not what its name says: remove it and cut the model again")
        return manifest

    def digests(self) -> tuple[str, ...]:
        """Digests of all manifests, sorted."""
        return tuple(sorted(p.stem for p in self.path.glob("*.json") if _DIGEST.fullmatch(p.stem)))

    def remove(self, name: str) -> bool:
        """Forget the manifest, not its pieces; whether it was there."""
        place = self._place(name)
        there = place.exists()
        place.unlink(missing_ok=True)
        return there

    def changed(self) -> int:
        """A number that differs after a manifest was added or removed by any process."""
        return self.path.stat().st_mtime_ns

    def _place(self, name: str) -> Path:
        if not _DIGEST.fullmatch(name):
            raise InvalidRequest(f"digest {name[:80]!r}: expected 64 lower-case hexadecimal digits", param="digest")
        return self.path / f"{name}.json"
