"""From what a person calls a model to a checkpoint on this machine and the name that the API gives it."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ganglion.cli import output
from ganglion.cli.bars import Bars
from ganglion.cli.output import human_bytes
from ganglion.wire.errors import InvalidRequest, NotFound

if TYPE_CHECKING:
    from ganglion.partitioner.sources import Download, Repository, Snapshot

GGUF = ".gguf"


@dataclass(frozen=True)
class Source:
    """A checkpoint here: `path` is its folder or GGUF file, `name` its name in the API, `origin` what people see."""

    path: Path
    name: str
    origin: str


async def checkpoint_of(model: str, name: str | None = None) -> Source | None:
    """The checkpoint that `model` means, downloaded where it is a repository that does not lie here whole.

    None for a name that is neither embedded nor a folder: it may be cut or deployed. Raises InvalidRequest, NotFound,
    and whatever a download raises.
    """
    found = local_checkpoint(model, name)
    if found is not None:
        return found
    repository = repository_of(model)
    if repository is None:
        return None
    here = cached(repository)
    return source_of(here or (await fetch(repository)).snapshot, name)


def local_checkpoint(model: str, name: str | None = None) -> Source | None:
    """The embedded model, folder or GGUF file of this machine; None for anything else.

    Raises InvalidRequest for a name that is none, NotFound for a path that leads nowhere.
    """
    from ganglion.models import DEMO_NAMES, demo_path
    from ganglion.partitioner.sources.reference import LocalPath, parse_reference

    if model in DEMO_NAMES:
        return Source(demo_path(model), name or model, model)
    path = _existing(model)
    if path is not None and path.is_dir():
        return Source(path.resolve(), name or path.resolve().name, str(path.resolve()))
    if path is not None and path.suffix.lower() == GGUF:
        path = path.absolute()
        return Source(path, name or path.stem, str(path))
    if isinstance(parse_reference(model), LocalPath):
        if path is not None:
            raise InvalidRequest(
                f"{path} is neither a folder with config.json and *.safetensors nor a {GGUF} file", param="model"
            )
        raise NotFound(f"there is no folder or file {Path(model).expanduser()}", param="model")
    return None


def repository_of(model: str) -> Repository | None:
    """The repository that `model` names; None for a plain name. Raises InvalidRequest naming what is wrong."""
    from ganglion.partitioner.sources.reference import Repository, parse_reference

    parsed = parse_reference(model)
    return parsed if isinstance(parsed, Repository) else None


def cached(repository: Repository) -> Snapshot | None:
    """What lies in the Hugging Face cache of a repository, if it is whole; nothing is asked of the network."""
    from ganglion.partitioner.sources import Cache, Hub

    with Hub.configured() as hub:
        return Cache(hub.cache).find(repository)


def source_of(snapshot: Snapshot, name: str | None) -> Source:
    """A downloaded checkpoint as a source; its origin names the commit."""
    repository = snapshot.repository
    variant = f":{repository.variant}" if repository.variant else ""
    origin = f"{repository.id}@{snapshot.commit}{variant}"
    return Source(snapshot.path, name or repository.model_name, origin)


async def fetch(repository: Repository, *, weights: bool = True) -> Download:
    """Download the newest commit of a repository's revision, with bars. Ends soon after it is cancelled."""
    from ganglion.partitioner.sources import Hub, pull

    stop = threading.Event()

    def download() -> Download:
        with Hub.configured() as hub, Bars() as bars:

            def found(commit: str, total_bytes: int) -> None:
                if weights:
                    bars.say(f"{repository} is commit {commit[:12]}, {human_bytes(total_bytes)}")

            def progress(file: str, done: int, total: int) -> None:
                bars.show(file, done, total, key=file)

            return pull(hub, repository, progress=progress, found=found, stop=stop, weights=weights)

    try:
        done = await asyncio.to_thread(download)
    except asyncio.CancelledError:
        stop.set()
        raise
    if weights:
        came = f"{human_bytes(done.received_bytes)} came now" if done.received_bytes else "all of it was here"
        output.step(f"downloaded {repository} ({came})")
    return done


def _existing(model: str) -> Path | None:
    try:
        path = Path(model).expanduser()
        return path if path.exists() else None
    except (OSError, ValueError, RuntimeError):  # too long, a NUL, an unknown ~user: no path of this machine
        return None
