"""What `ls` and `show` say: stable documents of cut models, downloads and checkpoints, made from headers alone."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from ganglion.agent.store import all_pieces
from ganglion.cli.output import human_bytes
from ganglion.cli.shelf import CutModel
from ganglion.cli.sourcing import Source
from ganglion.wire.errors import GanglionError, Unsupported
from ganglion.wire.nouns import Geometry, NumericClass
from ganglion.wire.shares import every_expert

if TYPE_CHECKING:
    from ganglion.partitioner.config import Config
    from ganglion.partitioner.weights import Weights

MODEL_COLUMNS = ("MODEL", "CLASS", "PARAMETERS", "SIZE", "DEPLOYED", "USED", "AGENT", "DIGEST", "FROM")
DOWNLOAD_COLUMNS = ("REPOSITORY", "COMMIT", "REVISIONS", "SIZE", "USED")

_LICENSE: Final = re.compile(r"(?:LICEN[CS]E|NOTICE|USE_POLICY)(?:\.(?:md|txt))?", re.IGNORECASE)


class _Kind(msgspec.Struct, frozen=True):
    type: str | None = None


class _Tokenizer(msgspec.Struct, frozen=True):
    model: _Kind = _Kind()


class _TokenizerConfig(msgspec.Struct, frozen=True):
    chat_template: msgspec.Raw = msgspec.Raw(b"null")


def cut_row(each: CutModel, deployed: frozenset[str] | None) -> dict[str, Any]:
    """One cut model of `ls`; `deployed`: the digests of manifests in use, None when that is not known."""
    held, total = each.held()
    return {
        "name": each.manifest.name,
        "manifest_digest": each.digest,
        "numeric_class": each.manifest.numeric_class.name,
        "family": each.manifest.family,
        "parameters": each.manifest.parameters,
        "stored_bytes": held,
        "missing_bytes": total - held,
        "agent": each.home.name,
        "origin": each.origin,
        "used_unix_s": round(each.used_unix_s) if each.used_unix_s else None,
        "deployed": None if deployed is None else each.digest in deployed,
    }


def cut_cells(row: dict[str, Any]) -> list[str]:
    """One cut model under MODEL_COLUMNS."""
    size = human_bytes(row["stored_bytes"])
    return [
        row["name"],
        row["numeric_class"],
        human_count(row["parameters"]),
        f"{size} ({human_bytes(row['missing_bytes'])} missing)" if row["missing_bytes"] else size,
        {True: "yes", False: "no", None: "-"}[row["deployed"]],
        _when(row["used_unix_s"]),
        row["agent"],
        row["manifest_digest"][:12],
        row["origin"] or "-",
    ]


def download_rows(cache: Path) -> list[dict[str, Any]]:
    """The models in the Hugging Face cache, a row for each commit."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        found = scan_cache_dir(cache)
    except CacheNotFound:
        return []
    rows = [
        {
            "repository": repository.repo_id,
            "commit": revision.commit_hash,
            "revisions": sorted(revision.refs),
            "size_bytes": revision.size_on_disk,
            "used_unix_s": round(max((file.blob_last_accessed for file in revision.files), default=0.0)) or None,
            "path": str(revision.snapshot_path),
        }
        for repository in found.repos
        if repository.repo_type == "model"
        for revision in repository.revisions
    ]
    return sorted(rows, key=lambda row: (str(row["repository"]), str(row["commit"])))


def download_cells(row: dict[str, Any]) -> list[str]:
    """One download under DOWNLOAD_COLUMNS."""
    revisions = ", ".join(row["revisions"]) or "-"
    return [row["repository"], row["commit"][:12], revisions, human_bytes(row["size_bytes"]), _when(row["used_unix_s"])]


def checkpoint_document(source: Source, cut: Iterable[CutModel]) -> dict[str, Any]:
    """A checkpoint as it lies here; `cut` are the models that are cut on this machine."""
    from ganglion.partitioner.checkpoint import open_checkpoint
    from ganglion.partitioner.sources.download import weights_bytes

    opened = open_checkpoint(source.path)
    formats: dict[str, int] = {}
    for tensor in opened.tensors.values():
        stored = _format_of(tensor)
        formats[stored] = formats.get(stored, 0) + tensor.elements
    folder = source.path if source.path.is_dir() else source.path.parent
    classes = sorted({each.manifest.numeric_class.name for each in cut if each.manifest.source_digest == opened.digest})
    return {
        "name": source.name,
        "kind": "checkpoint",
        "origin": source.origin,
        "path": str(source.path),
        **_configuration(opened.config),
        "parameters": sum(formats.values()),
        "formats": formats,
        "weights_bytes": weights_bytes(source.path),
        **_text(opened.tokenizer),
        "license": _license(folder),
        "digest": opened.digest,
        "cut": classes,
    }


def remote_document(source: Source, weights_bytes: int) -> dict[str, Any]:
    """A repository of which only configuration and tokenizer were downloaded."""
    from ganglion.partitioner.checkpoint import TOKENIZER_FILES, read_config

    document: dict[str, Any] = {
        "name": source.name,
        "kind": "repository",
        "origin": source.origin,
        "path": None,
        "weights_bytes": weights_bytes,
    }
    if source.path.is_dir():
        files = {name: source.path / name for name in TOKENIZER_FILES if (source.path / name).exists()}
        document |= _configuration(read_config(source.path)) | _text(files) | {"license": _license(source.path)}
    return document


def cut_document(each: CutModel, deployed: frozenset[str] | None) -> dict[str, Any]:
    """A cut model."""
    manifest, store = each.manifest, each.store
    tokenizer = {
        name: store.path_of(piece.digest) for name, piece in manifest.tokenizer.items() if store.has(piece.digest)
    }
    return {
        "name": manifest.name,
        "kind": "cut",
        "origin": each.origin,
        "path": str(each.home / "store"),
        "family": manifest.family,
        **_geometry(manifest.geometry),
        "splits": _splits(manifest.geometry, max(map(len, every_expert(manifest.layers)), default=0)),
        "parameters": manifest.parameters,
        **_text(tokenizer),
        "digest": manifest.source_digest,
        "opset": manifest.opset,
        "pieces": len(all_pieces(manifest)),
        **{
            key: value
            for key, value in cut_row(each, deployed).items()
            if key not in ("name", "origin", "family", "parameters")
        },
    }


def lines(document: dict[str, Any]) -> list[tuple[str, str]]:
    """A document of `show` for people: label and text."""

    return [
        (key.removesuffix("_bytes").removesuffix("_unix_s").replace("_", " "), _shown(key, value))
        for key, value in document.items()
    ]


def _shown(key: str, value: Any) -> str:
    if value is None or value in ("", [], {}):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{name} {each}" for name, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if key.endswith("_bytes"):
        value = f"{human_bytes(value)} ({value} bytes)"
    elif key == "parameters":
        value = f"{human_count(value)} ({value})"
    return _when(value) if key == "used_unix_s" else str(value)


def human_count(count: int) -> str:
    """`count` as people speak of parameters, for example "1.2 B"."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return str(count)


def _configuration(config: Config) -> dict[str, Any]:
    """Family and sizes; a family that is not supported says so, and its sizes stay unknown."""
    from ganglion.partitioner.families import family_of
    from ganglion.partitioner.families.model import split_model

    document: dict[str, Any] = {"architecture": next(iter(config.names("architectures")), None)}
    try:
        model = family_of(config).read(config)
        try:
            split = split_model(model, NumericClass(format="fp32", block=0, exact=True))
        except Unsupported:  # heads too large for exact classes
            split = split_model(model, NumericClass(format="fp32", block=0, exact=False))
    except GanglionError as error:
        return document | {"family": None, "supported": False, "reason": error.message}
    return document | {
        "family": model.family,
        "supported": True,
        **_geometry(split.geometry),
        "rope": _rope(config),
        "tied_head": model.tied,
        "splits": _splits(split.geometry),
    }


def _geometry(geometry: Geometry) -> dict[str, Any]:
    return {
        "layers": geometry.layers,
        "hidden": geometry.hidden,
        "heads": geometry.heads,
        "kv_heads": geometry.kv_heads,
        "head_dim": geometry.head_dim,
        "intermediate": geometry.intermediate,
        "vocabulary": geometry.vocab,
        "context_tokens": geometry.context,
    }


def _splits(geometry: Geometry, experts: int = 0) -> dict[str, int]:
    """Devices at most, by how the model is split; experts: of a layer, where it is cut expert by expert."""
    if experts:
        return {"expert": experts, "pipeline": geometry.layers}
    return {
        "tensor": max(geometry.head_groups, geometry.column_groups),
        "attention": geometry.head_groups,
        "pipeline": geometry.layers,
    }


def _format_of(tensor: Weights) -> str:
    """As GGUF names it, else the type or the bits of the stored numbers."""
    kind = getattr(tensor, "kind", None)
    if kind is not None:
        return str(kind.name)
    return f"{tensor.packing.bits} bits" if tensor.packing else tensor.stored


def _rope(config: Config) -> str | None:
    for field in ("rope_parameters", "rope_scaling"):
        with contextlib.suppress(GanglionError):
            if (found := config.object(field)) is not None:
                return str(found.fields.get("rope_type") or found.fields.get("type") or "default")
    return "default" if config.has("rope_theta") else None


def _text(files: Any) -> dict[str, Any]:
    """Kind of the tokenizer and where the chat template is; of damaged files nothing is known."""
    kind, template = None, "chat_template.jinja" if "chat_template.jinja" in files else None
    if "tokenizer.json" in files:
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            kind = msgspec.json.decode(files["tokenizer.json"].read_bytes(), type=_Tokenizer).model.type
    if template is None and "tokenizer_config.json" in files:
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            found = msgspec.json.decode(files["tokenizer_config.json"].read_bytes(), type=_TokenizerConfig)
            template = "tokenizer_config.json" if bytes(found.chat_template) != b"null" else None
    return {"tokenizer": kind, "chat_template": template}


def _license(folder: Path) -> str | None:
    return next((file.name for file in sorted(folder.iterdir()) if _LICENSE.fullmatch(file.name)), None)


def _when(unix_s: float | None) -> str:
    return "-" if unix_s is None else datetime.fromtimestamp(unix_s, tz=UTC).strftime("%Y-%m-%d %H:%M UTC")
