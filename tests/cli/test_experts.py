"""`ganglion experts`: the keys of its documents are a contract; tables say the same."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from ganglion.cli.experts import documents
from ganglion.cli.main import app
from ganglion.proto import admin_pb2, identity_pb2
from ganglion.wire.errors import InvalidRequest

STATE = admin_pb2.ExpertState(
    spec=admin_pb2.ExpertSpec(
        name="big",
        url="http://192.0.2.7/v1",
        model="Big-7B",
        domains=["c", "docs"],
        label=identity_pb2.TRUST_LABEL_FRIEND,
    ),
    state="dropped",
    why="it timed out",
    figures=admin_pb2.ExpertFigures(
        tokens_per_s=20.0, ttft_s=0.25, ttft_p95_s=1.5, tpot_p95_s=0.1, energy_j_per_token=1.5, samples=7
    ),
    queue=2,
)
SELECTION = admin_pb2.Selection(
    budget=admin_pb2.Budget(
        name="quick", latency_p95_s=2.0, tokens=64, combine=admin_pb2.COMBINE_VOTE, most=3, private=True
    ),
    experts=["demo"],
    value=0.75,
    latency_p95_s=1.25,
    energy_j=3.5,
    gap=0.01,
    left_out=[admin_pb2.LeftOut(expert="big", why="dropped: it timed out")],
)


def test_the_document_of_an_expert() -> None:
    row = documents.expert(STATE, {})
    assert json.loads(json.dumps(row)) == row
    assert list(row) == [
        "name", "state", "why", "url", "model", "domains", "label", "deployment", "device", "tokens_per_s", "ttft_s",
        "ttft_p95_s", "tpot_p95_s", "link_s", "energy_j_per_token", "energy_measured", "samples", "queue",
        "tokenizer_digest",
    ]  # fmt: skip
    assert (row["model"], row["label"], row["device"], row["why"]) == ("Big-7B", "friend", None, "it timed out")
    cells = dict(zip(documents.EXPERT_COLUMNS, documents.expert_cells(row), strict=True))
    assert cells == {
        "NAME": "big", "STATE": "dropped", "WHERE": "http://192.0.2.7/v1", "DOMAINS": "c, docs", "TOK/S": "20.0",
        "TTFT": "250 ms", "P95": "1.50 s", "J/TOKEN": "~1.5", "QUEUE": "2", "ANSWERS": "7",
    }  # fmt: skip


def test_a_deployed_expert_is_where_its_device_is() -> None:
    state = admin_pb2.ExpertState(spec=admin_pb2.ExpertSpec(name="demo"), state="ready", node_id="n1", deployment="d")
    row = documents.expert(state, {"n1": "desk"})
    assert (row["model"], row["label"], row["url"], row["device"]) == ("demo", None, None, "desk")
    assert documents.expert_cells(row)[2] == "desk"


def test_a_selection_says_what_was_chosen_and_why_not_the_others() -> None:
    row = documents.selection(SELECTION)
    assert list(row) == [
        "class", "combine", "tokens", "latency_s", "energy_j", "most", "private", "domains", "experts", "value",
        "predicted_latency_p95_s", "predicted_energy_j", "optimal", "gap", "refused", "left_out",
    ]  # fmt: skip
    assert row["left_out"] == {"big": "dropped: it timed out"}
    lines = documents.selection_lines(row)
    assert lines[0] == "class     quick: vote, 64 tokens, 95 % within 2 s, at most 3 experts, private"
    assert "0.7500 of 1 (the optimum is at most 0.0100 better)" in lines[2]
    assert "1.25 s" in lines[3]
    cells = documents.explained_cells(row, {"big": STATE})
    assert cells == [["→", "demo", "0.0", "~0", "chosen"], ["", "big", "20.0", "~1.5", "dropped: it timed out"]]


def test_a_refused_selection_says_why() -> None:
    refused = admin_pb2.Selection(budget=admin_pb2.Budget(name="a"), refused="latency_s 0.5: ...")
    lines = documents.selection_lines(documents.selection(refused))
    assert lines[-1] == "refused   latency_s 0.5: ..."


@pytest.mark.parametrize(("text", "seconds"), [("2s", 2.0), ("500ms", 0.5), ("1.5", 1.5), ("2 s", 2.0)])
def test_times_as_people_write_them(text: str, seconds: float) -> None:
    assert documents.parse_seconds(text, "--latency") == seconds


@pytest.mark.parametrize("text", ["", "2m", "-1s", "nan", "1e3s", "s"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="--latency"):
        documents.parse_seconds(text, "--latency")


def test_combinations_by_name() -> None:
    for name in ("best", "vote", "rerank", "blend"):
        assert documents.combine_name(documents.combine_of(name)) == name
    assert documents.combine_name(admin_pb2.COMBINE_UNSPECIFIED) == "best"
    with pytest.raises(InvalidRequest, match="rerank"):
        documents.combine_of("mean")


def test_wrong_words_are_told_before_anything_is_asked() -> None:
    for words in (["budget", "a", "b"], ["budget", "rm"], ["budget", "rm", "a", "b"]):
        result = CliRunner().invoke(app, ["experts", *words, "--home", "/nowhere"])
        assert result.exit_code == 2, words


def test_every_command_has_help_and_listings_have_json() -> None:
    for line, has_json in (("ls", True), ("add", True), ("rm", False), ("budget", True), ("explain", True)):
        result = CliRunner().invoke(app, ["experts", line, "--help"])
        assert result.exit_code == 0
        assert ("--json" in result.output) == has_json
