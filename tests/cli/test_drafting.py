"""What a person asks of drafting, and what they are shown of it."""

from __future__ import annotations

import socket

import msgspec
import pytest

from ganglion.cli import views
from ganglion.cli.deploying import Wish, request_of
from ganglion.cli.drafting import drafting_for, drafting_of, free_port
from ganglion.cli.joining import check_gateway_token
from ganglion.proto import admin_pb2
from ganglion.wire.errors import Conflict, InvalidRequest
from ganglion.wire.identity import OwnerKey
from ganglion.wire.nouns import Drafter, Drafting, NumericClass, Plan, PlanOptions, Range, Share, Stage, to_json
from ganglion.wire.tokens import mint

NODE = "a" * 26
WHOLE = Range(0, 1)
PLAN = Plan(
    manifest_digest="0" * 64,
    numeric_class=NumericClass(format="fp32", block=0, exact=True),
    context=256,
    sessions=2,
    kv_tokens=4 * 8192,
    chunk=64,
    stages=(
        Stage(
            layers=WHOLE,
            shares=(Share(device=NODE, heads=WHOLE, columns=WHOLE, vocab=WHOLE),),
            topology="mesh",
        ),
    ),
    threads={NODE: 1},
)
ASKED = {"mode": "auto", "away": "wait", "wait_s": 60.0, "window": 0, "memory": None, "url": None, "name": None}
OPTIONS = {
    "weights": None, "fast": False, "mode": "auto", "devices": "", "shares": "", "topology": "auto",
    "payload": "auto", "context": 0, "sessions": 0, "prefix_tokens": None, "private": False,
}  # fmt: skip


def test_drafting_options_become_the_document() -> None:
    assert drafting_of(**ASKED) == Drafting()
    asked = ASKED | {
        "mode": "branch",
        "away": "local",
        "window": 8,
        "memory": "512MiB",
        "url": "http://h:1/v1",
        "name": "x",
    }
    found = drafting_of(**asked)
    assert found == Drafting(
        target="x", mode="branch", away="local", window_tokens=8, memory_bytes=512 << 20, url="http://h:1/v1"
    )
    assert drafting_for("y", Drafting(mode="sync")) == Drafting(target="y", mode="sync")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mode": "fast"}, "mode"),
        ({"away": "hide"}, "away"),
        ({"memory": "lots"}, "not a size"),
        ({"url": "ftp://x", "name": "x"}, "url"),
        ({"url": "http://x"}, "--as"),
        ({"name": "x"}, "--as"),
    ],
)
def test_drafting_options_that_are_none_are_named(change, words) -> None:
    with pytest.raises(InvalidRequest, match=words):
        drafting_of(**ASKED | change)


@pytest.mark.parametrize(
    ("drafter", "option", "model"),
    [
        (None, "", ""), ("none", "", ""), ("ngram", "ngram", ""), ("early:2", "early:2", ""),
        ("demo-drafter", "model", "demo-drafter"), ("org/small", "model", "org/small"),
    ],
)  # fmt: skip
def test_a_drafter_is_a_kind_or_a_model(drafter, option, model) -> None:
    wish = Wish.of(**OPTIONS, drafter=drafter, window=4)
    assert (wish.options.drafter, wish.drafter, wish.options.window_tokens) == (option, model, 4)


def test_early_layers_are_a_number() -> None:
    with pytest.raises(InvalidRequest, match="drafter"):
        Wish.of(**OPTIONS, drafter="early:all")


def test_the_api_of_a_device_takes_the_next_free_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = used.getsockname()[1]
        assert port < free_port("127.0.0.1", port) <= port + 32
    with pytest.raises(Conflict, match="--port"):
        free_port("127.0.0.1", 65536)


def test_a_token_without_a_gateway_s_part_is_refused_before_it_is_used(tmp_path) -> None:
    owner, where = OwnerKey.generate(), {"addresses": ["192.0.2.1:7461"], "authority_pin": bytes(16)}
    check_gateway_token(tmp_path, None)
    check_gateway_token(tmp_path, mint(owner, **where, gateway=True))
    with pytest.raises(InvalidRequest, match="token create --draft"):
        check_gateway_token(tmp_path, mint(owner, **where))


def state(plan: Plan, **fields) -> admin_pb2.DeploymentState:
    return admin_pb2.DeploymentState(deployment="d", model="m", plan=to_json(plan), **fields)


def changed(**fields) -> Plan:
    return msgspec.structs.replace(PLAN, **fields)


def test_drafters_and_who_is_drafted_for_are_shown() -> None:
    own = Drafter(kind="model", manifest_digest="a" * 64, slots=4, context=64)
    shown = {
        "small": state(changed(drafter=own), drafter="small", drafter_digest="a" * 64),
        "ngram": state(changed(drafter=Drafter(kind="ngram"))),
        "early:2": state(changed(drafter=Drafter(kind="early", layers=2, slots=4, context=64))),
        "for big (sync)": state(changed(drafter=own, drafting=Drafting(target="big", mode="sync")), drafts_for="big"),
        "-": state(PLAN),
    }
    for text, deployed in shown.items():
        row = views.deployment(deployed, {})
        assert views.deployment_cells(row)[views.DEPLOYMENT_COLUMNS.index("DRAFT")] == text
    drafting = views.deployment(shown["for big (sync)"], {})
    assert (drafting["drafts_for"], drafting["drafter"], drafting["drafting"]["mode"]) == ("big", None, "sync")
    assert views.deployment(shown["small"], {})["drafter"]["model"] == "small"


def test_an_offer_of_which_nothing_came_says_why() -> None:
    offer = admin_pb2.RefusedOffer(node_id=NODE, model="small", target="big", reason="another tokenizer")
    row = views.refused_offer(offer, {NODE: "phone"})
    assert views.refused_line(row) == "phone does not draft for big with small: another tokenizer"


def test_a_request_carries_the_drafter(tmp_path) -> None:
    from ganglion.cli.deploying import LocalAgent, cut
    from ganglion.cli.sourcing import Source
    from ganglion.models import demo_path

    (tmp_path / "store").mkdir(mode=0o700)
    small = cut(tmp_path, tmp_path, Source(demo_path("demo-drafter"), "small", "x"), wish=Wish())
    request = request_of(small, PlanOptions(), LocalAgent(tmp_path, "here", NODE), small)
    assert request.drafter == to_json(small)
    assert request_of(small, PlanOptions(), LocalAgent(tmp_path, "here", NODE)).drafter == b""
