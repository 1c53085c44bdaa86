"""What a contract must have in common with the verifier."""

from __future__ import annotations

import msgspec
import pytest

from ganglion.agent.speculation.contract import check_contract, tokenizer_digest
from ganglion.proto import lane_pb2
from ganglion.wire.errors import GanglionError, InvalidRequest, Unsupported
from ganglion.wire.nouns import Embedding, Geometry, Manifest, NumericClass, PieceRef, Segment, digest

FILES = {"tokenizer.json": PieceRef("ab" * 32, 10), "tokenizer_config.json": PieceRef("cd" * 32, 20)}
MANIFEST = Manifest(
    format_version=3,
    name="demo",
    family="llama",
    source_digest="00" * 32,
    numeric_class=NumericClass(format="int8", block=0, exact=True),
    opset=21,
    geometry=Geometry(
        hidden=8,
        layers=1,
        heads=1,
        kv_heads=1,
        head_dim=8,
        intermediate=16,
        vocab=100,
        context=64,
        head_groups=1,
        column_groups=1,
        vocab_groups=1,
        vocab_group_rows=100,
    ),
    layers=(),
    head=Segment(kind="head", axis="columns", groups=1, slots=()),
    embedding=Embedding(dtype="float32", pieces=()),
    ropes={},
    handover="sum",
    graphs={},
    tokenizer=FILES,
    bos_id=None,
    eos_ids=(0,),
    parameters=1,
)


def contract(**changes: object) -> lane_pb2.Contract:
    described = {
        "manifest_digest": digest(MANIFEST),
        "numeric_class": "int8-exact",
        "tokenizer_digest": tokenizer_digest(MANIFEST),
        "vocab": 100,
        "miss": lane_pb2.MISS_WAIT,
    }
    return lane_pb2.Contract(**(described | changes))


def test_a_contract_that_holds():
    check_contract(contract(), MANIFEST, digest(MANIFEST))
    check_contract(contract(miss=lane_pb2.MISS_UNSPECIFIED, window_tokens=7), MANIFEST, digest(MANIFEST))


@pytest.mark.parametrize(
    ("field", "value", "error", "text"),
    [
        ("manifest_digest", "12" * 32, Unsupported, "12121212"),
        ("manifest_digest", "", InvalidRequest, "64 hexadecimal"),
        ("manifest_digest", "é" * 9000, InvalidRequest, "64 hexadecimal"),
        ("numeric_class", "int4-32-exact", Unsupported, "int8-exact"),
        ("numeric_class", "", Unsupported, "int8-exact"),
        ("tokenizer_digest", b"1" * 32, Unsupported, "313131"),
        ("tokenizer_digest", b"", InvalidRequest, "0 bytes"),
        ("vocab", 101, Unsupported, "101"),
        ("miss", 9, InvalidRequest, "miss 9"),
    ],
)
def test_what_differs_is_named(field, value, error, text):
    with pytest.raises(GanglionError, match=text) as caught:
        check_contract(contract(**{field: value}), MANIFEST, digest(MANIFEST))
    assert type(caught.value) is error
    assert caught.value.param == f"contract.{field}"
    assert len(caught.value.message) < 400


def test_the_digest_of_a_tokenizer_goes_by_names_and_contents_in_any_order():
    def of(files: dict[str, PieceRef]) -> bytes:
        return tokenizer_digest(msgspec.structs.replace(MANIFEST, tokenizer=files))

    first, second = FILES.items()
    assert len(of(FILES)) == 32
    assert of(dict([first])) == of(FILES)  # what stands beside tokenizer.json says nothing of ids
    plain = {"vocab.json": first[1], "merges.txt": second[1]}
    assert of(dict(reversed(plain.items()))) == of(plain)
    others = [
        {},
        {"tokenizer.json": second[1]},
        {**plain, "a": second[1]},
        dict(zip(plain, reversed(plain.values()), strict=True)),
    ]
    assert len({of(FILES), of(plain), *map(of, others)}) == 6
