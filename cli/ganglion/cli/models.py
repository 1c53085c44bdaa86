"""`pull`, `ls`, `show`, `rm`: models that are downloaded and cut on this machine."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ganglion.cli import output
from ganglion.cli.fleet import root_of
from ganglion.cli.options import (
    ExpertsOption,
    FastOption,
    FormatOption,
    HomeOption,
    JsonOption,
    ModelArgument,
    NameOption,
)
from ganglion.cli.runner import command
from ganglion.cli.talk import read_line

if TYPE_CHECKING:
    from ganglion.cli.shelf import CutModel


def add_to(app: typer.Typer) -> None:
    """Register the commands of this file."""
    command(app, "pull")(pull)
    command(app, "ls")(ls)
    command(app, "show")(show)
    command(app, "rm")(rm)


async def pull(
    model: Annotated[
        str,
        typer.Argument(
            help="A repository of the Hugging Face hub: org/name, org/name@revision, or for a GGUF file org/name:Q4_K_M"
            " (also hf.co/org/name:Q4_K_M). A folder or .gguf file is cut as it lies."
        ),
    ],
    name: NameOption = None,
    weights: FormatOption = None,
    fast: FastOption = False,
    experts: ExpertsOption = None,
    cut: Annotated[bool, typer.Option("--cut/--no-cut", help="Cut it into the store of this machine's agent.")] = True,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Download a model into the Hugging Face cache, and cut it so that it can be deployed; broken off, it goes on."""
    from ganglion.cli import deploying
    from ganglion.cli.shelf import agent_homes
    from ganglion.cli.sourcing import fetch, local_checkpoint, repository_of, source_of
    from ganglion.wire.errors import NotFound
    from ganglion.wire.nouns import digest

    wish = deploying.Wish.weights_only(weights, fast=fast, experts=experts)
    root = root_of(home)
    source = local_checkpoint(model, name)
    if source is None:
        repository = repository_of(model)
        if repository is None:
            raise NotFound(f"{model!r} is no folder and no embedded model; a repository is org/name", param="model")
        source = source_of((await fetch(repository)).snapshot, name)
    manifest = None
    if cut:
        place = deploying.store_home(root)
        if place is None:
            output.warn("not cut: this machine has no agent yet; `ganglion run` cuts it when there is one")
        else:
            manifest = deploying.cut(root, place, source, wish=wish)
    if as_json:
        output.answer_json(
            {
                "name": source.name,
                "origin": source.origin,
                "path": str(source.path),
                "manifest_digest": digest(manifest) if manifest else None,
                "numeric_class": manifest.numeric_class.name if manifest else None,
            }
        )
    else:
        output.answer(str(source.path))
        output.say(f"run it with: ganglion run {source.name if manifest and agent_homes(root) else model}")


async def ls(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Models on this machine: those that are cut, in the stores of its agents, and those that are downloaded."""
    from ganglion.cli import describing
    from ganglion.cli.shelf import cut_models
    from ganglion.partitioner.sources import Hub

    root = root_of(home)
    deployed = await _deployed(root)
    cut = [describing.cut_row(each, deployed) for each in cut_models(root)]
    with Hub.configured() as hub:
        cache = hub.cache
    downloads = describing.download_rows(cache)
    if as_json:
        output.answer_json({"models": cut, "cache": str(cache), "downloads": downloads})
        return
    empty = "no model is cut here; get one with: ganglion pull org/name"
    output.answer_table(describing.MODEL_COLUMNS, [describing.cut_cells(row) for row in cut], empty=empty)
    if downloads:
        output.answer("")
        rows = [describing.download_cells(row) for row in downloads]
        output.answer_table(describing.DOWNLOAD_COLUMNS, rows, empty="")


async def show(model: ModelArgument, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """What a model is: family, sizes, context, formats, how it can be split, tokenizer, license. Reads headers only.

    Of a repository that is not downloaded only configuration and tokenizer are fetched.
    """
    from ganglion.cli import describing
    from ganglion.cli.shelf import cut_models, require_cut
    from ganglion.cli.sourcing import cached, fetch, local_checkpoint, repository_of, source_of

    root = root_of(home)
    source, repository, documents = local_checkpoint(model), None, []
    if source is None and (repository := repository_of(model)) is not None:
        here = cached(repository)
        if here is None:
            done = await fetch(repository, weights=False)
            documents = [describing.remote_document(source_of(done.snapshot, None), done.weights_bytes)]
        else:
            source = source_of(here, None)
    if source is not None:
        documents = [describing.checkpoint_document(source, cut_models(root))]
    elif repository is None:
        deployed = await _deployed(root)
        documents = [describing.cut_document(each, deployed) for each in require_cut(root, model)]
    if as_json:
        output.answer_json(documents if len(documents) > 1 else documents[0])
        return
    for number, document in enumerate(documents):
        if number:
            output.answer("")
        rows = describing.lines(document)
        width = max(len(label) for label, _ in rows)
        for label, text in rows:
            output.answer(f"{label.ljust(width)}  {text}")


async def rm(
    model: Annotated[
        str, typer.Argument(help="Name of a cut model, the beginning of its digest, or the reference it came from.")
    ],
    cache: Annotated[
        bool, typer.Option("--cache", help="Also remove the downloaded commit from the Hugging Face cache.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove a model: its cut pieces that no other model here uses, and with --cache what was downloaded for it."""
    from ganglion.agent.store import ManifestShelf
    from ganglion.agent.store.gc import remove_model, unshared_pieces
    from ganglion.cli.shelf import Memory, find_cut, refuse_in_use, require_cut

    root = root_of(home)
    downloads = _downloads(model, find_cut(root, model)) if cache else None
    found = find_cut(root, model) if downloads else require_cut(root, model)
    deployed = await _deployed(root)
    for each in found:
        refuse_in_use(each, deployed)
    going = [
        f"{each.manifest.name} ({each.manifest.numeric_class.name}) in the store of {each.home.name}: "
        + output.human_bytes(
            sum(piece.size for piece in unshared_pieces(each.store, ManifestShelf(each.home / "store"), each.digest))
        )
        for each in found
    ]
    if downloads:
        going += [f"the download {row}: {output.human_bytes(size)}" for row, size in downloads.what]
    if not await _confirmed(going, yes=yes):
        output.say("nothing was removed")
        return
    freed = 0
    for each in found:
        freed += remove_model(each.store, ManifestShelf(each.home / "store"), each.digest).size_bytes
        Memory(root).forget(each.digest)
    freed += downloads.remove() if downloads else 0
    if as_json:
        output.answer_json({"manifest_digests": [each.digest for each in found], "freed_bytes": freed})
    for line in going:
        output.step(f"removed {line}")


class _Downloads:
    """Commits in the Hugging Face cache, removed as huggingface_hub does it."""

    def __init__(self, strategy: Any, what: list[tuple[str, int]]) -> None:
        self.what = what
        self._strategy = strategy

    def remove(self) -> int:
        """Remove them; the bytes that this frees."""
        self._strategy.execute()
        return int(self._strategy.expected_freed_size)


def _downloads(model: str, found: list[CutModel]) -> _Downloads | None:
    """What lies in the cache of the repository `model`, or of what the cut models came from; None for nothing."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    from ganglion.partitioner.sources import Cache, Hub, Repository, parse_reference
    from ganglion.wire.errors import InvalidRequest

    wanted: set[tuple[str, str | None]] = set()  # None: commits that no revision names, as a broken download leaves
    with Hub.configured() as hub:
        cache = Cache(hub.cache)
    for text in (model, *(each.origin for each in found if each.origin)):
        with contextlib.suppress(InvalidRequest):
            reference = parse_reference(text)
            if isinstance(reference, Repository):
                wanted.add((reference.id, cache.commit_of(reference)))
    try:
        scanned = scan_cache_dir(cache.path)
    except CacheNotFound:
        return None
    there = [
        (f"{repository.repo_id}@{revision.commit_hash[:12]}", revision.size_on_disk, revision.commit_hash)
        for repository in scanned.repos
        if repository.repo_type == "model"
        for revision in repository.revisions
        if (repository.repo_id, revision.commit_hash) in wanted
        or ((repository.repo_id, None) in wanted and not revision.refs)
    ]
    if not there:
        return None
    return _Downloads(
        scanned.delete_revisions(*(commit for _, _, commit in there)), [(name, size) for name, size, _ in there]
    )


async def _confirmed(going: list[str], *, yes: bool) -> bool:
    """Whether a person agrees. Raises InvalidRequest where nobody can be asked."""
    from ganglion.wire.errors import InvalidRequest

    if yes:
        return True
    if not sys.stdin.isatty():
        raise InvalidRequest("nobody can be asked here; say --yes to remove " + "; ".join(going), param="yes")
    for line in going:
        output.say(f"  {line}")
    output.notes().print("Remove? [y/N] ", end="", markup=False)
    return (await read_line()).lower() in ("y", "yes")


async def _deployed(root: Path) -> frozenset[str] | None:
    """Digests of the manifests that deployments use; None when there is no coordinator to ask."""
    from ganglion.cli.admin import admin
    from ganglion.cli.deploying import FAILED, STOPPED
    from ganglion.wire.errors import GanglionError

    try:
        async with admin(root) as line:
            states = (await line.fleet()).deployments
    except GanglionError:
        return None
    used = [each for each in states if each.phase not in (FAILED, STOPPED)]
    return frozenset(digest for each in used for digest in (each.manifest_digest, each.drafter_digest) if digest)
