"""Downloads from a hub on loopback: whole, continued, checked, and refused where they should be (E7)."""

# ruff: noqa: N802 - the ids of faults in names of tests are upper case

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_hub import COMMIT, FakeHub, Fault, answer, cut_after, endless, redirect_to, serve_hub
from huggingface_hub import hf_hub_download, scan_cache_dir

from ganglion.partitioner.sources import Cache, Hub, Repository, parse_repository, pull
from ganglion.partitioner.sources.hub import CDN_DOMAINS
from ganglion.partitioner.sources.transfer import StoppedError
from ganglion.wire.errors import (
    Conflict,
    Corrupt,
    Exhausted,
    GanglionError,
    InvalidDocument,
    NotFound,
    PermissionDenied,
    ProtocolViolation,
    Unavailable,
    Unreachable,
)

WEIGHTS = os.urandom(300_000)
INDEX = b'{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-2.safetensors"}}'
PLAIN = {"config.json": b"{}", "tokenizer.json": b'{"a": 1}', "model.safetensors": WEIGHTS}
REPOSITORIES = {
    "org/plain": PLAIN | {"pytorch_model.bin": b"pickle", "modeling.py": b"import os", "README.md": b"#"},
    "org/sharded": {
        "config.json": b"{}",
        "model.safetensors.index.json": INDEX,
        "model-1.safetensors": WEIGHTS[:1000],
        "model-2.safetensors": WEIGHTS[1000:],
        "consolidated.safetensors": WEIGHTS,
    },
    "org/quantized": {"q/m-Q4_0.gguf": WEIGHTS[:500], "m-Q8_0.gguf": WEIGHTS[:900], "LICENSE": b"free"},
}
REPOSITORY = Repository("org", "plain")


@pytest.fixture
def fake() -> Iterator[FakeHub]:
    with serve_hub(REPOSITORIES) as served:
        yield served


@pytest.fixture
def hub(fake: FakeHub, tmp_path: Path) -> Iterator[Hub]:
    with Hub(fake.endpoint, tmp_path / "hub", pause_s=0.001) as made:
        yield made


def blob_of(hub: Hub, body: bytes, ending: str = "") -> Path:
    return hub.cache / "models--org--plain" / "blobs" / f"{hashlib.sha256(body).hexdigest()}{ending}"


def test_only_what_is_read_comes_and_lies_where_the_library_looks_for_it(fake: FakeHub, hub: Hub) -> None:
    seen: list[tuple[str, int, int]] = []
    known: list[tuple[str, int]] = []
    done = pull(hub, REPOSITORY, progress=lambda *at: seen.append(at), found=lambda *what: known.append(what))
    total = sum(map(len, PLAIN.values()))
    assert (done.snapshot.commit, done.total_bytes, done.received_bytes) == (COMMIT, total, total)
    assert known == [(COMMIT, total)]
    assert {path.name: path.read_bytes() for path in done.snapshot.path.iterdir()} == PLAIN
    assert ("model.safetensors", len(WEIGHTS), len(WEIGHTS)) in seen
    assert sorted(fake.files_asked()) == sorted(PLAIN)
    assert not list(hub.cache.rglob("*.incomplete"))
    for name, body in PLAIN.items():
        found = hf_hub_download("org/plain", name, cache_dir=hub.cache, local_files_only=True)
        assert Path(found).read_bytes() == body
    (repo,) = scan_cache_dir(hub.cache).repos
    assert (repo.repo_id, repo.size_on_disk, set(repo.refs)) == ("org/plain", total, {"main"})


def test_what_is_here_is_not_fetched_again(fake: FakeHub, hub: Hub) -> None:
    pull(hub, REPOSITORY)
    fake.asked.clear()
    assert pull(hub, REPOSITORY).received_bytes == 0
    assert fake.files_asked() == []


def test_of_an_index_the_shards_that_it_names(hub: Hub) -> None:
    done = pull(hub, Repository("org", "sharded", "v1"))
    names = {path.name for path in done.snapshot.path.iterdir()}
    assert names == {"config.json", "model.safetensors.index.json", "model-1.safetensors", "model-2.safetensors"}
    cache = Cache(hub.cache)
    assert cache.find(Repository("org", "sharded", "v1")) == done.snapshot
    assert cache.find(Repository("org", "sharded")) is None, "main was never asked for"
    (done.snapshot.path / "model-2.safetensors").unlink()
    assert cache.find(Repository("org", "sharded", "v1")) is None, "a shard is missing"


@pytest.mark.parametrize(("variant", "file"), [("Q4_0", "q/m-Q4_0.gguf"), ("m-Q8_0.gguf", "m-Q8_0.gguf")])
def test_one_gguf_file_and_the_license(variant: str, file: str, hub: Hub) -> None:
    repository = parse_repository(f"hf.co/org/quantized:{variant}")
    done = pull(hub, repository)
    folder = Cache(hub.cache).snapshot_folder(repository, COMMIT)
    assert done.snapshot.path == folder / file
    assert done.snapshot.path.read_bytes() == REPOSITORIES["org/quantized"][file]
    assert (folder / "LICENSE").read_bytes() == b"free"
    assert Cache(hub.cache).find(repository) == done.snapshot
    assert Cache(hub.cache).find(Repository("org", "quantized", None, "Q5_0")) is None


def test_a_transfer_that_breaks_goes_on_where_it_was(fake: FakeHub, hub: Hub) -> None:
    fake.faults["model.safetensors"] = cut_after(100_000, times=2)
    pull(hub, REPOSITORY)
    ranges = [asked for path, asked, _ in fake.asked if path.startswith("/cdn/")]
    assert ranges == [f"bytes={start}-{len(WEIGHTS) - 1}" for start in (0, 100_000, 200_000)]
    assert blob_of(hub, WEIGHTS).read_bytes() == WEIGHTS


def test_a_later_process_goes_on_where_an_earlier_one_stopped(fake: FakeHub, hub: Hub) -> None:
    fake.faults["model.safetensors"] = cut_after(50_000, times=1)
    stop = threading.Event()

    def progress(file: str, here: int, total: int) -> None:
        if file == "model.safetensors" and here >= 50_000:
            stop.set()

    with pytest.raises(StoppedError):
        pull(hub, REPOSITORY, progress=progress, stop=stop)
    held = blob_of(hub, WEIGHTS, ".incomplete").stat().st_size
    assert held >= 50_000
    assert Cache(hub.cache).find(REPOSITORY) is None
    fake.asked.clear()
    with Hub(fake.endpoint, hub.cache) as again:
        done = pull(again, REPOSITORY)
    assert done.received_bytes == len(WEIGHTS) - held
    assert [asked for path, asked, _ in fake.asked if path.startswith("/cdn/")] == [f"bytes={held}-{len(WEIGHTS) - 1}"]
    assert blob_of(hub, WEIGHTS).read_bytes() == WEIGHTS


def test_spoiled_bytes_of_an_earlier_transfer_are_thrown_away_once(fake: FakeHub, hub: Hub) -> None:
    partial = blob_of(hub, WEIGHTS, ".incomplete")
    partial.parent.mkdir(parents=True)
    for spoiled in (bytes(1000), bytes(len(WEIGHTS)), bytes(len(WEIGHTS) + 1)):
        partial.write_bytes(spoiled)
        pull(hub, REPOSITORY)
        assert blob_of(hub, WEIGHTS).read_bytes() == WEIGHTS
        blob_of(hub, WEIGHTS).unlink()


def test_a_server_without_ranges_gives_the_whole_file_again(fake: FakeHub, hub: Hub) -> None:
    partial = blob_of(hub, WEIGHTS, ".incomplete")
    partial.parent.mkdir(parents=True)
    partial.write_bytes(WEIGHTS[:1000])
    fake.faults["model.safetensors"] = answer(200, {"Content-Length": str(len(WEIGHTS))}, WEIGHTS)
    pull(hub, REPOSITORY)
    assert blob_of(hub, WEIGHTS).read_bytes() == WEIGHTS


def test_the_token_goes_to_the_endpoint_only(fake: FakeHub, hub: Hub, tmp_path: Path) -> None:
    fake.token = "secret"
    with pytest.raises(NotFound, match=r"shows no repository org/plain.*HF_TOKEN"):
        pull(hub, REPOSITORY)
    with Hub(fake.endpoint, tmp_path / "other", token="secret") as known:
        pull(known, REPOSITORY)
        request = known._authorization
        import httpx

        assert request(httpx.URL(f"{fake.endpoint}/x")) == {"authorization": "Bearer secret"}
        for elsewhere in ("https://cdn-lfs.hf.co/x", "http://127.0.0.1:1/x", "https://127.0.0.1/x"):
            assert request(httpx.URL(elsewhere)) == {}


@pytest.mark.parametrize(
    "location",
    [
        "http://169.254.169.254/latest/meta-data/",
        "https://169.254.169.254/",
        "file:///etc/passwd",
        "//evil.example/x",
        "https://evil.example/x",
        "https://nothf.co/x",
        "https://hf.co.evil.example/x",
        "http://cdn-lfs.hf.co/x",
        "https://cdn-lfs.hf.co:8443/x",
        "http://127.0.0.1:1/x",
        "http://[::1]/x",
        "ftp://hf.co/x",
        "https://user@evil.example/",
        "https://[",
    ],
)
@pytest.mark.parametrize("where", ["listing", "model.safetensors"])
def test_E7_redirects_elsewhere_are_not_followed(where: str, location: str, fake: FakeHub, hub: Hub) -> None:
    fake.faults[where] = redirect_to(location)
    with pytest.raises(ProtocolViolation, match=r"redirects to|no address"):
        pull(hub, REPOSITORY)
    assert not blob_of(hub, WEIGHTS).exists()


def test_E7_the_hubs_own_content_networks_are_allowed(hub: Hub) -> None:
    import httpx

    for host in (*CDN_DOMAINS, "cdn-lfs.huggingface.co", "cdn-lfs-us-1.hf.co", "cas-bridge.xethub.hf.co"):
        assert hub.is_allowed(httpx.URL(f"https://{host}/x?Signature=y"))
    with Hub("https://mirror.example/hf", hub.cache) as mirror:
        assert mirror.is_allowed(httpx.URL("https://cdn.mirror.example/x"))
        assert not mirror.is_allowed(httpx.URL("http://mirror.example/x"))
        assert not mirror.is_allowed(httpx.URL("https://notmirror.example/x"))


SIZE = len(WEIGHTS)
LIES: dict[str, tuple[Fault, type[GanglionError], str]] = {
    "huge Content-Length": (answer(200, {"Content-Length": str(1 << 50)}), ProtocolViolation, "has 1125899906842624 b"),
    "absurd Content-Length": (answer(200, {"Content-Length": "9" * 400}), Unreachable, "bad Content-Length"),
    "endless": (endless, ProtocolViolation, f"goes on after the {SIZE} bytes"),
    "another range": (
        answer(206, {"Content-Range": f"bytes 5-{SIZE - 1}/{SIZE}", "Content-Length": str(SIZE)}, WEIGHTS),
        ProtocolViolation,
        "were asked for",
    ),
    "a range of another size": (
        answer(206, {"Content-Range": f"bytes 0-{SIZE - 1}/{SIZE * 2}", "Content-Length": str(SIZE)}, WEIGHTS),
        ProtocolViolation,
        "were asked for",
    ),
    "no range": (answer(206, {"Content-Length": str(SIZE)}, WEIGHTS), ProtocolViolation, "were asked for"),
    "other bytes": (answer(200, {"Content-Length": str(SIZE)}, bytes(SIZE)), Corrupt, "whose digest is not"),
    "compressed": (
        answer(200, {"Content-Encoding": "gzip", "Content-Length": "9"}, b"123456789"),
        ProtocolViolation,
        "compressed",
    ),
    "always shorter": (cut_after(0, times=99), Unreachable, f"broke 5 times.*0 of {SIZE} bytes are here"),
    "gated": (answer(403, {"X-Error-Code": "GatedRepo", "Content-Length": "0"}), PermissionDenied, "gated: accept its"),
    "gated, no token": (answer(401, {"X-Error-Code": "GatedRepo", "Content-Length": "0"}), PermissionDenied, "gated"),
    "gone": (answer(404, {"X-Error-Code": "EntryNotFound", "Content-Length": "0"}), NotFound, "has no file org/plain"),
    "forbidden": (answer(403, {"Content-Length": "0"}), PermissionDenied, "refuses org/plain model.safetensors"),
    "too often": (answer(429, {"Retry-After": "7", "Content-Length": "0"}), Exhausted, "try again in 7 s"),
    "broken": (answer(500, {"Content-Length": "0"}), Unreachable, "answers 500"),
    "a circle": (redirect_to("/cdn/org/plain/model.safetensors"), ProtocolViolation, "more than 5 times"),
}


@pytest.mark.parametrize("lie", LIES)
def test_E7_lies_about_a_file(lie: str, fake: FakeHub, hub: Hub) -> None:
    fault, error, said = LIES[lie]
    fake.faults["model.safetensors"] = fault
    with pytest.raises(error, match=said):
        pull(hub, REPOSITORY)
    assert not blob_of(hub, WEIGHTS).exists()
    partial = blob_of(hub, WEIGHTS, ".incomplete")
    assert not partial.exists() or partial.stat().st_size <= SIZE
    assert not (hub.cache / "models--org--plain" / "refs").exists()
    fake.faults.clear()
    pull(hub, REPOSITORY)
    assert blob_of(hub, WEIGHTS).read_bytes() == WEIGHTS


LISTINGS: dict[str, tuple[Fault, type[GanglionError], str]] = {
    "not JSON": (answer(200, {"Content-Length": "6"}, b"<html>"), ProtocolViolation, "not.*as a Hugging Face hub"),
    "another document": (answer(200, {"Content-Length": "2"}, b"{}"), ProtocolViolation, "sha"),
    "a commit that is none": (
        answer(200, {}, b'{"sha": "../../../../../../../../tmp/abcdefabcdefabc", "siblings": []}'),
        ProtocolViolation,
        "sha",
    ),
    "a digest that is a path": (
        answer(
            200,
            {},
            b'{"sha": "%s", "siblings": [{"rfilename": "config.json", "size": 1, "blobId": "../x"}]}' % COMMIT.encode(),
        ),
        ProtocolViolation,
        "blobId",
    ),
    "endless": (endless, ProtocolViolation, "goes on after"),
    "huge": (answer(200, {"Content-Length": str(1 << 40)}), ProtocolViolation, "the answer has 1099511627776 bytes"),
    "empty": (answer(200, {"Content-Length": "50"}, b"{"), Unreachable, "does not answer"),
    "no such revision": (
        answer(404, {"X-Error-Code": "RevisionNotFound", "Content-Length": "0"}),
        NotFound,
        "no such revision",
    ),
}


@pytest.mark.parametrize("lie", LISTINGS)
def test_E7_lies_about_a_repository(lie: str, fake: FakeHub, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ganglion.partitioner.sources.hub.ANSWER_BYTES", 1 << 20)
    fault, error, said = LISTINGS[lie]
    fake.faults["listing"] = fault
    with pytest.raises(error, match=said):
        pull(hub, REPOSITORY)
    assert not list(hub.cache.rglob("*"))


def test_what_does_not_fit_the_disk_is_not_begun(fake: FakeHub, hub: Hub) -> None:
    fake.said_sizes["model.safetensors"] = 1 << 60
    with pytest.raises(Exhausted, match=r"needs 115292\d+ bytes more and the disk of .* HF_HOME"):
        pull(hub, REPOSITORY)
    assert "model.safetensors" not in fake.files_asked()


def test_no_such_repository_revision_or_server(fake: FakeHub, hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="shows no repository org/absent"):
        pull(hub, Repository("org", "absent"))
    with pytest.raises(NotFound, match="no such revision: org/plain@v9"):
        pull(hub, Repository("org", "plain", "v9"))
    with (
        Hub("http://127.0.0.1:1", tmp_path) as nobody,
        pytest.raises(Unreachable, match=r"127\.0\.0\.1 does not answer"),
    ):
        pull(nobody, REPOSITORY)


def test_offline_the_cache_answers(fake: FakeHub, hub: Hub) -> None:
    with Hub(fake.endpoint, hub.cache, offline=True) as offline:
        with pytest.raises(
            Unavailable, match="HF_HUB_OFFLINE is set: unset it, or download it once with: ganglion pull"
        ):
            pull(offline, REPOSITORY)
        assert fake.asked == []
        online = pull(hub, REPOSITORY)
        fake.asked.clear()
        done = pull(offline, REPOSITORY)
        assert (done.snapshot, done.received_bytes) == (online.snapshot, 0)
        assert fake.asked == []


def outside_blob(hub: Hub, outside: Path) -> None:
    blob_of(hub, WEIGHTS).unlink()
    blob_of(hub, WEIGHTS).symlink_to(outside)


def outside_pointer(hub: Hub, outside: Path) -> None:
    place = Cache(hub.cache).snapshot_folder(REPOSITORY, COMMIT) / "model.safetensors"
    place.unlink()
    place.symlink_to(outside)


def pipe(hub: Hub, outside: Path) -> None:
    blob_of(hub, WEIGHTS).unlink()
    os.mkfifo(blob_of(hub, WEIGHTS))


@pytest.mark.parametrize("damage", [outside_blob, outside_pointer, pipe])
def test_E1_links_that_lead_out_of_the_cache(damage: Callable[[Hub, Path], None], hub: Hub, tmp_path: Path) -> None:
    pull(hub, REPOSITORY)
    outside = tmp_path / "outside"
    outside.write_bytes(WEIGHTS)
    damage(hub, outside)
    with pytest.raises(InvalidDocument, match=r"outside the cache|not a file"):
        Cache(hub.cache).find(REPOSITORY)


def test_a_partial_file_that_is_a_link_is_not_written_through(hub: Hub, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"mine")
    partial = blob_of(hub, WEIGHTS, ".incomplete")
    partial.parent.mkdir(parents=True)
    partial.symlink_to(outside)
    with pytest.raises(InvalidDocument, match="a link, a file is expected"):
        pull(hub, REPOSITORY)
    assert outside.read_bytes() == b"mine"


def test_blobs_that_the_library_shares_between_repositories_are_read(hub: Hub) -> None:
    done = pull(hub, REPOSITORY)
    shared = hub.cache / "blobs" / "ab" / "abcd"
    shared.parent.mkdir(parents=True)
    blob_of(hub, WEIGHTS).rename(shared)
    blob_of(hub, WEIGHTS).symlink_to("../../blobs/ab/abcd")
    assert Cache(hub.cache).find(REPOSITORY) == done.snapshot


def test_one_process_downloads_a_file_at_a_time(hub: Hub) -> None:
    listing = hub.listing(REPOSITORY)
    with (
        Cache(hub.cache).lock(REPOSITORY, listing.files["model.safetensors"]),
        pytest.raises(Conflict, match=r"another process is downloading model\.safetensors of org/plain"),
    ):
        pull(hub, REPOSITORY)
    pull(hub, REPOSITORY)
