"""What a device says it holds: whole models, parts of models, and what it fetched for a share."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import msgspec

from ganglion.agent.store import ManifestShelf, PieceStore, all_pieces
from ganglion.agent.supervisor_held import Held, HeldModels
from ganglion.wire.nouns import PieceRef, digest

_spec = importlib.util.spec_from_file_location("supervisor_scene", Path(__file__).with_name("test_supervisor.py"))
_scene = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_scene)
scene = _scene.scene  # the fixture


async def test_whole_in_part_and_nothing(tmp_path):
    theirs, mine, shelf = PieceStore(tmp_path / "theirs"), PieceStore(tmp_path / "mine"), ManifestShelf(tmp_path)
    manifest = _scene.model(theirs)
    said: list[Held] = []
    held = HeldModels(mine, shelf, said.append)
    await held.look()
    name = shelf.put(manifest)
    await held.look()
    assert said == [Held((), ())]
    for piece in all_pieces(manifest):
        mine.put(theirs.open(piece.digest))
        await held.look()
    assert said == [Held((), ()), Held((), (name,)), Held((name,), ())]
    mine.remove(manifest.embedding.pieces[0].digest)
    await held.look()
    assert held.held == said[-1] == Held((), (name,))


async def test_a_device_that_fetched_its_share_says_that_it_holds_a_part(scene):
    """The share needs every piece but the chat template, which stays in the text's room."""
    template = PieceRef("0" * 64, 9)
    tokenizer = scene.manifest.tokenizer | {"chat_template.jinja": template}
    scene.manifest = msgspec.structs.replace(scene.manifest, tokenizer=tokenizer)
    scene.assign(1)
    await scene.reached(1, "listening")
    name = digest(scene.manifest)
    fleet = scene.fleet
    await fleet.until(lambda: [h for h in fleet.of("held") if list(h.partial_manifest_digests) == [name]], "a part")
    assert ManifestShelf(scene.home.store).get(name) == scene.manifest
    assert not any(held.manifest_digests for held in fleet.of("held"))
