"""Which files of a repository are read: the checkpoint's own, or one GGUF file. Never pickles, never code. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final, Protocol

from ganglion.partitioner.checkpoint import CONFIG_BYTES, INDEX, INDEX_BYTES, SINGLE, TOKENIZER_BYTES, TOKENIZER_FILES
from ganglion.partitioner.sources.reference import check_file
from ganglion.wire.errors import InvalidDocument, InvalidRequest, NotFound, Unsupported

CONFIG: Final = "config.json"
LICENSE_BYTES: Final = 1 << 20
USUAL_VARIANT: Final = "Q4_K_M"  # as Ollama and llama.cpp take it where none is named

_LICENSE: Final = re.compile(r"(?:LICEN[CS]E|NOTICE|USE_POLICY)(?:\.(?:md|txt))?", re.IGNORECASE)
_PART: Final = re.compile(r"(.*)-\d{5}-of-(\d{5})(\.gguf)", re.IGNORECASE)


class HasSize(Protocol):
    """A file of a listing."""

    @property
    def size(self) -> int:
        """Bytes."""
        ...


@dataclass(frozen=True)
class Choice:
    """Names of files: `small` come first, then `weights`; `index`, one of `small`, names further weights.

    gguf: where the weights are a GGUF file, the one to open: the first of a split one.
    """

    small: tuple[str, ...]
    weights: tuple[str, ...]
    index: str | None = None
    gguf: str | None = None


def choose(files: Mapping[str, HasSize], variant: str | None, where: str) -> Choice:
    """The files of the repository `where` that are read. Raises NotFound, Unsupported, InvalidRequest by name."""
    quantized = sorted(name for name in files if name.lower().endswith(".gguf") and not _is_projector(name))
    licenses = tuple(sorted(name for name in files if _LICENSE.fullmatch(name) and files[name].size <= LICENSE_BYTES))
    if variant is None and CONFIG in files and (SINGLE in files or INDEX in files):
        small = (CONFIG, *(name for name in TOKENIZER_FILES if name in files), *licenses)
        chosen = Choice(small, (SINGLE,)) if SINGLE in files else Choice((*small, INDEX), (), index=INDEX)
        _check_sizes(files, chosen.small, where)
        return chosen
    if quantized:
        parts = variant_parts(quantized, variant, where)
        return Choice(licenses, tuple(check_file(name) for name in parts), gguf=parts[0])
    if variant is not None:
        raise NotFound(f"{where} has no GGUF file, so no variant {variant!r}; leave `:{variant}` out", param="model")
    pickled = sorted(name for name in files if PurePosixPath(name).suffix in {".bin", ".pt", ".pth", ".ckpt"})
    if pickled:
        raise Unsupported(f"{where}: weights are pickled ({pickled[0]}); only safetensors and GGUF files are read")
    if CONFIG not in files:
        raise NotFound(f"{where} holds no checkpoint: neither {CONFIG} nor a GGUF file", param="model")
    raise NotFound(f"{where} holds no weights that are read: neither {SINGLE}, {INDEX} nor a GGUF file", param="model")


def shards(weight_map: object, files: Mapping[str, HasSize], where: str) -> tuple[str, ...]:
    """The weight files that the `weight_map` of an index names. Raises InvalidDocument, NotFound by name."""
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InvalidDocument(f"{where}: {INDEX} does not name a file for each tensor")
    names = tuple(sorted(set(weight_map.values())))
    for name in names:
        if "/" in name or not name.endswith(".safetensors"):
            raise InvalidDocument(f"{where}: {INDEX} names the file {name!r}, a plain *.safetensors is expected")
        check_file(name)
        if name not in files:
            raise NotFound(f"{where}: {INDEX} names {name}, which the repository does not hold")
    return names


def matches_variant(name: str, variant: str) -> bool:
    """Whether the GGUF file `name` is of `variant`: the file's own name, or a part of it between punctuation."""
    stem, wanted = PurePosixPath(name).name.lower(), variant.lower()
    if stem in (wanted, f"{wanted}.gguf"):
        return True
    return re.search(rf"(?:^|[-._]){re.escape(wanted.removesuffix('.gguf'))}(?:[-.]|$)", stem) is not None


def split_parts(name: str, names: Iterable[str]) -> tuple[str, ...]:
    """The parts of the GGUF file of which `name` is one, in order: itself when it is not split. Raises NotFound."""
    match = _PART.fullmatch(name)
    if match is None:
        return (name,)
    there = set(names)
    parts = tuple(f"{match[1]}-{part:05d}-of-{match[2]}{match[3]}" for part in range(1, int(match[2]) + 1))
    missing = next((part for part in parts if part not in there), None)
    if missing is not None:
        raise NotFound(f"{name} is one of {len(parts)} parts, and {missing} is missing", param="model")
    return parts


def variant_parts(names: Sequence[str], variant: str | None, where: str) -> tuple[str, ...]:
    """The GGUF file of `names` that is meant, in its parts. Raises NotFound, InvalidRequest naming what there is."""
    wanted = variant or USUAL_VARIANT
    files = {split_parts(name, names): name for name in names}
    found = [parts for parts, name in files.items() if matches_variant(name, wanted)]
    if variant is None and not found and len(files) == 1:
        found = list(files)
    there = ", ".join(PurePosixPath(parts[0]).name for parts in list(files)[:20])
    if len(found) == 1:
        return found[0]
    if found:
        raise InvalidRequest(
            f"{where}: variant {wanted!r} fits {', '.join(parts[0] for parts in found)}; name one file", param="model"
        )
    if variant is None:
        raise InvalidRequest(
            f"{where} has several GGUF files; name one as in {where}:Q8_0; there are: {there}", param="model"
        )
    raise NotFound(f"{where} has no GGUF file of variant {variant!r}; there are: {there}", param="model")


def _check_sizes(files: Mapping[str, HasSize], names: Sequence[str], where: str) -> None:
    for name in names:
        limit = INDEX_BYTES if name == INDEX else CONFIG_BYTES if name == CONFIG else TOKENIZER_BYTES
        if files[name].size > limit:
            raise InvalidDocument(f"{where}: {name} has {files[name].size} bytes, at most {limit} are accepted")


def _is_projector(name: str) -> bool:
    return PurePosixPath(name).name.lower().startswith(("mmproj", "imatrix"))
