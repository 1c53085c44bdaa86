"""`pull`, `ls`, `show`, `rm`: through the real command, against a hub on loopback and a store on disk."""

# ruff: noqa: N802 - the ids of faults in names of tests are upper case

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, cast

import pytest
from checkpoints import make_llama
from fake_hub import COMMIT, FakeHub, files_of, serve_hub
from huggingface_hub import constants
from typer.testing import CliRunner, Result

from ganglion.agent.store import ManifestShelf, PieceStore, all_pieces
from ganglion.agent.store.gc import remove_model
from ganglion.cli.deploying import Wish, cut, is_of, manifest_for
from ganglion.cli.main import app
from ganglion.cli.serving import serving
from ganglion.cli.shelf import find_cut, key_of, refuse_in_use
from ganglion.cli.sourcing import Source, checkpoint_of
from ganglion.partitioner.sources import Cache, Repository
from ganglion.proto import admin_pb2
from ganglion.wire.errors import Conflict, Corrupt, InvalidRequest, NotFound
from ganglion.wire.nouns import to_json


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_llama(tmp_path_factory.mktemp("models") / "Tiny-Llama", dtype="bfloat16")
    (folder / "LICENSE").write_text("free")
    return folder


@pytest.fixture
def hub(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    files = files_of(checkpoint)
    with serve_hub(
        {"org/Tiny-Llama": files, "org/pickled": {"config.json": b"{}", "pytorch_model.bin": b""}}
    ) as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        yield served


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home with the store of one agent that does not run."""
    (tmp_path / "home" / "agents" / "desk" / "store").mkdir(parents=True, mode=0o700)
    (tmp_path / "home" / "owner").mkdir(mode=0o700)
    return tmp_path / "home"


def ganglion(home: Path, *arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [*arguments, "--home", str(home)])
    assert result.exit_code == code, result.output
    return result


def document(home: Path, *arguments: str) -> Any:
    return json.loads(ganglion(home, *arguments, "--json").stdout)


def desk(home: Path) -> tuple[PieceStore, ManifestShelf]:
    return PieceStore(home / "agents" / "desk" / "store"), ManifestShelf(home / "agents" / "desk" / "store")


def test_pull_ls_show_rm(hub: FakeHub, home: Path, checkpoint: Path) -> None:
    pulled = document(home, "pull", "org/Tiny-Llama")
    assert (pulled["name"], pulled["origin"]) == ("tiny-llama", f"org/Tiny-Llama@{COMMIT}")
    assert {path.name for path in Path(pulled["path"]).iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "LICENSE",
    }  # fmt: skip

    listed = document(home, "ls")
    (model,), (download,) = listed["models"], listed["downloads"]
    store, shelf = desk(home)
    pieces = all_pieces(shelf.get(pulled["manifest_digest"]))
    assert model["stored_bytes"] == sum(piece.size for piece in pieces) == store.used_bytes()
    assert model["missing_bytes"] == 0
    assert (model["name"], model["numeric_class"], model["agent"]) == ("tiny-llama", "fp32-exact", "desk")
    assert (model["origin"], model["deployed"]) == (pulled["origin"], None)
    assert model["used_unix_s"] > 0
    assert (download["repository"], download["commit"], download["revisions"]) == ("org/Tiny-Llama", COMMIT, ["main"])
    table = ganglion(home, "ls").stdout
    assert "tiny-llama" in table
    assert "org/Tiny-Llama" in table

    for reference in ("org/Tiny-Llama", str(checkpoint), "tiny-llama", pulled["manifest_digest"][:8]):
        shown = document(home, "show", reference)
        assert (shown["family"], shown["layers"], shown["hidden"], shown["vocabulary"]) == ("llama", 2, 64, 283)
        assert (shown["tokenizer"], shown["chat_template"]) == ("BPE", "tokenizer_config.json")
        assert shown["splits"] == {"tensor": shown["splits"]["tensor"], "attention": 2, "pipeline": 2}
    shown = document(home, "show", "org/Tiny-Llama")
    assert (shown["license"], shown["rope"], shown["cut"]) == ("LICENSE", "default", ["fp32-exact"])
    assert shown["weights_bytes"] == (checkpoint / "model.safetensors").stat().st_size
    assert shown["formats"] == {"bfloat16": shown["parameters"]}
    assert shown["parameters"] == shelf.get(pulled["manifest_digest"]).parameters
    assert "context tokens" in ganglion(home, "show", "tiny-llama").stdout

    refused = ganglion(home, "rm", "tiny-llama", code=2)
    assert "--yes" in refused.stderr
    removed = document(home, "rm", "org/Tiny-Llama", "--cache", "--yes")
    assert removed["manifest_digests"] == [pulled["manifest_digest"]]
    assert removed["freed_bytes"] >= model["stored_bytes"] + download["size_bytes"]
    assert store.used_bytes() == 0
    assert shelf.digests() == ()
    assert document(home, "ls") == {"models": [], "cache": listed["cache"], "downloads": []}
    assert list((home / "owner" / "manifests").iterdir()) == []


def test_what_was_pulled_is_neither_fetched_nor_cut_again(hub: FakeHub, home: Path) -> None:
    first = document(home, "pull", "org/Tiny-Llama")
    hub.asked.clear()
    store, _ = desk(home)
    before = {digest: store.path_of(digest).stat().st_mtime_ns for digest in store.digests()}
    assert document(home, "pull", "org/Tiny-Llama") == first
    assert hub.files_asked() == []
    assert {digest: store.path_of(digest).stat().st_mtime_ns for digest in store.digests()} == before


async def test_run_uses_what_is_here_and_downloads_what_is_not(hub: FakeHub) -> None:
    source = await checkpoint_of("org/Tiny-Llama")
    assert source is not None
    assert (source.name, source.origin) == ("tiny-llama", f"org/Tiny-Llama@{COMMIT}")
    hub.asked.clear()
    assert await checkpoint_of("hf.co/org/Tiny-Llama") == source
    assert hub.asked == []
    assert await checkpoint_of("some-name") is None


def test_show_of_a_repository_fetches_no_weights(hub: FakeHub, home: Path, checkpoint: Path) -> None:
    shown = document(home, "show", "org/Tiny-Llama")
    assert (shown["kind"], shown["family"], shown["path"]) == ("repository", "llama", None)
    assert shown["weights_bytes"] == (checkpoint / "model.safetensors").stat().st_size
    assert "model.safetensors" not in hub.files_asked()
    assert Cache(Path(constants.HF_HUB_CACHE)).find(Repository("org", "Tiny-Llama")) is None


def test_only_what_no_other_model_uses_is_removed(home: Path, checkpoint: Path) -> None:
    agent, (store, shelf) = home / "agents" / "desk", desk(home)
    source = Source(checkpoint, "tiny", str(checkpoint))
    both = [cut(home, agent, source, wish=Wish.weights_only(weights, fast=False)) for weights in ("fp32", "int4")]
    pieces = [{piece.digest for piece in all_pieces(manifest)} for manifest in both]
    assert pieces[0] & pieces[1], "the embedding is the same in both"
    assert len(document(home, "show", "tiny")) == 2
    fp32 = find_cut(home, "tiny")[0]
    removed = document(home, "rm", fp32.digest[:10], "--yes")
    kept = next(each for manifest, each in zip(both, pieces, strict=True) if manifest != fp32.manifest)
    assert removed["manifest_digests"] == [fp32.digest]
    assert set(store.digests()) == kept
    (left,) = shelf.digests()
    assert {piece.digest for piece in all_pieces(shelf.get(left))} == kept
    ganglion(home, "rm", "tiny", "--yes")
    assert list(store.digests()) == []


@pytest.mark.parametrize(("said", "code"), [(b"\x03", 130), (b"y\n", 0)])
def test_rm_asks_on_a_terminal(said: bytes, code: int, home: Path, checkpoint: Path) -> None:
    cut(home, home / "agents" / "desk", Source(checkpoint, "tiny", "x"), wish=Wish.weights_only("fp32", fast=False))
    line = [sys.executable, "-m", "ganglion.cli", "rm", "tiny", "--home", str(home)]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(line[0], line)
    shown = b""
    try:
        while b"Remove?" not in shown:
            shown += os.read(terminal, 1024)
        os.write(terminal, said)
        with contextlib.suppress(OSError):  # the terminal's other end is closed
            while more := os.read(terminal, 1024):
                shown += more
    finally:
        os.close(terminal)
        status = os.waitpid(pid, 0)[1]
    assert os.waitstatus_to_exitcode(status) == code, shown
    assert b"tiny (fp32-exact) in the store of desk" in shown
    assert b"internal error" not in shown
    assert bool(find_cut(home, "tiny")) == (said != b"y\n")


def test_nothing_is_removed_while_a_manifest_cannot_be_read(home: Path, checkpoint: Path) -> None:
    store, shelf = desk(home)
    wish = Wish.weights_only("fp32", fast=False)
    cut(home, home / "agents" / "desk", Source(checkpoint, "tiny", "x"), wish=wish)
    (digest,) = shelf.digests()
    (shelf.path / f"{'0' * 64}.json").write_bytes((shelf.path / f"{digest}.json").read_bytes())
    held = set(store.digests())
    with pytest.raises(Corrupt, match="not what its name says"):
        remove_model(store, shelf, digest)
    assert set(store.digests()) == held
    assert "not what its name says" in ganglion(home, "rm", "tiny", "--yes", code=9).stderr


def test_a_model_is_not_removed_while_an_agent_runs_something(home: Path, checkpoint: Path) -> None:
    agent = home / "agents" / "desk"
    cut(home, agent, Source(checkpoint, "tiny", "x"), wish=Wish.weights_only("fp32", fast=False))
    (agent / "run" / "d1-1").mkdir(parents=True)
    with serving(agent) as announce:
        announce({"name": "desk", "node_id": "a" * 26})
        refused = ganglion(home, "rm", "tiny", "--yes", code=5)
    assert "the agent desk runs a deployment" in refused.stderr
    (model,) = find_cut(home, "tiny")
    with pytest.raises(Conflict, match="tiny is deployed; stop it first with: ganglion stop tiny"):
        refuse_in_use(model, frozenset({model.digest}))
    refuse_in_use(model, frozenset({"0" * 64}))


def test_a_deployment_of_the_same_name_is_not_taken_for_another_checkpoint(
    home: Path, checkpoint: Path, tmp_path: Path
) -> None:
    manifest = cut(
        home, home / "agents" / "desk", Source(checkpoint, "tiny", "x"), wish=Wish.weights_only("fp32", fast=False)
    )
    state = admin_pb2.DeploymentState(model="tiny", manifest=to_json(manifest))
    assert is_of(state, Source(checkpoint, "tiny", "x"))
    assert is_of(state, None)
    other = make_llama(tmp_path / "tiny", seed=1, num_hidden_layers=1)
    assert not is_of(state, Source(other, "tiny", "y"))


async def test_a_cut_model_is_deployed_by_its_name(
    home: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    agent, source = home / "agents" / "desk", Source(checkpoint, "tiny", str(checkpoint))
    fp32, int4 = (cut(home, agent, source, wish=Wish.weights_only(weights, fast=False)) for weights in ("fp32", "int4"))
    with serving(agent) as announce:
        announce({"name": "desk", "node_id": "a" * 26})
        found = await checkpoint_of("tiny")
        assert found is None
        for weights, manifest in (("fp32", fp32), ("int4", int4)):
            wish = Wish.weights_only(weights, fast=False)
            assert await manifest_for(home, cast(Any, None), "tiny", found, wish) == manifest


def test_a_checkpoint_that_changed_is_cut_again(home: Path, checkpoint: Path) -> None:
    source = Source(checkpoint, "tiny", str(checkpoint))
    numeric = cut(home, home / "agents" / "desk", source, wish=Wish.weights_only("fp32", fast=False)).numeric_class
    before = key_of(source, numeric)
    stamp = (checkpoint / "config.json").stat()
    os.utime(checkpoint / "config.json", ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    assert key_of(source, numeric) != before
    os.utime(checkpoint / "config.json", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert key_of(source, numeric) == before


def test_the_key_of_a_gguf_file_is_of_its_parts_alone(tmp_path: Path, home: Path, checkpoint: Path) -> None:
    numeric = cut(
        home, home / "agents" / "desk", Source(checkpoint, "t", "x"), wish=Wish.weights_only("fp32", fast=False)
    ).numeric_class
    for name in ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "other.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    source = Source(tmp_path / "m-00001-of-00002.gguf", "m", "x")
    before = key_of(source, numeric)
    (tmp_path / "other.gguf").write_bytes(b"GGUF2")
    assert key_of(source, numeric) == before
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(b"GGUF2")
    assert key_of(source, numeric) != before


async def test_local_paths(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkpoint.parent)
    found = await checkpoint_of("Tiny-Llama")
    assert found == Source(checkpoint, "Tiny-Llama", str(checkpoint))
    assert await checkpoint_of("./Tiny-Llama", "mine") == Source(checkpoint, "mine", str(checkpoint))
    (tmp_path / "x.Q4_0.gguf").write_bytes(b"GGUF")
    assert await checkpoint_of(str(tmp_path / "x.Q4_0.gguf")) == Source(
        tmp_path / "x.Q4_0.gguf", "x.Q4_0", str(tmp_path / "x.Q4_0.gguf")
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFound, match="there is no folder or file"):
        await checkpoint_of("./absent")
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(InvalidRequest, match="neither a folder"):
        await checkpoint_of("./x.bin")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["pull", "org/absent"], 3, "shows no repository org/absent"),
        (["pull", "org/Tiny-Llama@v9"], 3, "no such revision"),
        (["pull", "org/Tiny-Llama:Q4_0"], 3, "no GGUF file, so no variant 'Q4_0'"),
        (["pull", "org/pickled"], 2, "pickled"),
        (["pull", "name"], 3, "a repository is org/name"),
        (["pull", "../../etc/passwd"], None, "passwd"),
        (["pull", "/etc/passwd"], 2, "neither a folder"),
        (["pull", "org/%2e%2e"], 2, "'%'"),
        (["pull", "a//b"], 2, "org/name"),
        (["pull", "org/na\u2024me"], 2, "U+2024"),
        (["pull", "org/aux"], 2, "device on Windows"),
        (["pull", "org/" + "a" * 4096], 2, "at most 512"),
        (["pull", "org/Tiny-Llama", "--format", "fp7"], 2, "--format 'fp7'"),
        (["show", "nothing"], 3, "no model that is cut here is called 'nothing'"),
        (["rm", "nothing", "--yes"], 3, "there are none"),
        (["rm", "nothing", "--cache", "--yes"], 3, "there are none"),
    ],
)
def test_E1_bad_names_are_refused_by_name(
    hub: FakeHub, home: Path, arguments: list[str], code: int | None, said: str
) -> None:
    result = CliRunner().invoke(app, [*arguments, "--home", str(home)])
    assert result.exit_code in ((2, 3) if code is None else (code,)), result.output
    assert said in result.stderr
    assert "Traceback" not in result.output
    assert hub.files_asked() == []


def test_no_agent_no_cut(hub: FakeHub, tmp_path: Path) -> None:
    result = ganglion(tmp_path / "empty", "pull", "org/Tiny-Llama")
    assert "not cut: this machine has no agent yet" in result.stderr
    assert Path(result.stdout.strip()).is_dir()
    cut_nothing = ganglion(tmp_path / "empty", "pull", "org/Tiny-Llama", "--no-cut")
    assert "not cut" not in cut_nothing.stderr


def test_ctrl_c_ends_a_download_and_the_next_one_goes_on(hub: FakeHub, checkpoint: Path, tmp_path: Path) -> None:
    weights = (checkpoint / "model.safetensors").read_bytes()
    over = threading.Event()

    def trickle(request: BaseHTTPRequestHandler, body: bytes, start: int) -> bool:
        request.send_response(206)
        request.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        request.end_headers()
        with contextlib.suppress(OSError):
            for at in range(start, len(body), 1000):
                request.wfile.write(body[at : at + 1000])
                if at >= 10_000:
                    over.wait(0.2)
        request.close_connection = True
        return True

    hub.faults["model.safetensors"] = trickle
    line = [sys.executable, "-m", "ganglion.cli", "pull", "org/Tiny-Llama", "--no-cut", "--home", str(tmp_path / "g")]
    environment = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HUB_CACHE": str(tmp_path / "hub")}
    with subprocess.Popen(
        line, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        try:
            for _ in range(3000):
                if any(file.stat().st_size >= 5000 for file in (tmp_path / "hub").rglob("*.incomplete")):
                    break
                over.wait(0.01)
            process.send_signal(signal.SIGINT)
            said = process.communicate(timeout=15)[1]
            assert process.returncode == 130, said
            assert "Traceback" not in said
        finally:
            process.kill()
            over.set()
    (partial,) = (tmp_path / "hub").rglob("*.incomplete")
    assert "org/Tiny-Llama@" in ganglion(tmp_path / "g", "rm", "org/Tiny-Llama", "--cache", code=2).stderr
    held = partial.stat().st_size
    assert 0 < held < len(weights)
    hub.faults.clear()
    hub.asked.clear()
    ganglion(tmp_path / "g", "pull", "org/Tiny-Llama", "--no-cut")
    assert [asked for path, asked, _ in hub.asked if path.startswith("/cdn/")] == [f"bytes={held}-{len(weights) - 1}"]


def test_the_environment_is_respected(hub: FakeHub, tmp_path: Path) -> None:
    environment = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "mine"}
    environment.pop("HF_HUB_CACHE", None)
    line = [sys.executable, "-m", "ganglion.cli", "pull", "org/Tiny-Llama", "--no-cut", "--home", str(tmp_path / "g")]

    def pull(**more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            line,
            env=environment | more,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            stdin=subprocess.DEVNULL,
        )

    refused = pull(HF_HUB_OFFLINE="1")
    assert refused.returncode == 7
    assert "HF_HUB_OFFLINE is set: unset it, or download it once with: ganglion pull org/Tiny-Llama" in refused.stderr
    assert hub.asked == []
    done = pull()
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "hf" / "hub" / "models--org--Tiny-Llama" / "snapshots" / COMMIT))
    assert f"is commit {COMMIT[:12]}" in done.stderr
    assert {token for _, _, token in hub.asked} == {"Bearer mine"}
