"""A GGUF file, or the first of a split one, as configuration, weights and tokenizer files; opening reads headers."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ganglion.partitioner.config import Config
from ganglion.partitioner.gguf.blocks import READABLE, BlockTensor
from ganglion.partitioner.gguf.configs import read_config
from ganglion.partitioner.gguf.header import GgufFile, TensorInfo, open_gguf
from ganglion.partitioner.gguf.metadata import Metadata
from ganglion.partitioner.gguf.names import rename
from ganglion.partitioner.gguf.tokenizers import tokenizer_files
from ganglion.partitioner.weights import Weights
from ganglion.wire.errors import Corrupt, InvalidDocument, Unsupported

SPLIT_NAME: Final = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class GgufSource:
    """What a file holds, by Hugging Face's names; `tokenizer` makes its files, `digest` is over the headers."""

    config: Config
    tensors: dict[str, Weights]
    tokenizer: dict[str, Callable[[], bytes]]
    digest: str


def gguf_config(path: Path) -> Config:
    """The configuration alone; raises what `open_source` raises of it."""
    return _configured(path, _parts(path))[1]


def open_source(path: Path) -> GgufSource:
    """Open the file `path`; raises NotFound, Corrupt, InvalidDocument or Unsupported with file and figure."""
    parts = _parts(path)
    metadata, config, tensors = _configured(path, parts)
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.header.nbytes.to_bytes(8, "little") + part.header)
    tokens, rows = len(metadata.texts("tokenizer.ggml.tokens")), config.whole("vocab_size")
    if tokens > rows:
        raise InvalidDocument(f"{path}: a vocabulary of {tokens} tokens and an embedding of {rows} rows")
    return GgufSource(config, rename(path, tensors, config), tokenizer_files(metadata), digest.hexdigest())


def _configured(path: Path, parts: list[GgufFile]) -> tuple[Metadata, Config, dict[str, BlockTensor]]:
    general = Metadata(path, parts[0].metadata, "")
    kind, architecture = general.text("general.type", "model"), general.text("general.architecture")
    if kind != "model":
        raise Unsupported(f"{path}: a GGUF file of type {kind[:80]!r}, a model is expected")
    tensors: dict[str, BlockTensor] = {}
    for part in parts:
        for name, info in part.tensors.items():
            if name in tensors:
                raise Corrupt(f"{part.path}: tensor {name} is also in another file of the split")
            tensors[name] = _readable(part.path, info)
    metadata = Metadata(path, parts[0].metadata, architecture)
    return metadata, read_config(metadata, dict(tensors)), tensors


def _readable(path: Path, info: TensorInfo) -> BlockTensor:
    if info.kind not in READABLE:
        supported = ", ".join(kind.name for kind in READABLE)
        raise Unsupported(f"{path}: tensor {info.name} is {info.kind.name}; weights are read from {supported}")
    return BlockTensor(info.name, info.kind, info.shape, info.data)


def _parts(path: Path) -> list[GgufFile]:
    first = open_gguf(path)
    named, count = SPLIT_NAME.fullmatch(path.name), _split(first, "count", 1)
    if count <= 1:
        return [first]
    if named is None or int(named[3]) != count:
        raise InvalidDocument(f"{path}: one of {count} files; the first is called NAME-00001-of-{count:05}.gguf")
    if _split(first, "no", 0) or int(named[2]) != 1:
        raise InvalidDocument(f"{path}: not the first of {count} files; name {named[1]}-00001-of-{count:05}.gguf")
    parts = [first]
    for number in range(2, count + 1):
        other = path.with_name(f"{named[1]}-{number:05}-of-{count:05}.gguf")
        if not other.is_file():
            raise Corrupt(f"{other}: one of {count} files, and it is missing (is the download complete?)")
        parts.append(open_gguf(other))
        if (_split(parts[-1], "no", 0), _split(parts[-1], "count", 1)) != (number - 1, count):
            raise Corrupt(f"{other}: it does not say that it is file {number} of {count}")
    found = sum(len(part.tensors) for part in parts)
    if (total := _split(first, "tensors.count", found)) != found:
        raise Corrupt(f"{path}: {found} tensors in {count} files, the first says {total}")
    return parts


def _split(part: GgufFile, key: str, default: int) -> int:
    return Metadata(part.path, part.metadata, "").whole(f"split.{key}", default, least=0)
