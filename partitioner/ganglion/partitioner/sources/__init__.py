"""Where checkpoints come from: what a person may call a model, and how a repository of a hub gets onto this machine."""

from ganglion.partitioner.sources.cache import Cache, Snapshot
from ganglion.partitioner.sources.download import Download, pull
from ganglion.partitioner.sources.hub import Hub
from ganglion.partitioner.sources.reference import (
    LocalPath,
    Name,
    Reference,
    Repository,
    parse_reference,
    parse_repository,
)

__all__ = [
    "Cache",
    "Download",
    "Hub",
    "LocalPath",
    "Name",
    "Reference",
    "Repository",
    "Snapshot",
    "parse_reference",
    "parse_repository",
    "pull",
]
