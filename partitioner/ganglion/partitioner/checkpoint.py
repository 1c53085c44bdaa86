"""A checkpoint: a Hugging Face folder or a GGUF file; opening reads configuration and headers only.

Folders may be quantized already (`prequantized`); their configuration and tensors look as if they were not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from ganglion.partitioner.config import Config
from ganglion.partitioner.families.text_part import text_part, text_tensors
from ganglion.partitioner.gguf.source import gguf_config, open_source
from ganglion.partitioner.prequantized import quantization_of, without_quantization
from ganglion.partitioner.safetensors import SafetensorsFile, Tensor, open_safetensors
from ganglion.partitioner.weights import Weights
from ganglion.wire.errors import Corrupt, InvalidDocument, NotFound, Unsupported

CONFIG_BYTES: Final = 4 << 20
INDEX_BYTES: Final = 64 << 20
TOKENIZER_BYTES: Final = 64 << 20
TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
GGUF: Final = ".gguf"


class Readable(Protocol):
    """A tokenizer file: a path, or what is made of a GGUF's vocabulary."""

    def read_bytes(self) -> bytes:
        """All of it."""
        ...


@dataclass(frozen=True)
class MadeFile:
    """A file that is made when it is read."""

    make: Callable[[], bytes]

    def read_bytes(self) -> bytes:
        """All of it."""
        return self.make()


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint; `digest` is over config.json and the headers, `eos_ids` joins both configurations."""

    path: Path
    config: Config
    tensors: Mapping[str, Weights]
    tokenizer: Mapping[str, Readable]
    digest: str
    bos_id: int | None
    eos_ids: tuple[int, ...]

    def tensor(self, name: str, *shape: int) -> Weights:
        """The tensor `name`, which must have `shape`; raises Corrupt when it is missing or shaped otherwise."""
        found = self.tensors.get(name)
        if found is None:
            raise Corrupt(f"{self.path}: tensor {name} is missing, config.json asks for it with shape {list(shape)}")
        if found.shape != shape:
            raise Corrupt(f"{self.path}: tensor {name} has shape {list(found.shape)}, config.json says {list(shape)}")
        return found


def read_config(path: Path) -> Config:
    """Read the configuration of the folder or GGUF file `path`; raises NotFound, InvalidDocument or Unsupported."""
    return gguf_config(path) if _is_gguf(path) else text_part(without_quantization(_folder_config(path)))


def open_checkpoint(path: Path) -> Checkpoint:
    """Open the folder or GGUF file `path` (of a split one the first).

    Raises NotFound, Corrupt, InvalidDocument or Unsupported with file and figure.
    """
    if not _is_gguf(path):
        return _open_folder(path)
    source = open_source(path)
    bos, eos = source.config.ids("bos_token_id"), source.config.ids("eos_token_id")
    tokenizer = {name: MadeFile(make) for name, make in source.tokenizer.items()}
    return Checkpoint(path, source.config, source.tensors, tokenizer, source.digest, bos[0] if bos else None, eos)


def _is_gguf(path: Path) -> bool:
    return path.suffix.lower() == GGUF and path.is_file()


def _folder_config(path: Path) -> Config:
    if not path.exists():
        raise NotFound(f"{path}: no such checkpoint folder")
    if not path.is_dir():
        raise InvalidDocument(
            f"{path}: not a folder; name the folder that holds config.json and the safetensors files, or a {GGUF} file"
        )
    file = path / "config.json"
    if not file.exists():
        hint = f"; name the {GGUF} file itself" if any(path.glob(f"*{GGUF}")) else ""
        raise NotFound(f"{path}: no config.json in it, this is not a Hugging Face checkpoint{hint}")
    return Config(_json(path, "config.json", CONFIG_BYTES), str(file))


def _open_folder(path: Path) -> Checkpoint:
    stored = _folder_config(path)
    quantization, config = quantization_of(stored), text_part(without_quantization(stored))
    digest = hashlib.sha256(_within(path, "config.json").read_bytes())
    tensors: dict[str, Tensor] = {}
    for name, opened in _weight_files(path):
        digest.update(len(opened.header).to_bytes(8, "little") + opened.header)
        for tensor in opened.tensors.values():
            if tensor.name in tensors:
                raise Corrupt(f"{path / name}: tensor {tensor.name} is also in another file of the checkpoint")
            tensors[tensor.name] = tensor
    tokenizer = {name: _within(path, name) for name in TOKENIZER_FILES if (path / name).exists()}
    for file in tokenizer.values():
        if file.stat().st_size > TOKENIZER_BYTES:
            raise InvalidDocument(f"{file}: {file.stat().st_size} bytes, at most {TOKENIZER_BYTES} are accepted")
    generation = Config({}, "")
    if "generation_config.json" in tokenizer:
        generation = Config(_json(path, "generation_config.json", CONFIG_BYTES), str(path / "generation_config.json"))
    bos = generation.ids("bos_token_id") or config.ids("bos_token_id")
    eos = tuple(sorted({*generation.ids("eos_token_id"), *config.ids("eos_token_id")}))
    weights = text_tensors(stored, quantization(tensors) if quantization else tensors)
    return Checkpoint(path, config, weights, tokenizer, digest.hexdigest(), bos[0] if bos else None, eos)


def _weight_files(path: Path) -> Iterable[tuple[str, SafetensorsFile]]:
    if (path / SINGLE).exists():
        yield SINGLE, open_safetensors(_within(path, SINGLE))
        return
    if not (path / INDEX).exists():
        pickled = sorted(p.name for p in path.iterdir() if p.suffix in {".bin", ".pt", ".pth"})
        if pickled:
            raise Unsupported(f"{path}: weights are pickled ({pickled[0]}); only safetensors files are read")
        raise NotFound(f"{path}: neither {SINGLE} nor {INDEX} in it")
    weight_map = _json(path, INDEX, INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise InvalidDocument(f"{path / INDEX}: weight_map does not name a file for each tensor")
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise InvalidDocument(
                f"{path / INDEX}: weight_map names the file {name!r}, a plain *.safetensors is expected"
            )
        if not (path / name).exists():
            raise Corrupt(f"{path / name}: the index names this file and it is missing (is the download complete?)")
        opened = open_safetensors(_within(path, name))
        absent = [tensor for tensor, file in weight_map.items() if file == name and tensor not in opened.tensors]
        if absent:
            raise Corrupt(f"{path / name}: the index says that it holds {absent[0]}, and it does not")
        yield name, opened


def _within(path: Path, name: str) -> Path:
    """The real file behind `path/name`: inside the folder, or in a Hugging Face cache the `blobs` that it links to.

    Those are the repository's, or the ones that all repositories of the cache share.
    """
    real, folder = (path / name).resolve(), path.resolve()
    blobs = (folder.parent.parent / "blobs", folder.parent.parent.parent / "blobs")
    cached = folder.parent.name == "snapshots" and any(real.is_relative_to(one) for one in blobs)
    if not (real.is_relative_to(folder) or cached):
        raise InvalidDocument(f"{path / name}: a link to {real}, outside the checkpoint's folder")
    if not real.is_file():
        raise InvalidDocument(f"{path / name}: not a file")
    return real


def _json(path: Path, name: str, limit_bytes: int) -> dict[str, Any]:
    file = _within(path, name)
    size = file.stat().st_size
    if size > limit_bytes:
        raise InvalidDocument(f"{path / name}: {size} bytes, at most {limit_bytes} are accepted")
    try:
        parsed = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InvalidDocument(f"{path / name}: not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise InvalidDocument(f"{path / name}: not an object")
    return parsed
